"""Where an answer looks: the language model's attention from the answer to the places where images stand.

The later half of the layers and all heads are averaged. Attention is what the model reads, not a proof of why it
answers: some patches draw much of it whatever is asked (attention sinks).
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaProcessor

from diffclip.attention_maps import upsample
from diffclip.base.overlay import overlay
from mllm.conversation import IGNORE, Conversation
from mllm.llava import DiffCLIPLlavaForConditionalGeneration
from mllm.model import VisionLanguageModel


@torch.no_grad()
def answer_attention(
    model: DiffCLIPLlavaForConditionalGeneration,
    input_ids: Tensor,
    pixel_values: Tensor,
    first: int,
    grid: tuple[int, int],
) -> Tensor:
    """How much the model attends to each patch while it writes each token of an answer.

    Everything before the answer is read as always, into a cache; the answer is then read once more with eager
    attention, the only one that returns weights. Not for two threads at a time: it changes the model for a moment.

    Args:
        input_ids: (1, tokens) int64, the conversation up to the answer's end, one placeholder per image feature.
        pixel_values: (images, 3, height, width), in the model's dtype.
        first: position of the answer's first token, behind all images. A token is written from the position before
            it, so the attention of positions first - 1 to tokens - 2 is returned.
        grid: rows and columns of patches.

    Returns:
        (tokens - first, images, rows, columns) float32: not negative, and at most 1 in sum over the images of
        one token, the rest being what text gets.

    Raises:
        ValueError: `first` is not behind all images, or the placeholders do not fit images and grid.
    """
    columns = image_positions(input_ids[0] == model.config.image_token_id, len(pixel_values), grid)
    if not int(columns.max()) < first < input_ids.shape[1]:
        raise ValueError(f"the answer starts at {first}, but images end at {int(columns.max())}")
    before = model(input_ids=input_ids[:, : first - 1], pixel_values=pixel_values, use_cache=True, logits_to_keep=1)
    language = model.model.language_model
    usual = language.config._attn_implementation
    language.set_attn_implementation("eager")
    try:
        read = language(
            input_ids=input_ids[:, first - 1 : -1], past_key_values=before.past_key_values, output_attentions=True
        )
    finally:
        language.set_attn_implementation(usual)
    maps = read.attentions[len(read.attentions) // 2 :]  # each (1, heads, tokens - first, tokens - 1)
    mean = sum(layer[0].float().mean(0) for layer in maps) / len(maps)
    return mean[:, columns.flatten()].unflatten(1, (len(pixel_values), *grid))


def image_positions(placeholders: Tensor, images: int, grid: tuple[int, int]) -> Tensor:
    """(images, rows * columns) int64 positions of the patches among a text's tokens.

    Args:
        placeholders: (tokens,) bool, true where image features stand: for each image its patches row by row, after
            its class token where the model sees that.

    Raises:
        ValueError: there are more or fewer placeholders than `images` of this grid have.
    """
    positions = placeholders.nonzero().flatten()
    patches = grid[0] * grid[1]
    if not images or len(positions) not in (images * patches, images * (patches + 1)):
        raise ValueError(f"{len(positions)} placeholders for {images} images of {grid[0]} x {grid[1]} patches")
    return positions.view(images, -1)[:, -patches:]


def overlays(
    vlm: VisionLanguageModel, turns: Conversation, images: Sequence[Image.Image]
) -> list[tuple[Image.Image, float]]:
    """Each image of a conversation as the tower sees it, with where the last answer looks laid over it.

    Args:
        turns: the conversation, ending with an answer.
        images: in the order in which the conversation shows them; at least one.

    Returns:
        For each image the overlay, at least 336 pixels high, and the share of the answer's attention it gets. The
        hottest colour stands for `image.info["hottest"]`, the share that the patch with the most of it gets.
    """
    model, processor = vlm
    encoded = vlm.encode(turns, len(images))
    ids, supervised = torch.tensor([encoded["input_ids"]]), torch.tensor(encoded["labels"]) != IGNORE
    last = int(supervised.nonzero()[-1])  # of the answer, its end token counted
    gaps = (~supervised[:last]).nonzero()
    pixels = vlm.pixels(images)
    grid = (pixels.shape[2] // processor.patch_size, pixels.shape[3] // processor.patch_size)
    ids, first = ids[:, : last + 1].to(model.device), int(gaps[-1]) + 1
    weights = answer_attention(model, ids, pixels.to(model.device, model.dtype), first, grid)
    heats = weights.mean(0).cpu()  # (images, rows, columns)
    result = []
    for image, heat in zip(images_of_pixels(processor, pixels), heats):
        scale = -(-336 // image.height)
        large = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        smooth = upsample(heat[None], (large.height, large.width))[0].numpy()
        shown = Image.fromarray(overlay(np.asarray(large), smooth))
        shown.info["hottest"] = float(smooth.max())
        result.append((shown, float(heat.sum())))
    return result


def images_of_pixels(processor: LlavaProcessor, pixels: Tensor) -> list[Image.Image]:
    """Images of what the tower gets, cropped, squashed or padded: (images, 3, height, width) as prepared for it."""
    mean, std = (torch.tensor(getattr(processor.image_processor, f"image_{key}")) for key in ("mean", "std"))
    colours = pixels.permute(0, 2, 3, 1) * std + mean  # (images, height, width, 3), 0 to 1
    return [Image.fromarray(values) for values in (255 * colours).round().clip(0, 255).byte().numpy()]
