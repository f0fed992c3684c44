"""Rows become the right examples; every fault in a data file is found before training and named."""

import contextlib
import io
import json
import tarfile
from typing import NamedTuple

import numpy as np
import pytest
import torch

from diffclip.base.errors import InputError
from mllm.conversation import IGNORE, NoSupervisionError, encode, render
from mllm.data.examples import ConversationDataset, collate, padded_length, training_order
from mllm.data.images import find_place
from mllm.data.rows import load_rows
from mllm.packed import BY_EXAMPLE, attend
from mllm.weights import freeze
from stages.attention import check_attention
from stages.settings import InstructConfig


def turns(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)]


@pytest.fixture
def folder(tmp_path, picture):
    """Two images as files and one inside a tar."""
    (tmp_path / "coco").mkdir()
    (tmp_path / "shots").mkdir()
    picture(0).save(tmp_path / "coco/0.png")
    picture(1).save(tmp_path / "coco/1.png")
    buffer = io.BytesIO()
    picture(2).save(buffer, "PNG")
    with tarfile.open(tmp_path / "shots/00000.tar", "w") as tar:
        for name, content in (("2.txt", b"text"), ("2.png", buffer.getvalue())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return tmp_path


ROWS = [
    {
        "id": "a",
        "image": "coco/0.png",
        "conversations": turns("<image>\nIs there a red square?", "yes", "a circle?", "no"),
    },
    {"id": 7, "image": "shots/2.png", "conversations": turns("What?\n<image>", "a small blue circle")},
    {"id": "t", "conversations": turns("yes or no", "yes no yes no")},
]


def write(path, rows, lines=False):
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return path


@pytest.mark.parametrize("lines", [False, True])
def test_examples_hold_text_labels_and_pixels_of_their_rows(folder, assembled, picture, lines):
    _, processor = assembled
    rows = load_rows([write(folder / "rows.json", ROWS, lines)], folder)
    dataset = ConversationDataset(rows, processor, template="vicuna")
    assert len(dataset) == 3
    for i, (row, seed) in enumerate(zip(ROWS, (0, 2, None))):
        expected = encode(render(row["conversations"], "vicuna"), processor.tokenizer, 16)
        example = dataset[i]
        assert example["input_ids"].tolist() == expected["input_ids"]
        assert example["labels"].tolist() == expected["labels"]
        assert dataset.lengths[i] == len(expected["input_ids"])
        if seed is None:
            assert "pixel_values" not in example
        else:
            pixels = processor.image_processor([picture(seed)], return_tensors="pt")["pixel_values"]
            assert torch.equal(example["pixel_values"], pixels)


def test_batch_pads_right_and_trains(folder, assembled):
    model, processor = assembled
    rows = load_rows([write(folder / "rows.json", ROWS)], folder)
    dataset = ConversationDataset(rows, processor, template="vicuna")
    batch = collate(processor)([dataset[i] for i in range(3)])
    width = padded_length(max(dataset.lengths))
    assert batch["input_ids"].shape == (3, width) and batch["pixel_values"].shape == (2, 3, 32, 32)
    for i, length in enumerate(dataset.lengths):
        assert batch["attention_mask"][i].tolist() == [1] * length + [0] * (width - length)
        assert (batch["labels"][i, length:] == IGNORE).all()
    assert "pixel_values" not in collate(processor)([dataset[2]])
    together = model.train()(**batch).loss
    counts = [(batch["labels"][i] != IGNORE).sum() for i in range(3)]
    alone = [model(**collate(processor)([dataset[i]])).loss * counts[i] for i in range(3)]
    torch.testing.assert_close(together, sum(alone) / sum(counts))  # a mean over tokens, blind to padding


def test_padded_lengths_are_the_next_that_cudnn_attention_can_be_trusted_with():
    allowed = [n for n in range(0, 2200, 8) if n % 128 != 64]
    for tokens in range(1, 2001):
        assert padded_length(tokens) == min(n for n in allowed if n >= tokens)


@pytest.mark.parametrize("attention", ["sdpa", "eager", BY_EXAMPLE])
def test_packed_examples_have_the_loss_and_gradients_of_padded_ones(folder, assembled, attention):
    model, processor = assembled
    rows = [*ROWS, {"conversations": turns("Is there a red square? " * 5, "No", "a small green star", "yes")}]
    dataset = ConversationDataset(load_rows([write(folder / "rows.json", rows)], folder), processor, template="vicuna")
    examples = [dataset[i] for i in range(len(dataset))]
    freeze(model, {"projector", "language_model"})
    model.train()
    found = []
    for packing in (False, True):
        inputs = collate(processor, packing)(examples)
        model.set_attn_implementation({"text_config": attention if packing else "eager"})
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        found.append((loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    assert inputs["input_ids"].shape == (1, padded_length(sum(len(e["input_ids"]) for e in examples)))
    (padded, wanted), (packed, grads) = found
    assert packed == pytest.approx(padded, rel=1e-5) and grads.keys() == wanted.keys()
    for name in wanted:
        assert (grads[name] - wanted[name]).norm() <= 1e-4 * wanted[name].norm() + 1e-7, name


@pytest.mark.parametrize("window", [None, 3])
def test_attention_by_example_is_that_of_a_mask(window):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 11, 8) for heads in (4, 2, 2))
    module = torch.nn.Module()
    module.num_key_value_groups, positions = 2, torch.cat([torch.arange(n) for n in (1, 6, 4)])[None]
    found, _ = attend(module, query, key, value, None, position_ids=positions, sliding_window=window, scaling=0.3)
    owner, place = (positions[0] == 0).cumsum(0), torch.arange(11)
    behind = place[:, None] - place
    seen = (owner[:, None] == owner) & (behind >= 0) & (behind < (window or 11))
    scores = (0.3 * query @ key.repeat_interleave(2, 1).mT).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(found, (scores.softmax(-1) @ value.repeat_interleave(2, 1)).transpose(1, 2))
    with pytest.raises(ValueError, match="one row"):
        attend(module, *[t.repeat(2, 1, 1, 1) for t in (query, key, value)], None, position_ids=positions)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"attn_implementation": "flash_attention_2"}, "needs a GPU and the package flash-attn"),
        ({"attn_implementation": "flex_attention"}, "no gradient on a CPU; set auto"),
        ({"attn_implementation": "sdpa", "packing": True}, "longer than padding; set `attn_implementation` auto"),
        ({"attn_implementation": "sdpa"}, ""),
        ({"packing": True}, ""),
    ],
)
def test_attention_that_this_machine_lacks_is_refused_before_weights_are_read(settings, reason):
    config = InstructConfig(use_cpu=True, **settings)
    with pytest.raises(InputError, match=reason) if reason else contextlib.nullcontext():
        check_attention(config)


