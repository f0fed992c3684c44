"""Run directories under damage, two writers, signals and changed settings: what goes on, what is refused, by name."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from launch import ROOT, environment, run_ranks, start_ranks
from safetensors.torch import save_file
from test_stages_run import Settings, paused
from test_stages_training import Tell, calm, settings_of, start, stopped, weights  # noqa: F401 - fixtures

from diffclip.base import lock, orphans
from diffclip.base.errors import InputError
from diffclip.base.ranks import from_main, gather
from diffclip.base.schema import COMPLETE, RECORD
from stages import ledger, manifest, verify
from stages.run import NOT_FINISHED, Run
from stages.settings import PretrainConfig, check
from stages.training import train


def flip(path, at=-1):
    """Change one bit of a file, which keeps its size."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


ODD = {
    "inputs": {"data": {"digest": "ab"}},
    "settings": [],
    "state": "x",
    "wall_seconds": "1",
    "learns": [1],
    "parameters": {"a": "b"},
}


@pytest.mark.parametrize("key", ODD)
def test_a_record_with_a_value_of_another_kind_is_refused_by_its_key(key, tmp_path):
    fine = {"state": "running", "parameters": {"a": 1}, "inputs": {"data": {"path": "x", "digest": ""}}, "new": [None]}
    (tmp_path / RECORD).write_text(json.dumps(fine))
    assert ledger.read_record(tmp_path) == fine
    (tmp_path / RECORD).write_text(json.dumps(fine | {key: ODD[key]}))
    with pytest.raises(InputError, match=f"{RECORD}: `{key}` is .*bring it back"):
        ledger.read_record(tmp_path)


# ---- checkpoints are whole or not there

