"""The shell scripts find their Python environment, and install nothing where nothing is needed."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from launch import ROOT

from diffclip.base.lazy_compile import ease_deepspeed

SYSTEM = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": os.environ.get("HOME", "/tmp"), "HF_HUB_OFFLINE": "1"}


def bash(words: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", *words], cwd=cwd, env=SYSTEM | environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
@pytest.mark.parametrize("script", ["1_pretrain", "4_evaluate"])
def test_the_stages_scripts_find_the_environment_without_its_being_active(script, tmp_path):
    link = tmp_path / "linked.sh"  # and from another folder, through a link, with CDPATH set
    link.symlink_to(ROOT / "scripts" / f"{script}.sh")
    ended = bash([str(link), "--help"], tmp_path, DIFFCLIP_VENV=sys.prefix, DEVICES="1", CDPATH="/:/tmp")
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "--output_dir" in ended.stdout and "installing" not in ended.stdout


@pytest.mark.parametrize("script", ["2_align", "3_instruct"])
def test_the_multimodal_stages_start_deepspeeds_launcher_in_the_environment(script, tmp_path):
    """One that prints what it is given, which the real one understands: that is started by the pipeline's test."""
    ease_deepspeed()
    from deepspeed.launcher import runner

    folder = tmp_path / "venv" / "bin"
    folder.mkdir(parents=True)
    for name, does in (("python", f'exec {sys.executable} "$@"'), ("deepspeed", "printf '%s\\n' \"$@\"")):
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)
    link = tmp_path / "linked.sh"
    link.symlink_to(ROOT / "scripts" / f"{script}.sh")
    ended = bash([str(link), "--help"], tmp_path, VIRTUAL_ENV=str(folder.parent), DEVICES="2", CDPATH="/:/tmp")
    words = ended.stdout.split()
    options = ["--num_gpus", "2", "--log_level", "error", "--module"]
    assert words == [*options, "diffclip", script[2:], "--help"], ended.stderr
    understood = runner.parse_args(words)
    assert (understood.user_script, understood.user_args) == ("diffclip", [script[2:], "--help"])
    assert understood.num_gpus == 2 and understood.module


@pytest.mark.parametrize("arguments", [["cc3m", "pope"], ["pairs", "urls.tsv"]], ids=" ".join)
def test_a_dry_run_of_the_data_needs_a_bare_python_and_installs_nothing(arguments, tmp_path):
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    (tmp_path / "urls.tsv").write_text("url\tcaption\nhttp://127.0.0.1:9/a.jpg\ta dog\n")
    path = f"{tmp_path}/bare/bin:{SYSTEM['PATH']}"
    words = [str(ROOT / "scripts" / "0_data.sh"), *arguments, "--out", "data", "--dry-run"]
    ended = bash(words, tmp_path, PATH=path, DIFFCLIP_VENV=str(tmp_path / "none"))
    assert ended.returncode == 0, ended.stderr
    assert "data" in ended.stdout and "installing" not in ended.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare", "urls.tsv"]


@pytest.mark.parametrize(
    ("stamps", "wanted", "there"),
    [
        (["eval"], "eval", True),
        (["eval,app,dev"], "eval", True),
        (["eval"], "eval,app,dev", False),
        (["app", "eval"], "eval", True),
        (["evaluation"], "eval", False),
        ([], "eval", False),
    ],
)
def test_extras_are_installed_once(stamps, wanted, there, tmp_path):
    for stamp in stamps:
        (tmp_path / f".diffclip-{stamp}").write_text("today\n")
    (tmp_path / ".diffclip-eval,old").write_text("another pyproject.toml\n")
    code = f"source {ROOT}/scripts/setup_env.sh; venv={tmp_path}; has_extras {wanted} today && echo yes || echo no"
    assert bash(["-c", code], tmp_path).stdout.split() == ["yes" if there else "no"]


@pytest.mark.parametrize(
    ("settings", "venv_folder", "activate"),
    [
        ({"VIRTUAL_ENV": "/venvs/mine"}, "/venvs/mine", ""),
        ({"CONDA_PREFIX": "/conda/envs/clip", "CONDA_DEFAULT_ENV": "clip"}, "/conda/envs/clip", ""),
        ({"CONDA_PREFIX": "/conda", "CONDA_DEFAULT_ENV": "base"}, f"{ROOT}/.venv", f"source {ROOT}/.venv/bin/activate"),
        ({}, f"{ROOT}/.venv", f"source {ROOT}/.venv/bin/activate"),
        ({"DIFFCLIP_VENV": "/x"}, "/x", "source /x/bin/activate"),
        ({"DIFFCLIP_VENV": "/my env"}, "/my env", "source /my\\ env/bin/activate"),
    ],
)
def test_an_active_environment_is_taken_before_our_own(settings, venv_folder, activate, tmp_path):
    code = f'source {ROOT}/scripts/setup_env.sh; find_venv; echo "$venv|$activate"'
    assert bash(["-c", code], tmp_path, **settings).stdout.strip() == f"{venv_folder}|{activate}"


