"""POPE: questions, scores, exact margins, lmms-eval, diagnosis of scores at chance, audit of published ones."""
