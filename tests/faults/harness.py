"""Disturbs every stage at random moments, gives the same command again until it ends, and compares with a calm run.

`World` is a small world of scenes with one calm run of each stage; `trial` disturbs another one, by a seed. What
holds: the same command comes to the calm run's result, nothing is left running, and what can be said in one sentence
is not said by a traceback. `python -m benchmarks.faults` tries as many as one likes.
"""

import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
import yaml
from launch import QUICKSTART, forked_lmms_eval, kill, run_ranks, start_ranks
from safetensors.torch import load_file

from diffclip.base.files import read_json
from stages.run import NOT_FINISHED

SCENES = {"pairs": 128, "retrieval": 10, "class_train": 80, "class_val": 40, "class_test": 40, "align": 48}
SCENES |= {"conversations": 48, "texts": 200, "pope": 6, "mmvp": 1, "segmentation": 1}
SMALL = {  # beside the quickstart's settings
    "language": {"global_batch_size": 16, "hidden_size": 32, "layers": 1, "save_steps": 3, "num_workers": 0},
    "pretrain": {"global_batch_size": 32, "epochs": 2, "save_steps": 2, "num_workers": 0},
    "align": {"global_batch_size": 8, "save_steps": 2, "deepspeed": ""},
    "instruct": {"global_batch_size": 8, "epochs": 1, "save_steps": 2, "deepspeed": ""},
    "evaluate": {"few_shot_episodes": 10},
}
TRAININGS = ("language", "pretrain", "align", "instruct")
MOST_TRIES = 6
NAMED = (0, 2, NOT_FINISHED)  # exit codes of a command that knew what happened


@dataclass
class World:
    """Commands of the stages, each with the calm run that it is compared with, in `folder`."""

    folder: Path
    only: str = ""  # parts of the scenes, where not every stage is disturbed
    seconds: dict[tuple[str, int], float] = field(default_factory=dict)  # what a calm run takes, by stage and ranks

    def __post_init__(self) -> None:
        options = [f"--{name}={value}" for name, value in SCENES.items()] + [f"--only={self.only}"] * bool(self.only)
        run_ranks(0, "diffclip", "scenes", "export", str(self.folder / "scenes"), *options)
        shutil.rmtree(self.folder / "scenes" / "classification" / "shape_color", ignore_errors=True)
        for stage, changes in SMALL.items():
            values = yaml.safe_load((QUICKSTART / f"{stage}.yaml").read_text()) | {"use_cpu": True} | changes
            values = {k: v for k, v in values.items() if stage in TRAININGS or k != "use_cpu"}
            (self.folder / f"{stage}.yaml").write_text(yaml.safe_dump(values))

    def command(self, stage: str, out: Path) -> list[str]:
        """The words after `python -m`."""
        scenes, config = self.folder / "scenes", f"--config={self.folder / stage}.yaml"
        images = f"--image_root={scenes / 'llava' / 'images'}"
        own: dict[str, Callable[[], list[str]]] = {
            "language": lambda: [f"--text={scenes / 'llava' / 'text.jsonl'}"],
            "pretrain": lambda: ["--model=CLIP-tiny", f"--train_data={scenes}/pretrain/*.tar"],
            "align": lambda: [
                *(f"--vision_tower={self.calm('pretrain')}", f"--language_model={self.calm('language')}"),
                *(f"--data={scenes / 'llava' / 'align.json'}", images),
            ],
            "instruct": lambda: [
                *(f"--model={self.calm('align')}", f"--data={scenes / 'llava' / 'instruct.json'}", images),
            ],
            "evaluate": lambda: [
                *(f"--clip={self.calm('pretrain')}", f"--data_root={scenes}", f"--mllm={self.calm('instruct')}"),
                *(f"--pope={scenes / 'pope'}", f"--image_root={scenes / 'pope' / 'images'}"),
            ],
        }
        if stage == "report":
            return ["diffclip", "report", str(self.folder / "report-runs"), f"--output_dir={out}"]
        return ["diffclip", stage, config, *own[stage](), f"--output_dir={out}"]

    def calm(self, stage: str, ranks: int = 0) -> Path:
        """The directory of an undisturbed run, which is made when it is first asked for."""
        out = self.folder / f"{stage}-{ranks or 'calm'}"
        if (stage, ranks) not in self.seconds:
            self.seconds[stage, ranks] = 0.0
            arguments = self.command(stage, out)
            if stage == "report":
                runs = self.folder / "report-runs"
                runs.mkdir()
                for name in (*TRAININGS, "evaluate"):
                    shutil.copytree(self.calm(name), runs / name)
            started = time.time()
            with forked_lmms_eval():
                run_ranks(ranks, *arguments)
            self.seconds[stage, ranks] = time.time() - started
        return out


