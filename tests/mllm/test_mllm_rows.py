"""Rows as users bring them: read as what they are, or refused by name; never learnt as text alone."""

import base64
import io
import json
import math
import os
import random
import re
import shutil
import signal
import tarfile

import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer

from diffclip.base.errors import InputError
from mllm.conversation import IGNORE, Segment, encode, render
from mllm.data import examine, records
from mllm.data.__main__ import main
from mllm.data.examine import STRETCH
from mllm.data.files import read_rows
from mllm.data.images import find_place
from mllm.data.rows import load_rows
from mllm.literal import control_tokens
from mllm.model import VisionLanguageModel, load


def row(question="<image>\nWhat?", answer="Red.", **keys):
    return {
        "id": "ok",
        **keys,
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
    }


def write(path, *rows, encoding="utf-8"):
    path.write_text(json.dumps(rows), encoding=encoding)
    return path


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path, picture):
    for name in ("a", "b"):
        picture(ord(name)).save(tmp_path / f"{name}.png")
    return tmp_path


def checked(file, root, *options):
    """The exit code of `diffclip check`."""
    return main(["check", str(file), f"--image_root={root}", *options])


def refused(file, root, capsys, *words, **options):
    """Both `check` and `load_rows` name the row and say each of `words`."""
    with pytest.raises(InputError) as error:
        load_rows([file], root, **options)
    template = [f"--template={options['template']}"] if "template" in options else []
    assert checked(file, root, *template) == 2
    for told in (str(error.value), capsys.readouterr().out.splitlines()[0]):
        assert "row 0" in told and len(told) < 500 and "\n" not in told
        for word in words:
            assert word in told, told


def test_pictures_under_each_known_key_are_the_same(folder, picture):
    data = "data:image/png;base64," + base64.b64encode(encoded(picture(ord("a")))).decode()
    found = [
        load_rows([write(folder / "r.json", row(**keys))], folder)[0].images[0].open().tobytes()
        for keys in (
            {"image": "a.png"},
            {"image": ["a.png"]},
            {"images": ["a.png"]},
            {"image": None, "images": ["a.png"], "video": None},
            {"image_path": "a.png"},
            {"image": data},
            {"image": {"path": "a.png"}},
        )
    ]
    assert set(found) == {picture(ord("a")).tobytes()}


@pytest.mark.parametrize(
    "keys, question, words",
    [
        ({"images": ["a.png"]}, "What?", ["1 images", "shows 0", "put one <image>"]),
        ({"video": "v.mp4"}, "<video>\nWhat?", ["`video`", "drop the row"]),
        ({"video": "v_1", "image": "a.png"}, "<image>\nWhat?", ["`video`"]),
        ({"audios": ["a.wav"]}, "What?", ["`audios`"]),
        ({"img": "a.png"}, "What?", ["`img`", "call it `image`"]),
        ({"frames": ["a.JPG"]}, "What?", ["`frames`"]),
        ({"image": None}, "<image>\nWhat?", ["0 images", "shows 1", "take <image> out"]),
        ({"image": "https://a.org/a.png"}, "<image>\nWhat?", ["https://a.org/a.png is an address", "path of a copy"]),
        ({"image": 5}, "<image>\nWhat?", ["`image` holds 5"]),
        ({"image": [["a.png"]]}, "<image>\nWhat?", ["`image` holds ['a.png']"]),
        ({"image": "a.png", "images": ["b.png"]}, "<image>\nWhat?", ["`image`", "`images`"]),
        ({"image": "data:image/png;base64,!!"}, "<image>\nWhat?", ["not base64"]),
        ({"image": "iVBOR" * 1000}, "<image>\nWhat?", ["no path of an image"]),
        ({"image": "a\udce9.png"}, "<image>\nWhat?", ["no path of an image"]),
    ],
)
def test_what_cannot_be_shown_is_never_learnt_as_text(folder, capsys, keys, question, words):
    refused(write(folder / "r.json", row(question, **keys)), folder, capsys, *words)


def test_other_keys_of_text_rows_are_no_media(folder):
    keys = {
        "id": "a.png",
        "source": "sharegpt",
        "url": "https://example.org/page",
        "data_source": "x.json",
        "image": "",
        "video": math.nan,  # a missing value, as pandas writes it
    }
    assert load_rows([write(folder / "r.json", row("What?", **keys))], folder)[0].images == []


