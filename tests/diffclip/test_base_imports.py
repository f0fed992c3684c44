"""Large imports: nothing is collected meanwhile, and what was loaded is looked through no more; small ones are left."""

import gc
import sys

import pytest

from diffclip.base import imports
from diffclip.base.imports import importing


@pytest.fixture(autouse=True)
def unfrozen():
    """What the tests' own start froze lies among the objects of a collection again, and is frozen after the test."""
    gc.unfreeze()
    yield
    gc.freeze()


def loaded(count, monkeypatch):
    with importing():
        assert not gc.isenabled()
        for number in range(count):
            monkeypatch.setitem(sys.modules, f"made_up_{number}", sys)


def test_many_modules_are_frozen(monkeypatch):
    loaded(imports.MANY + 1, monkeypatch)
    assert gc.isenabled() and gc.get_freeze_count() > 10_000


def test_where_all_was_there_nothing_is_frozen(monkeypatch):
    loaded(1, monkeypatch)
    assert gc.isenabled() and gc.get_freeze_count() < 1000  # a frozen cycle would never be freed


def test_a_failing_import_leaves_the_collector_as_it_was():
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
