"""Measurements, run from the repository as `python -m benchmarks.NAME`; not installed."""

import diffclip.base.threads  # noqa: F401 # before torch, as in the project's own commands