@pytest.mark.parametrize(
    "question, answer, words",
    [
        ("What?", "Red \ufdd0", ["U+FDD0"]),
        ("What is <|im_<image>start|>?", "Red.", ["a question contains <|im_start|>"]),  # vicuna takes <image> out
        ("What?", "Red \ud83d", ["an answer contains half a character", "\\ud83d"]),
        ("\udc00 What?", "Red", ["a question contains half a character"]),
        ("What?", "An <image>.", ["an answer contains <image>"]),
    ],
)
def test_texts_that_no_tokenizer_takes_as_they_stand(folder, capsys, question, answer, words):
    refused(write(folder / "r.json", row(question, answer)), folder, capsys, *words)


def test_control_tokens_are_those_of_the_model(folder, assembled):
    processor = assembled.processor
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["</s>", "\n"]})
    control = control_tokens(processor.tokenizer)
    assert {"</s>", "<|im_end|>"} <= set(control) and not {"<image>", "\n"} & set(control)
    file = write(folder / "r.json", row("Strike <s>it</s>?", "No"))
    assert load_rows([file], folder)[0].conversation[0]["value"] == "Strike <s>it</s>?"  # plain text to Qwen
    shown = load_rows([file], folder, control=control)[0].conversation[0]["value"]
    assert shown != "Strike <s>it</s>?" and "</s>" not in shown  # marked, see test_mllm_literal


def test_a_padding_token_that_is_the_end_token_leaves_the_end_in_the_labels(folder, tower_dir, language_dir, tmp_path):
    from mllm.assemble import assemble
    from mllm.data.examples import ConversationDataset, collate

    tokenizer = AutoTokenizer.from_pretrained(language_dir)
    shutil.copytree(language_dir, tmp_path / "lm")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "lm")
    _, processor = assemble(tower_dir, tmp_path / "lm")
    assert processor.tokenizer.pad_token_id == processor.tokenizer.eos_token_id
    rows = load_rows([write(folder / "r.json", row("a?", "no"), row("a?", "a small blue circle"))], folder)
    dataset = ConversationDataset(rows, processor, template="vicuna")
    batch = collate(processor)([dataset[0], dataset[1]])
    end = processor.tokenizer.eos_token_id
    for labels, mask in zip(batch["labels"], batch["attention_mask"]):
        assert (labels == end).sum() == 1 and labels[labels != IGNORE][-1] == end
        assert mask[labels != IGNORE].all()
    assert (batch["input_ids"][0][batch["attention_mask"][0] == 0] == end).all()


@pytest.mark.parametrize("lead", ["", "<|im_start|>"])
def test_a_tokenizer_that_appends_its_end_token(tower_dir, language_dir, tmp_path, lead):
    from tokenizers.processors import TemplateProcessing

    from mllm.assemble import assemble

    tokenizer = AutoTokenizer.from_pretrained(language_dir)
    specials = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|im_start|>", "<|im_end|>")]
    template = f"{lead} $A <|im_end|>".strip()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=specials)
    shutil.copytree(language_dir, tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    model, processor = assemble(tower_dir, tmp_path / "lm")
    VisionLanguageModel(model, processor).save(tmp_path / "run")
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "no"}]
    for one in (processor, load(tmp_path / "run")[1]):
        encoded_turns = encode(render(turns, "vicuna"), one.tokenizer, 1)
        assert encoded_turns["input_ids"].count(specials[1][1]) == 1
        assert encoded_turns["labels"][-1] == specials[1][1]
        (question,) = one(text=VisionLanguageModel(model, one).prompts([turns[:1]]))["input_ids"]
        assert question == encoded_turns["input_ids"][: len(question)]
        assert (question[0] == specials[0][1]) == bool(lead)  # what stands before every text is kept


