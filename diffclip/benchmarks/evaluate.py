"""All protocols on all data of a suite for one model: a flat dict of scores, each sample's outcome on disk.

Every image is encoded once; zero-shot and retrieval use features after the projection, probe and
few-shot before.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from diffclip.base.errors import InputError
from diffclip.base.files import write_json
from diffclip.benchmarks import PROTOCOLS, datasets, few_shot, linear_probe, mmvp, retrieval, zero_shot
from diffclip.benchmarks.features import Encoder, save_tensors
from diffclip.benchmarks.images import Pictures

METRICS_FILE = "clip_benchmarks.json"
OUTCOMES_FILE = "clip_outcomes.safetensors"


def evaluate_clip(
    model: nn.Module,
    preprocess: Callable[[Image.Image], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
    data_root: str | Path,
    out_dir: str | Path,
    *,
    suite: datasets.Suite | None = None,
    missing: Mapping[str, str] | None = None,
    protocols: Sequence[str] = PROTOCOLS,
    templates: str | None = None,
    probe: str = "exact",
    seed: int = 0,
    episodes: int = 5000,
    way: int = 5,
    shot: int = 5,
    probe_features: str = "before",
    precision: str = "float32",
    batch_size: int = 128,
    workers: int | None = None,
    cache_dir: str | Path | None = None,
    quiet: bool = False,
) -> dict[str, float]:
    """Run every protocol that the data allows and return the scores, all in percent.

    Keys: zero_shot/SET/{top1,top5,mean_per_class}, shift/SET/{...}, shift/average, shift/average_with_base,
    retrieval/[SET/]{text_to_image,image_to_text}/R@{1,5,10}, linear_probe/SET/{accuracy,mean_per_class,C},
    few_shot/SET/{accuracy,sd,ci95}, mmvp/CATEGORY, mmvp/average, mmvp/average7 (of the public nine categories).

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
        templates: "imagenet7", "imagenet80" or a file for all sets; None takes each set's own
            templates.json, and imagenet7 where there is none.
        probe: "exact" for the official linear-probe solver, "fast" for the minimum that it stops short of where
            the penalty is weak: scores differ by some tenths of a point (see `linear_probe.linear_probe`).
        seed: draws the few-shot episodes; nothing else here is random.
        way, shot: classes of a few-shot episode, and images of each to learn from.
        probe_features: linear probe and few-shot on features "before" the projection (the protocol) or "after" it.
        cache_dir: where features are kept, out_dir/features when None.

    Raises:
        InputError: missing or malformed data, named; raised before any image is encoded, but for
        corrupt images.
    """
    if probe_features not in ("before", "after"):
        raise InputError(f"probe_features {probe_features!r} is neither before nor after")
    data_root, out_dir = Path(data_root), Path(out_dir)
    data = datasets.read(data_root, suite or datasets.suite_from_folder(data_root))
    common = zero_shot.templates(templates) if templates else None
    encoder = Encoder(
        model,
        preprocess,
        tokenizer,
        cache_dir=cache_dir or out_dir / "features",
        precision=precision,
        batch_size=batch_size,
        workers=workers,
        quiet=quiet,
    )
    if dist.is_initialized():
        encoder.images_together(_pictures(data, protocols))
        if dist.get_rank() != 0:
            return {}
    metrics: dict[str, float] = {}
    outcomes: dict[str, Tensor] = {}
    skipped: dict[str, str] = dict(missing or {})
    about = {
        "weights": encoder.fingerprint,
        "precision": precision,
        "templates": templates or "each set's own, else imagenet7",
        "linear_probe": probe,
        "probe_features": probe_features,
        "few_shot": {"way": way, "shot": shot, "queries": 6, "episodes": episodes, "seed": seed},
        "data": str(data_root),
        "notes": {name: "; ".join(labelled.notes) for name, labelled in data.classification.items() if labelled.notes},
    }
    result = {"metrics": metrics, "skipped": skipped, "about": about}
    try:
        classifiers: dict[str, Tensor] = {}
        for name, labelled in data.classification.items():
            prompts = common or labelled.templates or zero_shot.templates("imagenet7")
            if "zero_shot" in protocols or "shift" in protocols:
                classifiers[name] = _classifier(encoder, labelled.classnames, prompts)
            if "zero_shot" in protocols:
                test = encoder.images(labelled.splits["test"], f"{name} test")
                found = zero_shot.classify(test.after, classifiers[name], test.labels)
                _add_classified(f"zero_shot/{name}", found, metrics, outcomes)

        for name, shift in data.shifts.items() if "shift" in protocols else ():
            shifted = encoder.images(shift.pictures, f"{name} shift")
            # a shifted set often has fewer classes; only those compete, as is usual for ImageNet-A and -R
            present, labels = shifted.labels.unique(return_inverse=True)
            found = zero_shot.classify(shifted.after, classifiers[shift.of][present], labels)
            _add_classified(f"shift/{name}", found, metrics, outcomes)
        if data.shifts and "shift" in protocols:
            shifted = [metrics[f"shift/{name}/top1"] for name in data.shifts]
            metrics["shift/average"] = sum(shifted) / len(shifted)
            bases = [metrics.get(f"zero_shot/{of}/top1") for of in sorted({shift.of for shift in data.shifts.values()})]
            if None not in bases:
                metrics["shift/average_with_base"] = (sum(shifted) + sum(bases)) / (len(shifted) + len(bases))

        for name, captioned in data.retrieval.items() if "retrieval" in protocols else ():
            prefix = f"retrieval/{name}" if name else "retrieval"
            ranks = retrieval.ranks(
                encoder.images(captioned.images, f"{prefix} images").after,
                encoder.texts(captioned.captions, f"{prefix} captions"),
                torch.tensor(captioned.owner),
            )
            metrics |= {f"{prefix}/{key}": value for key, value in retrieval.recalls(ranks).items()}
            for direction, rank in ranks._asdict().items():
                outcomes |= {f"{prefix}/{direction}/R@{k}": rank < k for k in (1, 5, 10)}

        for name, labelled in data.classification.items():
            wanted = [protocol for protocol in ("linear_probe", "few_shot") if protocol in protocols]
            if "train" not in labelled.splits:
                skipped |= {f"{protocol}/{name}": "there is no train split" for protocol in wanted}
                continue
            if not wanted:
                continue
            rows = {
                split: (getattr(features, probe_features), features.labels)
                for split, pictures in labelled.splits.items()
                for features in [encoder.images(pictures, f"{name} {split}")]
            }
            if "linear_probe" in protocols:
                fitted = linear_probe.linear_probe(
                    rows["train"], rows.get("val"), rows["test"], metric=labelled.metric, mode=probe
                )
                labels = rows["test"][1]
                right = zero_shot.ZeroShot(fitted.predicted, labels, None)
                metrics[f"linear_probe/{name}/accuracy"] = 100 * right.correct.double().mean().item()
                metrics[f"linear_probe/{name}/mean_per_class"] = right.metrics()["mean_per_class"]
                metrics[f"linear_probe/{name}/C"] = fitted.C
                outcomes[f"linear_probe/{name}/accuracy"] = right.correct
                outcomes[f"linear_probe/{name}/mean_per_class"] = _balanced(right.correct, labels)
            if "few_shot" in protocols:
                (train, train_labels), (test, labels) = rows["train"], rows["test"]
                try:
                    drawn = few_shot.draw(train_labels, labels, way=way, shot=shot, episodes=episodes, seed=seed)
                except ValueError as error:
                    skipped[f"few_shot/{name}"] = str(error)
                    continue
                accuracy = few_shot.accuracies(train, test, train_labels, labels, drawn)
                metrics |= {f"few_shot/{name}/{key}": value for key, value in few_shot.summary(accuracy).items()}
                outcomes[f"few_shot/{name}/accuracy"] = accuracy

        if data.mmvp and "mmvp" in protocols:
            images = encoder.images(data.mmvp.images, "mmvp images").after
            statements = [mmvp.PROMPT.replace("{c}", statement) for statement in data.mmvp.statements]
            similarity = mmvp.similarities(images, encoder.texts(statements, "mmvp statements"))
            right_pairs = mmvp.right_pairs(similarity)
            by_category = mmvp.by_category(right_pairs, data.mmvp.categories)
            metrics |= {f"mmvp/{category}": value for category, value in by_category.items()}
            metrics |= {f"mmvp/{name}": value for name, value in mmvp.averages(by_category).items()}
            numbers = torch.tensor([list(by_category).index(category) for category in data.mmvp.categories])
            outcomes["mmvp/average"] = _balanced(right_pairs, numbers)
    except BaseException as error:
        result["failed"] = str(error) or type(error).__name__
        raise
    finally:
        save_tensors(outcomes, out_dir / OUTCOMES_FILE)
        write_json(out_dir / METRICS_FILE, result)
    return metrics


def _pictures(data: datasets.Data, protocols: Sequence[str]) -> dict[str, Pictures]:
    """Everything that the protocols look at, under the names that the progress bars show."""
    wanted = {}
    trained = {"linear_probe", "few_shot"} & set(protocols)
    for name, labelled in data.classification.items():
        trains = bool(trained) and "train" in labelled.splits
        for split, pictures in labelled.splits.items():
            if trains or (split == "test" and "zero_shot" in protocols):
                wanted[f"{name} {split}"] = pictures
    if "shift" in protocols:
        wanted |= {f"{name} shift": shift.pictures for name, shift in data.shifts.items()}
    if "retrieval" in protocols:
        wanted |= {f"retrieval {name} images": captioned.images for name, captioned in data.retrieval.items()}
    if data.mmvp and "mmvp" in protocols:
        wanted["mmvp images"] = data.mmvp.images
    return wanted


def _classifier(encoder: Encoder, classnames: list[str], templates: list[str]) -> Tensor:
    features = encoder.texts(zero_shot.prompts(classnames, templates), "prompts")
    return zero_shot.class_means(features.unflatten(0, (len(classnames), len(templates))))


def _add_classified(
    prefix: str, found: zero_shot.ZeroShot, metrics: dict[str, float], outcomes: dict[str, Tensor]
) -> None:
    metrics |= {f"{prefix}/{key}": value for key, value in found.metrics().items()}
    outcomes[f"{prefix}/top1"] = found.correct
    if found.top5 is not None:
        outcomes[f"{prefix}/top5"] = found.top5
    outcomes[f"{prefix}/mean_per_class"] = _balanced(found.correct, found.labels)


def _balanced(correct: Tensor, labels: Tensor) -> Tensor:
    """Weigh outcomes so that their plain mean is the mean over classes."""
    return correct * zero_shot.balanced_weights(labels)
