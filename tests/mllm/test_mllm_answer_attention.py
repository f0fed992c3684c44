"""Where an answer looks: attention weights computed by hand, the places of two images, and what the overlay shows."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from mllm.answer_attention import answer_attention, image_positions, images_of_pixels, overlays
from mllm.assemble import assemble
from mllm.processing import with_mode

ANSWER = "a small blue circle left"


@pytest.fixture
def two_images(tower_dir, language_dir, picture):
    """A model whose template shows two images in one question; such a conversation; and its images."""
    vlm = assemble(tower_dir, language_dir, seed=3, template="chatml")
    turns = [{"from": "human", "value": "left <image> right <image> Is there a red square?"}]
    return vlm, turns, [picture(0), picture(1)]


def whole_conversation(vlm, turns, images):
    """Model inputs with ANSWER written behind them, and the position where it starts, by plain tokenising."""
    inputs = vlm.inputs(vlm.prompts([turns]), [images])
    answer = vlm.tokenizer(ANSWER + "<|im_end|>", return_tensors="pt")["input_ids"]
    return torch.cat([inputs["input_ids"], answer], 1), inputs["pixel_values"], inputs["input_ids"].shape[1]


def weights_by_hand(model, input_ids, pixel_values, layer):
    """softmax(q k / sqrt(d)) of one Qwen2 layer, from its own input, written out: (heads, tokens, tokens)."""
    attention, kept = model.model.language_model.layers[layer].self_attn, {}
    hook = attention.register_forward_pre_hook(lambda _, args, kwargs: kept.update(kwargs), with_kwargs=True)
    model(input_ids=input_ids, pixel_values=pixel_values)
    hook.remove()
    x, (cos, sin) = kept["hidden_states"], kept["position_embeddings"]
    q, k = (p(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    scores = (q @ k.transpose(-1, -2))[0] / attention.head_dim**0.5
    tokens = scores.shape[-1]
    return scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf).softmax(-1)


@torch.no_grad()
def test_weights_are_those_of_a_computation_by_hand(two_images):
    vlm, turns, images = two_images
    model = vlm.model
    ids, pixels, first = whole_conversation(vlm, turns, images)
    model.set_attn_implementation("sdpa")
    usual = model(input_ids=ids, pixel_values=pixels).logits
    got = answer_attention(model, ids, pixels, first, (4, 4))
    assert got.shape == (ids.shape[1] - first, 2, 4, 4) and got.dtype == torch.float32
    wanted = weights_by_hand(model, ids, pixels, layer=1).mean(0)  # the later half of two layers
    starts = [i for i, one in enumerate(ids[0].tolist()) if one == model.config.image_token_id][::16]
    assert starts[1] > starts[0] + 16  # words stand between the images
    for number, start in enumerate(starts):
        rows = wanted[first - 1 : -1, start : start + 16]
        torch.testing.assert_close(got[:, number].flatten(1), rows, atol=1e-6, rtol=1e-4)
    assert (got >= 0).all() and (got.sum((1, 2, 3)) < 1).all() and got.std() > 0
    assert model.model.language_model.config._attn_implementation == "sdpa"  # put back
    assert torch.equal(model(input_ids=ids, pixel_values=pixels).logits, usual)


def test_a_patch_has_its_place_in_the_map(two_images):
    """Attention put on one patch of the second image shows there, in the row and column where it is."""
    vlm, turns, images = two_images
    model = vlm.model
    ids, pixels, first = whole_conversation(vlm, turns, images)
    place = image_positions(ids[0] == model.config.image_token_id, 2, (4, 4))[1, 6]  # second image, row 1, column 2

    def point(module, args, output):  # as if every head attended to nothing else
        if output[1] is None:
            return output
        weights = torch.zeros_like(output[1])
        weights[..., place] = 1
        return output[0], weights

    hook = model.model.language_model.layers[1].self_attn.register_forward_hook(point, prepend=True)
    got = answer_attention(model, ids, pixels, first, (4, 4))
    hook.remove()
    wanted = torch.zeros(2, 4, 4)
    wanted[1, 1, 2] = 1
    assert torch.equal(got, wanted.expand_as(got))


def test_class_tokens_are_left_out_and_wrong_counts_refused():
    placeholders = torch.tensor([0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1], dtype=torch.bool)
    assert image_positions(placeholders, 2, (2, 2)).tolist() == [[2, 3, 4, 5], [8, 9, 10, 11]]
    with pytest.raises(ValueError, match="10 placeholders for 3 images of 2 x 2"):
        image_positions(placeholders, 3, (2, 2))


def test_an_answer_starts_behind_the_pictures(two_images):
    vlm, turns, images = two_images
    ids, pixels, _ = whole_conversation(vlm, turns, images)
    for wrong in (3, ids.shape[1]):
        with pytest.raises(ValueError, match="the answer starts at"):
            answer_attention(vlm.model, ids, pixels, wrong, (4, 4))


def test_overlays_are_of_the_last_answer(two_images):
    vlm, turns, images = two_images
    model = vlm.model
    ids, pixels, first = whole_conversation(vlm, turns, images)
    wanted = answer_attention(model, ids, pixels, first, (4, 4)).mean(0).sum((1, 2)).tolist()
    found = overlays(vlm, [*turns, {"from": "gpt", "value": ANSWER}], images)
    assert [share for _, share in found] == pytest.approx(wanted, abs=1e-6)
    assert all(shown.size == (352, 352) for shown, _ in found)  # 32 px, eleven times
    earlier = [*turns, {"from": "gpt", "value": "no no no"}, {"from": "human", "value": "Is there a blue circle?"}]
    again = overlays(vlm, [*earlier, {"from": "gpt", "value": ANSWER}], images)
    ids, pixels, first = whole_conversation(vlm, earlier, images)
    wanted = answer_attention(model, ids, pixels, first, (4, 4)).mean(0).sum((1, 2)).tolist()
    assert [share for _, share in again] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
def test_the_picture_is_shown_as_the_tower_sees_it(assembled, mode):
    """A red left third, green middle, blue right third, 96 x 32: which of them are seen, and where."""
    processor = assembled[1]
    processor.image_processor = with_mode(processor.image_processor, mode)
    thirds = np.zeros((32, 96, 3), np.uint8)
    for column in range(3):
        thirds[:, 32 * column : 32 * (column + 1), column] = 255
    pixels = processor.image_processor([Image.fromarray(thirds)], return_tensors="pt")["pixel_values"]
    seen = np.asarray(images_of_pixels(processor, pixels)[0])
    assert seen.shape == (32, 32, 3)
    middle = [seen[16, x].argmax() for x in (3, 16, 28)]
    assert middle == ([1, 1, 1] if mode == "crop" else [0, 1, 2])
    mean = [round(255 * part) for part in processor.image_processor.image_mean]
    assert (np.abs(seen[2, 16].astype(int) - mean).max() <= 1) == (mode == "pad")
