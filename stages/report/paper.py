"""The paper's sets, and its own numbers as printed there, in tables of their own and never in a column with ours.

From Hammoud and Ghanem, "DiffCLIP: Differential Attention Meets CLIP", arXiv 2503.06626v1. Its bars (figures 1, 3, 5)
and radar (figure 4) carry no table, so that only what text or tables say is repeated here.
"""

from collections.abc import Mapping

from stages.report.cells import Table, percent

SOURCE = "arXiv 2503.06626v1"
PAPER_SETS = {  # folder in diffclip.benchmarks.paper: name in the paper, in its order
    "classification": {
        "caltech101": "Caltech-101",
        "dtd": "DTD",
        "pets": "Pets",
        "flowers": "Flowers",
        "sun397": "SUN397",
        "aircraft": "Aircraft",
        "cifar10": "CIFAR10",
        "cifar100": "CIFAR100",
        "food101": "Food-101",
    },
    "retrieval": {"flickr30k": "Flickr30k", "flickr8k": "Flickr8k", "coco": "MSCOCO"},
    "zero_shot": {"imagenet": "ImageNet"},
    "shifts": {
        "imagenet-v2": "ImageNet-V2",
        "imagenet-a": "ImageNet-A",
        "imagenet-r": "ImageNet-R",
        "imagenet-sketch": "ImageNet-Sketch",
    },
}
# (pretraining, model): numbers in the order of the columns
LINEAR = {
    ("CC3M", "CLIP"): (72.5, 58.7, 61.0, 85.8, 54.1, 35.7, 83.5, 63.4, 59.1, 63.8),
    ("CC3M", "DiffCLIP"): (76.2, 60.2, 62.2, 86.6, 56.2, 34.6, 83.9, 63.7, 59.4, 64.8),
    ("CC12M", "CLIP"): (88.3, 71.2, 79.5, 92.6, 68.3, 48.8, 92.0, 74.7, 77.5, 77.0),
    ("CC12M", "DiffCLIP"): (89.5, 71.8, 83.0, 93.5, 69.4, 46.4, 90.7, 73.3, 77.7, 77.3),
}
FEW_SHOT = {
    ("CC3M", "CLIP"): (90.4, 72.9, 69.6, 92.5, 91.8, 44.6, 63.4, 72.8, 67.0, 73.9),
    ("CC3M", "DiffCLIP"): (91.6, 73.2, 71.6, 92.9, 92.8, 45.4, 62.4, 73.5, 68.3, 74.6),
    ("CC12M", "CLIP"): (97.4, 81.9, 86.3, 96.9, 96.5, 56.1, 81.3, 85.1, 86.0, 85.3),
    ("CC12M", "DiffCLIP"): (97.6, 82.2, 88.2, 97.3, 96.8, 55.2, 80.3, 83.3, 87.5, 85.4),
}
RETRIEVAL = {  # image retrieval, text retrieval (R@5): Flickr30k, Flickr8k, MSCOCO, average each; ImageNet zero-shot
    ("CC3M", "CLIP"): (31.8, 35.4, 19.4, 28.9, 43.4, 46.2, 25.4, 38.3, 13.6),
    ("CC3M", "DiffCLIP"): (32.9, 36.5, 20.9, 30.1, 44.7, 47.8, 27.6, 40.1, 14.4),
    ("CC12M", "CLIP"): (62.5, 62.1, 41.3, 55.3, 76.8, 77.7, 53.8, 69.4, 31.8),
    ("CC12M", "DiffCLIP"): (62.2, 61.5, 42.3, 55.3, 77.4, 77.4, 55.5, 70.1, 33.8),
}
POPE = {  # accuracy, precision, recall of CLIP, then of DiffCLIP
    "Random": (50.14, 50.07, 98.21, 50.41, 50.21, 98.56),
    "Popular": (50.27, 50.13, 99.33, 50.27, 50.13, 99.47),
    "Adversarial": (50.17, 50.08, 99.33, 50.20, 50.10, 99.47),
}
MMVP = {"CLIP": 21.9, "DiffCLIP": 27.6}  # averages, from the caption of figure 4

SCALE = "ViT-B/16, 40 epochs with batches of 4096; other data and budget than the runs above, so not comparable."


def paper_table1() -> Table:
    """The paper's table 1."""
    table = _table("paper-table1", "Table 1", ["Pretraining", "Model", *PAPER_SETS["classification"].values(), "Avg."])
    for heading, rows in (("Linear probing", LINEAR), ("Few-shot", FEW_SHOT)):
        table.rows += [[heading], *_rows(rows)]
    return table


def paper_table2() -> Table:
    """The paper's table 2."""
    sets = (*PAPER_SETS["retrieval"].values(), "Avg.")
    table = _table("paper-table2", "Table 2", ["Pretraining", "Model", *sets, *sets, "ImageNet"])
    table.groups = [("", 2), ("Image retrieval (R@5)", 4), ("Text retrieval (R@5)", 4), ("Zero-shot", 1)]
    table.rows = _rows(RETRIEVAL)
    return table


def paper_table3() -> Table:
    """The paper's table 3, and what is known about it."""
    measures = ["Accuracy", "Precision", "Recall"]
    table = _table("paper-table3", "Table 3", ["POPE", *measures, *measures])
    table.groups = [("", 1), ("CLIP", 3), ("DiffCLIP", 3)]
    table.rows = [[split, *(f"{value:.2f}" for value in values)] for split, values in POPE.items()]
    table.caption += (
        " They stand at chance: the Random row equals scoring 2,910 answers against the first 2,910 labels of the "
        "later file of 3,000, where even a perfect model gets at most 51.3 %. Here answers meet labels "
        "by image and question."
    )
    return table


def paper_figure4() -> Table:
    """What the caption of the paper's figure 4 says."""
    table = _table("paper-figure4", "Figure 4", ["Model", "MMVP-VLM, Avg."])
    table.rows = [[model, f"{value:.1f}"] for model, value in MMVP.items()]
    table.caption += " These averages can be reached only over seven of the benchmark's nine patterns."
    return table


def _table(name: str, what: str, columns: list[str]) -> Table:
    caption = f"As printed in {SOURCE}, {what}. {SCALE}"
    return Table(columns, name=name, title=f"The paper's {what}", caption=caption, published=True)


def _rows(numbers: Mapping[tuple[str, str], tuple[float, ...]]) -> list[list[str]]:
    """Rows as in the paper: DiffCLIP's numbers with their difference from CLIP's of the same pretraining."""
    rows = []
    for (data, model), values in numbers.items():
        cells = [f"{value:.1f}" for value in values]
        if model != "CLIP":
            base = numbers[data, "CLIP"]
            cells = [f"{cell} ({percent([v - b], sign=True)})" for cell, v, b in zip(cells, values, base)]
        rows.append([data, model, *cells])
    return rows
