"""Every command and Python block of README and docs runs as it stands, on small stand-ins for what it names.

What differs from the page is in `STAND_INS` and in `workspace`; what is only parsed, and why, in `PARSED`.
docs/results.md is left out: its commands are records of what was measured.
"""

import contextlib
import functools
import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from clips import shallow
from launch import ROOT, environment, forked_lmms_eval, run_ranks

from diffclip import variants
from diffclip.base.ranks import free_port
from stages import shipped
from stages.cli import VERBS, call
from stages.config import parse
from stages.settings import AlignConfig, EvaluateConfig, InstructConfig, PipelineConfig, PretrainConfig

pytestmark = pytest.mark.usefixtures("coarse_figures")

TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*TOP, *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name != "results.md")]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STAND_INS = {  # what stands on a page -> what stands for it here
    "DiffCLIP-S-16": "DiffCLIP-tiny",
    "Qwen/Qwen2.5-0.5B-Instruct": "runs/language",
    "open_clip:ViT-B-32@laion2b_s34b_b79k": "runs/clip/pretrain",
    "--tasks pope ": "--tasks tiny_pope --include_path tasks --output_path lmms ",  # the Hub's questions
    "--nproc-per-node 8": "--nproc-per-node 1",
}
SETTINGS = {  # so that a command takes seconds
    "pretrain": ["--epochs=1", "--global_batch_size=64", "--num_workers=0"],
    "language": ["--hidden_size=32", "--layers=1"],
    "align": ["--global_batch_size=16", "--num_workers=0", "--language_model=runs/language"],
    "instruct": ["--global_batch_size=16", "--num_workers=0"],
    "evaluate": ["--few_shot_episodes=20", "--linear_probe=fast"],
    "benchmark": ["--episodes=20", "--probe=fast"],
    "scenes": ["--pairs=8", "--align=8", "--conversations=8", "--texts=8", "--pope=3", "--mmvp=1", "--retrieval=4"]
    + ["--class_train=10", "--class_val=5", "--class_test=10", "--segmentation=2"],
}
CONFIGS = {"pretrain": PretrainConfig, "align": AlignConfig, "instruct": InstructConfig, "evaluate": EvaluateConfig}
PARSED = {  # pages whose stages have the paper's size: their flags and configurations are read, nothing is trained
    "pope.md": tuple(CONFIGS),
    "released.md": tuple(CONFIGS),
    "paper_scale.md": ("pretrain",),
    "reproduce.md": tuple(CONFIGS),
}
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")  # Python 3.10 reads no TOML
EXTRAS = {*re.findall(r"^(\w+) = ", PROJECT.split("[project.optional-dependencies]")[1].split("\n[")[0], re.MULTILINE)}
NOT_RUN = {  # what a page may have somebody type, and why it is not typed here
    "git": "there is no network",
    "cd": "the tests are there already",
    "pip": "nothing is installed; that the extras exist is tested below",
    "pre-commit": "its hooks are tested below",
}
OWN_PROCESS = ("app",)  # a server
OPTIONAL = {"--to onnx": "onnxruntime", "from trl": "trl"}  # what a page may use and need not be installed


LISTINGS = {"cluster.md": "several machines, or Slurm", "quickstart.md": "the layout of the code"}


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def commands(page: Path) -> list[list[str]]:
    """The words of each command of a page's bash blocks, without comments."""
    text = "\n".join(blocks(page, "bash"))
    for there, here in STAND_INS.items():
        text = text.replace(there, here)
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def named(words: list[str]) -> str:
    return " ".join(words)[:60]


def skip_without_packages(text: str) -> None:
    for mark, package in OPTIONAL.items():
        if mark in text:
            pytest.importorskip(package, reason=f"{package} is not installed")


def start(words: list[str], folder: Path) -> None:
    ended = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, f"{shlex.join(words)}\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"


