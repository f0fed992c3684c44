"""After `import diffclip` transformers' Auto classes know our models, whichever is imported first; it costs nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import diffclip
from mllm.assemble import assemble

TREE = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runs(language_dir, tmp_path_factory):
    """A folder with `tower`, a pretraining run, and `llava`, a multimodal model around it."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    diffclip.save(diffclip.build("DiffCLIP-tiny"), folder / "tower")
    assemble(folder / "tower", language_dir).save(folder / "llava")
    return folder


def fresh(code, folder):
    """What a new process prints that runs `code` in `folder`."""
    environment = os.environ | {"PYTHONPATH": str(TREE)}
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


BEFORE = "import diffclip; import transformers as t"
LLAVA = "DiffCLIPLlavaForConditionalGeneration"
AFTER = "import transformers as t; t.AutoConfig, t.AutoImageProcessor; import diffclip"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "use", "name"),
    [
        (BEFORE, "t.AutoConfig.from_pretrained('tower')", "DiffCLIPConfig"),
        (AFTER, "t.AutoModel.from_pretrained('tower')", "DiffCLIPModel"),
        (BEFORE, "t.AutoImageProcessor.from_pretrained('tower')", "DiffCLIPImageProcessor"),
        (AFTER, "t.AutoProcessor.from_pretrained('llava').image_processor", "DiffCLIPImageProcessor"),
        (BEFORE, "t.AutoModelForImageTextToText.from_pretrained('llava')", LLAVA),
        ("import mllm, transformers as t", "t.pipeline('image-text-to-text', 'llava').model", LLAVA),
    ],
)
def test_each_auto_class_finds_our_models_as_the_first_thing_that_a_process_does(start, use, name, runs):
    assert fresh(f"{start}; print(type({use}).__name__)", runs) == name


def test_importing_the_packages_imports_nothing_heavy_and_reads_no_command_line(tmp_path):
    code = "import sys; del sys.argv, sys.orig_argv; import diffclip, mllm; print(sorted(set(sys.modules) & {heavy}))"
    heavy = {"torch", "transformers", "numpy", "open_clip", "timm", "PIL", "diffclip.hf", "mllm.model"}
    assert fresh(code.format(heavy=heavy), tmp_path) == "[]"


@pytest.mark.slow
def test_importing_transformers_imports_nothing_of_ours(tmp_path):
    code = "import sys, diffclip; from transformers import AutoModel, AutoImageProcessor; import transformers as t;"
    code += "t.AutoConfig.for_model('vit'); print(sorted(set(sys.modules) & {'diffclip.hf', 'mllm', 'mllm.model'}))"
    assert fresh(code, tmp_path) == "[]"


@pytest.mark.slow
def test_without_the_multimodal_package_the_tower_is_known_and_its_models_are_not(runs):
    code = """import sys; sys.modules['mllm'] = None  # Python's way to say that there is no such module
import diffclip, transformers
print(type(transformers.AutoModel.from_pretrained('tower')).__name__)
try:
    transformers.AutoConfig.from_pretrained('llava', trust_remote_code=False)
except ValueError as error:
    print('trust_remote_code=True' in str(error))
"""
    assert fresh(code, runs).split() == ["DiffCLIPModel", "True"]
