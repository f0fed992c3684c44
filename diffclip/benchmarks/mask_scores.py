"""Do the patches that speak for a text lie on the object? Scored without choosing a threshold.

Appendix A of the paper shows attention maps and leaves their quality to the eye. Here `relevance` for "a {category}"
is compared with the category's mask in COCO-format annotations, by three scores that no threshold enters:

- pointing: is the most relevant pixel inside the mask (Zhang et al. 2016, arXiv 1608.00507; no tolerance margin);
- energy: the share of all relevance that lies inside (Wang et al. 2020, arXiv 1910.01279);
- precision: average precision of the pixels ranked by relevance.

Beside them stands `area`, the mask's share of the image: what energy and precision are for a map of noise.
"""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from diffclip.attention_maps import relevance, seen_part, upsample
from diffclip.base.devices import pick_device
from diffclip.base.errors import InputError, in_one_line
from diffclip.base.files import check_output, read_json, write_json
from diffclip.base.images import open_image
from diffclip.base.lines import print_line
from diffclip.base.paths import inside
from diffclip.base.statistics import bootstrap_mean
from diffclip.benchmarks.comparison import model_names
from diffclip.mapped_models import load_with_maps

Item = tuple[Path, str, np.ndarray]  # an image, a category, and the mask (height, width) of its objects

LARGEST = 20_000  # pixels of a side; more than any of COCO's
SCORES = ("pointing", "energy", "precision")
PROMPT = "a {}"


def read_masks(instances: str | Path, images: str | Path) -> Iterator[Item]:
    """Yield (image, category name, mask) for every category in every image; all its objects are one mask.

    Masks are (height, width) bool, from polygons or run lengths; crowds and annotations without a segmentation are
    left out. InputError: annotations that are not COCO's, an image that is missing or outside of the folder.
    """
    from pycocotools.coco import COCO  # of the extra `eval`

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = read_json(instances)
            coco.createIndex()
        names = {c["id"]: c["name"] for c in coco.dataset["categories"]}
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{instances}: cannot be read as COCO instances: {type(error).__name__} {error}") from error
    for image_id, image in sorted(coco.imgs.items()):
        path = inside(images, image.get("file_name"), f"{instances}: image {image_id}: file_name")
        if not _small(image.get("height"), image.get("width"), least=0):
            raise InputError(f"{instances}: image {image_id} has a height or width that no image has: write it again")
        if not path.is_file():
            raise InputError(f"{path}: no such image, but {instances} has it as image {image_id}")
        masks: dict[int, np.ndarray] = {}  # by category
        for annotation in coco.imgToAnns[image_id]:
            if annotation.get("iscrowd") or not annotation.get("segmentation"):
                continue
            try:
                kind = annotation["category_id"]
                if kind not in names:
                    raise ValueError("of a category that is not there")
                if not _drawable(annotation["segmentation"]):
                    raise ValueError("a point, or a run of pixels, far outside of all images")
                masks[kind] = masks.get(kind, False) | coco.annToMask(annotation).astype(bool)
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                reason = in_one_line(error)
                raise InputError(
                    f"{instances}: annotation {annotation.get('id')} is no mask ({reason}): remove it"
                ) from None
        for kind, mask in sorted(masks.items()):
            if mask.any() and not mask.all():
                yield path, names[kind], mask


def _small(*numbers: object, least: int = -LARGEST) -> bool:
    """Whether these are numbers of pixels; pycocotools, which is C, takes memory for whatever they say."""
    return all(isinstance(number, int | float) and least <= number <= LARGEST for number in numbers)


def _drawable(segmentation: Any) -> bool:
    """Whether a segmentation is polygons, or runs, of an image that can be."""
    if isinstance(segmentation, list):
        return all(isinstance(polygon, list) and _small(*polygon) for polygon in segmentation)
    counts = segmentation["counts"]
    runs = counts if isinstance(counts, list) else []
    return _small(*segmentation["size"], least=0) and sum(runs) <= LARGEST**2 and all(run >= 0 for run in runs)


