"""All protocols on all data of a suite: of one model a flat dict of scores, of several a table that compares them.

Every image is encoded once; zero-shot and retrieval use features after the projection, probe and few-shot before.
"""

import argparse
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

import diffclip
from diffclip.base.console import print_table
from diffclip.base.devices import group, pick_device
from diffclip.base.errors import InputError
from diffclip.base.files import read_json, write_json, write_whole
from diffclip.base.schema import CLIP_BENCHMARKS, CLIP_OUTCOMES
from diffclip.benchmarks import PROTOCOLS, datasets, paper, prompts
from diffclip.benchmarks.comparison import compare, markdown, model_groups
from diffclip.benchmarks.features import Encoder, save_tensors
from diffclip.benchmarks.images import Images
from diffclip.benchmarks.protocol import Data, Evaluation, Protocol, Settings, load
from diffclip.weights import read_safetensors


def evaluate_clip(
    model: nn.Module,
    preprocess: Callable[[Image.Image], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
    data_root: str | Path,
    out_dir: str | Path,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    *,
    suite: datasets.Suite | None = None,
    missing: Mapping[str, str] | None = None,
    cache_dir: str | Path | None = None,
) -> dict[str, float]:
    """Run every protocol that the data allows and return the scores, all in percent, under the protocols' names.

    Writes `clip_benchmarks.json` (the scores, what they were made with, what was skipped and why) and
    `clip_outcomes.safetensors` (one number per sample under the name of a score, which is 100 times their mean). Where
    a set cannot be scored, both hold the scores of all others, and the former has `failed` with the reasons.

    In an initialised process group all ranks encode; rank 0 alone scores and writes, and the others return {} before.

    Args:
        model, preprocess, tokenizer: what `diffclip.load` returns; the model may be on any device.
        data_root: the data, laid out as `datasets.suite_from_folder` finds it, or the paper's sets in folders of their
            names, unless `suite` says.
        missing: sets that belong to the suite but are not there, with the remedy; listed as skipped.
        cache_dir: where features are kept, out_dir/features when None.

    Raises:
        InputError: missing or malformed data; before any image is encoded, but for corrupt images.
    """
    data_root, out_dir = Path(data_root), Path(out_dir)
    if not suite and not any((data_root / part).is_dir() for part in datasets.PARTS if part not in paper.SETS):
        named, absent = paper.suite(data_root)
        if named.keys() - paper.SETS.keys():  # mmvp/ alone is a part of its own
            suite, missing = named, {**absent, **(missing or {})}
    data = datasets.read(data_root, suite or datasets.suite_from_folder(data_root))
    common = prompts.templates(settings.templates) if settings.templates else None
    how = {name: getattr(settings, name) for name in ("precision", "batch_size", "workers", "quiet")}
    encoder = Encoder(model, preprocess, tokenizer, cache_dir=cache_dir or out_dir / "features", **how)
    chosen = {name: load(name) for name in PROTOCOLS if name in settings.protocols}
    if dist.is_initialized():
        wanted: dict[str, Images] = {}
        for name, protocol in chosen.items():
            for set_name, dataset in data.sets(PROTOCOLS[name].part).items():
                wanted |= protocol.images(set_name, dataset)
        encoder.images_together(wanted)
        if dist.get_rank() != 0:
            return {}
    evaluation = Evaluation(encoder, data, settings, common, skipped=dict(missing or {}))
    few_shot = {"way": settings.way, "shot": settings.shot, "queries": 6, "episodes": settings.episodes}
    about = {
        "weights": encoder.fingerprint,
        "precision": settings.precision,
        "templates": settings.templates or "each set's own, else imagenet7",
        "linear_probe": settings.probe,
        "probe_features": settings.probe_features,
        "few_shot": few_shot | {"seed": settings.seed},
        "data": str(data_root),
        "notes": notes(data),
    }
    result: dict[str, Any] = {"metrics": evaluation.metrics, "skipped": evaluation.skipped, "about": about}
    try:
        if failed := _score(evaluation, chosen):
            result["failed"] = "; ".join(failed)
            more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            kept = f"{len(evaluation.metrics)} other scores are in {out_dir / CLIP_BENCHMARKS}"
            raise InputError(f"{failed[0]}{more}; {kept}, and the same command takes up what it has")
    except BaseException as error:
        result.setdefault("failed", str(error) or type(error).__name__)
        raise
    finally:
        save_tensors(evaluation.outcomes, out_dir / CLIP_OUTCOMES)
        write_json(out_dir / CLIP_BENCHMARKS, result)
    return evaluation.metrics


def _score(evaluation: Evaluation, chosen: Mapping[str, Protocol]) -> list[str]:
    """Score every set by every protocol; where one cannot be scored, the others are all the same, and this says why.

    A protocol averages over its sets only where all of them have scores.
    """
    failed: list[str] = []
    for part, names in groupby(PROTOCOLS, lambda name: PROTOCOLS[name].part):
        here = [name for name in names if name in chosen]
        incomplete = set()
        for set_name, dataset in evaluation.data.sets(part).items():
            for name in here:
                try:
                    chosen[name].score(evaluation, set_name, dataset)
                except InputError as error:
                    incomplete.add(name)
                    failed.append(f"{name} {set_name}".strip() + f": {error}")
        for name in here:
            finish = chosen[name].finish
            if finish and evaluation.data.sets(part) and name not in incomplete:
                finish(evaluation)
    return failed


def notes(data: Data) -> dict[str, str]:
    """What a reader of the scores should know of a set: of how many classes and images they are, where some lack."""
    found = {name: list(labelled.notes) for name, labelled in data.classification.items()}
    images = {name: len(labelled.splits["test"]) for name, labelled in data.classification.items()}
    for name, shift in data.shifts.items():
        classes, present = len(data.classification[shift.of].classnames), len(set(shift.images.labels))
        few = present < classes
        found[name] = [f"{present:,} of the {classes:,} classes of {shift.of} have images; only these compete"] * few
        images[name] = len(shift.images)
    for name, captioned in data.retrieval.items():
        found[name], images[name] = [], len(captioned.images)
    for name in images.keys() & paper.SETS.keys():
        if images[name] != (published := paper.SETS[name].test):
            found[name].append(f"scored on {images[name]:,} images; the published test set has {published:,}")
    return {name or "retrieval": "; ".join(sentences) for name, sentences in found.items() if sentences}


@group()
def run(options: argparse.Namespace) -> None:
    """Evaluate each model into output_dir/<name>, then print scores and, against the first model, differences."""
    device = pick_device(options.device)
    suite, missing = _suite(options.suite, options.data_root)
    settings = Settings(**{name: vars(options)[name] for name in Settings.__dataclass_fields__ if name in options})
    common: dict[str, Any] = {"suite": suite, "missing": missing, "cache_dir": options.output_dir / "features"}
    groups = model_groups(options.model)
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in groups}
    outcomes: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in groups}
    skipped: dict[str, str] = {}
    notes: dict[str, str] = {}
    written = []
    for name, seed, source in [(name, *seed) for name, sources in groups.items() for seed in enumerate(sources)]:
        model, preprocess, tokenizer = diffclip.load(source)
        out = options.output_dir / name / (str(seed) if len(groups[name]) > 1 else "")
        metrics = evaluate_clip(model.to(device), preprocess, tokenizer, options.data_root, out, settings, **common)
        scores[name].append(metrics)
        if metrics:  # another rank than 0 has only encoded
            outcomes[name].append({key: value.numpy() for key, value in read_safetensors(out / CLIP_OUTCOMES).items()})
            stored = read_json(out / CLIP_BENCHMARKS)
            skipped |= stored["skipped"]
            notes |= stored["about"]["notes"]
            written.append(str(out / CLIP_BENCHMARKS))
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
