"""The whole chain for several variants: scenes -> pretrain -> language -> align -> instruct -> evaluate -> report.

Runs the same stage commands that a user would type, and prints each; on a CPU the variants side by side, and the
language model beside their pretraining, since two small models with a core each take less time than one after the other
with both. Finished stages are skipped and an interrupted one goes on from its last checkpoint, so the same command may
be given again at any time. Each seed draws its own scenes and has a folder of its own; the report, written anew after
each, has all of them.

    diffclip pipeline --seeds 0 1 2 --variants CLIP DiffCLIP --output_dir runs/three_seeds
    diffclip pipeline --fast  # one model in a simpler world, in minutes
"""

import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from diffclip.base.errors import InputError, exit_on_input_error
from diffclip.base.files import read_json
from diffclip.base.lines import print_line
from diffclip.base.orphans import as_parent
from diffclip.base.ranks import free_port
from diffclip.base.schema import LOG, RECORD
from diffclip.base.threads import cores
from stages.config import parse, read_yaml, require
from stages.settings import AlignConfig, InstructConfig, PipelineConfig

QUICKSTART, FAST = "quickstart/pipeline", "fast/pipeline"  # the configurations where none is named

running: set[subprocess.Popen] = set()
ending = threading.Event()  # a variant has failed: what is begun from now on is ended at once


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    named = any(word.split("=")[0] == "--config" for word in argv)
    config = parse(PipelineConfig, __doc__, argv if named else [f"--config={QUICKSTART}", *argv])
    if config.fast and named:
        raise InputError("settings `fast` and `config`: `fast` is a configuration of its own; leave one out")
    if config.fast:
        config = parse(PipelineConfig, __doc__, [f"--config={FAST}", *argv])
    require(config, "output_dir", "variants", "seeds", "pretrain", "language", "align", "instruct", "evaluate")
    os.environ |= as_parent()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    multimodal = (read_yaml(config.align, AlignConfig), read_yaml(config.instruct, InstructConfig))
    on_cpu = all(values.get("use_cpu") for values in multimodal)
    if on_cpu:  # DeepSpeed's launcher warns of each GPU that it misses
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    at_once = max(1, cores() // config.ranks)
    jobs = min(config.jobs or (at_once if on_cpu else 1), len(config.variants))
    beside = jobs > 1 or (on_cpu and cores() > 1)
    started = time.time()
    out = Path(config.output_dir)
    folders = seed_folders(out, list(dict.fromkeys(config.seeds)))
    reported: list[str] = []
    for number, (seed, folder) in enumerate(folders.items(), 1):
        if len(folders) > 1:
            print_line(f"\nSeed {seed}, {number} of {len(folders)}, in {folder}", keep="\n")
        run_scenes(config, seed, folder)
        run_variants(config, seed, folder, jobs, side_by_side=beside)
        reported += [str(folder / variant) for variant in config.variants]
        run_verb("report", *reported, "--output_dir", f"{out}/report")
    print_line()
    print_line(f"All stages took {(time.time() - started) / 60:.1f} minutes. Report: {out}/report/index.html")
    print_line(what_next(folders, config.variants, argv), keep="\n")


def seed_folders(out: Path, seeds: list[int]) -> dict[int, Path]:
    """Where each seed's chain lies: a single one in `out` itself, several in `out`/seed-N.

    What an earlier command began stays where it is: a quickstart of seed 0 is the first of `--seeds 0 1 2` there.
    """
    made = out / "scenes" / "scenes.json"
    there = read_json(made)["options"].get("seed") if made.is_file() else None

    def folder(seed: int) -> Path:
        own = out / f"seed-{seed}"
        return out if there == seed or (there is None and len(seeds) == 1 and not own.exists()) else own

    return {seed: folder(seed) for seed in seeds}


def run_scenes(config: PipelineConfig, number: int, out: Path) -> None:
    """The scenes of one seed, into `out`."""
    options = (f"--{key}={value}" for key, value in config.scenes.items())
    run_verb("scenes", "export", str(out / "scenes"), f"--seed={number}", *options)


def run_language(config: PipelineConfig, number: int, out: Path, threads: int, label: str = "") -> None:
    """The language model that all variants of one seed start from, into `out`."""
    data = out / "scenes" / "llava"
    run_verb(
        *("language", f"--config={config.language}", f"--seed={number}", f"--text={data}/text.jsonl"),
        *("--vocabulary_from", f"{data}/align.json", f"{data}/instruct.json", f"--output_dir={out}/language"),
        label=label,
        threads=threads,
    )


def run_variants(config: PipelineConfig, number: int, out: Path, jobs: int, side_by_side: bool) -> None:
    """All stages for one seed: one command after the other or, `side_by_side`, `jobs` variants at a time and beside
    their pretraining the language model, which needs none of it; where one fails, the others are ended.
    """
    if not side_by_side:
        run_language(config, number, out, threads_of(jobs))
        for variant in config.variants:
            run_variant(config, number, out, variant, jobs)
        return
    ending.clear()
    labels = {variant: f"[{variant}] " for variant in (config.variants if jobs > 1 else config.variants[:1])}
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(jobs) as pool:
        try:
            language = first.submit(run_language, config, number, out, threads_of(jobs + 1), "[language] ")
            chains = [
                pool.submit(run_variant, config, number, out, v, jobs, language.result, labels.get(v, ""))
                for v in config.variants
            ]
            for chain in as_completed([language, *chains]):
                chain.result()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            ending.set()
            for process in [*running]:
                end(process)
            if isinstance(error, KeyboardInterrupt):
                interrupted()
            raise


def run_variant(
    config: PipelineConfig,
    number: int,
    out: Path,
    variant: str,
    jobs: int,
    language: Callable[[], None] = lambda: None,
    label: str = "",
) -> None:
    """Every stage of one variant, one after the other, beside those of `jobs` - 1 others; `language` waits for the
    language model; `label` begins each line of what does not run alone.
    """
    seed, data, runs = f"--seed={number}", out / "scenes", out / variant
    run_verb(
        *("pretrain", f"--config={config.pretrain}", seed, f"--model={variant}-{config.size}"),
        *(f"--train_data={data}/pretrain/*.tar", f"--val_data={data}/classification/shape"),
        f"--output_dir={runs}/pretrain",
        label=label,
        threads=max(1, min(threads_of(jobs), cores() - 1)),  # one is for the language model, which ends sooner
    )
    language()
    label = label if jobs > 1 else ""
    run_deepspeed(
        config.ranks,
        *("align", f"--config={config.align}", seed, f"--vision_tower={runs}/pretrain"),
        *(f"--language_model={out}/language", f"--data={data}/llava/align.json"),
        *(f"--image_root={data}/llava/images", f"--output_dir={runs}/align"),
        label=label,
        threads=threads_of(jobs * config.ranks),
    )
    run_deepspeed(
        config.ranks,
        *("instruct", f"--config={config.instruct}", seed, f"--model={runs}/align"),
        *(f"--data={data}/llava/instruct.json", f"--image_root={data}/llava/images"),
        f"--output_dir={runs}/instruct",
        label=label,
        threads=threads_of(jobs * config.ranks),
    )
    run_verb(
        *("evaluate", f"--config={config.evaluate}", seed, f"--clip={runs}/pretrain", f"--mllm={runs}/instruct"),
        *(f"--data_root={data}", f"--pope={data}/pope", f"--image_root={data}/pope/images"),
        f"--output_dir={runs}/evaluate",
        label=label,
        threads=threads_of(jobs),
    )


def what_next(folders: dict[int, Path], variants: list[str], argv: list[str]) -> str:
    """Commands to go on with, as they must be typed after the finished chain `argv`."""
    out = next(iter(folders.values()))
    image = min((out / "scenes" / "pope" / "images").iterdir())
    run = str(out / variants[-1] / "instruct")
    towers = [str(out / variant / "pretrain") for variant in variants]
    seeds = [*folders, *(seed for seed in range(3) if seed not in folders)][:3]
    query = ["--query", "a circle", "--models", *towers, "--out", str(out / "maps.png")]
    commands = [
        ("ask the model", ["chat", run, "--image", str(image), "Is there a circle in the image?"]),
        ("see where each tower looks", ["maps", str(image), *query]),
        ("chat on a page in the browser, on this machine alone", ["app", run]),
        ("three seeds in one report; what is finished stays", ["pipeline", *argv, "--seeds", *map(str, seeds)]),
        ("your own data: settings to change, and docs/data.md", ["config", "copy", "own_data/pretrain", "mine.yaml"]),
    ]
    lines = []
    if activate := os.environ.get("DIFFCLIP_ACTIVATE"):  # set by quickstart.sh where the environment is not active
        lines += ["# enter the environment", activate]
    for why, (verb, *words) in commands:
        if verb == "pipeline" and len(folders) >= 3:
            continue
        lines.append(f"# {why}")
        if verb == "app" and importlib.util.find_spec("gradio") is None:
            lines.append("python -m pip install 'diffclip-stack[app]'")
        lines.append(shlex.join(["diffclip", verb, *words]))
    return "\nWhat next:\n" + "\n".join(f"  {line}" for line in lines)


def threads_of(processes: int) -> int:
    """Threads for each of `processes` that run at the same time, at least one."""
    return max(1, cores() // processes)


def run_verb(*arguments: str, label: str = "", threads: int | None = None) -> None:
    """Run `diffclip ...` to its end; exits with its code if it fails."""
    run([sys.executable, "-m", "diffclip", *arguments], ["diffclip", *arguments], label, threads)


def run_deepspeed(ranks: int, *arguments: str, label: str, threads: int) -> None:
    """Run a stage under the deepspeed launcher on `ranks` devices of this machine.

    The launcher can exit with 0 although a rank died, so the result is looked for in run.json.
    """
    out = Path(next(a for a in arguments if a.startswith("--output_dir=")).split("=", 1)[1])
    if finished(out):  # the stage says so itself, in a tenth of the launcher's time
        return run_verb(*arguments, label=label, threads=threads)
    options = ["--num_gpus", str(ranks), "--log_level", "error", "--module", "diffclip", *arguments]
    launcher = [sys.executable, str(Path(sys.executable).parent / "deepspeed"), "--master_port", str(free_port())]
    run([*launcher, *options], ["deepspeed", *options], label, threads)
    if not finished(out):
        raise InputError(f"{arguments[0]} did not finish: see the lines above and {out}/{LOG}, then start again")


def finished(out: Path) -> bool:
    """Whether the run directory `out` says that its stage came to its end."""
    path = out / RECORD
    record = read_json(path) if path.is_file() else None
    return isinstance(record, dict) and record.get("state") == "finished"


def run(command: list[str], typed: list[str], label: str, threads: int | None) -> None:
    """Run a command in a process group of its own, so that an interrupt ends all of it; print it as typed.

    Its lines are its own, unless they get a label: then nobody has the terminal, and there are no bars. The command
    computes with so many `threads`, if any are given, unless the user has said how many.
    """
    print_line()
    print_line(f"{label}$ {shlex.join(typed)}")
    output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "bufsize": 0} if label else {}
    settings = ({"OMP_NUM_THREADS": str(threads)} if threads else {}) | os.environ
    process = subprocess.Popen(command, start_new_session=True, env=settings, **output)
    running.add(process)
    if ending.is_set():
        end(process)
    try:
        for line in process.stdout or ():
            print_line(label + line.decode(errors="replace").rstrip())
        code = process.wait()
    except BaseException:
        end(process)
        interrupted()
    finally:
        running.discard(process)
    if code:
        sys.exit(code)


def end(process: subprocess.Popen) -> None:
    """Kill a process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def interrupted() -> NoReturn:
    print_line("\ninterrupted; the same command goes on from here", keep="\n", error=True)
    sys.exit(130)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