def map_scores(heat: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Pointing, energy, precision and area in percent, for heat (height, width) >= 0 and a mask like it.

    Where several pixels are most relevant, pointing is the share of them inside; a map of zeros counts as even.
    """
    if not heat.any():
        heat = np.ones_like(heat)
    top = heat >= heat.max()
    return {
        "pointing": 100 * float(mask[top].mean()),
        "energy": 100 * float(heat[mask].sum() / heat.sum()),
        "precision": 100 * float(average_precision_score(mask.ravel(), heat.ravel())),
        "area": 100 * float(mask.mean()),
    }


def localise(
    model: nn.Module,
    transform: Callable[[Image.Image], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
    items: Sequence[Item],
    batch_size: int = 64,
) -> np.ndarray:
    """Return (items, 4): pointing, energy, precision and area of each item, in percent.

    Args:
        model, transform, tokenizer: from `diffclip.load`.
        items: from `read_masks`. Masks get the model's own resizing and centre crop; an object that the crop
            leaves out, or leaves nothing beside, has NaN in its row.

    InputError: an image that is not of its masks' size.
    """
    crop = seen_part(transform, nearest=True)
    device = next(model.parameters()).device
    rows = []
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        images = [open_image(path) for path, _, _ in batch]
        for image, (path, _, mask) in zip(images, batch):
            if image.size != mask.shape[::-1]:
                raise InputError(
                    f"{path}: is {image.width} x {image.height} pixels as a viewer shows it, its masks are "
                    f"{mask.shape[1]} x {mask.shape[0]}: annotate it as it is shown, or take out its EXIF orientation"
                )
        pixels = torch.stack([transform(image) for image in images]).to(device)
        texts = tokenizer([PROMPT.format(name) for _, name, _ in batch]).to(device)
        height, width = pixels.shape[-2:]
        heats = upsample(relevance(model, pixels, texts), (height, width)).cpu().numpy()
        for heat, (_, _, mask) in zip(heats, batch):
            seen = np.asarray(crop(Image.fromarray(mask).convert("RGB")))[:, :, 0] > 127
            whole = seen.any() and not seen.all()
            rows.append([*map_scores(heat, seen).values()] if whole else [np.nan] * 4)
    return np.array(rows)


def summary(models: Mapping[str, np.ndarray], images: Sequence[Path]) -> dict[str, Any]:
    """Return mean and 95 % interval of each score of each model, and of each model's difference to the first.

    Intervals are bootstrapped over images, since the objects of one image are not independent.

    Args:
        models: name -> what `localise` returned, the same items for all.
        images: of each item, its image.
    """
    _, image = np.unique([str(path) for path in images], return_inverse=True)
    whole = ~np.isnan(np.stack(list(models.values()))).any(axis=(0, 2))
    rows: dict[str, dict[str, dict[str, float]]] = {}
    first = next(iter(models.values()))
    for name, scores in models.items():
        rows[name] = {s: _interval(scores[whole, i], image[whole]) for i, s in enumerate((*SCORES, "area"))}
        if scores is not first:
            lead = scores - first
            rows[name] |= {f"{s}_difference": _interval(lead[whole, i], image[whole]) for i, s in enumerate(SCORES)}
    return {"items": int(whole.sum()), "pictures": len(set(image[whole])), "models": rows}


def _interval(values: np.ndarray, image: np.ndarray) -> dict[str, float]:
    return dict(zip(("mean", "low", "high"), bootstrap_mean(values, image)))


def compare(instances: str, images: str, models: Sequence[str], out: str, device: str = "cpu") -> None:
    """Score each model's maps on all masks, print the scores and write them to the JSON file `out`."""
    check_output(out, (".json",))
    chosen = pick_device(device)
    names = model_names(models)
    items = list(read_masks(instances, images))
    if not items:
        raise InputError(f"{instances}: no masks to compare with")
    scores = {}
    for name, (model, transform, tokenizer) in zip(names, load_with_maps(models)):
        scores[name] = localise(model.to(chosen), transform, tokenizer, items)
        model.to("cpu")
        print_line(f"{name}: {len(items)} objects in {len({path for path, _, _ in items})} images")
    result = summary(scores, [path for path, _, _ in items])
    write_json(out, result)
    for name, row in result["models"].items():
        cells = [f"{s} {v['mean']:.1f} [{v['low']:.1f}, {v['high']:.1f}]" for s, v in row.items()]
        print_line(f"{name}: {', '.join(cells)}")
