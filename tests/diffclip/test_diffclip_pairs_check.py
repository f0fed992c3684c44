"""`diffclip check` for pairs: every fault by name, right counts, and the same readers as training."""

import io
import json

import numpy as np
import pytest
from PIL import Image

import diffclip
from diffclip.data.check import NO_FAULT, check, is_doubtful, main, summary, unreadable
from diffclip.data.pairs import BadSample, PairTable
from stages import check as door


def image(width: int, height: int, seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    whole = {
        "a": image(10, 20),
        "b": image(30, 40, 1),
        "c": image(10, 20),
        "cut": image(50, 50)[:2000],
        "mute": image(9, 9),
    }
    for name, content in whole.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    captions = {
        "a": "a cat",
        "b": "a cat\nsee https://example.org",
        "c": "www.example.org/cat",
        "cut": "x",
        "lost": "y",
    }
    for name, text in captions.items():
        (tmp_path / f"{name}.txt").write_text(text)
    return tmp_path


def test_counts_sizes_doubles_and_faults(folder):
    found = summary(check(PairTable([str(folder)])), 0)
    assert (found["pairs"], found["examined"], found["readable"], found["captions"]) == (4, 4, 3, 4)
    assert found["width"] == {"smallest": 10, "median": 10, "95 %": 10, "largest": 30}
    assert found["height"]["largest"] == 40 and found["caption_characters"]["smallest"] == 5
    assert found["bytes"]["largest"] == (folder / "b.png").stat().st_size
    assert (found["doubled_images"], found["doubled_captions"]) == (1, 1)
    assert {kind: entry["count"] for kind, entry in found["doubtful_captions"].items()} == {"only a web address": 1}
    faults = {fault["key"].rsplit("/")[-1]: fault["reason"] for fault in found["faults"]}
    assert set(faults) == {"cut.png", "mute.png", "lost.txt"} and "truncated" in faults["cut.png"]


def test_faults_are_the_pairs_that_training_cannot_read(folder):
    table = PairTable([str(folder)])
    bad = set()
    for row in range(len(table)):
        try:
            table[row]
        except BadSample as error:
            bad.add((error.key, error.reason))
    assert set(unreadable(table)) == bad and len(bad) == 1


@pytest.mark.parametrize(
    "caption, kinds",
    [
        ("a cat on a mat", set()),
        ("Ein Kätzchen, 3 < 5 & 7 > 2, R&D", set()),
        ("крокодил 北京", set()),
        ("caf\ufffd", {"replacement characters"}),
        ("cafÃ©", {"UTF-8 read as another encoding"}),
        ("itâ€™s", {"UTF-8 read as another encoding"}),
        ("a\x00b", {"control characters"}),
        ("a <b>cat</b>", {"HTML"}),
        ("salt &amp; pepper", {"HTML"}),
        (" https://example.org/a.jpg ", {"only a web address", "only a file name"}),
        ("see https://example.org", set()),
        ("IMG_1234.JPG", {"only a file name"}),
        ("007 - 8", {"without a letter"}),
        ("['a', 'b']", {"a list written as text"}),
    ],
)
def test_doubtful_captions_are_told_from_good_ones(caption, kinds):
    assert {kind for kind, pattern in NO_FAULT.items() if is_doubtful(pattern, caption)} == kinds


def test_captions_that_fill_the_context_are_counted(tmp_path):
    (tmp_path / "x.jsonl").write_text("".join(
        json.dumps({"image": "a.png", "caption": " ".join(["cat"] * words)}) + "\n" for words in (1, 74, 75, 200)
    ))  # fmt: skip
    (tmp_path / "a.png").write_bytes(image(8, 8))
    tokenizer = diffclip.tokenizer(diffclip.MODELS["CLIP-B-16"])  # 77 with begin and end
    assert check(PairTable([str(tmp_path / "x.jsonl")]), tokenizer=tokenizer).cut == 2


def test_a_sample_is_drawn_and_said(folder, capsys):
    found = check(PairTable([str(folder)]), some=2)
    assert (found.pairs, found.examined) == (4, 2)
    assert main([str(folder), "--some", "2"]) == 2
    assert "2 of them drawn at random" in capsys.readouterr().out


def test_json_and_console_name_the_same_faults(folder, capsys):
    assert main([str(folder), "--json"]) == 2
    faults = json.loads(capsys.readouterr().out)["faults"]
    assert main([str(folder)]) == 2
    printed = capsys.readouterr().out
    assert len(faults) == 3 and all(f"{fault['key']}: {fault['reason']}\n" in printed for fault in faults)
    for name in ("cut.png", "cut.txt", "mute.png", "lost.txt"):
        (folder / name).unlink()
    assert main([str(folder), "--json"]) == 0 and json.loads(capsys.readouterr().out)["faults"] == []


def test_the_door_tells_pairs_from_conversations(folder, capsys):
    rows = folder / "rows.json"
    rows.write_text(json.dumps([{"id": 1, "image": "a.png", "conversations": [{"from": "human", "value": "x"}]}]))
    assert door.holds_turns(str(rows))
    for name, text in {
        "p.json": '{"a.png": "x"}',
        "p.jsonl": '{"image": "a.png", "caption": "x"}\n',
        "p.csv": "",
    }.items():
        (folder / name).write_text(text)
        assert not door.holds_turns(str(folder / name))
    assert not door.holds_turns(str(folder)) and not door.holds_turns("hf:owner/name") and not door.holds_turns("*.tar")
    assert door.main([str(folder / "p.jsonl")]) == 0 and "no fault found" in capsys.readouterr().out
    assert door.main(["--json", str(folder / "p.jsonl")]) == 0 and json.loads(capsys.readouterr().out)["pairs"] == 1
    for words in ([str(rows), "--image_root", str(folder)], ["--image_root", str(folder), str(rows)]):
        assert door.main(words) == 2
    assert "rows.json: row 0" in capsys.readouterr().out
