"""Reading and writing of text files: lines, encodings, damage, kills."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc

import pytest

from diffclip.base import files
from diffclip.base.errors import InputError

ODD = ["a\u2028b", "c\x85d", "e\u2029f", "g\x0bh\x0ci\x1cj", "\ud800 half", os.fsdecode(b"caf\xe9.jpg"), "日本"]


def test_strings_with_every_kind_of_line_end_come_back(tmp_path):
    files.append_jsonl(tmp_path / "log", [{"key": text} for text in ODD])
    files.append_jsonl(tmp_path / "log", [{"key": "last"}])
    back = [(number, row["key"]) for number, row in files.read_jsonl(tmp_path / "log")]
    assert back == list(enumerate([*ODD, "last"], 1))
    raw = (tmp_path / "log").read_text(encoding="utf-8")
    assert [json.loads(line)["key"] for line in raw.splitlines()] == [*ODD, "last"]  # also for readers that split so


def test_raw_line_separators_in_a_strangers_file_do_not_end_a_line(tmp_path):
    (tmp_path / "rows").write_text('{"a": "x\u2028y"}\n\n{"a": "z\x85"}\n', encoding="utf-8")
    assert list(files.read_jsonl(tmp_path / "rows")) == [(1, {"a": "x\u2028y"}), (3, {"a": "z\x85"})]


def test_half_a_line_is_skipped_in_our_logs_and_does_not_eat_the_next(tmp_path):
    (tmp_path / "log").write_bytes(b'{"key": "a"}\n{"key": "b", "re')
    files.append_jsonl(tmp_path / "log", [{"key": "c"}])
    assert [row["key"] for _, row in files.read_jsonl(tmp_path / "log", damaged="skip")] == ["a", "c"]
    with pytest.raises(InputError, match=r"log:2: not valid JSON"):
        list(files.read_jsonl(tmp_path / "log"))


def test_what_nothing_can_be_appended_to_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")  # would be waited for
    for name in ("folder", "loop", "pipe"):
        with pytest.raises(InputError, match=f"{name}: "):
            files.append(tmp_path / name, "line\n")
    with pytest.raises(OSError, match="No space"):  # which is told as such
        files.append("/dev/full", "line\n")
    with pytest.raises(FileNotFoundError):  # as a disk that is gone
        files.append(tmp_path / "nowhere/log", "line\n")


def test_whole_lines_are_counted_and_the_rest_cut_off(tmp_path):
    path = tmp_path / "answers"
    assert files.cut_to_whole_lines(path) == 0
    path.write_bytes(b"1\n2\n3")
    assert files.cut_to_whole_lines(path) == 2
    assert path.read_bytes() == b"1\n2\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'\xff\xfe{\x00"\x00', r"not UTF-8 \(byte 0\)"),
        (b"{nope", "not valid JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b"9" * 5000, "not valid JSON"),
        (b"", "not valid JSON"),
    ],
)
def test_what_is_no_json_is_named(tmp_path, content, reason):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"x\.json: {reason}"):
        files.read_json(tmp_path / "x.json")
    if content:
        with pytest.raises(InputError, match=rf"x\.json:1: {reason.split(chr(92))[0]}"):
            list(files.read_jsonl(tmp_path / "x.json"))


def test_missing_files_and_folders_are_named(tmp_path):
    for read in (files.read_json, files.read_yaml, lambda p: list(files.read_jsonl(p))):
        with pytest.raises(InputError, match="none: cannot be read"):
            read(tmp_path / "none")
        with pytest.raises(InputError, match="cannot be read"):
            read(tmp_path)


def test_byte_order_marks_are_skipped(tmp_path):
    (tmp_path / "x").write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    assert files.read_json(tmp_path / "x") == {"a": 1}
    assert list(files.read_jsonl(tmp_path / "x")) == [(1, {"a": 1})]
    assert files.read_yaml(tmp_path / "x") == {"a": 1}


@pytest.mark.slow
@pytest.mark.parametrize("text", ["a: [", "a: !!python/object:os.system x", "a: 2024-99-99", "[" * 50_000])
def test_what_is_no_yaml_is_named(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match=r"x\.yaml: (not valid YAML|nested too deep)"):
        files.read_yaml(tmp_path / "x.yaml")


def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path):
    code = (
        "import sys; from diffclip.base.files import write_json\n"
        "for i in range(10**9): write_json(sys.argv[1], {'n': i, 'filler': 'x' * 100_000})"
    )
    path = tmp_path / "out.json"
    for wait in (0.15, 0.11, 0.13):
        path.unlink(missing_ok=True)
        child = subprocess.Popen([sys.executable, "-c", code, str(path)])
        while not path.exists():
            time.sleep(0.01)
        time.sleep(wait)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert len(files.read_json(path)["filler"]) == 100_000


def test_files_are_readable_as_the_umask_says_and_failures_leave_nothing(tmp_path):
    before = os.umask(0o022)
    try:
        files.write_whole(tmp_path / "a", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        files.write_whole(tmp_path / "folder", "text")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "folder"]


def test_a_librarys_file_takes_its_place_at_the_end_or_never(tmp_path):
    path = tmp_path / "scores.npz"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), files.whole(path) as temporary:
        temporary.write_bytes(b"half")
        assert path.read_bytes() == b"old" and temporary.suffix == ".npz"  # by which libraries choose the format
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with files.whole(path) as first, files.whole(path) as second:  # two processes, or threads, at once
        assert first != second
        first.write_bytes(b"a")
        second.write_bytes(b"b")
    assert path.read_bytes() == b"a" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("piece", [1, 3, 50, 1 << 20])
def test_an_array_read_item_by_item_is_what_json_reads(tmp_path, monkeypatch, piece):
    """Random values and random damage, in pieces that end anywhere."""
    monkeypatch.setattr(files, "PIECE", piece)
    rng = random.Random(piece)

    def value(depth=0):
        kind = rng.randrange(7 if depth < 3 else 4)
        if kind < 2:
            return rng.choice([True, None, -1.5e-7, 12345, rng.random()])
        if kind < 4:
            return "".join(rng.choice('ab"\\\n\u2028é😀]},[{ ') for _ in range(rng.randrange(30)))
        if kind < 6:
            return {str(n): value(depth + 1) for n in range(rng.randrange(4))}
        return [value(depth + 1) for _ in range(rng.randrange(4))]

    path = tmp_path / "a.json"
    for _ in range(60):
        wanted = [value() for _ in range(rng.randrange(5))]
        text = json.dumps(wanted, indent=rng.choice([None, 1]), ensure_ascii=rng.random() < 0.5)
        path.write_text(text, encoding="utf-8")
        assert list(files.read_array(path)) == wanted
        place = rng.randrange(1, len(text))
        damaged = text[:place] + rng.choice(["", ",", "x", '"']) + text[place + 1 :]
        path.write_text(damaged, encoding="utf-8")
        try:
            wanted = json.loads(damaged)
        except ValueError:
            with pytest.raises(InputError, match=r"a\.json"):
                list(files.read_array(path))
        else:
            assert list(files.read_array(path)) == wanted


def test_gzip_is_read_as_what_it_holds(tmp_path):
    (tmp_path / "a").write_bytes(gzip.compress(b'{"a": 1}\n{"a": 2}'))
    assert files.read_text(tmp_path / "a") == '{"a": 1}\n{"a": 2}'
    assert [row for _, row in files.read_jsonl(tmp_path / "a")] == [{"a": 1}, {"a": 2}]
    (tmp_path / "a").write_bytes(gzip.compress(b"x" * 999)[:-5])
    with pytest.raises(InputError, match="no whole gzip file"):
        files.read_text(tmp_path / "a")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a")
    for read in (files.read_json, files.read_yaml, lambda path: list(files.read_jsonl(path))):
        with pytest.raises(InputError, match="is a pipe, and no file"):
            read(tmp_path / "a")


def test_blank_lines_without_end_are_no_text(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LEAST_UNPACKED", 1 << 20)
    (tmp_path / "a").write_bytes(gzip.compress((b" " * 1023 + b"\n") * (8 << 10), 9))
    for read in (files.read_jsonl, files.read_array):
        with pytest.raises(InputError, match=r"a: unpacks to over 200 times its size"):
            list(read(tmp_path / "a"))
    squeezed(tmp_path / "b", b"[1, ", b" " * (1 << 19), 1)
    with pytest.raises(InputError, match="not valid JSON"):  # so much may be
        list(files.read_array(tmp_path / "b"))


def squeezed(path, start, content, times):
    with gzip.open(path, "wb", 1) as file:
        file.write(start)
        for _ in range(times):
            file.write(content)
    return path


def test_what_unpacks_to_more_than_memory_is_refused_in_little_of_it(tmp_path, monkeypatch):
    for name in ("MOST_ROW", "MOST_SETTINGS", "MOST_YAML"):
        monkeypatch.setattr(files, name, 2 << 20)
    bomb = squeezed(tmp_path / "bomb.json", b"", b" " * (1 << 20), 40)
    text = squeezed(tmp_path / "text.json", b'["', b"a" * (1 << 20), 40)
    readers = {
        "too many for what it should be": lambda: files.read_text(bomb, 2 << 20),
        "too many for what": lambda: files.read_settings(bomb),
        "too many for": lambda: files.read_yaml(bomb),
        "bomb.json:1: has over": lambda: list(files.read_jsonl(bomb)),
        "item 0: .*too many for a row": lambda: list(files.read_array(text)),
    }
    for message, read in readers.items():
        tracemalloc.start()
        with pytest.raises(InputError, match=message):
            read()
        assert tracemalloc.get_traced_memory()[1] < 24 << 20, message
        tracemalloc.stop()


def test_what_is_nested_deeper_than_copies_of_it_can_be_is_refused(tmp_path):
    for text in ("[" * 101 + "]" * 101, '{"a":' * 101 + "1" + "}" * 101):
        for read in (files.read_json, files.read_jsonl):
            (tmp_path / "x.json").write_text(f"[{text}]")
            with pytest.raises(InputError, match=r"x\.json.*nested too deep"):
                list(read(tmp_path / "x.json"))
    (tmp_path / "x.json").write_text("[" * 100 + "]" * 100 + "\n")
    assert files.read_json(tmp_path / "x.json") is not None
    (tmp_path / "x.json").write_text(json.dumps([[[1]]] * 200))  # many, but none deep
    assert len(files.read_json(tmp_path / "x.json")) == 200


def test_references_of_yaml_do_not_make_billions():
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{each}: &{each} [{', '.join([f'*{before}'] * 9)}]" for before, each in zip("abcdefgh", "bcdefghi")]
    for text in ("\n".join(lines), "&a [*a]", "&a {b: *a}"):
        with pytest.raises(InputError, match=r"x\.yaml: nested too deep"):
            files.parse_yaml(text, "x.yaml")
    assert files.parse_yaml("a: &a [1]\nb: *a", "x.yaml") == {"a": [1], "b": [1]}