DAMAGES = {
    "a bit": lambda file: flip(file, file.stat().st_size // 2),
    "its end": lambda file: os.truncate(file, file.stat().st_size // 2),
    "all of it": Path.unlink,
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", COMPLETE])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(stopped, calm, tmp_path, capsys, name, damage):  # noqa: F811
    out = tmp_path / "run"
    shutil.copytree(stopped, out)  # with checkpoints 4 and 6
    DAMAGES[damage](out / "checkpoint-6" / name)
    trainer, run = start(out)
    train(trainer, run)
    said = capsys.readouterr().out
    assert "resumes at step 4 of 12" in said and torch.equal(weights(trainer), calm)
    if (name, damage) != (COMPLETE, "all of it"):  # then it looks half written, and those go without a word
        assert "checkpoint-6 is not what was written" in said and (out / "broken-checkpoint-6").is_dir()
    run.finish({})
    assert not list(out.glob("*checkpoint*"))


@pytest.mark.slow
def test_with_no_whole_checkpoint_training_begins_anew_and_another_runs_is_not_taken(stopped, calm, tmp_path, capsys):  # noqa: F811
    out, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(stopped, out)
    for step in (4, 6):
        flip(out / f"checkpoint-{step}" / "optimizer.pt")
    with pytest.raises(SystemExit):
        train(*start(other, Tell(8)))
    shutil.copytree(other / "checkpoint-8", out / "checkpoint-8")
    capsys.readouterr()
    trainer, run = start(out)
    train(trainer, run)
    said = capsys.readouterr().out
    assert "another run's" in said and "training begins anew" in said and torch.equal(weights(trainer), calm)


def test_a_checkpoint_of_an_older_version_is_taken(stopped, tmp_path):  # noqa: F811
    shutil.copytree(stopped, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-6" / COMPLETE).write_text("")
    _, run = start(tmp_path / "run")
    assert run.checkpoint().endswith("checkpoint-6")


@pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
def test_without_its_record_a_directory_is_nobodys(stopped, tmp_path, text):  # noqa: F811
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    (out / "run.json").unlink()
    if text:
        (out / "run.json").write_text(text)
    with pytest.raises(InputError, match=r"run\.json.*(another|choose another) --output_dir"):
        start(out)
    assert (out / "checkpoint-6" / "optimizer.pt").is_file()


def test_settings_are_compared_with_the_record_whatever_has_become_of_the_yaml(tmp_path):
    settings = Settings(str(tmp_path / "run"))
    paused(settings, {})
    for damage in (lambda file: file.write_text("rate: 7\nseed: 0\n"), Path.unlink):
        damage(tmp_path / "run" / "config.yaml")
        Run("pretrain", settings, {})
        with pytest.raises(InputError, match=r"rate 0\.1 -> 7"):
            Run("pretrain", Settings(str(tmp_path / "run"), rate=7), {})


def test_a_finished_run_that_lost_a_file_is_not_finished_to_anybody(tmp_path, capsys):
    settings = Settings(str(tmp_path / "run"))
    run = Run("pretrain", settings, {})
    save_file({"x": torch.ones(3), "y": torch.zeros(2)}, run.path / "model.safetensors")
    run.finish({"loss": 1.0})
    assert Run("pretrain", settings, {}).finished and verify.main([str(run.path)]) == 0
    flip(run.path / "model.safetensors")
    for refused in (
        lambda: Run("pretrain", settings, {}),
        lambda: Run("x", Settings(str(tmp_path / "y")), {"m": run.path}),
    ):
        with pytest.raises(InputError, match=r"model\.safetensors is not what was written.*diffclip verify"):
            refused()
    (run.path / "metrics.json").unlink()
    capsys.readouterr()
    assert verify.main([str(run.path), "--json"]) == 2
    faults = json.loads(capsys.readouterr().out)[str(run.path)]["faults"]
    assert faults == ["metrics.json is missing", "model.safetensors is not what was written"]
    assert verify.main([str(run.path), "--accept"]) == 0 and Run("pretrain", settings, {}).finished
    save_file({"y": torch.tensor([0, float("nan")])}, run.path / "model.safetensors")
    assert verify.main([str(run.path), "--accept"]) == 2
    assert "model.safetensors: y holds what is no finite number" in capsys.readouterr().out
    with pytest.raises(InputError, match="no run directory"):
        verify.main([str(tmp_path)])
    record = json.loads((run.path / "run.json").read_text())
    del record["files"]
    (run.path / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"run\.json no longer says what its files hold"):
        Run("pretrain", Settings(str(tmp_path / "later")), {"model": run.path})
    del record["id"]  # as older versions wrote it
    (run.path / "run.json").write_text(json.dumps(record))
    Run("pretrain", Settings(str(tmp_path / "later")), {"model": run.path})


# ---- settings and data that have changed


@pytest.mark.slow
def test_a_learning_rate_is_taken_over_where_the_user_says_so(stopped, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    with pytest.raises(InputError, match=r"learning_rate 0\.1 -> 0\.01; .*--resume_with learning_rate"):
        start(out, learning_rate=0.01)
    taken = {"learning_rate": 0.01, "weight_decay": 0.2, "resume_with": ["learning_rate", "weight_decay"]}
    trainer, run = start(out, **taken)
    train(trainer, run)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["learning_rate"] for line in lines}
    for step in range(1, 13):  # linear to 0, as Trainer's default
        assert rates[step] == pytest.approx((0.1 if step <= 6 else 0.01) * (13 - step) / 12)
    decays = {group["weight_decay"] for group in trainer.optimizer.param_groups if "bias" not in str(group)}
    assert 0.2 in decays
    said = capsys.readouterr().out
    assert "goes on with learning_rate 0.1 -> 0.01, weight_decay 0.0 -> 0.2, as it was told to" in said
    assert len(json.loads((out / "run.json").read_text())["taken_over"]) == 2


@pytest.mark.parametrize("name, words", [("model", "decides which weights or samples"), ("learning_speed", "is none")])
def test_not_all_can_be_taken_over(name, words):
    with pytest.raises(InputError, match=f"resume_with`: {name} {words}.*learning_rate"):
        check(PretrainConfig(resume_with=[name]))


def test_a_finished_run_is_trained_further_from_another_directory(tmp_path):
    settings = settings_of(tmp_path / "run")
    Run("pretrain", settings, {}).finish({})
    with pytest.raises(InputError, match=rf"epochs 1 -> 2; .*--init_from {tmp_path / 'run'}"):
        Run("pretrain", settings_of(tmp_path / "run", epochs=2), {})


@pytest.fixture
def images(tmp_path):
    """A folder with links to pictures that lie elsewhere."""
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(bytes(range(200)))
        (tmp_path / "images" / f"{i}.png").symlink_to(tmp_path / f"{i}.png")
    (tmp_path / "images" / "up").symlink_to(tmp_path / "images")
    return tmp_path / "images"


@dataclass
class Folders(Settings):
    val_data: str = ""
    image_root: str = ""
    data_changed: str = "refuse"
    resume_with: list = field(default_factory=list)


CHANGES = {
    "1.png changed": lambda images: flip(images.parent / "1.png", 100),
    "2.png gone": lambda images: (images / "2.png").unlink(),
    "2 files changed, e.g. 0.png": lambda images: [flip(images.parent / f"{i}.png", 7) for i in (0, 2)],
    "4.png added": lambda images: (images / "4.png").write_bytes(b"x"),
}


@pytest.mark.parametrize("words", CHANGES)
def test_what_has_changed_in_a_folder_is_named_and_accepted_on_demand(tmp_path, images, words, capsys):
    settings = Folders(str(tmp_path / "run"), val_data=str(images), image_root=str(images))
    paused(settings, {"val_data": images, "image_root": images})
    CHANGES[words](images)
    with pytest.raises(InputError, match=rf"val_data \(.*{words}.*--data_changed accept"):
        Run("pretrain", settings, {"val_data": images, "image_root": images})
    accepting = replace(settings, data_changed="accept")
    Run("pretrain", accepting, {"val_data": images, "image_root": images})
    assert words in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert any(words in change for change in record["taken_over"])
    Run("pretrain", settings, {"val_data": images, "image_root": images})  # they are its own now


def test_pictures_beside_those_that_the_rows_name_decide_nothing(tmp_path, images, capsys):
    before = manifest.folder_manifest(images)
    (images / "new.png").write_bytes(b"x")
    (images / ".hidden").write_bytes(b"x")
    now = manifest.folder_manifest(images)
    assert manifest.differences("image_root", {"image_root": before}, {"image_root": now}) == ("", "new.png added")
    assert manifest.differences("val_data", {"val_data": before}, {"val_data": now}) == ("new.png added", "")
    assert manifest.differences("val_data", {}, {"val_data": now}) == ("", "")


def test_a_manifest_is_read_once_and_sees_a_change_that_keeps_size_and_time(tmp_path, images, monkeypatch):
    monkeypatch.setenv("DIFFCLIP_CACHE", str(tmp_path / "cache"))
    (images / "long.bin").write_bytes(bytes(3 << 20))
    first = manifest.folder_manifest(images)
    read = []
    monkeypatch.setattr(manifest, "sampled_content", lambda path, size: read.append(path) or "read")
    assert manifest.folder_manifest(images) == first and not read
    stat = (images.parent / "1.png").stat()
    flip(images.parent / "1.png", 5)
    os.utime(images.parent / "1.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert manifest.folder_manifest(images)["1.png"] == "read" and len(read) == 1
    next((tmp_path / "cache" / "manifests").iterdir()).write_bytes(b"broken")
    assert len(manifest.folder_manifest(images)) == len(first)


# ---- one writer

HOLDER = """
import sys, time
from diffclip.base import lock
lock.hold(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_writer_is_refused_by_name_and_a_dead_ones_lock_is_free(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, env=environment(), stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(
        InputError, match=rf"is being written by process {process.pid} on \S+ since \d{{4}}-.*--output_dir"
    ):
        lock.hold(tmp_path)
    process.kill()
    process.wait()
    lock.hold(tmp_path)
    lock.hold(tmp_path)  # its own
    lock.release(tmp_path)
    assert not list(tmp_path.iterdir())


# ---- ranks agree


def says_what_it_was_told(arguments):
    rank = int(os.environ["RANK"])
    print(f"{from_main(lambda: {'from': rank})} {gather(f'rank {rank}')}\n", end="", flush=True)
    try:
        from_main(lambda: Path("nowhere").read_text() if rank else refuse())
    except InputError as error:
        print(f"{rank} {error}\n", end="", flush=True)
    time.sleep(3 * rank)  # rank 0, at which the others ask, has no more to do
    print(f"{from_main(lambda: 'the last word')}\n", end="", flush=True)


def refuse():
    raise InputError("x: not there")


def starts_where_it_is(arguments):
    os.chdir(arguments[int(os.environ["RANK"])])
    Run("pretrain", Settings("run"), {})


@pytest.mark.slow
def test_all_ranks_do_what_rank_0_decides():
    said = run_ranks(2, says_what_it_was_told).stdout.splitlines()
    assert (
        sorted(said)
        == ["0 x: not there", "1 x: not there"] + ["the last word"] * 2 + ["{'from': 0} ['rank 0', 'rank 1']"] * 2
    )


@pytest.mark.slow
def test_a_directory_that_not_all_ranks_see_is_refused_at_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    ended = run_ranks(2, starts_where_it_is, str(tmp_path / "a"), str(tmp_path / "b"), check=False)
    assert "does not see what rank 0 on" in ended.stderr and "shared file system" in ended.stderr
    run_ranks(2, starts_where_it_is, str(tmp_path / "b"), str(tmp_path / "b"))
    record = json.loads((tmp_path / "b" / "run" / "run.json").read_text())
    assert record["ranks"] == 2 and len(record["hosts"]) == 1


def test_ranks_that_cannot_meet_say_where(monkeypatch):
    from diffclip.base import ranks

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        ranks._store.cache_clear()
        with pytest.raises(InputError, match=rf"the ranks cannot meet at 127\.0\.0\.1:{port} .*--master_port"):
            ranks.from_main(dict)
    ranks._store.cache_clear()


# ---- told to end


def trains(arguments):
    """A rank of a training that goes slowly, and says when it is under way."""
    from transformers import TrainerCallback

    class Slow(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            time.sleep(0.1)
            if state.global_step == 3:
                Path(arguments[1], f"under way {os.environ['RANK']}").touch()

    trainer, run = start(Path(arguments[0]), Slow(), micro=4, dropout=0.0, save_steps=100)
    train(trainer, run)
    run.finish({})


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_one_rank_ends_all_with_a_checkpoint_of_the_same_step(tmp_path, number):
    out = tmp_path / "run"
    with start_ranks(2, trains, str(out), str(tmp_path), folder=tmp_path) as processes:
        deadline = time.time() + 120
        while not (tmp_path / "under way 1").exists():
            assert time.time() < deadline and all(p.is_alive() for p in processes), (tmp_path / "stderr").read_text()
            time.sleep(0.05)
        os.kill(processes[1].pid, number)
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [NOT_FINISHED] * 2, (tmp_path / "stderr").read_text()
    record = json.loads((out / "run.json").read_text())
    step = int(next(out.glob("checkpoint-*")).name.rpartition("-")[2])
    assert record["state"] == "stopped" and 3 <= step < 12
    run_ranks(2, trains, str(out), str(tmp_path))
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(1, 13)] and json.loads((out / "run.json").read_text())["state"] == "finished"
    if number == signal.SIGTERM:
        run_ranks(2, trains, str(tmp_path / "calm"), str(tmp_path))
        one, two = (load(folder) for folder in (tmp_path / "calm", out))
        assert one == two


def load(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def test_a_signal_that_is_ignored_stays_ignored_and_handlers_come_back():
    from stages import signals

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        term = signal.getsignal(signal.SIGTERM)
        with signals.noticed():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and signal.getsignal(signal.SIGTERM) != term
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.Told()()
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.Told()() and signal.getsignal(signal.SIGTERM) == term  # a second one ends it
        assert signal.getsignal(signal.SIGTERM) == term
        with signals.noticed():
            assert not signals.Told()()
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- nothing is left running

CHILD = """
import time
from diffclip.base.orphans import end_with_parents
end_with_parents()
print("up", flush=True)
time.sleep(60)
"""
PARENT = """
import subprocess, sys, os, time
from diffclip.base.orphans import as_parent
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env={**os.environ, **as_parent()}, stderr=subprocess.PIPE)
print(child.pid, flush=True)
print(child.stderr.read().decode(), flush=True)
"""


def test_a_command_ends_with_the_one_that_started_it():
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    child = int(parent.stdout.readline())
    assert parent.stdout.readline() == "up\n"
    parent.kill()
    parent.wait()
    deadline = time.time() + 10
    while orphans._start(child):
        assert time.time() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("value", ["elsewhere:1:1", "7", "", "::", f"{os.uname().nodename}:x:1"])
def test_a_parent_of_another_machine_says_nothing(monkeypatch, value):
    monkeypatch.setenv(orphans.PARENT, value)
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    orphans.end_with_parents()
    time.sleep(0.05)
    assert not ended and not orphans._watching.is_set()


def test_launchers_are_told_from_other_programs():
    def is_launcher(*command):
        process = subprocess.Popen([sys.executable, *command], stdin=subprocess.PIPE)
        try:
            time.sleep(0.2)
            return orphans._is_launcher(process.pid)
        finally:
            process.kill()
            process.wait()

    assert not is_launcher("-c", "input()  # torchrun deepspeed")
    assert is_launcher("-u", "-m", "torch.distributed.run", "--help") in (True, False)  # it may have ended already
    assert not orphans._is_launcher(os.getpid()) and not orphans._is_launcher(2**22 + 1)