def test_a_tokenizer_that_was_saved_to_cut_and_fill_up_does_neither(tower_dir, language_dir, tmp_path):
    from mllm.assemble import assemble

    tokenizer = AutoTokenizer.from_pretrained(language_dir)
    tokenizer.backend_tokenizer.enable_truncation(16)
    tokenizer.backend_tokenizer.enable_padding(length=24)
    shutil.copytree(language_dir, tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "lm").backend_tokenizer.encode("Is there " * 40).ids) == 24
    model, processor = assemble(tower_dir, tmp_path / "lm")
    VisionLanguageModel(model, processor).save(tmp_path / "run")
    turns = [{"from": "human", "value": "Is there a red square? " * 20}, {"from": "gpt", "value": "no"}]
    whole = AutoTokenizer.from_pretrained(language_dir)
    for one in (processor, load(tmp_path / "run")[1], AutoProcessor.from_pretrained(tmp_path / "run")):
        (text,) = VisionLanguageModel(model, one).prompts([turns[:1]])
        wanted = whole(text)["input_ids"]
        assert len(wanted) > 100
        assert one(text=[text])["input_ids"] == [wanted]
        assert encode([Segment(text, False)], one.tokenizer, 1)["input_ids"] == wanted
        assert one(text=["yes"])["input_ids"] == [whole("yes")["input_ids"]]


def test_a_tokenizer_that_cannot_stop_appending_is_refused(assembled):
    from tokenizers.processors import TemplateProcessing

    processor = assembled.processor
    end = [("<|im_end|>", processor.tokenizer.eos_token_id)]
    appending = TemplateProcessing(single="$A <|im_end|>", special_tokens=end)
    processor.tokenizer.backend_tokenizer.post_processor = appending  # as in runs of earlier versions
    with pytest.raises(InputError, match=r"writes <\|im_end\|> behind every text"):
        assembled.use_template("vicuna")


def test_pictures_inside_parquet_and_saved_datasets(folder, picture):
    import pyarrow as pa
    from datasets import Dataset, Image
    from pyarrow import parquet

    contents = [encoded(picture(n)) for n in range(3)]
    turns = row()["conversations"]
    structs = [
        {"id": str(n), "image": {"bytes": c, "path": None}, "conversations": turns} for n, c in enumerate(contents)
    ]
    structs.append({"id": "t", "image": None, "conversations": row("Yes?")["conversations"]})
    parquet.write_table(pa.Table.from_pylist(structs), folder / "structs.parquet")
    plain = [{**one, "image": one["image"]["bytes"]} for one in structs[:3]]
    parquet.write_table(pa.Table.from_pylist(plain), folder / "plain.parquet")
    pictures = Dataset.from_list(structs).cast_column("image", Image())
    pictures.save_to_disk(str(folder / "saved"))
    pictures.to_parquet(str(folder / "features.parquet"))
    for name in ("structs.parquet", "plain.parquet", "saved", "features.parquet"):
        rows = load_rows([folder / name], folder)
        shown = [r.images[0].open(r.key).tobytes() for r in rows[:3]]
        assert shown == [picture(n).tobytes() for n in range(3)], name
        assert name == "plain.parquet" or rows[3].images == []
        assert next(rows.texts())[1][:3:2] == [1, 1]
        assert checked(folder / name, folder) == 0
    broken = [{"id": "x", "image": b"no image", "conversations": turns}]
    parquet.write_table(pa.Table.from_pylist(broken), folder / "broken.parquet")
    assert checked(folder / "broken.parquet", folder) == 2


def tar_of(path, **members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name.replace("__", "/") + ".png")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_a_name_in_two_tars_is_refused_unless_the_row_names_the_tar(folder, capsys, picture):
    (folder / "sub").mkdir()
    red, blue = encoded(picture(1)), encoded(picture(2))
    tar_of(folder / "sub/0.tar", same=red, one=red)
    tar_of(folder / "sub/1.tar", same=blue, x__deep=red, y__deep=blue)
    refused(
        write(folder / "r.json", row(image="sub/same.png")), folder, capsys, "sub/0.tar/same.png", "sub/1.tar/same.png"
    )
    refused(write(folder / "r.json", row(image="sub/deep.png")), folder, capsys, "sub/1.tar/x/deep.png")
    names = ["sub/0.tar/same.png", "sub/1.tar/same.png", "sub/1.tar/x/deep.png", "sub/1.tar/y/deep.png", "sub/one.png"]
    found = [find_place(folder, name).read() for name in names]
    assert found == [red, blue, red, blue, red]
    assert load_rows([write(folder / "r.json", row(image=names[1]))], folder)[0].images[0].read() == blue


