"""The LLaVA-style model: vision tower, projector and language model, its data, and its evaluation on POPE."""

import diffclip  # noqa: F401 # before torch; transformers' Auto classes know this model after it