def carry_out(words: list[str], page: str, folder: Path, monkeypatch) -> None:
    """Run one command of a page in `folder`."""
    program, *rest = words
    skip_without_packages(" ".join(words))
    monkeypatch.chdir(folder)
    if program == "./scripts/quickstart.sh":  # run for real in test_stages_pipeline
        parse(PipelineConfig, "", ["--config=quickstart/pipeline", *rest])
    elif program == "./scripts/test.sh" or program in NOT_RUN:
        pass  # the first is what runs this
    elif program == "./scripts/0_data.sh":
        start(["bash", str(ROOT / program), *rest, "--dry-run"], folder)
    elif program == "lmms-eval":
        run_ranks(0, "lmms_eval", *rest)  # the console script itself is started in tests/mllm/test_mllm_lmms.py
        results = json.loads(next((folder / "lmms").rglob("*_results.json")).read_text(encoding="utf-8"))
        assert 0 <= results["results"]["tiny_pope"]["accuracy,none"] <= 100
    elif program == "python":
        module, *arguments = rest[rest.index("-m") + 1 :]
        run_ranks(0, module, *arguments)
    else:
        assert program in ("diffclip", "deepspeed", "torchrun"), f"{page}: no test can run {shlex.join(words)}"
        at = words.index("diffclip")
        launcher, verb, arguments = words[:at], words[at + 1], words[at + 2 :]
        if verb in PARSED.get(page, ()):
            parse(CONFIGS[verb], "", arguments)
            return
        if arguments[:1] != ["data"]:
            arguments = [*arguments, *SETTINGS.get(verb, [])]
        if program == "deepspeed" and verb == "align":  # the launcher itself once
            port = f"--master_port={free_port()}"
            launcher = [sys.executable, str(Path(sys.executable).parent / program), port, *launcher[1:]]
        elif program == "torchrun":
            launcher = [sys.executable, "-m", "torch.distributed.run", *launcher[1:]]
        elif program == "deepspeed":
            run_ranks(1, "diffclip", verb, *arguments)
            return
        elif verb in OWN_PROCESS:
            launcher = [sys.executable, "-m"]
        else:  # in this process, which spares the imports
            # an untrained model's score is at chance, and `diagnose` ends with 1 where it finds why
            with forked_lmms_eval():
                assert call([verb, *arguments]) in ((None, 0, 1) if arguments[:1] == ["diagnose"] else (None, 0))
            return
        start([*launcher, "diffclip", verb, *arguments], folder)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A folder that holds, in small, all that the pages name, made from the built-in scenes."""
    import datasets
    from PIL import Image

    import diffclip
    from diffclip.checkpoints import save

    folder = tmp_path_factory.mktemp("docs")
    (folder / "stages").mkdir()
    (folder / "stages" / "configs").symlink_to(ROOT / "stages" / "configs")
    small = {"pairs": 96, "retrieval": 20, "class_train": 60, "class_val": 20, "class_test": 20, "align": 32}
    small |= {"conversations": 32, "texts": 300, "pope": 4, "mmvp": 2, "segmentation": 2}
    call(["scenes", "export", str(folder / "world"), *(f"--{k}={n}" for k, n in small.items())])
    world = folder / "world"
    (folder / "pairs").symlink_to(world / "pretrain")
    for name in ("POPE", "pope"):
        (folder / name).symlink_to(world / "pope")
    for name in ("IMAGES", "images"):
        shutil.copytree(world / "llava" / "images", folder / name)
        shutil.copytree(world / "pope" / "images", folder / name, dirs_exist_ok=True)
    for name, source in {"captions.json": "align", "conversations.json": "instruct", "rows.json": "instruct"}.items():
        shutil.copy(world / "llava" / f"{source}.json", folder / name)
    shutil.copy(world / "llava" / "text.jsonl", folder / "text.jsonl")
    photos = sorted((world / "pope" / "images").iterdir())
    for name in ("a.jpg", "mug.jpg"):
        Image.open(photos[0]).convert("RGB").save(folder / name)
    pairs = [{"image": {"bytes": p.read_bytes(), "path": None}, "caption": f"scene {i}"} for i, p in enumerate(photos)]
    datasets.Dataset.from_list(pairs).to_parquet(folder / "more_pairs.parquet")
    rows = [{"image": p.name, "question": "Is there a circle?"} for p in photos]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(world / "pope", folder / "runs" / "quickstart" / "scenes" / "pope")
    (folder / "urls.tsv").write_text("url\tcaption\nhttp://127.0.0.1:9/a.jpg\ta dog\n")
    for name in ("benchmarks", "data"):  # one set: a linear probe takes seconds
        shutil.copytree(world, folder / name, ignore=shutil.ignore_patterns("color", "shape_color"))
    shutil.copytree(world / "classification" / "shape", folder / "data" / "cifar10")
    write_shards(folder / "data" / "imagenet-v2", photos)
    for name, model in {
        "clip": "CLIP-tiny",
        "diffclip": "DiffCLIP-tiny",
        "quickstart/CLIP": "CLIP-tiny",
        "quickstart/DiffCLIP": "DiffCLIP-tiny",
    }.items():
        save(diffclip.build(shallow(model)), folder / "runs" / name / "pretrain")
    save(diffclip.build(smallest_with_a_timm_name()), folder / "runs" / "clip-s16" / "pretrain")
    return folder


def smallest_with_a_timm_name() -> dict[str, Any]:
    """A CLIP's config whose vision tower open_clip can build by itself."""
    config = variants.named("CLIP-tiny")
    vision = {"image_size": 160, "patch_size": 16, "width": 64, "layers": 6, "head_width": 32, "mlp_ratio": 3.0}
    config["model_cfg"]["vision_cfg"] = vision | {"timm_model_name": "test_vit", "timm_pool": "token"}
    config["preprocess_cfg"]["size"] = 160
    return config


