"""Distribution shifts: zero-shot on other images of a classification set's classes, with that set's classifier."""

from diffclip.benchmarks.images import Images
from diffclip.benchmarks.protocol import Evaluation, Protocol, Shift
from diffclip.benchmarks.zero_shot import class_vectors, classify


def images(name: str, shift: Shift) -> dict[str, Images]:
    return {f"{name} shift": shift.images}


def score(evaluation: Evaluation, name: str, shift: Shift) -> None:
    """Add shift/NAME/{top1,top5,mean_per_class}."""
    features = evaluation.encoder.images(shift.images, f"{name} shift")
    # a shifted set often has fewer classes; only those compete, as is usual for ImageNet-A and -R
    present, labels = features.labels.unique(return_inverse=True)
    found = classify(features.after, class_vectors(evaluation, shift.of)[present], labels)
    evaluation.add(f"shift/{name}", found.metrics(), found.outcomes())


def averages(evaluation: Evaluation) -> None:
    """Add shift/average and, where the sets that are shifted were scored too, shift/average_with_base."""
    metrics, shifts = evaluation.metrics, evaluation.data.shifts
    shifted = [metrics[f"shift/{name}/top1"] for name in shifts]
    metrics["shift/average"] = sum(shifted) / len(shifted)
    bases = [f"zero_shot/{of}/top1" for of in sorted({shift.of for shift in shifts.values()})]
    if all(base in metrics for base in bases):
        both = [*shifted, *(metrics[base] for base in bases)]
        metrics["shift/average_with_base"] = sum(both) / len(both)


PROTOCOL = Protocol(images, score, averages)