def test_prefix_keeps_a_subset_and_several_files_make_a_mixture(folder):
    file = write(folder / "rows.json", ROWS)
    assert [r.images[0].file for r in load_rows([file], folder, image_prefix="coco/")] == [str(folder / "coco/0.png")]
    assert len(load_rows([file, file], folder)) == 6
    with pytest.raises(InputError, match="vg/"):
        load_rows([file], folder, image_prefix="vg/")


def test_files_win_over_tars_and_absent_names_are_none(folder, picture):
    picture(5).save(folder / "shots/2.png")
    assert find_place(folder, "shots/2.png").file == str(folder / "shots/2.png")
    assert find_place(folder, "shots/3.png") is None and find_place(folder, "nowhere/1.png") is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"image": "coco/9.png", "conversations": turns("<image>\na", "b")}, ["coco/9.png", "image_root"]),
        ({"image": "coco/0.png", "conversations": [{"from": "tool", "value": "a"}]}, ["tool"]),
        ({"image": "coco/0.png", "conversations": turns("<image>\na")}, ["answer"]),
        ({"image": "coco/0.png", "conversations": turns("<image>\na", " ")}, ["empty"]),
        ({"image": "coco/0.png", "conversations": turns("<image>\na", "<image>")}, ["<image>"]),
        ({"image": "coco/0.png", "conversations": turns("a", "b")}, ["1 images", "shows 0"]),
        ({"conversations": turns("<image>\na", "b")}, ["0 images", "shows 1"]),
        ({"image": ["coco/0.png", "coco/1.png"], "conversations": turns("<image>\na", "b")}, ["2 images"]),
        ({"image": "coco/0.png"}, ["conversations"]),
    ],
)
def test_a_bad_row_is_named_before_training(folder, assembled, row, words):
    file = write(folder / "rows.json", [*ROWS, {"id": "bad", **row}])
    with pytest.raises(InputError) as error:
        ConversationDataset(load_rows([file], folder), assembled[1], template="vicuna")
    for word in ["rows.json", "row 3", "id bad", *words]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_two_pictures_in_two_questions(folder, assembled):
    row = {
        "image": ["coco/0.png", "coco/1.png"],
        "conversations": turns("<image>\na", "yes", "<image>\nb", "no"),
    }
    dataset = ConversationDataset(load_rows([write(folder / "r.json", [row])], folder), assembled[1], template="vicuna")
    assert dataset[0]["pixel_values"].shape[0] == 2
    assert assembled[0].train()(**collate(assembled[1])([dataset[0]])).loss.isfinite()


def test_plain_captions(folder, assembled):
    _, processor = assembled
    dataset = ConversationDataset(load_rows([write(folder / "r.json", ROWS[1:2])], folder), processor, template="plain")
    example = dataset[0]
    assert example["input_ids"][:16].tolist() == [processor.image_token_id] * 16
    assert processor.tokenizer.decode(example["labels"][16:]) == "a small blue circle\n"


