"""Conversations about images: `layouts` reads the files, `images` finds what rows show, `checks` judges them.

`rows` keeps those without fault, `examples` makes of them what a model learns from, `report` describes them.
"""
