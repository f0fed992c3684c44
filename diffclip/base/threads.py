"""How long OpenMP's threads spin at a barrier, set on import: before torch, whose libgomp reads it when it is loaded.

By default they spin for milliseconds, which takes the core from whoever else could run: beside one busy process a
training step waits for threads that wait for each other. Much shorter spins than these cost where the machine is
free (docs/paper_scale.md).
"""

import os
import sys

SPINS = "3000"

if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = SPINS  # processes that this one starts inherit it