def test_cut_rows_are_errors_that_name_the_row(folder, assembled):
    rows = load_rows([write(folder / "r.json", ROWS[:1])], folder)
    full = ConversationDataset(rows, assembled[1], template="vicuna")
    first = next(i for i, label in enumerate(full[0]["labels"].tolist()) if label != IGNORE)
    cut = ConversationDataset(rows, assembled[1], template="vicuna", max_length=first + 1)
    assert (cut[0]["labels"] != IGNORE).sum() == 1 and cut.lengths == [first + 1]
    with pytest.raises(NoSupervisionError, match="id a"):
        ConversationDataset(rows, assembled[1], template="vicuna", max_length=first)[0]


@pytest.mark.parametrize("content", ["", "[1]", "{", '[{"id": 1}', "[]"])
def test_files_that_hold_no_rows(folder, content):
    (folder / "r.json").write_text(content)
    with pytest.raises(InputError, match=r"r\.json"):
        load_rows([folder / "r.json"], folder)
    with pytest.raises(InputError, match="absent"):
        load_rows([folder / "absent.json"], folder)


def test_broken_picture_is_named(folder, assembled):
    (folder / "coco/0.png").write_bytes(b"no image")
    dataset = ConversationDataset(
        load_rows([write(folder / "r.json", ROWS[:1])], folder), assembled[1], template="vicuna"
    )
    with pytest.raises(InputError, match=r"id a.*0\.png"):
        dataset[0]


@pytest.mark.slow
def test_real_rows_with_pictures_in_tars(shared_data, assembled):
    root = shared_data("llava").parent
    rows = load_rows([root / "llava/stage1_captions.json"], root)
    assert len(rows) == 8166
    in_tar = next(r for r in rows if r.images[0].file.endswith(".tar"))
    assert in_tar.images[0].open().mode == "RGB"


class Rows(NamedTuple):
    """Stands for a dataset: only the lengths matter."""

    lengths: list[int]

    def __len__(self):
        return len(self.lengths)


def padding(lengths, order, batch):
    """Padded over real tokens of all batches."""
    taken = np.asarray(lengths)[order].reshape(-1, batch)
    return taken.max(axis=1).sum() * batch / taken.sum()


def test_batches_of_like_length_cover_each_epoch_and_start_with_the_longest():
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(200, 260, 3000), rng.integers(300, 900, 2000), rng.integers(20, 60, 1003)])
    rows, batch = Rows(rng.permutation(lengths).tolist()), 32
    steps = 2 * (len(rows) // batch)
    order = training_order(rows, "length", batch, steps, seed=5)
    assert len(order) == steps * batch
    for epoch in (order[: len(order) // 2], order[len(order) // 2 :]):
        assert len(set(epoch)) == len(epoch) > len(rows) - batch
    assert max(rows.lengths[k] for k in order[:batch]) == max(rows.lengths)
    assert padding(rows.lengths, order, batch) <= 1.05
    anywhere = training_order(rows, "random", batch, steps, seed=5)
    assert padding(rows.lengths, anywhere[: steps * batch], batch) > 1.5
    assert (
        order == training_order(rows, "length", batch, steps, seed=5) != training_order(rows, "length", batch, steps, 6)
    )
    firsts = [np.mean([rows.lengths[k] for k in order[i : i + batch]]) for i in range(batch, len(order), batch)]
    assert abs(np.corrcoef(firsts, np.arange(len(firsts)))[0, 1]) < 0.2  # short and long batches come mixed


def test_answers_of_other_lengths_meet_in_a_batch_of_like_length():
    """Two answers whose rows differ by one token: sorted to the token, nearly every batch would hold but one."""
    answers = np.random.default_rng(0).integers(0, 2, 2000)
    rows, batch = Rows((100 + answers).tolist()), 16
    order = training_order(rows, "length", batch, len(rows) // batch, seed=0)
    both = [0 < answers[order[i : i + batch]].sum() < batch for i in range(0, len(order), batch)]
    assert np.mean(both) > 0.5


def test_order_of_the_file_and_data_smaller_than_a_batch():
    rows = Rows([5, 6, 7])
    assert training_order(rows, "file", 2, 3, seed=0) == [0, 1, 2, 0, 1, 2]
    for kind in ("random", "length"):
        assert sorted(training_order(rows, kind, 6, 1, seed=0)) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("name", ["../secret.png", "{}/secret.png", "coco/../../secret.png", "..\\secret.png"])
def test_rows_show_nothing_outside_of_image_root(folder, picture, name):
    """Also not what lies in a tar there; a folder above both is the remedy that the message names."""
    picture(0).save(folder / "secret.png")
    row = {"id": "x", "image": name.format(folder), "conversations": turns("<image>\nWhat?", "A shape.")}
    (folder / "coco" / "rows.json").write_text(json.dumps([row]))
    with pytest.raises(InputError, match=r"leads outside|as Windows writes it"):
        load_rows([folder / "coco" / "rows.json"], folder / "coco")
    if name == "{}/secret.png":
        (found,) = load_rows([folder / "coco" / "rows.json"], folder)[0].images
        assert found.file == str(folder / "secret.png")