def result(stage: str, out: Path) -> object:
    """What has to be the same: weights, scores, or the tables of a page."""
    if stage in TRAININGS:
        weights = load_file(next(iter(sorted(out.glob("*.safetensors")))))
        return {name: tensor.double().sum().item() for name, tensor in weights.items() if torch.is_tensor(tensor)}
    if stage == "evaluate":
        return read_json(out / "metrics.json")
    return (out / "report.md").read_text().replace(str(out), "")


def differ(one: object, other: object) -> bool:
    """Whether results are not the same; scores of two generations may differ in no digit either."""
    return one != other


def restricted(arguments: list[str]) -> None:
    """A stage whose writes end at so many bytes, as on a full disk, or that may hold so few files open."""
    import runpy
    import sys

    kind, amount, *rest = arguments
    limits = {"full disk": resource.RLIMIT_FSIZE, "few open files": resource.RLIMIT_NOFILE}
    resource.setrlimit(limits[kind], (int(amount), resource.getrlimit(limits[kind])[1]))
    sys.argv = rest
    runpy.run_module(rest[0], run_name="__main__", alter_sys=True)


def damage(out: Path, rng: random.Random) -> str:
    """Spoil one file of the newest whole checkpoint; what was done, or "" where there is none."""
    whole = sorted(out.glob("checkpoint-*/complete"), key=lambda path: path.stat().st_mtime)
    files = sorted(file for file in whole[-1].parent.rglob("*") if file.is_file()) if whole else []
    if not files:
        return ""
    file = rng.choice(files)
    how = rng.choice(("cut", "flipped", "gone"))
    size = file.stat().st_size
    if how == "gone" or not size:
        file.unlink()
    elif how == "cut":
        os.truncate(file, rng.randrange(size))
    else:
        content = bytearray(file.read_bytes())
        content[rng.randrange(size)] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    return f"{file.parent.name}/{file.name} {how}"


@dataclass
class Trial:
    """What was done to one run, and what came of it."""

    stage: str
    ranks: int
    fault: str
    at: float = 0.0  # seconds after the start
    tries: int = 0  # commands that it took, the disturbed one counted
    wrong: str = ""  # "" where it held


def faults_of(stage: str) -> list[str]:
    """What is tried on a stage."""
    common = ["kill", "kill one", "terminate", "hang up", "pause", "full disk", "few open files"]
    return [*common, *(["kill and spoil"] * 2 if stage in TRAININGS else [])]


