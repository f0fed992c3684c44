"""The LLaVA-style model: vision tower, projector and language model, its data, and its evaluation on POPE.

Importing the package teaches transformers' Auto classes to load what it saves.
"""

import diffclip.base.threads  # noqa: F401, I001 # first of all, before torch

import sys

if sys.argv[0] != "-m":  # while `python -m mllm.x` starts, --help need not wait for transformers
    from mllm import model as model
