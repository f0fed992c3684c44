"""Image-text retrieval: R@k in both directions as CLIP papers count it, in blocks of the similarity matrix.

Text to image is averaged over captions; image to text counts a hit when any own caption is among the first k.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Ranks(NamedTuple):
    """For each query how many wrong items come before the first right one (0 = a hit at 1)."""

    text_to_image: Tensor  # (T,) int64
    image_to_text: Tensor  # (I,) int64


@torch.no_grad()
def ranks(image_features: Tensor, text_features: Tensor, text_owner: Tensor, block: int = 256) -> Ranks:
    """Rank by cosine similarity; equal similarities are ordered by row, so a collapsed model stays at chance.

    Args:
        image_features: (I, width), any floating dtype, need not be normalised.
        text_features: (T, width).
        text_owner: (T,) integer, row of the picture that each caption belongs to.
        block: queries per block; memory is block x max(I, T) floats, never I x T.

    Raises:
        ValueError: an owner outside the pictures, or a picture without a caption.
    """
    images = F.normalize(image_features.float(), dim=-1)
    texts = F.normalize(text_features.float(), dim=-1)
    owner = torch.as_tensor(text_owner, dtype=torch.int64, device=images.device)
    owned = torch.bincount(owner, minlength=len(images))
    if len(owner) != len(texts) or len(owned) != len(images) or (owned == 0).any():
        raise ValueError("text_owner must give each caption one of the pictures, and each picture a caption")

    image_rows = torch.arange(len(images), device=images.device)
    text_rows = torch.arange(len(texts), device=images.device)
    to_image = []
    for rows, own in zip(texts.split(block), owner.split(block)):
        similarity = rows @ images.T  # (block, I)
        best = similarity.gather(1, own[:, None])
        to_image.append(_before(similarity, best, own[:, None], image_rows))
    to_text = []
    for rows, number in zip(images.split(block), image_rows.split(block)):
        similarity = rows @ texts.T  # (block, T)
        own = owner == number[:, None]
        best, place = similarity.masked_fill(~own, -torch.inf).max(dim=1, keepdim=True)
        to_text.append(_before(similarity, best, place, text_rows))
    return Ranks(torch.cat(to_image).cpu(), torch.cat(to_text).cpu())


def _before(similarity: Tensor, best: Tensor, place: Tensor, rows: Tensor) -> Tensor:
    """Count per row what stands before column `place`: larger values, and equal ones further left."""
    return ((similarity > best) | ((similarity == best) & (rows < place))).sum(dim=1)


def recall_at_k(
    image_features: Tensor, text_features: Tensor, text_owner: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Return {"text_to_image/R@1": percent, ..., "image_to_text/R@1": ...}; arguments as in `ranks`."""
    return recalls(ranks(image_features, text_features, text_owner), ks)


def recalls(found: Ranks, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Turn ranks into R@k in percent, keys as in `recall_at_k`."""
    return {
        f"{direction}/R@{k}": 100 * (rank < k).double().mean().item()
        for direction, rank in found._asdict().items()
        for k in ks
    }
