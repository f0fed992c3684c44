"""transformers' own common tests, from the sources of the installed version, which scripts/test.sh fetches once.

The sources on PyPI lack the suites of exporters and of generation that these tests build on, and a helper that fetches
pictures: empty classes stand in for the first two, and a picture of our own for those.
"""

import functools
import importlib
import os
import re
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers
from PIL import Image

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffclip"
TESTS = CACHE / f"transformers-{transformers.__version__}" / "tests"
NAME = "transformers_own_tests"
# The old name of an argument of from_pretrained takes seconds a model, and is transformers' own matter.
DTYPE = "test_bc_torch_dtype"
# Of 25 ways to compare eager attention with torch's kernel these: masks are for words, and 16 bits repeat it
KERNEL = r"test_eager_matches_sdpa_inference_(?!.*(fp32_pad_right$|output_attentions$|bf16_pad_left_no_attn_mask$))"


def module(name: str) -> Any:
    """A module of transformers' tests, like "test_modeling_common"; skips the module that asks if it is not there."""
    if not TESTS.is_dir():
        pytest.skip(f"{TESTS} is missing: ./scripts/test.sh fetches it from PyPI", allow_module_level=True)
    pytest.importorskip("parameterized")
    if NAME not in sys.modules:
        _stand_in(NAME, __path__=[str(TESTS)])
        _stand_in(f"{NAME}.exporters", __path__=[])
        _stand_in(f"{NAME}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
        _stand_in(f"{NAME}.generation", __path__=[])
        _stand_in(f"{NAME}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
        _stand_in("fetch_hub_objects_for_ci", url_to_local_path=_picture)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)  # theirs
        return importlib.import_module(f"{NAME}.{name}")


@functools.cache
def _picture(url: str) -> str:
    """A file in the place of a picture on the Hub."""
    path = Path(tempfile.mkdtemp(prefix="diffclip-tests-")) / "picture.png"
    Image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 9).convert("RGB").save(path)
    return str(path)


def _stand_in(name: str, **content: Any) -> None:
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(content)


def accept(failures: dict[str, str], without: str = f"{KERNEL}|{DTYPE}") -> Any:
    """Class decorator: these tests fail, for these reasons, and one that passes after all fails.

    Tests whose name begins with the expression `without` are not run at all.
    """

    def mark(case: Any) -> Any:
        for name in dir(case):
            if name.startswith("test_") and re.match(without, name):
                setattr(case, name, None)
        for name, reason in failures.items():
            inherited = getattr(case, name)

            def test(self: Any, inherited: Any = inherited) -> None:
                inherited(self)

            test.__name__ = name
            setattr(case, name, pytest.mark.xfail(strict=True, reason=reason)(test))
        return case

    return mark
