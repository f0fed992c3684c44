"""POPE: questions and their images go through lmms-eval or exact margins to answers, parsers and scores.

Beside them: controls, which tell what a score is worth; the diagnosis of scores at chance; the audit of published ones.
"""