def trial(world: World, stage: str, ranks: int, fault: str, seed: int) -> Trial:
    """Disturb a run of `stage` once, go on to its end, and compare."""
    rng = random.Random(f"{stage} {ranks} {fault} {seed}")
    wanted = result(stage, world.calm(stage, ranks))
    done = Trial(stage, ranks, fault, at=rng.uniform(0.05, 1.0) * world.seconds[stage, ranks])
    with tempfile.TemporaryDirectory(dir=world.folder) as name, forked_lmms_eval():
        folder, out = Path(name), Path(name) / "run"
        arguments = world.command(stage, out)
        code, said = disturbed(arguments, ranks, done, folder, rng)
        if fault == "kill and spoil":
            done.fault += f": {damage(out, rng) or 'nothing there yet'}"
        if fault not in ("kill", "kill and spoil") and "Traceback" in said:
            done.wrong = f"a traceback: {said.strip().splitlines()[-1][:200]}"
        done.tries = 1
        while not done.wrong and code:
            if done.tries == MOST_TRIES:
                done.wrong = f"never ended: {said.strip().splitlines()[-1:]}"
                break
            ended = run_ranks(ranks, *arguments, check=False)
            code, said = ended.returncode, ended.stderr
            done.tries += 1
            if code not in NAMED:
                done.wrong = f"ended with {code}: {said.strip().splitlines()[-1:]}"
        if not done.wrong and result(stage, out) != wanted:
            done.wrong = "another result than undisturbed"
        if left := [p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if holds(p.info["cmdline"], name)]:
            done.wrong = done.wrong or f"left running: {left[0]}"
    return done


def disturbed(arguments: list[str], ranks: int, done: Trial, folder: Path, rng: random.Random) -> tuple[int, str]:
    """Exit code and stderr of a run that something happens to."""
    command: list[str | Callable] = [*arguments]
    if done.fault in ("full disk", "few open files"):
        # not so few that what is printed into the harness's own files is cut
        amount = rng.choice((20_000, 60_000, 1_000_000)) if done.fault == "full disk" else rng.choice((24, 40, 64))
        done.fault += f", {amount}"
        command = [restricted, done.fault.partition(",")[0], str(amount), *arguments]
    with start_ranks(ranks, *command, folder=folder) as processes:  # type: ignore[arg-type]
        deadline = time.time() + (done.at if "," not in done.fault else 600)
        while time.time() < deadline and all(process.is_alive() for process in processes):
            time.sleep(0.02)
        alive = [process for process in processes if process.is_alive()]
        victim = rng.choice(alive) if alive else None
        if victim and done.fault in ("kill", "kill and spoil"):
            kill(*processes)
        elif victim and done.fault == "kill one":
            kill(victim)  # the others end by themselves, unless they are waited for too long
        elif victim and done.fault in ("terminate", "hang up"):
            with suppress(ProcessLookupError):
                os.kill(victim.pid, signal.SIGTERM if done.fault == "terminate" else signal.SIGHUP)
        elif victim and done.fault == "pause":
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(victim.pid, signal.SIGSTOP)
                time.sleep(1)
                os.kill(victim.pid, signal.SIGCONT)
        codes = ends(processes)
        odd = [code for each, code in zip(processes, codes) if each is not victim and code not in (*NAMED, -9)]
        if done.fault == "kill one" and odd:  # -9: it waited at the store of rank 0, and `ends` gave up
            done.wrong = f"a rank whose peer was killed ended with {odd}"
        code = next((code for code in codes if code), 0)
    told = folder / "stderr"
    return code, told.read_text(errors="replace") if told.is_file() else ""


def ends(processes: list) -> list[int]:
    """Exit codes; where one rank fails, the others are killed a little later, as a launcher does."""
    deadline = None
    while any(process.is_alive() for process in processes):
        if deadline is None and any(process.exitcode for process in processes):
            deadline = time.time() + 20
        if deadline and time.time() > deadline:
            kill(*processes)
        time.sleep(0.05)
    return [process.exitcode or 0 for process in processes]


def holds(cmdline: list[str] | None, name: str) -> bool:
    return any(name in part for part in cmdline or [])


def trials(
    world: World, stages: list[str], ranks: list[int], each: int, seed: int, faults: list[str] | None = None
) -> Iterator[Trial]:
    """`each` trials of every stage and number of ranks; all faults in turn, or those named."""
    for stage in stages:
        for number in ranks if stage in TRAININGS else [0]:
            kinds = faults or faults_of(stage)
            for i in range(each):
                yield trial(world, stage, number, kinds[(i + seed) % len(kinds)], seed * 1000 + i)
