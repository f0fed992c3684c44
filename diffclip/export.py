"""A dual encoder leaves for where this package is not: open_clip, ONNX, torch.export, or the official code.

What is written is read back as its readers would, and compared with the run on pictures and texts before it takes its
place; a format that cannot hold the model says which part of it that is.
"""

import copy
import importlib.util
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffclip import checkpoints
from diffclip.architectures import plain_state
from diffclip.attention import Differential
from diffclip.base.backbones import open_clip
from diffclip.base.errors import InputError, in_one_line
from diffclip.base.files import check_output, write_json
from diffclip.models import DualEncoder
from diffclip.scenes.drawing import draw, make_scene
from diffclip.scenes.text import captions
from diffclip.weights import write_safetensors

TOLERANCE = 1e-4  # of unit-length features; rounding alone makes some 1e-6
TOWERS = ("image", "text")
Features = dict[str, Tensor]  # of each tower, (n, embed_dim), unit length
Encode = Callable[[list[Image.Image], list[str]], Features]


def export(source: str | Path, form: str, target: str | Path, **imported: Any) -> dict[str, float]:
    """Write what `diffclip.load` reads in another form; return each tower's largest difference from it.

    Args:
        source, imported: as for `diffclip.load`.
        form: of `FORMS`, which write files into the folder `target`, or "official", which writes the file `target`.

    Raises:
        InputError: the model cannot be read or not be held by that form, packages for it are missing, or what was
            written gives other features; then `target` is as it was.
    """
    target = Path(target)
    if form not in (known := (*FORMS, "official")):
        raise InputError(f"form {form!r} is unknown: use one of {', '.join(known)}")
    if form == "official":
        check_output(target, (".pt", ".pth"))
    elif target.exists() and not target.is_dir():
        raise InputError(f"{target}: is a file; give the name of a folder for {form}")
    elif not target.is_dir():
        check_output(target)
    model, transform, tokenizer = checkpoints.load(source, **imported)
    expected = encoder(model, transform, tokenizer)
    if form == "official":
        checkpoints.write_official(model, target)
        return differences(encoder(*checkpoints.load(target)), expected, form)
    with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=f".{target.name}.") as name:
        folder = Path(name)
        try:
            found = FORMS[form](model, transform, tokenizer, folder)
            difference = differences(found, expected, form)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None
        target.mkdir(exist_ok=True)
        for file in sorted(folder.iterdir()):
            file.replace(target / file.name)
    return difference


def to_open_clip(model: DualEncoder, transform: Callable, tokenizer: Callable, folder: Path) -> Encode:
    """Write open_clip_config.json and weights that `open_clip.create_model("local-dir:…")` takes without us."""
    config = model.model_config
    if any(isinstance(module, Differential) for module in model.modules()):
        remedy = 'after `import diffclip`, open_clip.create_model("local-dir:RUN") takes the run as it is'
        raise InputError(f"open_clip has no differential attention; {remedy}")
    vision_cfg = config["model_cfg"]["vision_cfg"]
    if "vision_norm_eps" in config["diffclip"] and "timm_model_name" not in vision_cfg:  # a tower of ours
        size = f"width {vision_cfg['width']}, {vision_cfg['layers']} layers"
        raise InputError(
            f"open_clip builds such towers by timm's names, and timm has no named model of this size ({size}): train "
            "S-16, B-32, B-16 or L-14, or give vision_cfg a timm_model_name of its own size"
        )
    theirs_alone = {key: config[key] for key in ("model_cfg", "preprocess_cfg")}
    write_json(folder / checkpoints.CONFIG, theirs_alone)
    write_safetensors(plain_state(model), folder / checkpoints.WEIGHTS)
    try:
        theirs, _, their_transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        their_tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    except Exception as error:  # open_clip raises whatever its loaders do
        reason = in_one_line(error)
        name = vision_cfg.get("timm_model_name", "its config")
        raise InputError(f"open_clip builds another model from {name} ({reason})") from None
    if differing := _other_epsilons(model, theirs):
        raise InputError(f"open_clip has no place for these epsilons of layer norms: {differing}")
    return encoder(theirs.eval(), their_transform, their_tokenizer)


def _other_epsilons(model: nn.Module, theirs: nn.Module) -> str:
    """Name the first norm whose epsilon is another in the second model, in words; "" if there is none."""
    has = {name: module.eps for name, module in theirs.named_modules() if hasattr(module, "eps")}
    for name, module in model.named_modules():
        if hasattr(module, "eps") and has.get(name) != module.eps:
            return f"{name} {module.eps}, not {has.get(name)}"
    return ""


def to_pt2(model: nn.Module, transform: Callable, tokenizer: Callable, folder: Path) -> Encode:
    """Write image.pt2 and text.pt2, each a program of torch.export's for any number of inputs, and encoders.json."""
    for tower, program in programs(model, transform, tokenizer).items():
        torch.export.save(program, folder / f"{tower}.pt2")
    write_json(folder / "encoders.json", description(model, tokenizer))
    read = {tower: torch.export.load(folder / f"{tower}.pt2").module() for tower in TOWERS}
    return lambda images, texts: {
        "image": read["image"](stacked(transform, images)),
        "text": read["text"](tokenizer(texts)),
    }


