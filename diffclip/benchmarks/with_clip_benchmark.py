"""clip-benchmark's own command line with our models in it, for its other data sets and for a second opinion.

    python -m diffclip.benchmarks.with_clip_benchmark eval --model diffclip --pretrained runs/diffclip/pretrain \
        --dataset wds/imagenetv2 --dataset_root data/imagenet-v2 --no_amp --output scores.json

All arguments are clip-benchmark's; `--pretrained` takes whatever `diffclip.load` reads. Of a shard's members only those
are decoded that hold images, texts, numbers and plain arrays: webdataset's own table would unpickle others, and with
that run whatever the shard's author put into them.
"""

import itertools
import re
import sys

from PIL import EpsImagePlugin

import diffclip
from diffclip.base.errors import exit_on_input_error
from diffclip.base.images import as_decoder
from diffclip.base.lines import print_line


def load_diffclip(model_name: str, pretrained: str, cache_dir: str | None = None, device: str = "cpu") -> tuple:
    """Return (model, transform, tokenizer) of `pretrained`, in the form that clip-benchmark wants."""
    model, transform, tokenizer = diffclip.load(pretrained)
    return model.to(device).eval(), transform, tokenizer


def only_plain_decoders() -> None:
    """Take out of webdataset's table all that can run code, or may come to; such members stay bytes."""
    from webdataset import autodecode

    plain = {"txt", "text", "transcript", "cls", "cls2", "index", "inx", "id", "json", "jsn", "npy"}
    for suffix in autodecode.decoders.keys() - plain:
        del autodecode.decoders[suffix]
    EpsImagePlugin.gs_binary = False  # a member called .jpg may hold a program for Ghostscript


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print_line(f"{__doc__}\n`eval --help` and `build --help` are clip-benchmark's own.", keep="\n")
        return
    from clip_benchmark import cli, models

    only_plain_decoders()
    models.TYPE2FUNC["diffclip"] = load_diffclip
    models.MODEL_TYPES.append("diffclip")  # which the command line shares
    sys.argv = [sys.argv[0], *arguments, *defaults(arguments)]  # which clip-benchmark reads
    with as_decoder():  # its data sets, torchvision's and webdataset open images by themselves
        cli.main()


def defaults(arguments: list[str]) -> list[str]:
    """What to add to an evaluation's arguments: our models, and an output file whose name can hold the model's path."""
    if "eval" not in arguments:
        return []
    given = {word.split("=")[0] for word in arguments}
    pretrained = next((b for a, b in itertools.pairwise(arguments) if a == "--pretrained"), "diffclip")
    name = re.sub(r"[^\w.-]+", "-", pretrained).strip("-")
    added = {"--model_type": "diffclip", "--model": "diffclip", "--output": f"{{dataset}}_{name}_{{task}}.json"}
    return [word for flag, value in added.items() if flag not in given for word in (flag, value)]


if __name__ == "__main__":
    with exit_on_input_error():
        main()
