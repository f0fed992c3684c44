"""Task files for lmms-eval that need no network, and the functions they name."""
