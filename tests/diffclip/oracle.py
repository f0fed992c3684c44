"""A model that knows colours, and a set of every kind that the protocols score, on which it is always right."""

import io
import json
import tarfile

import torch
from PIL import Image
from torch import nn

from diffclip.benchmarks.evaluate import evaluate_clip
from diffclip.benchmarks.protocol import Settings

COLOURS = {
    "red": (250, 0, 0),
    "lime": (0, 250, 0),
    "blue": (0, 0, 250),
    "white": (250,) * 3,
    "black": (0,) * 3,
    "pink": (250, 0, 250),
}


class Oracle(nn.Module):
    """Sees the colour of an image and reads the colour word of a text; `blind` sees nothing."""

    def __init__(self, blind=False):
        super().__init__()
        self.model_config = {"blind": blind}  # not in the weights, yet the feature cache must tell them apart
        self.visual = nn.Module()
        self.visual.trunk = lambda images: images.mean(dim=(2, 3)).sub(0.5) * (0 if blind else 1) + 0.01
        self.visual.head = nn.Identity()
        self.colours = nn.Parameter(torch.tensor([*COLOURS.values()]) / 250 - 0.5)

    def encode_text(self, ids):
        return self.colours[ids[:, 0]]


def tokenizer(texts):
    return torch.tensor([[next(i for i, colour in enumerate(COLOURS) if colour in text.split())] for text in texts])


def preprocess(image):
    return torch.tensor(list(image.resize((2, 2)).getdata()), dtype=torch.float32).T.reshape(3, 2, 2) / 250


def paint(path, colour, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), tuple(min(255, value + shade) for value in COLOURS[colour])).save(path)


def write_data(root):
    """Classification with train, val and test, a shift of it, retrieval and MMVP."""
    for split, count in (("train", 6), ("val", 2), ("test", 7)):
        for colour in COLOURS:
            for i in range(count):
                paint(root / "classification" / "colour" / split / f"{colour}_thing" / f"{i}.png", colour, i)
    (root / "classification/colour/classnames.json").write_text(json.dumps([f"{c} thing" for c in reversed(COLOURS)]))
    (root / "classification/colour/templates.json").write_text('["a {c} here", "{c}"]')
    for colour in ("lime", "pink", "black"):  # a subset of the classes
        paint(root / "shifts" / "dim" / f"{colour}_thing" / "0.png", colour, 5)
    (root / "retrieval").mkdir()
    with tarfile.open(root / "retrieval/00000.tar", "w") as tar:
        for number, (colour, value) in enumerate(COLOURS.items()):
            buffer = io.BytesIO()
            Image.new("RGB", (8, 8), value).save(buffer, "PNG")
            texts = f"the {colour} one\nall {colour}\n".encode()
            for suffix, content in (("png", buffer.getvalue()), ("txt", texts)):
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    rows = ["Question ID,Type,Statement"]
    for number, colour in enumerate(COLOURS, start=1):
        category = "Warm" if number < 3 else "Cold"
        paint(root / "mmvp" / "MMVP VLM Images" / category / f"{number}.png", colour)
        rows.append(f"{number},{category},{colour}")
    (root / "mmvp/Questions.csv").write_text("\n".join(rows))


def evaluate(root, out, model=None, suite=None, missing=None, **options):
    settings = Settings(quiet=True, episodes=50, **options)
    return evaluate_clip(model or Oracle(), preprocess, tokenizer, root, out, settings, suite=suite, missing=missing)
