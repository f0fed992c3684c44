"""Image-text retrieval: R@k in both directions as CLIP papers count it, in blocks of the similarity matrix.

Text to image is averaged over captions; image to text counts a hit when any own caption is among the first k.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffclip.benchmarks.captioned import Captioned
from diffclip.benchmarks.images import Images
from diffclip.benchmarks.protocol import Evaluation, Protocol

TIE = 3e-7  # some units in the last place of a cosine in float32


class Ranks(NamedTuple):
    """For each query how many wrong items come before the first right one (0 = a hit at 1)."""

    text_to_image: Tensor  # (T,) int64
    image_to_text: Tensor  # (I,) int64


@torch.no_grad()
def ranks(image_features: Tensor, text_features: Tensor, text_owner: Tensor, block: int = 512) -> Ranks:
    """Rank by cosine similarity, each product of an image and a text computed once.

    Similarities within `TIE` are equal, which is what float32 leaves of equal ones, and are ordered by row: so a
    collapsed model stays at chance.

    Args:
        image_features: (I, width), any floating dtype, need not be normalised.
        text_features: (T, width).
        text_owner: (T,) integer, row of the image that each caption belongs to.
        block: texts at a time; memory is two times block x I floats, never I x T.

    Raises:
        ValueError: an owner outside the images, or an image without a caption.
    """
    images = F.normalize(image_features.float(), dim=-1)
    texts = F.normalize(text_features.float(), dim=-1)
    owner = torch.as_tensor(text_owner, dtype=torch.int64, device=images.device)
    owned = torch.bincount(owner, minlength=len(images))
    if len(owner) != len(texts) or len(owned) != len(images) or (owned == 0).any():
        raise ValueError("text_owner must give each caption one of the images, and each image a caption")

    own = torch.cat([(t * images[o]).sum(dim=1) for t, o in zip(texts.split(block), owner.split(block))])  # (T,)
    best = own.new_full((len(images),), -torch.inf).scatter_reduce(0, owner, own, "amax")  # (I,) of its own captions
    to_image, clear, equal = [], torch.zeros_like(best), torch.zeros_like(best)
    compared = texts.new_empty(min(block, len(texts)), len(images))  # 1.0 where true: sums faster than booleans do
    for rows, mine, place in zip(texts.split(block), own.split(block), owner.split(block)):
        similarity = rows @ images.T  # (block, I)
        found = compared[: len(rows)]
        before = torch.gt(similarity, mine[:, None] + TIE, out=found).sum(dim=1)
        ties = torch.ge(similarity, mine[:, None] - TIE, out=found).sum(dim=1) > before + 1
        for row in ties.nonzero()[:, 0].tolist():
            before[row] += ((similarity[row] - mine[row]).abs() <= TIE)[: place[row]].sum()
        to_image.append(before.long())
        clear += torch.gt(similarity, best + TIE, out=found).sum(dim=0)
        equal += torch.ge(similarity, best - TIE, out=found).sum(dim=0)
    to_text = clear.long()
    for tied in (equal > clear + 1).nonzero()[:, 0].split(block):
        near = (images[tied] @ texts.T - best[tied, None]).abs() <= TIE  # (tied, T)
        first_own = (near & (owner == tied[:, None])).int().argmax(dim=1)  # an image's first caption among equals
        to_text[tied] += (near & (torch.arange(len(texts), device=owner.device) < first_own[:, None])).sum(dim=1)
    return Ranks(torch.cat(to_image).cpu(), to_text.cpu())


def recall_at_k(image_features: Tensor, text_features: Tensor, text_owner: Tensor) -> dict[str, float]:
    """Return {"text_to_image/R@1": percent, ..., "image_to_text/R@10": ...}; arguments as in `ranks`."""
    return recalls(hits(ranks(image_features, text_features, text_owner)))


def hits(found: Ranks) -> dict[str, Tensor]:
    """For each query, (T,) or (I,) bool, whether a right item is among the first k; keys as in `recall_at_k`."""
    return {f"{way}/R@{k}": rank < k for way, rank in found._asdict().items() for k in (1, 5, 10)}


def recalls(outcomes: dict[str, Tensor]) -> dict[str, float]:
    return {name: 100 * values.double().mean().item() for name, values in outcomes.items()}


def images(name: str, captioned: Captioned) -> dict[str, Images]:
    return {f"retrieval {name} images": captioned.images}


def score(evaluation: Evaluation, name: str, captioned: Captioned) -> None:
    """Add retrieval/[NAME/]{text_to_image,image_to_text}/R@{1,5,10}."""
    prefix = f"retrieval/{name}" if name else "retrieval"
    features = evaluation.encoder.images(captioned.images, f"{prefix} images").after
    texts = evaluation.encoder.texts(captioned.captions, f"{prefix} captions")
    outcomes = hits(ranks(features, texts, torch.tensor(captioned.owner)))
    evaluation.add(prefix, recalls(outcomes), outcomes)


PROTOCOL = Protocol(images, score)
