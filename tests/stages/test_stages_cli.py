"""The command `diffclip`: every verb is there, says what it takes without loading torch, and near misses are named."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from launch import ROOT, environment, run, run_program

import diffclip
from diffclip.base.errors import InputError
from stages import shipped
from stages.cli import VERBS, call, main

OLD = ["stages.pretrain", "stages.language", "stages.align", "stages.instruct", "stages.evaluate", "stages.report"]
OLD += ["stages.pipeline", "stages.publish", "stages.fetch", "diffclip.benchmarks", "diffclip.scenes"]
OLD += ["diffclip.checkpoints", "diffclip.attention_maps", "diffclip.benchmarks.localisation", "mllm.chat", "mllm.app"]
OLD += ["mllm.data", "mllm.pope"]
COMMANDS = [*(f"diffclip {verb}" for verb in VERBS), *(f"python -m {module}" for module in OLD)]
HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "open_clip",
    "timm",
    "deepspeed",
    "scipy",
    "sklearn",
    "matplotlib",
    "pandas",
)
# Each command in a process of its own, forked from one that has loaded what all of them share, which is not heavy.
PROBE = """
import contextlib, io, json, os, runpy, sys, tempfile
commands, heavy = map(json.loads, sys.argv[1:])
import stages.cli, stages.config, stages.settings
assert not set(heavy) & set(sys.modules)
for command in commands:
    with tempfile.TemporaryFile("w+") as file:
        if os.fork() == 0:
            program, *words = command.split()
            code, text = None, io.StringIO()
            with contextlib.redirect_stdout(text):
                try:
                    if program == "python":
                        sys.argv = [words[1], "--help"]
                        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
                    else:
                        import stages.cli
                        stages.cli.main([*words, "--help"])
                except SystemExit as end:
                    code = end.code
                except BaseException as error:
                    code = repr(error)
            json.dump([code, text.getvalue(), sorted(set(heavy) & set(sys.modules))], file)
            file.flush()
            os._exit(0)
        os.wait()
        file.seek(0)
        print(json.dumps([command, json.load(file)]))
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, tuple]:
    """(exit code, text, heavy modules that were loaded) of each command's `--help`."""
    command = [sys.executable, "-c", PROBE, json.dumps(COMMANDS), json.dumps(HEAVY)]
    ended = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    return dict(json.loads(line) for line in ended.stdout.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_there_and_needs_no_heavy_library(command, helps):
    code, text, heavy = helps[command]
    assert code in (None, 0) and text.startswith("usage: ") and "--help" in text
    assert not heavy


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_shows_what_is_typed(verb, helps):
    text = helps[f"diffclip {verb}"][1]
    assert text.startswith(f"usage: diffclip {verb}")
    example = text.partition("\nexample:\n")[2]
    assert f"diffclip {verb} " in example or f"diffclip {verb}\n" in example


def test_without_a_verb_the_help_names_all_of_them(capsys):
    for argv in ([], ["--help"], ["-h"], ["help"]):
        assert main(argv) is None
        text = capsys.readouterr().out
        assert all(f"  {name:<11}{verb.summary}\n" in text for name, verb in VERBS.items())
        assert max(map(len, text.splitlines())) <= 80


def test_a_verb_that_is_nearly_right_is_suggested():
    with pytest.raises(InputError, match=r"no verb pretain: did you mean `diffclip pretrain`\?"):
        call(["pretain"])
    with pytest.raises(InputError, match="no verb zzz: `diffclip --help` lists the verbs"):
        call(["zzz", "--help"])


def test_the_launchers_rank_may_stand_before_the_verb(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--local_rank=1", "align", "--help"])
    assert end.value.code == 0 and capsys.readouterr().out.startswith("usage: diffclip align")


def test_bad_input_ends_with_code_2_and_no_traceback(tmp_path, capsys):
    for argv, message in (
        (
            ["pretrain", f"--output_dir={tmp_path / 'run'}", "--train_data", "missing/*.tar", "--use_cpu"],
            "missing/*.tar: no such file",
        ),
        (["config", "show", "nowhere"], "nowhere: no such configuration file"),
        (["config", "shw"], "did you mean show?"),
    ):
        with pytest.raises(SystemExit) as end:
            main(argv)
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_package_runs_as_a_module_and_passes_on_the_exit_code():
    assert "usage: diffclip VERB" in run("diffclip").stdout
    ended = run("diffclip", "pretrain", "--epochs", "many", check=False)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr


@pytest.mark.slow
def test_the_launchers_start_a_verb():
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m"]
    assert "usage: diffclip pretrain" in run_program([*launcher, "diffclip", "pretrain", "--help"], check=True).stdout


def test_config_lists_shows_and_copies(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["config", "list"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in shipped.shipped()) and "Quickstart, stage 2: only the projector" in listed
    main(["config", "show", "quickstart/align"])
    assert capsys.readouterr().out == (shipped.CONFIGS / "quickstart" / "align.yaml").read_text()
    main(["config", "copy", "paper/instruct"])
    main(["config", "copy", "deepspeed/zero2.json", "own.json"])
    assert (tmp_path / "instruct.yaml").read_text() == (shipped.CONFIGS / "paper" / "instruct.yaml").read_text()
    assert json.loads((tmp_path / "own.json").read_text())["zero_optimization"]["stage"] == 2
    with pytest.raises(InputError, match=r"instruct\.yaml: is there already"):
        call(["config", "copy", "paper/instruct"])
    with pytest.raises(InputError, match=r"did you mean paper/instruct"):
        call(["config", "show", "paper/instruckt"])


def test_env_says_what_a_bug_report_needs(monkeypatch, capsys):
    monkeypatch.setenv("DIFFCLIP_VENV", str(Path.home() / "venv"))
    monkeypatch.setenv("HF_TOKEN", "secret")
    main(["env"])
    text = capsys.readouterr().out
    names = {line.split()[0] for line in text.splitlines()}
    assert names >= {"python", "system", "torch", "transformers", "deepspeed", "peft", "open_clip_torch", "timm"}
    assert names >= {"lmms-eval", "datasets", "commit", "CUDA", "OpenMP", "DIFFCLIP_VENV"}
    assert "~/venv" in text and "secret" not in text and "HF_TOKEN" not in text


@pytest.mark.slow
def test_an_installed_wheel_has_the_command_and_the_configurations(tmp_path):
    (tmp_path / "source").mkdir()
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for source in (ROOT / name for names in copied for name in names.split()):  # a build writes beside its sources
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / "source" / source.name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run_program([*build, f"--wheel-dir={tmp_path}", str(tmp_path / "source")], check=True)
    wheel = zipfile.ZipFile(next(tmp_path.glob(f"*-{diffclip.__version__}-*.whl")))
    names = wheel.namelist()
    files = (path for name in ("diffclip", "mllm", "stages") for path in (ROOT / name).rglob("*") if path.is_file())
    assert {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts} <= set(names)
    entry_points = wheel.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert "diffclip = stages.cli:main" in entry_points
    wheel.extractall(tmp_path / "installed")
    code = "from stages.cli import main; main(['config', 'show', 'quickstart/align'])"
    shown = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env=environment() | {"PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.startswith("# Quickstart, stage 2")
