"""The whole chain for real, at the smallest scale: every stage, the deepspeed launcher, lmms-eval, the report.

Also what happens when it is killed: nothing is left running, and the same command goes on.
"""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import psutil
import pytest
import yaml
from launch import QUICKSTART, ROOT, environment, forked_lmms_eval, run_ranks

from diffclip import hf
from diffclip.base.commands import Parser
from diffclip.base.errors import InputError
from diffclip.base.fingerprint import fingerprint
from stages import cli, pipeline
from stages.config import parse
from stages.pipeline import finished
from stages.settings import PipelineConfig

pytestmark = pytest.mark.usefixtures("coarse_figures")

SMALL = {"pairs": 256, "retrieval": 20, "class_train": 60, "class_val": 20, "class_test": 20, "align": 64}
SMALL |= {"conversations": 64, "texts": 300, "pope": 4, "mmvp": 2, "segmentation": 2}


def carry_on(*arguments: str) -> str:
    """The console of `diffclip pipeline ARGUMENTS`, whose commands run in this process, without its imports.

    CLIP's align under the deepspeed launcher and its lmms-eval stay real; its instruct is forked as one rank.
    The other model is trained without DeepSpeed, and its lmms-eval is forked.
    """
    start = pipeline.run

    def run(command: list[str], typed: list[str], label: str, threads: int) -> None:
        _, *words = command[command.index("diffclip") :]
        other = not any("/CLIP/" in word for word in words)
        if "--module" in command and not other and words[0] == "align":
            start(command, typed, label, threads)
        elif "--module" in command and not other:
            run_ranks(1, "diffclip", *words)
        else:
            with forked_lmms_eval() if other else contextlib.nullcontext():
                cli.call([*words, *(["--deepspeed="] if other and words[0] in ("align", "instruct") else [])])

    console = io.StringIO()
    with (
        mock.patch.dict(os.environ, environment()),
        mock.patch.object(pipeline, "run", run),
        mock.patch.object(pipeline, "cores", lambda: 1),  # one command at a time
        contextlib.redirect_stdout(console),
    ):
        pipeline.main([*arguments, "--jobs=1"])
    return console.getvalue()


