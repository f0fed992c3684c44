"""POPE: questions go through lmms-eval or exact margins to answers and scores; controls stand beside them."""
