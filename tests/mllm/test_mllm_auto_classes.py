"""After `import diffclip` transformers' Auto classes know our models, whichever is imported first; it costs nothing."""

import json
import subprocess
import sys

import pytest
import torch
from launch import environment

import diffclip
from mllm.assemble import assemble


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
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Most of what a fresh process costs is what transformers stands on. This one has imported it, and none of transformers
# or of ours, and forks a process for each line that it reads.
PARENT = """
import sys
sys.modules["wandb"] = None  # or timm would import it
import json, os, traceback
import numpy, PIL.Image, sklearn.metrics, timm, torch, torchvision
del sys.modules["wandb"]
assert not {"transformers", "diffclip", "mllm"} & set(sys.modules)
for line in sys.stdin:
    folder, code = json.loads(line)
    if not (child := os.fork()):
        os.chdir(folder)
        try:
            exec(code, {})
        except BaseException:
            traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
    print(flush=True, end="\\0\\n")
"""


@pytest.fixture(scope="module")
def forked():
    """forked(code, folder): what a process prints that runs `code` in `folder` and finds transformers not imported."""
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", PARENT]
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment()}
    with subprocess.Popen(command, **options) as parent:

        def run(code, folder):
            print(json.dumps([str(folder), code]), file=parent.stdin, flush=True)
            lines = iter(parent.stdout.readline, "")
            return "".join(iter(lambda: next(lines), "\0\n")).strip()

        yield run
        parent.stdin.close()


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
    ],
)
def test_each_auto_class_finds_our_models_as_the_first_thing_that_a_process_does(start, use, name, runs, forked):
    assert forked(f"{start}; print(type({use}).__name__)", runs) == name


@pytest.mark.slow
def test_a_process_that_has_imported_nothing_finds_our_models(runs):
    code = "import mllm, transformers as t; print(type(t.pipeline('image-text-to-text', 'llava').model).__name__)"
    assert fresh(code, runs) == LLAVA


def test_importing_the_packages_imports_nothing_heavy_and_reads_no_command_line(tmp_path):
    code = "import sys; del sys.argv, sys.orig_argv; import diffclip, mllm; print(sorted(set(sys.modules) & {heavy}))"
    heavy = {"torch", "transformers", "numpy", "open_clip", "timm", "PIL", "diffclip.hf", "mllm.model"}
    assert fresh(code.format(heavy=heavy), tmp_path) == "[]"


@pytest.mark.slow
def test_importing_transformers_imports_nothing_of_ours(tmp_path, forked):
    code = "import sys, diffclip; from transformers import AutoModel, AutoImageProcessor; import transformers as t;"
    code += "t.AutoConfig.for_model('vit'); print(sorted(set(sys.modules) & {'diffclip.hf', 'mllm', 'mllm.model'}))"
    assert forked(code, tmp_path) == "[]"


@pytest.mark.slow
def test_without_the_multimodal_package_the_tower_is_known_and_its_models_are_not(runs, forked):
    code = """import sys; sys.modules['mllm'] = None  # Python's way to say that there is no such module
import diffclip, transformers
print(type(transformers.AutoModel.from_pretrained('tower')).__name__)
try:
    transformers.AutoConfig.from_pretrained('llava', trust_remote_code=False)
except ValueError as error:
    print('trust_remote_code=True' in str(error))
"""
    assert forked(code, runs).split() == ["DiffCLIPModel", "True"]
