"""`python -m diffclip VERB …` is the console command `diffclip VERB …`, which lies a floor above."""

import importlib
import sys

if __name__ == "__main__":
    sys.exit(importlib.import_module("stages.cli").main())