def fake_python(folder: Path, pip: bool = True) -> Path:
    """An environment whose python writes each of its commands into a file `log` beside it, and does nothing."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    refuse = '[ "$2" = ensurepip ] && touch "$0.pip"\n[ "$2" = pip ] && [ ! -f "$0.pip" ] && exit 1\n' * (not pip)
    python.write_text(f'#!/bin/sh\necho "$*" >>{folder}/log\n{refuse}exit 0\n')
    python.chmod(0o755)
    return folder / "log"


def install(folder: Path, **settings: str) -> subprocess.CompletedProcess:
    code = f"source {ROOT}/scripts/setup_env.sh; install_into_venv eval"
    return bash(["-c", code], folder.parent, DIFFCLIP_VENV=str(folder), **settings)


MIRROR = "http://mirror.example:8080/cpu"


@pytest.mark.parametrize(("cpu", "index"), [("1", "https://download.pytorch.org/whl/cpu"), (MIRROR, MIRROR), ("", "")])
def test_pytorch_comes_without_cuda_where_that_is_asked_for(cpu, index, tmp_path):
    log = fake_python(tmp_path / "venv")
    done = install(tmp_path / "venv", DIFFCLIP_CPU=cpu)
    assert done.returncode == 0 and f"about {3 if cpu else 7} GB" in done.stdout
    installs = [line for line in log.read_text().splitlines() if " install " in line]
    assert [line for line in installs if "torchvision" in line] == [
        f"-m pip install --quiet torch>=2.9,<2.15 torchvision>=0.24,<0.30 --index-url {index}" for _ in range(bool(cpu))
    ]
    assert installs[-1].endswith(f"--editable {ROOT}[eval]")
    assert install(tmp_path / "venv").returncode == 0 and "install" not in log.read_text().splitlines()[-1]


def test_another_value_of_diffclip_cpu_is_refused_and_a_mirrors_password_not_shown(tmp_path):
    log = fake_python(tmp_path / "venv")
    refused = install(tmp_path / "venv", DIFFCLIP_CPU="mirror.example/whl/cpu")
    assert refused.returncode == 2 and "https://HOST/whl/cpu" in refused.stderr
    assert "torch" not in log.read_text()
    python = tmp_path / "venv/bin/python"
    python.write_text('#!/bin/sh\n[ "$3" != install ]\n')
    failed = install(tmp_path / "venv", DIFFCLIP_CPU="https://me:secret@mirror.example/cpu")
    assert failed.returncode == 2 and "error: https://mirror.example/cpu did not give" in failed.stderr


def test_an_environment_without_pip_is_given_one(tmp_path):
    log = fake_python(tmp_path / "venv", pip=False)
    assert install(tmp_path / "venv").returncode == 0
    words = [line.split()[1] for line in log.read_text().splitlines() if line.startswith("-m")]
    assert words == ["pip", "ensurepip", "pip"]


@pytest.mark.parametrize("setting", ["DIFFCLIP_VENV", "VIRTUAL_ENV", "CONDA_PREFIX"])
def test_a_folder_that_is_no_environment_is_never_cleared(setting, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    code = f"source {ROOT}/scripts/setup_env.sh; install_into_venv eval"
    ended = bash(["-c", code], tmp_path, **{setting: str(home), "CONDA_DEFAULT_ENV": "mine"})
    assert ended.returncode == 2 and str(home) in ended.stderr and "conda install python" in ended.stderr
    assert (home / "thesis.tex").read_text() == "years of work"


def test_a_broken_environment_is_made_again(tmp_path):
    broken = tmp_path / "venv"
    (broken / "bin").mkdir(parents=True)
    (broken / "pyvenv.cfg").write_text("home = /gone")
    (broken / "bin" / "python").symlink_to("/gone/python")
    made = tmp_path / "tools"
    fake = fake_python(made)  # stands for the python3 that makes it
    (made / "bin" / "python").rename(made / "bin" / "python3")
    ended = bash(
        ["-c", f"source {ROOT}/scripts/setup_env.sh; install_into_venv eval"],
        tmp_path,
        DIFFCLIP_VENV=str(broken),
        PATH=f"{made}/bin:{SYSTEM['PATH']}",
    )
    assert f"making a virtual environment in {broken}" in ended.stdout
    assert f"-m venv --clear {broken}" in fake.read_text()