def to_onnx(model: nn.Module, transform: Callable, tokenizer: Callable, folder: Path) -> Encode:
    """Write image.onnx and text.onnx for any number of inputs, and encoders.json."""
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if not importlib.util.find_spec(name)]:
        raise InputError(f"ONNX needs {', '.join(missing)}: pip install 'diffclip-stack[export]'")
    import onnxruntime

    for tower, program in programs(model, transform, tokenizer).items():
        file = folder / f"{tower}.onnx"
        # protobuf holds 2 GB; the weights of a larger tower lie beside it
        apart = sum(tensor.nbytes for tensor in program.state_dict.values()) > 1.8e9
        inputs, outputs = [tower], ["features"]
        torch.onnx.export(
            program, (), file, dynamo=True, external_data=apart, verbose=False, input_names=inputs, output_names=outputs
        )
    write_json(folder / "encoders.json", description(model, tokenizer))
    read = {tower: onnxruntime.InferenceSession(folder / f"{tower}.onnx") for tower in TOWERS}

    def encode(images: list[Image.Image], texts: list[str]) -> Features:
        inputs = {"image": stacked(transform, images), "text": tokenizer(texts)}
        return {tower: torch.from_numpy(read[tower].run(None, {tower: x.numpy()})[0]) for tower, x in inputs.items()}

    return encode


FORMS: dict[str, Callable[..., Encode]] = {"open_clip": to_open_clip, "onnx": to_onnx, "pt2": to_pt2}


class Tower(nn.Module):
    """One tower alone, as a function from its input to features of unit length (batch, embed_dim)."""

    def __init__(self, model: nn.Module, tower: str) -> None:
        super().__init__()
        # a copy whose other half is gone, since a program takes along all parameters that its module has
        self.model = copy.copy(model)
        self.model._modules = {
            name: m for name, m in model._modules.items() if (name == "visual") == (tower == "image")
        }
        if tower == "image":
            self.model._parameters, self.model._buffers = {}, {}
        self.encode = f"encode_{tower}"

    def forward(self, batch: Tensor) -> Tensor:
        return getattr(self.model, self.encode)(batch, normalize=True)


def programs(model: nn.Module, transform: Callable, tokenizer: Callable) -> dict[str, torch.export.ExportedProgram]:
    """Return torch.export's program of each tower, for any number of inputs; InputError if it has none."""
    images, texts = samples(2)
    inputs = {"image": stacked(transform, images), "text": tokenizer(texts)}
    made = {}
    for tower, x in inputs.items():
        try:
            with torch.no_grad():
                any_batch = ({0: torch.export.Dim.DYNAMIC},)
                made[tower] = torch.export.export(Tower(model, tower).eval(), (x,), dynamic_shapes=any_batch)
        except Exception as error:  # torch.export's own have many names
            reason = in_one_line(error)
            raise InputError(f"torch.export has no program of its {tower} tower ({reason})") from None
    return made


def description(model: Any, tokenizer: Callable) -> dict[str, Any]:
    """Return what the programs do not hold: how to prepare images and texts, and how to compare the features."""
    config = getattr(model, "model_config", None) or {}
    bias = getattr(model, "logit_bias", None)
    return {
        "preprocess_cfg": config.get("preprocess_cfg") or getattr(model.visual, "preprocess_cfg", None),
        "context_length": tokenizer(["a"]).shape[1],
        "features": "unit length",
        "logit_scale": model.logit_scale.exp().item(),
        "logit_bias": None if bias is None else bias.item(),
    }


def samples(count: int) -> tuple[list[Image.Image], list[str]]:
    """Return pictures, of the built-in scenes, noise and not square, and captions, the last one too long for any."""
    scenes = [make_scene(0, "export", i) for i in range(count)]
    images = [Image.fromarray(draw(scene)) for scene in scenes[1:]]
    noise = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    texts = [captions(scene, random.Random(i), 1)[0] for i, scene in enumerate(scenes)]
    return [*images, Image.fromarray(noise)], [*texts[:-1], " ".join(texts) * 20]


def stacked(transform: Callable, images: list[Image.Image]) -> Tensor:
    """Return (batch, 3, H, W) of PIL images."""
    return torch.stack([transform(image) for image in images])


def encoder(model: Any, transform: Callable, tokenizer: Callable) -> Encode:
    """Return pictures and texts -> features of a model run plainly."""

    def encode(images: list[Image.Image], texts: list[str]) -> Features:
        return {
            "image": model.encode_image(stacked(transform, images), normalize=True),
            "text": model.encode_text(tokenizer(texts), normalize=True),
        }

    return encode


@torch.no_grad()
def differences(found: Encode, expected: Encode, form: str) -> dict[str, float]:
    """Return each tower's largest, over batches of one and of five; InputError if it is more than rounding."""
    largest = dict.fromkeys(TOWERS, 0.0)
    for count in (1, 5):
        inputs = samples(count)
        other = expected(*inputs)
        try:
            one = found(*inputs)
        except Exception as error:  # of whichever reader
            raise InputError(f"as {form} it does not run ({' '.join(str(error).split())[:300]})") from None
        for tower in TOWERS:
            largest[tower] = max(largest[tower], (one[tower] - other[tower]).abs().max().item())
    if not max(largest.values()) <= TOLERANCE:  # not a number, too
        raise InputError(f"as {form} its features differ by {largest}, so that is not the same model")
    return largest