def test_a_name_twice_in_one_tar_is_refused_unless_both_are_the_same_image(folder, capsys, picture):
    (folder / "sub").mkdir()
    with tarfile.open(folder / "sub/0.tar", "w") as tar:
        for name, seed in (("same", 1), ("other", 1), ("same", 1), ("other", 2)):
            member = tarfile.TarInfo(f"{name}.png")
            member.size = len(content := encoded(picture(seed)))
            tar.addfile(member, io.BytesIO(content))
    assert find_place(folder, "sub/same.png").read() == encoded(picture(1))
    refused(write(folder / "r.json", row(image="sub/other.png")), folder, capsys, "is 2 times in", "sub/0.tar")


def test_a_compressed_tar_is_named(folder, picture):
    (folder / "sub").mkdir()
    with tarfile.open(folder / "sub/0.tar", "w:gz") as tar:
        tar.add(folder / "a.png", "c.png")
    with pytest.raises(InputError, match=r"0\.tar: is compressed.*`gunzip -c "):
        find_place(folder, "sub/c.png")


def test_a_tar_that_ends_within_an_image_is_named_and_one_without_its_end_is_read(folder, picture):
    tar_of(folder / "whole.tar", c=encoded(picture(1)), d=encoded(picture(2)))
    with tarfile.open(folder / "whole.tar") as tar:
        last = tar.getmembers()[-1]
    content = (folder / "whole.tar").read_bytes()
    for name, end in (("endless", -(-last.size // 512) * 512), ("cut", 10)):
        (folder / name).mkdir()
        (folder / name / "0.tar").write_bytes(content[: last.offset_data + end])
    assert find_place(folder, "endless/d.png").read() == encoded(picture(2))
    with pytest.raises(InputError, match=r"0\.tar: ends early, within d.*download or write it again"):
        find_place(folder, "cut/c.png")


def test_two_folders_never_share_rows(tmp_path, monkeypatch):
    """The same relative paths, sizes and times, as copies have them."""
    for name, answer in (("one", "Red."), ("two", "Sea.")):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "r.json", row("What?", answer))
        os.utime(tmp_path / name / "r.json", ns=(10**18, 10**18))
    for name, answer in (("one", "Red."), ("two", "Sea."), ("one", "Red.")):
        monkeypatch.chdir(tmp_path / name)
        rows = load_rows(["r.json"], ".")
        assert rows[0].conversation[1]["value"] == answer
    os.replace(tmp_path / "two/r.json", tmp_path / "one/r.json")
    assert load_rows(["r.json"], ".")[0].conversation[1]["value"] == "Sea."


def test_pictures_of_two_folders_never_mix(tmp_path, monkeypatch, picture):
    for number, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        picture(number).save(tmp_path / name / "a.png")
        write(tmp_path / "r.json", row(image="a.png"))
    for number, name in enumerate(("one", "two")):
        monkeypatch.chdir(tmp_path / name)
        rows = load_rows([tmp_path / "r.json"], ".")
        monkeypatch.chdir(tmp_path)
        assert rows[0].images[0].open().tobytes() == picture(number).tobytes()


def test_a_file_rewritten_inside_a_folder_is_read_anew(folder):
    from datasets import Dataset

    Dataset.from_list([row("What?", "Red.")]).save_to_disk(str(folder / "saved"))
    Dataset.from_list([row("What?", "Sea.")]).save_to_disk(str(folder / "other"))
    assert load_rows([folder / "saved"], folder)[0].conversation[1]["value"] == "Red."
    before = (folder / "saved").stat()
    for file in (folder / "other").iterdir():
        (folder / "saved" / file.name).write_bytes(file.read_bytes())  # in place: the folder itself stays as it is
    assert (folder / "saved").stat().st_mtime_ns == before.st_mtime_ns
    assert load_rows([folder / "saved"], folder)[0].conversation[1]["value"] == "Sea."


def test_marks_line_ends_and_encodings(folder):
    write(folder / "bom.json", row("What?"), encoding="utf-8-sig")
    lines = json.dumps(row("What?", "a\u2028b\x85c"), ensure_ascii=False) + "\r\n"
    (folder / "bom.jsonl").write_text(lines * 2, encoding="utf-8-sig", newline="")
    assert len(list(read_rows(folder / "bom.json"))) == 1
    assert [one["conversations"][1]["value"] for one in read_rows(folder / "bom.jsonl")] == ["a\u2028b\x85c"] * 2
    write(folder / "wide.json", row("What?"), encoding="utf-16")
    with pytest.raises(InputError, match=r"wide\.json.*not UTF-8.*iconv -f utf-16"):
        load_rows([folder / "wide.json"], folder)
    (folder / "deep.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"deep\.json.*too deep"):
        load_rows([folder / "deep.json"], folder)
    (folder / "half.jsonl").write_text(json.dumps(row("What?")) + '\n{"id": 1')
    with pytest.raises(InputError, match=r"half\.jsonl:2"):
        load_rows([folder / "half.jsonl"], folder)


def test_two_pictures_in_one_question(folder, capsys, assembled):
    from mllm.data.examples import ConversationDataset

    file = write(folder / "r.json", row("<image>\n<image>\nSame?", image=["a.png", "b.png"]))
    refused(file, folder, capsys, "has 2 images", "shows 1", "use template chatml")
    refused(file, folder, capsys, "plain", "use template vicuna or chatml", template="plain")
    rows = load_rows([file], folder, template="chatml")
    example = ConversationDataset(rows, assembled[1], template="chatml")[0]
    assert example["pixel_values"].shape[0] == 2 and torch.isfinite(example["pixel_values"]).all()


def test_shared_cases(shared_cases, capsys):
    cases = shared_cases("rows")
    images = cases / "images"
    for name, *words in (
        ("other-keys/images_key_no_tag.json", "1 images", "shows 0"),
        ("other-keys/video_key.json", "`video`"),
        ("surrogate_answer.json", "half a character"),
        ("image-field/image_int.json", "`image` holds 5"),
        ("image-field/nested_list.json", "`image` holds"),
        ("two_pictures_one_question.json", "chatml"),
    ):
        refused(cases / name, images, capsys, *words)
    assert checked(cases / "image-field/base64_uri.json", images) == 2
    told = capsys.readouterr().out
    assert "row 0" in told and len(told) < 500
    refused(cases / "two-tars/rows.json", cases / "two-tars/images", capsys, "sub/00000.tar", "sub/00001.tar")
    assert len(load_rows([cases / "encodings/bom_json_rows.json"], images)) == 1
    (row,) = load_rows([cases / "eos_in_answer.json"], images)
    assert "<|im_end|>" not in row.conversation[1]["value"]  # it stays text, see test_mllm_literal
    with pytest.raises(InputError, match=r"utf16_rows\.json.*not UTF-8"):
        load_rows([cases / "encodings/utf16_rows.json"], images)
    for name, count in (("onevision", 2), ("binary", 1)):
        rows = load_rows([cases / f"parquet/{name}.parquet"], images)
        assert [r.images[0].open().size for r in rows] == [(48, 48)] * count


def in_processes(monkeypatch, count):
    monkeypatch.setattr(records, "_processes", lambda files: count)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more processes than cores
def test_several_processes_judge_rows_as_one_does(folder, monkeypatch):
    names = random.Random(5)
    lines = [
        row(names.choice(["<image>\nWhat?", "What?", "<image>\n" + "é" * 9]), id=n, image=f"{names.choice('abc')}.png")
        for n in range(STRETCH * 5 + 7)
    ]
    lines[3] |= {"split": "val"}
    first, second = write(folder / "1.json", *lines[:250]), folder / "2.jsonl"
    second.write_text("\n".join(map(json.dumps, lines[250:])))
    wanted = load_rows([first, second], folder, max_bad_share=math.inf, fresh=True)
    assert len(wanted) > 50 and len(wanted.problems) > 50
    for count in (1, 2, 3, 8):  # 8: more than there are stretches
        in_processes(monkeypatch, count)
        state = torch.get_rng_state()
        rows = load_rows([first, second], folder, max_bad_share=math.inf, fresh=True)
        assert torch.equal(torch.get_rng_state(), state)  # or a training would depend on what was kept
        assert rows.table.data.to_pylist() == wanted.table.data.to_pylist() and rows.problems == wanted.problems


def test_rows_of_other_splits_are_told_once_by_several_processes(folder, monkeypatch, capfd):
    in_processes(monkeypatch, 2)
    file = write(
        folder / "r.json", *[row(split="train" if n % 2 else "val", image="a.png") for n in range(4 * STRETCH)]
    )
    assert len(load_rows([file], folder)) == 2 * STRETCH
    assert capfd.readouterr().err.count(f"{2 * STRETCH} rows of other splits") == 1


def test_errors_of_several_processes_are_those_of_one(folder, monkeypatch):
    file = folder / "r.jsonl"
    file.write_text("\n".join([json.dumps(row(image="a.png"))] * 250 + ['{"id": 1']))
    with pytest.raises(InputError) as alone:
        load_rows([file], folder)
    in_processes(monkeypatch, 2)
    with pytest.raises(InputError) as among:
        load_rows([file], folder)
    assert str(among.value) == str(alone.value) and "r.jsonl:251" in str(among.value)

    monkeypatch.setattr(records, "examine", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(InputError, match=r"r\.jsonl has ended .*memory runs out: free some"):
        load_rows([file], folder)


class Opens(torch.utils.data.Dataset):
    """Somebody's dataset, which loads the rows in its own loading process."""

    def __init__(self, file):
        self.file = file

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return len(load_rows([self.file], self.file.parent, fresh=True))


@pytest.mark.slow
@pytest.mark.parametrize("large", [False, True])
def test_rows_loaded_within_another_loaders_process_are_all_there(folder, monkeypatch, large):
    monkeypatch.setattr(records, "SEVERAL_FROM", 0 if large else 1 << 40)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
    file = write(folder / "r.json", *[row(image="a.png")] * (3 * STRETCH))
    assert list(torch.utils.data.DataLoader(Opens(file), None, num_workers=2)) == [3 * STRETCH] * 4


def test_where_no_process_can_be_started_this_one_judges(folder, monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    in_processes(monkeypatch, 2)
    monkeypatch.setattr(records, "DataLoader", refuse)
    file = write(folder / "r.json", *[row(image="a.png")] * (3 * STRETCH))
    assert len(load_rows([file], folder)) == 3 * STRETCH


def test_a_prefix_of_few_rows_leaves_no_empty_batches(folder, monkeypatch):
    names = ["b.png" if n % (2 * STRETCH) == 7 else "a.png" for n in range(10 * STRETCH)]
    file = write(folder / "r.json", *[row(image=name) for name in names])
    for count in (0, 2):
        in_processes(monkeypatch, count)
        settings = {"image_prefix": "b", "split": "", "template": "vicuna", "control": []}
        assert [len(batch) for batch in records.record_batches([file], folder, settings)] == [1] * 5
        assert len(load_rows([file], folder, image_prefix="b", fresh=True)) == 5


def test_a_process_that_ends_while_rows_are_written_is_told_as_one(folder):
    told = pytest.raises(InputError, match=r"r\.json has ended .*killed by signal.*memory runs out")
    with told, records.ended_processes(["r.json"]):  # torch raises it wherever the first process is at that time
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")


def test_large_images_in_rows_are_handed_on_by_their_bytes(folder, monkeypatch):
    monkeypatch.setattr(examine, "BYTES", 1000)
    held = "data:image/png;base64," + base64.b64encode((folder / "a.png").read_bytes()).decode()
    file = write(folder / "r.json", *[row(image=held)] * 40)
    settings = {"image_prefix": "", "split": "", "template": "vicuna", "control": []}
    sizes = [len(batch) for batch in records.record_batches([file], folder, settings)]
    assert (
        sum(sizes) == 40 and max(sizes) * (folder / "a.png").stat().st_size <= 1000 + (folder / "a.png").stat().st_size
    )


def test_only_large_files_of_text_are_given_to_several_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    for name in ("large.json", "small.jsonl", "large.parquet"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(records.SEVERAL_FROM + 1 if "large" in name else 100)
    counts = [records._processes([str(tmp_path / name)]) for name in ("large.json", "small.jsonl", "large.parquet")]
    assert counts == [records.MOST_PROCESSES, 0, 0]
    assert records._processes([tmp_path / "large.json", tmp_path / "large.parquet"]) == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1))
    assert records._processes([tmp_path / "large.json"]) == 0


@pytest.mark.parametrize("named", [True, False])
def test_a_disk_that_fails_while_rows_are_read_is_not_told_as_one_that_is_full(named, tmp_path, monkeypatch):
    def fails(*_, **__):
        yield from ()
        raise OSError(5, "Input/output error", *["somewhere.parquet"] * named)

    monkeypatch.setattr(records, "examine", fails)
    path = write(tmp_path / "rows.json", row("What?"))
    told = r"somewhere\.parquet" if named else re.escape(str(path))
    with pytest.raises(InputError, match=rf"^{told}: cannot be read \(Input/output error\)"):
        load_rows([path], tmp_path)
