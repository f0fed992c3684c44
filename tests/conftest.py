"""Fixtures for all tests: no network, and the optional shared numbers and data that some tests compare with."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

SHARED = Path(os.environ.get("DIFFCLIP_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def _need(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path} is missing: set DIFFCLIP_SHARED to the folder that holds golden/ and data/")
    return path


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Path]:
    """Folder of one set of numbers from the official implementations, e.g. golden("01_diffattn_vision")."""
    return lambda name: _need(SHARED / "golden" / name)


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Folder of one small set of real images and text, e.g. shared_data("fashion")."""
    return lambda name: _need(SHARED / "data" / name)