def names(folder: Path, cmdline: list[str] | None) -> bool:
    return any(str(folder) in part for part in cmdline or [])


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> tuple[Path, list[str]]:
    """Output directory and command of a finished pipeline for CLIP and DiffCLIP-dagger, interrupted once."""
    folder = tmp_path_factory.mktemp("pipeline")
    small = {
        "pretrain": {"global_batch_size": 64, "epochs": 1},
        "language": {"global_batch_size": 16, "hidden_size": 32, "layers": 1},
        "align": {"global_batch_size": 16},
        "instruct": {"global_batch_size": 16, "epochs": 1, "logging_steps": 1},
        "evaluate": {"few_shot_episodes": 20, "linear_probe": "fast"},
    }
    settings: dict = {"variants": ["CLIP", "DiffCLIP-dagger"], "size": "tiny", "scenes": SMALL}
    for stage, changes in small.items():
        values = yaml.safe_load((QUICKSTART / f"{stage}.yaml").read_text()) | changes
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(values))
        settings[stage] = str(folder / f"{stage}.yaml")
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(settings))
    command = [f"--config={folder / 'pipeline.yaml'}", f"--output_dir={folder / 'out'}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "diffclip", "pipeline", *command],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    deadline = time.time() + 300
    while not (folder / "out" / "CLIP" / "align" / "run.json").exists() and time.time() < deadline:
        time.sleep(0.1)
    process.kill()  # as kill -9: what it started has to notice by itself
    process.wait()
    deadline = time.time() + 60  # a launcher that was just starting takes seconds to come to its stage's first line
    while left := [p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if names(folder, p.info["cmdline"])]:
        assert time.time() < deadline, f"a killed pipeline left a stage running: {left}"
        time.sleep(0.5)
    shutil.rmtree(
        folder / "out" / "scenes" / "classification" / "shape_color"
    )  # two sets will do: a probe takes seconds
    (folder / "console.txt").write_text(carry_on(*command))
    return folder / "out", command


@pytest.mark.slow
def test_pipeline_ends_with_a_table_and_a_report(quickstart):
    out, _ = quickstart
    console = (out.parent / "console.txt").read_text()
    assert "POPE" in console and str(out / "report" / "index.html") in console
    page = (out / "report" / "index.html").read_text()
    assert "CLIP-tiny" in page and "DiffCLIP-dagger-tiny" in page and "http://" not in page.split("<body")[0]
    assert (out / "report" / "report.md").read_text().count("|") > 20
    metrics = json.loads((out / "DiffCLIP-dagger" / "evaluate" / "metrics.json").read_text())
    for key in (
        "zero_shot/shape/top1",
        "shift/sketch/top1",
        "retrieval/text_to_image/R@1",
        "linear_probe/color/accuracy",
        "mmvp/average",
        "pope/mean/accuracy",
        "pope_shuffled/mean/accuracy",
        "pope_blind/adversarial/accuracy",
    ):
        assert 0 <= metrics[key] <= 100
    assert metrics["pope_always_yes/mean/accuracy"] == 50
    assert metrics["pope/random/questions"] == 24


def next_commands(console: str) -> list[list[str]]:
    """The words of each command below "What next:"."""
    lines = console.partition("What next:\n")[2].splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.slow
def test_the_console_ends_with_commands_that_run_as_they_stand(quickstart, capsys):
    out, _ = quickstart
    commands = next_commands((out.parent / "console.txt").read_text())
    chat, maps = (next(words for words in commands if words[1] == verb) for verb in ("chat", "maps"))
    cli.call(chat[1:])
    assert capsys.readouterr().out.strip()
    cli.call(maps[1:])
    assert (out / "maps.png").stat().st_size > 1000


def dry_pipeline(*arguments: str, capsys, jobs: int = 1) -> tuple[list[list[str]], str]:
    """The commands that a pipeline would run, with scenes of one image made for each export; and its console."""
    commands: list[list[str]] = []

    def run(command: list[str], typed: list[str], label: str, threads: int) -> None:
        commands.append(typed[typed.index("diffclip") + 1 :])
        if commands[-1][0] == "scenes":
            scenes = Path(commands[-1][2])
            (scenes / "pope" / "images").mkdir(parents=True, exist_ok=True)
            (scenes / "pope" / "images" / "0.png").touch()
            seed = next(int(word.partition("=")[2]) for word in commands[-1] if word.startswith("--seed="))
            (scenes / "scenes.json").write_text(json.dumps({"options": {"seed": seed}}))

    with (
        mock.patch.dict(os.environ, {"DIFFCLIP_ACTIVATE": "source '/my venv/bin/activate'"}),
        mock.patch.object(pipeline, "run", run),
        mock.patch.object(pipeline, "finished", lambda out: True),
        mock.patch("importlib.util.find_spec", lambda name: None),
    ):
        pipeline.main([*arguments, f"--jobs={jobs}"])
    return commands, capsys.readouterr().out


def folders_of(typed: list[list[str]], verb: str) -> list[str]:
    named = [word for words in typed if words[0] == verb for word in words if word.startswith("--output_dir=")]
    return [word.partition("=")[2] for word in named]


def test_several_seeds_have_a_folder_each_and_one_report(tmp_path, capsys):
    out = tmp_path / "out"
    typed, _ = dry_pipeline("--variants", "CLIP", "--seeds", "0", "1", "1", f"--output_dir={out}", capsys=capsys)
    assert folders_of(typed, "evaluate") == [f"{out}/seed-{seed}/CLIP/evaluate" for seed in (0, 1)]
    assert all(f"--seed={seed}" in words for words in typed for seed in (0, 1) if f"seed-{seed}/" in words[-1])
    reports = [words[1:] for words in typed if words[0] == "report"]
    runs = [f"{out}/seed-{seed}/CLIP" for seed in (0, 1)]
    assert reports == [[*runs[:number], "--output_dir", f"{out}/report"] for number in (1, 2)]
    again, _ = dry_pipeline("--variants", "CLIP", "--seed", "1", f"--output_dir={out}", capsys=capsys)
    assert folders_of(again, "evaluate") == [f"{out}/seed-1/CLIP/evaluate"]


def test_more_seeds_take_up_the_one_that_is_there(tmp_path, capsys):
    out = tmp_path / "out"
    one, _ = dry_pipeline("--seed=5", f"--output_dir={out}", capsys=capsys)
    assert folders_of(one, "language") == [f"{out}/language"]
    three, _ = dry_pipeline("--seeds", "4", "5", "6", f"--output_dir={out}", capsys=capsys)
    assert folders_of(three, "language") == [f"{out}/seed-4/language", f"{out}/language", f"{out}/seed-6/language"]
    other, _ = dry_pipeline("--seed=7", f"--output_dir={out}", capsys=capsys)
    assert folders_of(other, "language") == [f"{out}/seed-7/language"]


def test_more_ranks_than_cores_are_one_variant_at_a_time(tmp_path, capsys):
    typed, _ = dry_pipeline("--ranks=1000", f"--output_dir={tmp_path / 'out'}", capsys=capsys, jobs=0)
    assert [words[0] for words in typed if words[0] != "language"][:6] == [
        *("scenes", "pretrain", "align", "instruct", "evaluate", "pretrain")
    ]


def test_fast_is_a_configuration_of_its_own(tmp_path, capsys):
    typed, console = dry_pipeline("--fast", f"--output_dir={tmp_path / 'out'}", capsys=capsys)
    assert "--simple=1" in typed[0] and [words[0] for words in typed].count("pretrain") == 1
    for words in typed[1:-1]:
        assert f"--config=fast/{words[0]}" in words
    assert re.search(r"diffclip pipeline --fast .*--seeds 0 1 2", console)
    with pytest.raises(InputError, match=r"`fast` and `config`.*leave one out"):
        pipeline.main(["--fast", "--config", "quickstart/pipeline"])
    assert parse(PipelineConfig, "", ["--config=fast/pipeline"]).output_dir != PipelineConfig().output_dir


@pytest.mark.parametrize(
    ("cores", "jobs", "ranks", "side_by_side", "expected"),
    [
        (2, 2, 1, True, {"language": 1, "pretrain": 1, "align": 1, "evaluate": 1}),
        (2, 1, 2, True, {"language": 1, "pretrain": 1, "align": 1, "evaluate": 2}),
        (12, 2, 3, True, {"language": 4, "pretrain": 6, "align": 2, "evaluate": 6}),
        (12, 1, 2, False, {"language": 12, "pretrain": 11, "align": 6, "evaluate": 12}),
        (1, 1, 1, False, {"language": 1, "pretrain": 1, "align": 1, "evaluate": 1}),
    ],
)
def test_each_command_is_told_its_threads(cores, jobs, ranks, side_by_side, expected, tmp_path):
    threads: dict[str, set[int | None]] = {}

    def run(command: list[str], typed: list[str], label: str, given: int | None) -> None:
        threads.setdefault(typed[typed.index("diffclip") + 1], set()).add(given)

    config = parse(PipelineConfig, "", ["--config=quickstart/pipeline", f"--ranks={ranks}"])
    with (
        mock.patch.object(pipeline, "run", run),
        mock.patch.object(pipeline, "cores", lambda: cores),
        mock.patch.object(pipeline, "finished", lambda out: True),
        mock.patch.object(pipeline, "ending", threading.Event()),
    ):
        pipeline.run_variants(config, 0, tmp_path, jobs, side_by_side)
    expected["instruct"] = expected["align"]
    assert threads == {verb: {number} for verb, number in expected.items()}


@pytest.mark.parametrize(
    ("settings", "cores", "together"),
    [
        (["--variants=CLIP"], 2, True),
        (["--variants=CLIP"], 1, False),
        (["--variants=CLIP", "--align={gpu}"], 2, False),
        (["--align={gpu}", "--jobs=2"], 2, True),
    ],
)
def test_the_language_model_is_trained_beside_the_towers_where_cores_are_free(settings, cores, together, tmp_path):
    (tmp_path / "gpu.yaml").write_text("use_cpu: false")
    seen, labels, trained = threading.Barrier(2), {}, []

    def run(command: list[str], typed: list[str], label: str, threads: int | None) -> None:
        verb = typed[typed.index("diffclip") + 1]
        labels[verb] = label
        if verb == "language" or "--model=CLIP-tiny" in typed:
            with contextlib.suppress(threading.BrokenBarrierError):
                seen.wait(5 if together else 0.2)
        if verb == "language":
            time.sleep(0.2)
            trained.append(verb)
        if verb == "align":
            assert trained
        if verb == "instruct":
            raise InputError("as far as this goes")

    settings = [word.format(gpu=tmp_path / "gpu.yaml") for word in settings]
    with (
        mock.patch.object(pipeline, "run", run),
        mock.patch.object(pipeline, "cores", lambda: cores),
        mock.patch.object(pipeline, "finished", lambda out: True),
        mock.patch.object(pipeline, "ending", threading.Event()),
        mock.patch.dict(os.environ),
        pytest.raises(InputError, match="as far"),
    ):
        pipeline.main([*settings, f"--output_dir={tmp_path / 'out'}"])
    assert seen.broken is not together
    assert bool(labels["pretrain"]) is together and bool(labels["instruct"]) is ("--jobs=2" in settings)


@pytest.mark.parametrize(("threads", "users", "used"), [(3, None, "3"), (3, "5", "5"), (None, None, "None")])
def test_a_command_computes_with_its_threads_unless_the_user_says_otherwise(
    threads, users, used, tmp_path, monkeypatch
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if users:
        monkeypatch.setenv("OMP_NUM_THREADS", users)
    code = f"import os; open({str(tmp_path / 'used')!r}, 'w').write(str(os.environ.get('OMP_NUM_THREADS')))"
    pipeline.run([sys.executable, "-c", code], ["python"], "", threads)
    assert (tmp_path / "used").read_text() == used


def test_a_language_model_that_fails_ends_the_variants_that_are_trained_beside_it(tmp_path):
    ended = threading.Event()

    def run(command: list[str], typed: list[str], label: str, threads: int) -> None:
        if "language" in typed:
            time.sleep(0.2)  # the towers are in their training
            raise InputError("no text")
        if "pretrain" in typed:
            process = subprocess.Popen(["sleep", "60"], start_new_session=True)
            pipeline.running.add(process)
            if pipeline.ending.is_set():
                pipeline.end(process)
            code = process.wait()
            pipeline.running.discard(process)
            if code < 0:
                ended.set()

    config = parse(PipelineConfig, "", ["--config=quickstart/pipeline"])
    with (
        mock.patch.object(pipeline, "run", run),
        mock.patch.object(pipeline, "ending", threading.Event()),
        pytest.raises(InputError, match="no text"),
    ):
        pipeline.run_variants(config, 0, tmp_path, 2, side_by_side=True)
    assert ended.is_set()


class Parsed(Exception):
    """A command line was read to its end."""


def test_what_next_names_commands_that_their_parsers_take(tmp_path, capsys, monkeypatch):
    out = tmp_path / "my runs"
    _, console = dry_pipeline("--variants", "CLIP", "DiffCLIP", f"--output_dir={out}", capsys=capsys)
    activate, *commands = next_commands(console)
    assert activate == ["source", "/my venv/bin/activate"]
    assert ["python", "-m", "pip", "install", "diffclip-stack[app]"] in commands
    commands = [words[1:] for words in commands if words[0] == "diffclip"]
    assert [words[0] for words in commands] == ["chat", "maps", "app", "pipeline", "config"]
    config = parse(PipelineConfig, "", next(words[1:] for words in commands if words[0] == "pipeline"))
    assert (config.output_dir, config.seeds, config.variants) == (str(out), [0, 1, 2], ["CLIP", "DiffCLIP"])

    def read(parser: Parser, parsed: object, unknown: list[str]) -> None:
        assert not unknown
        raise Parsed

    monkeypatch.setattr(Parser, "_nothing_left", read)
    for words in commands:
        with pytest.raises(Parsed):
            cli.call(words)


@pytest.mark.slow
def test_only_the_named_parts_learnt_and_the_tower_is_the_pretrained_one(quickstart):
    out, _ = quickstart
    for variant in ("CLIP", "DiffCLIP-dagger"):
        align, instruct = (
            json.loads((out / variant / stage / "run.json").read_text()) for stage in ("align", "instruct")
        )
        for record, learns in ((align, {"projector"}), (instruct, {"projector", "language_model"})):
            changed = {part for part in record["before"] if record["before"][part] != record["after"][part]}
            assert changed == learns == set(record["learns"])
        assert align["after"] == instruct["before"]
        tower = hf.DiffCLIPVisionModel.from_pretrained(out / variant / "pretrain")
        assert fingerprint(tower) == instruct["after"]["vision_tower"]


@pytest.mark.slow
def test_pipeline_called_again_trains_nothing(quickstart):
    out, command = quickstart
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    console = carry_on(*command)
    assert console.count("nothing to do") == 9  # language, and four stages for each of two variants
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")} == before


@pytest.mark.slow
def test_two_ranks_give_the_losses_of_one(quickstart, tmp_path):
    out, _ = quickstart
    arguments = ["stages.instruct", f"--config={out.parent / 'instruct.yaml'}", f"--model={out / 'CLIP' / 'align'}"]
    arguments += [f"--data={out / 'scenes' / 'llava' / 'instruct.json'}", f"--output_dir={tmp_path / 'run'}"]
    run_ranks(2, *arguments, f"--image_root={out / 'scenes' / 'llava' / 'images'}")
    one, two = (
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (out / "CLIP" / "instruct", tmp_path / "run")
    )
    assert len(one) == 4
    assert two == pytest.approx(one, rel=1e-4)


def test_finished_is_read_as_json(tmp_path):
    """Not by its text: another's layout says the same, and a file name that looks like it says nothing."""
    record = tmp_path / "run.json"
    assert not finished(tmp_path)
    for text, expected in (
        ('{"state":"finished"}', True),
        ('{"state": "running", "inputs": {"data": {"path": "x", "state": "finished"}}}', False),
        ("[]", False),
    ):
        record.write_text(text)
        assert finished(tmp_path) is expected
    record.write_text('{"state": "finished"')
    with pytest.raises(InputError, match=r"run\.json: not valid JSON"):
        finished(tmp_path)