def write_shards(folder: Path, photos: list[Path]) -> None:
    """Images of two classes in clip-benchmark's layout."""
    (folder / "test").mkdir(parents=True)
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for i, photo in enumerate(photos):
            for suffix, content in ((photo.suffix, photo.read_bytes()), (".cls", str(i % 2).encode())):
                info = tarfile.TarInfo(f"s{i}{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    (folder / "test" / "nshards.txt").write_text("1")
    (folder / "classnames.txt").write_text("even\nodd\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of {c}.\n")


@pytest.fixture(scope="module")
def trained(workspace) -> Path:
    """The workspace after all commands of data.md: its runs/mine, also under the names that other pages use."""
    language = ["diffclip", "language", "--text=text.jsonl", "--output_dir=runs/language", "--max_tokens=64"]
    with pytest.MonkeyPatch.context() as patch:
        for words in (language, *commands(ROOT / "docs" / "data.md")):
            carry_out(words, "data.md", workspace, patch)
    for stage in ("align", "instruct"):
        (workspace / "runs" / stage).symlink_to(workspace / "runs" / "mine" / stage)
    (workspace / "runs" / "quickstart" / "CLIP" / "instruct").symlink_to(workspace / "runs" / "mine" / "instruct")
    for name in ("clip", "diffclip"):
        shutil.copytree(workspace / "runs" / "mine" / "evaluate", workspace / "runs" / name / "evaluate")
    write_lmms_task(workspace)
    return workspace


@pytest.fixture
def hub(workspace, monkeypatch) -> None:
    """A Hub cache that holds a small model under the id of the published weights, in their layout."""
    folder = workspace / "hub" / "models--hammh0a--DiffCLIP_ViTB16_CC12M"
    if not folder.exists():
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
        file = folder / "snapshots" / ("0" * 40) / "checkpoint_best.pt"
        call(["convert", str(workspace / "runs" / "diffclip" / "pretrain"), str(file)])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(workspace / "hub"))


def write_lmms_task(folder: Path) -> None:
    """The workspace's POPE questions as a task of lmms-eval, `tiny_pope`, in tasks/."""
    from mllm.pope.images import find_images
    from mllm.pope.lmms import write_parquet, write_tasks
    from mllm.pope.questions import read

    questions = read(folder / "POPE")[:4]
    (folder / "tasks").mkdir()
    write_parquet(questions, find_images(questions, folder / "IMAGES"), folder / "tasks" / "tiny_pope.parquet")
    write_tasks(folder / "tasks", {"tiny_pope": folder / "tasks" / "tiny_pope.parquet"})


@pytest.mark.slow
def test_the_commands_of_your_own_data_lead_from_pairs_to_a_report(trained):
    assert "DiffCLIP-tiny" in (trained / "runs" / "mine" / "report" / "report.md").read_text(encoding="utf-8")
    assert (trained / "scenes" / "scenes.json").is_file()


OTHERS = [(page, words) for page in PAGES if page.name != "data.md" for words in commands(page)]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "words"), OTHERS, ids=[f"{page.stem}: {named(words)}" for page, words in OTHERS])
def test_commands_run_as_typed(page, words, trained, hub, monkeypatch):
    carry_out(words, page.name, trained, monkeypatch)


