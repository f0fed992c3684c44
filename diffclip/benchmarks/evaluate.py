"""All protocols on all data of a suite for one model: a flat dict of scores, each sample's outcome on disk.

Every image is encoded once; zero-shot and retrieval use features after the projection, probe and
few-shot before.
"""

from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from diffclip.base.files import write_json
from diffclip.benchmarks import PROTOCOLS, datasets, prompts
from diffclip.benchmarks.features import Encoder, save_tensors
from diffclip.benchmarks.protocol import Evaluation, Settings, load

METRICS_FILE = "clip_benchmarks.json"
OUTCOMES_FILE = "clip_outcomes.safetensors"


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
    `clip_outcomes.safetensors` (one number per sample under the name of a score, its mean times 100 is
    the score). Where a part fails, both hold what was scored until then, and the former has `failed` with the reason.

    Under torchrun (a process group that is initialised) all ranks encode; rank 0 alone scores and writes, and the
    others return {} before it does.

    Args:
        model, preprocess, tokenizer: what `diffclip.load` returns; the model may be on any device.
        data_root: folder that holds the data, laid out as `datasets.suite_from_folder` finds it
            unless `suite` says.
        missing: sets that belong to the suite but are not there, with the remedy; listed as skipped.
        cache_dir: where features are kept, out_dir/features when None.

    Raises:
        InputError: missing or malformed data, named; raised before any image is encoded, but for
        corrupt images.
    """
    data_root, out_dir = Path(data_root), Path(out_dir)
    data = datasets.read(data_root, suite or datasets.suite_from_folder(data_root))
    common = prompts.templates(settings.templates) if settings.templates else None
    encoder = Encoder(
        model,
        preprocess,
        tokenizer,
        cache_dir=cache_dir or out_dir / "features",
        precision=settings.precision,
        batch_size=settings.batch_size,
        workers=settings.workers,
        quiet=settings.quiet,
    )
    chosen = {name: load(name) for name in PROTOCOLS if name in settings.protocols}
    if dist.is_initialized():
        wanted = [
            protocol.images(set_name, dataset)
            for name, protocol in chosen.items()
            for set_name, dataset in data.sets(PROTOCOLS[name].part).items()
        ]
        encoder.images_together({title: images for part in wanted for title, images in part.items()})
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
        "notes": {name: "; ".join(labelled.notes) for name, labelled in data.classification.items() if labelled.notes},
    }
    result: dict[str, Any] = {"metrics": evaluation.metrics, "skipped": evaluation.skipped, "about": about}
    try:
        for part, names in groupby(PROTOCOLS, lambda name: PROTOCOLS[name].part):
            protocols = [chosen[name] for name in names if name in chosen]
            for set_name, dataset in data.sets(part).items():
                for protocol in protocols:
                    protocol.score(evaluation, set_name, dataset)
            for protocol in protocols:
                if protocol.finish and data.sets(part):
                    protocol.finish(evaluation)
    except BaseException as error:
        result["failed"] = str(error) or type(error).__name__
        raise
    finally:
        save_tensors(evaluation.outcomes, out_dir / OUTCOMES_FILE)
        write_json(out_dir / METRICS_FILE, result)
    return evaluation.metrics
