"""Conversations in every layout that people have become the same turns and images, or are refused by name."""

import base64
import gzip
import io
import json
import tarfile

import pytest
from shards import write_shard

from diffclip.base.errors import InputError
from mllm.conversation import CHATML_SYSTEM, VICUNA_SYSTEM, chat_template, render
from mllm.data.judge import image_problems
from mllm.data.layouts import read_conversation
from mllm.data.rows import load_rows

ASKED = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
TEXT = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Red."}]


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def user(*content):
    """OpenAI's messages with these parts, and an answer."""
    return [{"role": "user", "content": list(content)}, {"role": "assistant", "content": "Red."}]


def said(text):
    return {"type": "text", "text": text}


MESSAGES = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Red."}]
TAGGED = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "Red."}]
URL = {"type": "image_url", "image_url": {"url": "a.png"}}
ONE_IMAGE = {
    "LLaVA": {"image": "a.png", "conversations": ASKED},
    "LLaVA, a list": {"image": ["a.png"], "conversations": ASKED},
    "images beside": {"images": ["a.png"], "conversations": ASKED},
    "image_path": {"image_path": "a.png", "conversations": ASKED},
    "ShareGPT with OpenAI's keys": {"image": "a.png", "conversations": TAGGED},
    "ShareGPT, user and assistant": {
        "image": "a.png",
        "conversations": [{"from": "user", "value": "<image>\nWhat?"}, {"from": "assistant", "value": "Red."}],
    },
    "roles in capitals": {
        "image": "a.png",
        "conversations": [{"from": "Human", "value": "<image>\nWhat?"}, {"from": "GPT", "value": "Red."}],
    },
    "OpenAI, image_url": {"messages": user(URL, said("What?"))},
    "OpenAI, image_url as text": {"messages": user({"type": "image_url", "image_url": "a.png"}, said("What?"))},
    "OpenAI, detail": {
        "messages": user({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, said("What?"))
    },
    "OpenAI's responses": {
        "messages": user({"type": "input_image", "image_url": "a.png"}, {"type": "input_text", "text": "What?"})
    },
    "parts with image": {"messages": user({"type": "image", "image": "a.png"}, said("What?"))},
    "parts with path": {"messages": user({"type": "image", "path": "a.png"}, said("What?"))},
    "parts without type": {"messages": user({"image": "a.png"}, {"text": "What?"})},
    "parts, strings among them": {"messages": user({"image": "a.png"}, "What?")},
    "parts as tables fill them up": {
        "messages": user(
            {"type": "image", "image": "a.png", "text": None, "image_url": None},
            {"type": "text", "text": "What?", "image": None, "image_url": None},
        )
    },
    "a place in the parts": {"images": ["a.png"], "messages": user({"type": "image"}, said("What?"))},
    "a numbered place": {"images": ["a.png"], "messages": user({"type": "image", "index": 0}, said("What?"))},
    "one part, no list": {"messages": [{"role": "user", "content": said("What?")}, MESSAGES[1]], "image": "a.png"},
    "TRL, images beside": {"images": ["a.png"], "messages": MESSAGES},
    "LLaMA-Factory, tagged": {"images": ["a.png"], "messages": TAGGED},
    "TRL's prompt": {"images": ["a.png"], "prompt": "What?", "completion": "Red."},
    "TRL's prompt, messages": {"images": ["a.png"], "prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    "TRL's prompt, mixed": {"image": "a.png", "prompt": MESSAGES[:1], "completion": "Red."},
    "the Cauldron": {"images": ["a.png"], "texts": [{"user": "What?", "assistant": "Red.", "source": "x"}]},
    "file address": {"image": "file://ROOT/a.png", "conversations": ASKED},
    "file address, quoted": {"image": "file://ROOT/%61.png", "conversations": ASKED},
    "absolute below the root": {"image": "ROOT/a.png", "conversations": ASKED},
    "another spelling": {"image": "./a.png", "conversations": ASKED},
    "provenance": {"image": "a.png", "conversations": ASKED, "image_url": "https://x.org/1.jpg", "source": "x/9.png"},
    "the same name again": {"image": "a.png", "file_name": "a.png", "conversations": ASKED},
    "empty other keys": {"image": "a.png", "images": [], "video": None, "audio": "", "conversations": ASKED},
    "UltraChat's prompt": {"image": "a.png", "prompt": "What?", "messages": TAGGED},
}


@pytest.mark.parametrize("layout", ONE_IMAGE)
def test_every_layout_of_one_question_about_one_image_is_the_same(layout, tmp_path, picture):
    picture(1).save(tmp_path / "a.png")
    text = json.dumps([ONE_IMAGE[layout]]).replace("ROOT", str(tmp_path))
    (tmp_path / "r.json").write_text(text)
    (row,) = load_rows([tmp_path / "r.json"], tmp_path)
    assert row.conversation == ASKED
    assert [image.open().tobytes() for image in row.images] == [picture(1).tobytes()]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("form", ["data", "url", "base64", "anthropic", "struct"])
def test_images_inside_of_a_row(kind, form, tmp_path, picture):
    content = encoded(picture(1), kind)
    plain = base64.b64encode(content).decode()
    uri = f"data:image/{kind.lower()};base64,{plain}"
    part = {
        "data": {"type": "image", "image": uri},
        "url": {"type": "image_url", "image_url": {"url": uri}},
        "base64": {"type": "image", "base64": plain},
        "anthropic": {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": plain}},
        "struct": {"type": "image", "image": {"bytes": content, "path": None}},
    }[form]
    turns, images = read_conversation({"messages": user(part, said("What?"))})
    assert turns == ASKED and [held for _, held in images] == [content]
    assert all(len(name) < 80 for name, _ in images)  # what messages call it


def test_parts_keep_their_order():
    first, second = ({"type": "image", "image": name} for name in ("a.png", "b.png"))
    for parts, wanted in (
        ((first, second, said("Same?")), "<image>\n<image>\nSame?"),
        ((said("Is this"), first, said("like this"), second, said("?")), "Is this\n<image>\nlike this\n<image>\n?"),
        ((said("What?\n"), first), "What?\n<image>"),
        ((said("Wh"), said("at?"), first, second), "What?\n<image>\n<image>"),
        ((first, said(""), second), "<image>\n<image>"),
    ):
        turns, images = read_conversation({"messages": user(*parts)})
        shown = ["a.png", "b.png"][: wanted.count("<image>")]
        assert (turns[0]["value"], [name for name, _ in images]) == (wanted, shown)
    back = [{"type": "image", "index": 1}, said("and"), {"type": "image", "index": 0}]
    turns, images = read_conversation({"images": ["a.png", "b.png"], "messages": user(*back)})
    assert [name for name, _ in images] == ["b.png", "a.png"]


def test_several_images_of_the_cauldron_stand_before_the_first_question():
    texts = [{"user": "Same?", "assistant": "No."}, {"user": "Sure?", "assistant": "Yes."}]
    turns, images = read_conversation({"images": ["a.png", "b.png"], "texts": texts})
    assert [turn["value"] for turn in turns] == ["<image>\n<image>\nSame?", "No.", "Sure?", "Yes."]
    assert len(images) == 2


SYSTEM = {
    "ShareGPT's key": {"system": "Be brief.", "conversations": TEXT},
    "a turn": {"conversations": [{"from": "system", "value": "Be brief."}, *TEXT]},
    "OpenAI": {"messages": [{"role": "system", "content": "Be brief."}, *MESSAGES]},
    "OpenAI's developer": {"messages": [{"role": "developer", "content": [said("Be brief.")]}, *MESSAGES]},
    "both, the same": {"system": "Be brief.", "messages": [{"role": "system", "content": "Be brief."}, *MESSAGES]},
}


@pytest.mark.parametrize("layout", SYSTEM)
def test_a_system_text_takes_the_place_of_the_templates_own(layout):
    turns, _ = read_conversation(SYSTEM[layout])
    assert turns == [{"from": "system", "value": "Be brief."}, *TEXT]
    for template, own in (("vicuna", VICUNA_SYSTEM), ("chatml", CHATML_SYSTEM)):
        plain = "".join(s.text for s in render(TEXT, template))
        segments = render(turns, template)
        assert own in plain and "".join(s.text for s in segments) == plain.replace(own, "Be brief.")
        assert not any("brief" in s.text for s in segments if s.supervised)
    assert render(turns, "plain") == render(TEXT, "plain")


@pytest.mark.parametrize("template", ["vicuna", "chatml"])
@pytest.mark.parametrize("system", ["", " \n", "Be brief.\nIt's {{ x }}"])
def test_the_jinja_template_writes_a_system_text_as_training_does(template, system):
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "system", "content": system}, *MESSAGES]
    turns, _ = read_conversation({"messages": messages})
    wanted = "".join(s.text for s in render(turns, template))
    (found,), _ = render_jinja_template([messages], chat_template=chat_template(template))
    assert found == wanted and (system.strip() or "helpful") in found


def test_a_blank_system_text_leaves_the_templates_own():
    blank = [{"from": "system", "value": " \n"}, *TEXT]
    assert render(blank, "chatml") == render(TEXT, "chatml")
    assert (
        read_conversation({"conversations": blank})[0]
        == TEXT
        == read_conversation({"system": "", "messages": MESSAGES})[0]
    )


DEEP: list = []
for _ in range(900):
    DEEP = [DEEP]
REFUSED = [
    ({}, "has no conversation, but nothing"),
    ({"instruction": "a", "output": "b"}, "has no conversation, but instruction, output"),
    ({"conversations": "a"}, "`conversations` is no list of turns"),
    ({"conversations": [["human", "a"]]}, "`conversations` is no list of turns"),
    ({"conversations": TEXT, "messages": MESSAGES}, "turns in `conversations` and in `messages`"),
    ({"prompt": "a"}, "has no conversation, but prompt"),
    ({"prompt": [1], "completion": "b"}, "`prompt` is neither a text nor a list of messages"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "has no conversation, but prompt, chosen, rejected"),
    ({"texts": ["a", "b"]}, "`texts` is no list of turns"),
    ({"texts": [{"question": "a", "answer": "b"}]}, "`texts` holds more than"),
    ({"texts": [{"user": "a", "assistant": "b", "image": "a.png"}]}, "a turn names an image or film in `image`"),
    ({"conversations": [{"from": "tool", "value": "a"}, *TEXT]}, "turn 0 is by `tool`"),
    ({"conversations": [{"value": "a"}, *TEXT]}, "neither `from` nor `role`"),
    ({"conversations": [{"from": 5, "value": "a"}, *TEXT]}, "neither `from` nor `role`"),
    ({"conversations": [{"from": "human", "role": "gpt", "value": "a"}]}, "or in both"),
    ({"conversations": [{"from": "human", "value": "a", "content": "b"}, TEXT[1]]}, "two texts"),
    ({"conversations": [{"from": "human", "value": 5}, TEXT[1]]}, "a human turn has no text"),
    ({"conversations": [TEXT[0], {"from": "gpt", "value": None}]}, "a gpt turn has no text"),
    ({"conversations": [TEXT[0], {"from": "gpt", "value": "b", "weight": 0}]}, "not to be learnt"),
    ({"messages": [MESSAGES[0], {"role": "assistant", "content": "b", "tool_calls": [{"id": 1}]}]}, "`tool_calls`"),
    ({"tools": [{"name": "f"}], "messages": MESSAGES}, "`tools`"),
    ({"system": "a", "conversations": [{"from": "system", "value": "b"}, *TEXT]}, "two system texts"),
    ({"system": ["a"], "conversations": TEXT}, "`system` is not one text"),
    ({"messages": user({"type": "video", "video": "v.mp4"}, said("a"))}, "type `video`"),
    ({"messages": user({"type": "input_audio", "input_audio": {"data": "AAAA"}}, said("a"))}, "type `input_audio`"),
    ({"messages": user({"type": "file", "file": "a.pdf"}, said("a"))}, "type `file`"),
    ({"messages": user(5)}, "neither a text nor an image"),
    ({"messages": user({"type": "text", "text": 5})}, "no text in `text`"),
    (
        {"messages": user({"type": "text", "text": "a", "image_url": "a.png"})},
        "a text part of a message has `image_url`",
    ),
    ({"messages": user({"type": "image", "image": "a.png", "text": "a"})}, "an image part of a message has a text"),
    ({"messages": user({"type": "image", "image": "a.png"}, {"type": "image"})}, "an image that is not given"),
    ({"image": "b.png", "messages": user({"type": "image", "image": "a.png"})}, "beside its messages and in them"),
    ({"images": ["a.png"], "messages": user({"type": "image", "index": 1})}, "show images [1], but it has 1"),
    ({"images": ["a.png", "b.png"], "messages": user({"type": "image", "index": 0})}, "each must be shown once"),
    ({"messages": user({"type": "image", "image": ["a.png", "b.png"]})}, "several images"),
    ({"messages": user({"type": "image", "image": "a.png", "url": "b.png"})}, "has `image` and `url`"),
    ({"messages": user({"type": "image", "image": 5})}, "`messages` holds 5"),
    ({"messages": user({"type": "image_url", "image_url": {"url": 5}})}, "`messages` holds 5"),
    ({"conversations": TEXT, "video": "v"}, "`video`"),
    ({"conversations": TEXT, "videos": ["v"]}, "`videos`"),
    ({"conversations": TEXT, "audio_url": "https://x.org/a"}, "`audio_url`"),
    ({"conversations": TEXT, "img": "000123"}, "`img`"),
    ({"conversations": TEXT, "image_file": "000123"}, "`image_file`"),
    ({"conversations": TEXT, "image_url": "https://x.org/a"}, "`image_url`"),
    ({"conversations": TEXT, "image_base64_str": ["AAAA"]}, "`image_base64_str`"),
    ({"conversations": TEXT, "extra": {"deep": [{"shot": "a.png"}]}}, "`extra`"),
    ({"conversations": TEXT, "bytes": b"abc"}, "`bytes`"),
    ({"conversations": TEXT, "thing": "data:image/png;base64,AAAA"}, "`thing`"),
    ({"conversations": TEXT, "thing": "/9j/4AAQSkZJRg"}, "`thing`"),
    ({"conversations": [{**TEXT[0], "image": "a.png"}, TEXT[1]]}, "a turn names an image or film in `image`"),
    ({"image": "a.png", "image2": "b.png", "conversations": ASKED}, "`image2`"),
    ({"image": "a.png", "mask": "m.png", "conversations": ASKED}, "`mask`"),
    ({"image": "a.png", "thumb": b"abc", "conversations": ASKED}, "`thumb`"),
    ({"image": {"bytes": None, "path": None}, "conversations": ASKED}, "`image` holds None"),
    ({"image": {"bytes": [137, 80]}, "conversations": ASKED}, "`image` holds"),
    ({"image": True, "conversations": ASKED}, "`image` holds True"),
    ({"image": 1.5, "conversations": ASKED}, "`image` holds 1.5"),
    ({"image": "data:image/png;base64,@@", "conversations": ASKED}, "not base64"),
    ({"image": "data:image/svg+xml,<svg/>", "conversations": ASKED}, "not base64"),
]


@pytest.mark.parametrize("row, words", REFUSED)
def test_what_is_none_of_the_layouts_is_refused_by_name(row, words):
    with pytest.raises(InputError) as error:
        read_conversation(row)
    assert words in str(error.value) and len(str(error.value)) < 400


HOSTILE = [
    {"id": "x" * 10_000, "conversations": [{"from": "x" * 10_000, "value": "a"}]},
    {"id": "two\nlines", "image": "a\nb.png", "conversations": ASKED},
    {"id": {"a": [1]}, "image": "x/" * 400 + "a.png", "conversations": ASKED},
    {"image": "/etc/passwd", "conversations": ASKED},
    {"image": "../a.png", "conversations": ASKED},
    {"image": "file:///etc/passwd", "conversations": ASKED},
    {"image": "file://ROOT/../a.png", "conversations": ASKED},
    {"image": "http://x.org/a.png", "conversations": ASKED},
    {"image": "a\u0000.png", "conversations": ASKED},
    {"image": "C:\\a.png", "conversations": ASKED},
    {"image": "~/a.png", "conversations": ASKED},
    {"image": ".", "conversations": ASKED},
    {"image": "..", "conversations": ASKED},
    {"image": DEEP, "conversations": ASKED},
    {"conversations": DEEP},
    {"extra": DEEP, "conversations": TEXT, "image": 5},
    {"image": float("nan"), "conversations": ASKED},
    {"conversations": [{"from": "human", "value": "\ud800"}, TEXT[1]]},
    {"system": "\ufdd0", "conversations": TEXT},
    {"system": "<image>", "conversations": TEXT},
    {"conversations": [*TEXT, {"from": "system", "value": "late"}]},
    {"conversations": [*TEXT, TEXT[0]]},
    {"conversations": [TEXT[0], TEXT[0], TEXT[1]]},
    {"messages": [{"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}]},
    {"image": ["a.png"] * 3, "conversations": ASKED},
    {"clip": "7", "conversations": [{"from": "human", "value": "<video>\nWhat happens?"}, TEXT[1]]},
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_rows_are_named_in_one_line_and_no_other_row_is_lost(number, tmp_path, picture):
    picture(1).save(tmp_path / "a.png")
    (tmp_path / "in").mkdir()
    picture(1).save(tmp_path / "in/a.png")
    good = {"image": "a.png", "conversations": ASKED}
    text = json.dumps([good, HOSTILE[number], good]).replace("ROOT", str(tmp_path / "in"))
    (tmp_path / "r.json").write_text(text)
    rows = load_rows([tmp_path / "r.json"], tmp_path / "in", max_bad_share=0.5)
    assert [row.conversation for row in rows] == [ASKED] * 2
    ((key, reason),) = rows.problems
    assert "row 1 (id " in key and "\n" not in key + reason and 5 < len(reason) < 700
    with pytest.raises(InputError, match="row 1 "):
        load_rows([tmp_path / "r.json"], tmp_path / "in")


# ---------------------------------------------------------------- files


@pytest.fixture
def rows_of_five():
    return [{"id": n, "conversations": [{**TEXT[0], "value": f"What is {n}?"}, TEXT[1]]} for n in range(5)]


def asked(path, **options):
    return [row.conversation[0]["value"] for row in load_rows([path], path.parent, **options)]


def test_every_kind_of_file_gives_the_same_rows(tmp_path, rows_of_five):
    from datasets import Dataset, DatasetDict

    wanted = [f"What is {n}?" for n in range(5)]
    table = Dataset.from_list(rows_of_five)
    array, lines = json.dumps(rows_of_five), "\n".join(map(json.dumps, rows_of_five))
    (tmp_path / "a.json").write_text(array)
    (tmp_path / "indented.json").write_text(json.dumps(rows_of_five, indent=2), encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8-sig")
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(array.encode()))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "named-otherwise").write_bytes(gzip.compress(lines.encode()))
    table.to_parquet(str(tmp_path / "a.parquet"))
    for folder in ("hub/data", "flat", "deep/x/y"):
        (tmp_path / folder).mkdir(parents=True)
    for n, name in ((0, "train-00000-of-00002"), (1, "train-00001-of-00002")):
        table.shard(2, n, contiguous=True).to_parquet(str(tmp_path / f"hub/data/{name}.parquet"))
        table.shard(2, n, contiguous=True).to_parquet(str(tmp_path / f"flat/part-{n}.parquet"))
    table.to_parquet(str(tmp_path / "deep/x/y/0.parquet"))
    table.to_parquet(str(tmp_path / "hub/data/.cached.parquet"))
    other = Dataset.from_list([{"id": "t", "conversations": TEXT}])
    other.to_parquet(str(tmp_path / "hub/data/test-00000-of-00001.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    DatasetDict(train=table, test=other).save_to_disk(str(tmp_path / "dict"))
    DatasetDict(all=table).save_to_disk(str(tmp_path / "one"))
    kinds = ["a.json", "indented.json", "a.jsonl", "a.json.gz", "a.jsonl.gz", "named-otherwise", "a.parquet", "hub"]
    kinds += ["flat", "deep", "saved", "dict/train", "one", "flat/part-*.parquet", "hub/data/train-{00000,00001}-*"]
    for kind in kinds:
        path = tmp_path / kind
        assert [r.conversation[0]["value"] for r in load_rows([path], tmp_path)] == wanted, kind
    assert asked(tmp_path / "dict", split="train") == wanted
    assert asked(tmp_path / "dict", split="test") == asked(tmp_path / "hub", split="test") == ["What?"]
    for path, options, words in (
        ("dict", {}, "holds the splits .*: name one, e.g. .*dict/t"),
        ("dict", {"split": "val"}, "has no split val"),
        ("hub", {"split": "validation"}, "has no split val, but test, train"),
        ("nothing/*.json", {}, "no such file"),
    ):
        with pytest.raises(InputError, match=words):
            load_rows([tmp_path / path], tmp_path, **options)


def test_rows_that_name_another_split_are_left_out(tmp_path, capsys):
    rows = [
        {"split": s, "conversations": [{**TEXT[0], "value": str(s)}, TEXT[1]]} for s in ("train", "val", "hard", None)
    ]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    assert asked(tmp_path / "r.json") == ["train", "hard", "None"]
    assert "1 rows of other splits than train are left out" in capsys.readouterr().err
    assert asked(tmp_path / "r.json", split="validation") == ["val", "hard", "None"]


def test_turns_of_older_tables_and_turns_written_as_text(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    columns = {"from": ["human", "gpt"], "value": ["What?", "Red."]}
    parquet.write_table(pa.Table.from_pylist([{"conversations": columns}]), tmp_path / "columns.parquet")
    parquet.write_table(pa.Table.from_pylist([{"messages": json.dumps(MESSAGES)}]), tmp_path / "text.parquet")
    for name in ("columns", "text"):
        assert load_rows([tmp_path / f"{name}.parquet"], tmp_path)[0].conversation == TEXT


def test_images_of_the_hubs_tables(tmp_path, picture):
    """LLaVA-OneVision's struct, the Cauldron's list of them, TRL's images beside parts."""
    import pyarrow as pa
    from datasets import Dataset, Image, List
    from pyarrow import parquet

    held = [{"bytes": encoded(picture(n)), "path": None} for n in range(2)]
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
    ]
    tables = {
        "onevision": [{"id": "a", "image": held[0], "conversations": ASKED, "data_source": "x"}],
        "cauldron": [{"images": [held[0]], "texts": [{"user": "What?", "assistant": "Red.", "source": "x"}]}],
        "trl": [{"images": [held[0]], "messages": messages}],
    }
    for name, rows in tables.items():
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        feature = Image() if "image" in rows[0] else List(Image())
        made = Dataset.from_list(rows).cast_column("image" if "image" in rows[0] else "images", feature)
        made.save_to_disk(str(tmp_path / name))
        for path in (tmp_path / f"{name}.parquet", tmp_path / name):
            (row,) = load_rows([path], tmp_path)
            assert row.conversation == ASKED
            assert [image.open().tobytes() for image in row.images] == [picture(0).tobytes()]
    two = [{"images": held, "texts": [{"user": "Same?", "assistant": "No."}]}]
    parquet.write_table(pa.Table.from_pylist(two), tmp_path / "two.parquet")
    (row,) = load_rows([tmp_path / "two.parquet"], tmp_path, template="chatml")
    assert [image.open().tobytes() for image in row.images] == [picture(n).tobytes() for n in range(2)]
    with pytest.raises(InputError, match="use template chatml"):
        load_rows([tmp_path / "two.parquet"], tmp_path)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.json", b'{\n "data": [\n  {"id": 1}]\n}', r"one JSON object \(data\)"),
        ("a.json", b'[{"id": 1}, {"id"', "item 1: not valid JSON"),
        ("a.json", b'[{"id": 1} {"id": 2}]', "item 1: `{` stands where"),
        ("a.json", b'[{"id": 1}]]', "something follows the array"),
        ("a.json", b"[[[" + b"[" * 5000, "nested too deep"),
        ("a.json", b'[{"id": 1}, 5]', "row 1 is no JSON object"),
        ("a.json", b'[{"id": ' + b"9" * 5000 + b"}]", "item 0: not valid JSON"),
        ("a.json", b'[{"a": "\xff"}]', "not UTF-8.*iconv"),
        ("a.json", b'[{"image": "a.png", "image": "b.png"}]', "item 0: .*the key 'image' stands twice"),
        ("a.jsonl", b'{"image": "a.png", "image": "b.png"}', ":1: .*the key 'image' stands twice"),
        ("a.json.gz", gzip.compress(b'[{"id": 1}]' * 99, mtime=0)[:-9], "no whole gzip file"),
        ("a.json.gz", b"\x1f\x8bbroken", "a.json.gz"),
        ("a.json.zst", b"\x28\xb5\x2f\xfd123", "unpack it with unzstd"),
        ("a.parquet", b"PAR1 no parquet", "cannot be read as parquet"),
        ("a.csv", b"id,image\n1,2\n", "caption_column"),
        ("a.tar", b"x" * 600, "not a readable tar"),
        ("a.zip", b"PK", "no file of conversations"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as error:
        load_rows([tmp_path / name], tmp_path)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_captioned_images_of_any_layout_are_rows_of_alignment(tmp_path):
    write_shard(tmp_path / "shard.tar", 3, replace={1: b"no image"})
    (tmp_path / "folder").mkdir()
    with tarfile.open(tmp_path / "shard.tar") as tar:
        tar.extractall(tmp_path / "folder", filter="data")
    keys = [f"shard_{n:04d}" for n in range(3)]
    texts = [(tmp_path / "folder" / f"{key}.txt").read_text() for key in keys]
    table = "".join(f"folder/{key}.jpg\t{text}\n" for key, text in zip(keys, texts))
    (tmp_path / "table.tsv").write_text(f"filepath\tcaption\n{table}folder/gone.jpg\tlost\n")
    for name, lost in (("shard.tar", 0), ("folder", 0), ("table.tsv", 1)):
        rows = load_rows([tmp_path / name], tmp_path, template="plain", max_bad_share=0.5)
        assert [row.conversation[1]["value"] for row in rows] == texts, name
        assert len(rows.problems) == lost and ("gone.jpg" in str(rows.problems)) == bool(lost)
        assert (rows[0].images[0].open().size, rows[2].images[0].read()) == (
            (48, 48),
            (tmp_path / "folder" / f"{keys[2]}.jpg").read_bytes(),
        )
        assert [*image_problems(rows)] == [1], name  # judged as all other images are


def test_a_folder_of_json_with_notes_beside_it_is_no_folder_of_captioned_images(tmp_path):
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "README.txt").write_text("about")
    with pytest.raises(InputError, match=r"name the files in it, e\.g\. .*rows\.json"):
        load_rows([tmp_path], tmp_path)


def test_an_item_of_any_length_is_read_piece_by_piece(tmp_path):
    long = "x" * 5_000_000 + 'é\u2028\\"'
    rows = [{"id": n, "conversations": [TEXT[0], {"from": "gpt", "value": long if n == 1 else "a"}]} for n in range(3)]
    (tmp_path / "r.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert [row.conversation[1]["value"] for row in load_rows([tmp_path / "r.json"], tmp_path)] == ["a", long, "a"]
