"""timm without wandb, to be imported before timm and open_clip.

Where wandb is installed, as lmms-eval wants it, timm imports it for a function of its own training script: a quarter of
the time that our commands take to start. It stays importable for all others.
"""

import sys

if "timm" not in sys.modules and "wandb" not in sys.modules:
    sys.modules["wandb"] = None  # type: ignore[assignment] # Python's way to say that there is no such module
    try:
        import timm.utils.summary  # noqa: F401
    finally:
        del sys.modules["wandb"]