PYTHON = [(page, code) for page in PAGES for code in blocks(page, "python")]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "code"), PYTHON, ids=[f"{page.stem}-{i}" for i, (page, _) in enumerate(PYTHON)])
def test_python_blocks_run_as_they_stand(page, code, trained, hub, monkeypatch, capsys):
    skip_without_packages(code)
    monkeypatch.chdir(trained)
    exec(compile(code, page.name, "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out.splitlines()
    for shape in re.findall(r"^print\(.*\)  # (torch\.Size\(.*\))$", code, re.MULTILINE):
        assert shape in printed


NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def cells(notebook: Path, kind: str) -> list[dict[str, Any]]:
    return [c for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebooks_run_from_the_first_cell_to_the_last(notebook, trained, monkeypatch):
    """In this process, on untrained models of the same kind."""
    monkeypatch.chdir(trained)
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict[str, Any] = {"__name__": "__main__"}
    for i, cell in enumerate(cells(notebook, "code")):
        exec(compile("".join(cell["source"]), f"{notebook.name}, cell {i}", "exec"), names)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebooks_are_small_and_tell_nothing_of_the_machine_that_ran_them(notebook):
    text = notebook.read_text(encoding="utf-8")
    assert len(text) < 200_000
    outputs = json.dumps([cell["outputs"] for cell in cells(notebook, "code")])
    assert not re.search(r"/(?:tmp|home|root|work|usr)/", outputs)


@functools.cache
def flags_of(*verb: str) -> set[str]:
    """The flags that `diffclip VERB --help` shows."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        call([*verb, "--help"])
    return set(re.findall(r"--([a-z]\w*)", shown.getvalue()))


def mentioned(page: Path) -> list[tuple[tuple[str, ...], list[str]]]:
    """(verb, flags) of commands within sentences and tables of a page, and in blocks that are not run."""
    text = re.sub(
        r"^```(?:bash|python)\n.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    found = []
    for command in re.findall(r"(?:`|^)(?:[^`\n]*? )?diffclip ([a-z][^`\n]*)", text, re.MULTILINE):
        words = command.split()
        inner = words[1:2] if words[0] in ("pope", "scenes", "config") and words[1:2] and words[1].isalpha() else []
        flags = [flag.replace("-", "_") for flag in re.findall(r"(?<!\S)--([a-z][\w-]*)", command)]
        if words[0] in VERBS and flags:
            found.append(((words[0], *inner), flags))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_flags_that_sentences_name_are_there(page):
    for verb, flags in mentioned(page):
        for flag in flags:
            assert flag in flags_of(*verb), f"{page.name} names diffclip {' '.join(verb)} --{flag}"


def test_blocks_of_code_say_their_language():
    """What is neither bash nor Python is a listing; commands in one are not run, for the reason in LISTINGS."""
    for page in PAGES:
        kinds = {kind for kind, _ in FENCE.findall(page.read_text(encoding="utf-8"))} - {"bash", "python", "bibtex"}
        assert not kinds or page.name in LISTINGS, f"{page.name} has blocks of {kinds}"


def test_the_readme_is_two_screens():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 100


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs" / "results.md"], ids=lambda page: page.stem)
def test_modules_files_and_pages_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for module in set(re.findall(r"python -m ([a-z_]+(?:\.[a-z_]+)*)", text)):
        assert importlib.util.find_spec(module), f"{page.name} names python -m {module}"
    for verb in set(re.findall(r"(?:`|^|-m |--module )diffclip ([a-z]+)", text, re.MULTILINE)):
        assert verb in VERBS, f"{page.name} names diffclip {verb}"
    for config in set(re.findall(r"--config ([a-z_]+/\w+)(?=[\s`])", text)):
        assert config in shipped.shipped(), f"{page.name} names --config {config}"
    for config in set(re.findall(r"(stages/configs/[\w/]+\.(?:yaml|json))", text)):
        assert (ROOT / config.replace("zeroN", "zero2")).is_file(), f"{page.name} names {config}"
    for extras in re.findall(r"""pip install '(?:\.|diffclip-stack)\[(.+?)\]'""", text):
        assert set(extras.split(",")) <= EXTRAS, f"{page.name} names the extras {extras}"
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"
