"""Score several models, each with one or more seeds, on a suite, and compare them in one table."""

import argparse
import os
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch

import diffclip
from diffclip.base.console import print_table
from diffclip.base.devices import pick_device
from diffclip.base.errors import InputError
from diffclip.base.files import read_json, write_whole
from diffclip.benchmarks import datasets, paper
from diffclip.benchmarks.comparison import compare, markdown, model_groups
from diffclip.benchmarks.evaluate import METRICS_FILE, OUTCOMES_FILE, evaluate_clip
from diffclip.benchmarks.protocol import Settings


def run(options: argparse.Namespace) -> None:
    """Evaluate each model into output_dir/<name>, then print scores and, against the first model, differences."""
    device = pick_device(options.device)
    if "WORLD_SIZE" in os.environ:  # torchrun
        torch.distributed.init_process_group("gloo")  # features are gathered on the CPU
        if device == torch.device("cuda"):
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    suite, missing = _suite(options.suite, options.data_root)
    settings = Settings(**{name: vars(options)[name] for name in Settings.__dataclass_fields__ if name in options})
    groups = model_groups(options.model)
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in groups}
    outcomes: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in groups}
    skipped: dict[str, str] = {}
    notes: dict[str, str] = {}
    written = []
    for name, source in [(name, source) for name, sources in groups.items() for source in sources]:
        model, preprocess, tokenizer = diffclip.load(source)
        out = options.output_dir / name
        if len(groups[name]) > 1:
            out = out / str(len(scores[name]))
        metrics = evaluate_clip(
            model.to(device),
            preprocess,
            tokenizer,
            options.data_root,
            out,
            settings,
            suite=suite,
            missing=missing,
            cache_dir=options.output_dir / "features",
        )
        scores[name].append(metrics)
        if metrics:  # another rank than 0 has only encoded
            outcomes[name].append(safetensors.numpy.load_file(out / OUTCOMES_FILE))
            stored = read_json(out / METRICS_FILE)
            skipped |= stored["skipped"]
            notes |= stored["about"]["notes"]
            written.append(str(out / METRICS_FILE))
    if not written:
        return
    rows = compare(scores, outcomes)
    write_whole(options.output_dir / "comparison.md", markdown(rows))
    lines = [f"{what}: {note}" for what, note in notes.items()]
    lines += [f"skipped {what}: {why}" for what, why in skipped.items()]
    lines.append(f"wrote {options.output_dir / 'comparison.md'}, {', '.join(written)}")
    print_table(rows[0], rows[1:], "CLIP benchmarks", lines)


def _suite(name: str | None, data_root: Path) -> tuple[datasets.Suite | None, dict[str, str]]:
    """The suite that is named, None where the folder's layout tells, and the sets of the paper's that are not there."""
    if name != "paper":
        return datasets.read_suite_file(Path(name)) if name else None, {}
    suite, missing = paper.suite(data_root)
    if not suite:
        raise InputError(f"{data_root} holds none of the paper's sets: see `data check`")
    return suite, missing
