"""The tokenizer: the official ids, two dimensions always, and the end token that the official one loses."""

import json
import random

import open_clip
import pytest
import torch

from diffclip import models, preprocessing, variants

CONFIG = variants.MODELS["CLIP-B-16"]
END = 49407


@pytest.fixture(scope="module")
def records(golden):
    return json.loads((golden("09_tokenizer") / "slip_simple_tokenizer.json").read_text())["records"]


def test_legacy_ids_are_the_official_ones(records):
    tokenize = preprocessing.tokenizer(CONFIG, legacy=True)
    for record in records:
        ids = tokenize(record["text"])[0]
        assert ids[: len(record["ids"])].tolist() == record["ids"], record["text"]
        assert not ids[len(record["ids"]) :].any()
        assert int(ids.argmax()) == record["pooled_position"]
        assert (END in ids) == record["has_eot"]


def test_legacy_decodes_as_the_official_one(records):
    tokenize = preprocessing.tokenizer(CONFIG, legacy=True)
    for record in records:
        assert tokenize.decode(tokenize.encode(record["text"])) == record["decoded"]


def test_default_keeps_the_end_token_and_otherwise_equals_legacy(records):
    tokenize, legacy, cut = preprocessing.tokenizer(CONFIG), preprocessing.tokenizer(CONFIG, legacy=True), 0
    for record in records:
        if "<|" in record["text"]:  # special tokens written out: open_clip gives them other names
            continue
        ours, theirs = tokenize(record["text"])[0], legacy(record["text"])[0]
        assert (ours == END).sum() == 1
        if record["has_eot"]:
            assert torch.equal(ours, theirs)
        else:
            assert ours[-1] == END
            assert torch.equal(ours[:-1], theirs[:-1])
            cut += 1
    assert cut > 0


@pytest.mark.slow
def test_captions_of_all_kinds_have_open_clips_ids():
    """Plain ones are not looked through for broken Unicode and HTML, which they cannot hold."""
    ours, theirs, rng = preprocessing.tokenizer(CONFIG), open_clip.SimpleTokenizer(), random.Random(0)
    letters = [
        *map(chr, range(32, 127)),
        *" \t\n\r\0\x1b\x85\u2019éÃ©½ﬁ\u200b\U0001f600",
        "&amp;",
        "&lt",
        "\x1b[1m",
        "Ã¢â‚¬",
    ]
    plain = [*map(chr, range(32, 127))]
    texts = ["".join(rng.choices(plain if i % 2 else letters, k=rng.randrange(60))) for i in range(4000)]
    assert torch.equal(ours(texts), theirs(texts))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["CLIP-B-16", "DiffCLIP-tiny"])
def test_always_two_dimensions(name, legacy):
    config = variants.MODELS[name]
    context = config["model_cfg"]["text_cfg"]["context_length"]
    tokenize = preprocessing.tokenizer(config, legacy=legacy)
    for texts, rows in [("a cat", 1), (["a cat"], 1), (["a cat", "two dogs", ""], 3)]:
        ids = tokenize(texts)
        assert ids.shape == (rows, context)
        assert ids.dtype == torch.long


def test_long_captions_differ_in_their_embedding_only_with_the_end_token():
    """Without it, every over-long caption is read at the start token and gets one and the same embedding."""
    model = models.build("DiffCLIP-tiny").eval()
    long = ["a red square and a blue circle " * 10, "many green stars on the left of it " * 10]
    with torch.no_grad():
        kept = model.encode_text(preprocessing.tokenizer(model.model_config)(long))
        lost = model.encode_text(preprocessing.tokenizer(model.model_config, legacy=True)(long))
    torch.testing.assert_close(lost[0], lost[1])
    assert (kept[0] - kept[1]).abs().max() > 1e-3
