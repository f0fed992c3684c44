"""Score models on every CLIP benchmark found under a folder and print one table.

python -m diffclip.benchmarks --model runs/clip runs/diffclip --data-root data/scenes --out results

With more devices: torchrun --nproc-per-node 8 -m diffclip.benchmarks ..., the same numbers.
"""

import argparse
import os
import sys
from pathlib import Path

from diffclip.base.errors import InputError, exit_on_input_error
from diffclip.benchmarks import PROTOCOLS


def parser() -> argparse.ArgumentParser:
    """Return the command line, without importing anything slow."""
    summary, example, more = (__doc__ or "").split("\n\n")
    p = argparse.ArgumentParser(
        "python -m diffclip.benchmarks", description=summary, epilog=f"example: {example}. {more}"
    )
    p.add_argument(
        "--model",
        nargs="+",
        required=True,
        metavar="PATH | NAME=PATH,...",
        help="run directories or checkpoints, several paths for the seeds of one model; the first is the reference",
    )
    p.add_argument(
        "--data-root",
        type=Path,
        required=True,
        help="folder with classification/, shifts/, retrieval/, mmvp/",
    )
    p.add_argument("--out", type=Path, required=True, help="where scores, outcomes and features go")
    p.add_argument("--suite", help="`paper`, or a YAML file that names the folders; else they are found by layout")
    p.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=PROTOCOLS, help="which to run (all)")
    p.add_argument("--templates", help="imagenet7, imagenet80 or a JSON file, instead of each set's own")
    p.add_argument("--probe", choices=("exact", "fast"), default="exact", help="linear-probe solver (exact)")
    p.add_argument(
        "--probe-features",
        choices=("before", "after"),
        default="before",
        help="probe and few-shot before the projection, as the protocol has it, or after (before)",
    )
    p.add_argument("--episodes", type=int, default=5000, help="few-shot episodes (5000)")
    p.add_argument("--way", type=int, default=5, help="classes of a few-shot episode (5)")
    p.add_argument("--shot", type=int, default=5, help="images of each class to learn from (5)")
    p.add_argument("--seed", type=int, default=0, help="draws the few-shot episodes (0)")
    p.add_argument("--precision", choices=("float32", "bfloat16", "float16"), default="float32")
    p.add_argument("--batch-size", type=int, default=128)
    p.add_argument("--workers", type=int, help="loader processes (up to 8 with a GPU, else none)")
    p.add_argument("--device", help="cuda, cpu, ... (cuda where there is one)")
    return p


def main() -> None:
    with exit_on_input_error():
        if sys.argv[1:2] == ["data"]:
            return data(sys.argv[2:])
        run(parser().parse_args())


def data(arguments: list[str]) -> None:
    """`data check` lists the paper's sets and how to get them, `data download SET...` lets torchvision fetch some."""
    p = argparse.ArgumentParser("python -m diffclip.benchmarks data", description="The paper's sets.")
    p.add_argument("action", choices=("check", "download"), help="list all sets, or fetch some with torchvision")
    p.add_argument("sets", nargs="*", metavar="SET", help="what to fetch: food101, cifar10, ...")
    p.add_argument("--data-root", type=Path, required=True, help="folder with a folder for each set")
    options = p.parse_args(arguments)
    root = options.data_root
    if options.action == "download":
        from diffclip.benchmarks.torchvision_sets import MARKERS, read_torchvision, torchvision_root

        if not options.sets or not set(options.sets) <= set(MARKERS):
            raise InputError(f"data download: name sets among {', '.join(MARKERS)}; 0_data.sh fetches the others")
        for name in options.sets:
            folder = torchvision_root(name, root / name, root) or root / name
            splits = read_torchvision(name, folder, download=True)[1]
            print(f"{name}: {', '.join(f'{len(rows):,} {split}' for split, rows in splits.items())}")
        return

    from rich.console import Console
    from rich.table import Table

    from diffclip.benchmarks.paper import SETS, check

    title = f"the paper's benchmarks in {root}"
    result = Table("set", "classes", "scored by", "state", "test images", "how to get it", title=title)
    for name, state, found, expected, how in check(root):
        classes = str(SETS[name].classes or "")
        result.add_row(name, classes, SETS[name].metrics(name), state, f"{found:,} of {expected:,}", how)
    Console(width=None if sys.stdout.isatty() else 180).print(result)


def run(options: argparse.Namespace) -> None:
    """Evaluate each model into out/<name>, then print scores and, against the first model, differences."""
    import safetensors.numpy
    import torch
    from rich.console import Console

    import diffclip
    from diffclip.base.files import read_json, write_whole
    from diffclip.benchmarks import datasets, paper
    from diffclip.benchmarks.comparison import compare, markdown, model_groups, table
    from diffclip.benchmarks.evaluate import METRICS_FILE, OUTCOMES_FILE, evaluate_clip

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "WORLD_SIZE" in os.environ:  # torchrun
        torch.distributed.init_process_group("gloo")  # features are gathered on the CPU
        device = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
    suite, missing = None, {}
    if options.suite == "paper":
        suite, missing = paper.suite(options.data_root)
        if not suite:
            raise InputError(f"{options.data_root} holds none of the paper's sets: see `data check`")
    elif options.suite:
        suite = datasets.read_suite_file(Path(options.suite))
    groups = model_groups(options.model)
    scores: dict[str, list[dict]] = {name: [] for name in groups}
    outcomes: dict[str, list[dict]] = {name: [] for name in groups}
    skipped, notes, written = {}, {}, []
    for name, source in [(name, source) for name, sources in groups.items() for source in sources]:
        model, preprocess, tokenizer = diffclip.load(source)
        out = options.out / name
        if len(groups[name]) > 1:
            out = out / str(len(scores[name]))
        found = evaluate_clip(
            model.to(device),
            preprocess,
            tokenizer,
            options.data_root,
            out,
            suite=suite,
            missing=missing,
            protocols=options.protocols,
            templates=options.templates,
            probe=options.probe,
            seed=options.seed,
            episodes=options.episodes,
            way=options.way,
            shot=options.shot,
            probe_features=options.probe_features,
            precision=options.precision,
            batch_size=options.batch_size,
            workers=options.workers,
            cache_dir=options.out / "features",
        )
        scores[name].append(found)
        if found:  # another rank than 0 has only encoded
            outcomes[name].append(safetensors.numpy.load_file(out / OUTCOMES_FILE))
            told = read_json(out / METRICS_FILE)
            skipped |= told["skipped"]
            notes |= told["about"]["notes"]
            written.append(str(out / METRICS_FILE))
    if not written:
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    rows = compare(scores, outcomes)
    write_whole(options.out / "comparison.md", markdown(rows))
    console.print(table(rows))
    for what, note in notes.items():
        console.print(f"{what}: {note}")
    for what, why in skipped.items():
        console.print(f"skipped {what}: {why}")
    console.print(f"wrote {options.out / 'comparison.md'}, {', '.join(written)}")


if __name__ == "__main__":
    main()
