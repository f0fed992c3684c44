"""What is done to a valid file or to a value: every way is drawn from a `random.Random`, so that a seed repeats it."""

import contextlib
import gzip
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
import pyarrow.parquet
import torch

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 1000, -(10**9), 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e-300, 1e308),
    *(float("nan"), float("inf"), -float("inf"), "", " ", "0", "-1", "1e9", "nan", "x" * 5000, "ä\u202e\u2028", "a\nb"),
    *("\x1b[31m", "\x00", "\ud800", "../../up", "/etc/hostname", "/", ".", "a/b", "*", "{0..9}", "%s%n", "=1+1"),
    *("<image>", "http://127.0.0.1:9/x", "file:///etc/hostname", "hf:nobody/nothing", "yes", "red"),
    *([], {}, [[]], [None], [0], [-1], ["a"], [{}], {"a": 1}, {"": {}}, [1, "a", None], [["a"]], [float("nan")]),
)
DEEP = ("[" * 200 + "]" * 200, "[" * 100_000, '{"a":' * 3000 + "1" + "}" * 3000)
NUMBERS = ("-1", "0", "NaN", "Infinity", "1e999", "9" * 40, "9" * 5000, "0x10", "1_000", "true", "null")
MAGIC = (
    b"\x1f\x8b\x08",
    b"PK\x03\x04",
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"PAR1",
    b"ARROW1",
    b"%!PS-Adobe",
    b"BZh9",
)
MAGIC += (b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"\x93NUMPY\x01\x00", b"\x80\x02", b"GGUF", b"\xff\xfe", b"<html>")
BOMB = gzip.compress(b" " * (64 << 20), 1)
NAMES = ("../up.txt", "/tmp/up.txt", "a/../../up.txt", "x" * 300, "a\x1b[2Jb.jpg", "\udc80.jpg", "con\nb.txt", ".", "")


class Planted:
    """Unpickled, it leaves a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(self.marker),)


def spoil(path: Path, rng: Random, marker: Path) -> str:
    """Change a file, or what stands in its place, and say how; `marker` is what planted code would make."""
    raw = path.read_bytes()
    path.unlink()  # `copy` may have linked it
    path.write_bytes(raw)
    by_kind = {
        **dict.fromkeys((".json", ".jsonl", ".yaml"), json_value),
        **{".safetensors": safetensors_header, ".parquet": parquet_columns, ".tar": tar_members},
        **dict.fromkeys((".pt", ".bin", ".pth"), lambda *given: planted(*given, marker)),
    }
    ways = [(place, 2), (content, 4)]
    if path.is_file() and (way := by_kind.get(path.suffix)):
        ways.append((way, 8))
    way = rng.choices([way for way, _ in ways], [weight for _, weight in ways])[0]
    try:
        return f"{path.name}: {way(path, rng)}"
    except Exception:
        return f"{path.name}: {content(path, rng)}"  # what cannot be written so, or was spoilt before


# ---------------------------------------------------------------- what stands in a file's place


def place(path: Path, rng: Random) -> str:
    """Something else where the file was."""
    how = rng.choice(
        ("gone", "empty", "folder", "fifo", "no permission", "dangling link", "loop", "link out", "device")
    )
    if how == "no permission":
        path.chmod(0)
        return how
    content = path.read_bytes()
    path.unlink()
    if how == "empty":
        path.touch()
    elif how == "folder":
        path.mkdir()
        (path / "inner").write_bytes(content)
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "dangling link":
        path.symlink_to("nowhere")
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "link out":
        path.symlink_to("/etc/hostname")
    elif how == "device":
        path.symlink_to("/dev/null")
    return how


def content(path: Path, rng: Random) -> str:
    """Other bytes in the file."""
    raw = path.read_bytes() if path.is_file() else b""
    size = len(raw)
    at, to = sorted((rng.randint(0, size), rng.randint(0, size)))
    how = rng.choice(
        ("cut", "flip", "splice", "insert", "zeros", "magic", "utf-16", "latin1", "mark", "gzip", "packed twice")
        + ("doubled", "crlf", "cr", "nul", "number", "deep", "huge line", "random", "surrogates", "bomb")
    )
    text = raw.decode("utf-8", "replace")
    new: dict[str, Callable[[], bytes]] = {
        "cut": lambda: raw[:at],
        "flip": lambda: _flipped(raw, rng),
        "splice": lambda: raw[:at] + raw[to:] + raw[at:to],
        "insert": lambda: raw[:at] + rng.randbytes(rng.choice((1, 8, 500))) + raw[at:],
        "zeros": lambda: raw[:at] + bytes(to - at) + raw[to:],
        "magic": lambda: (magic := rng.choice(MAGIC)) + raw[rng.choice((0, len(magic))) :],
        "utf-16": lambda: text.encode("utf-16"),
        "latin1": lambda: raw[:at] + "é".encode("latin1") + raw[at:],
        "mark": lambda: b"\xef\xbb\xbf" + raw,
        "gzip": lambda: gzip.compress(raw, 1),
        "packed twice": lambda: gzip.compress(gzip.compress(raw, 1), 1)[: -rng.choice((1, 4, 40)) or None],
        "doubled": lambda: raw + raw,
        "crlf": lambda: raw.replace(b"\n", b"\r\n"),
        "cr": lambda: raw.replace(b"\n", b"\r"),
        "nul": lambda: raw[:at] + b"\0" + raw[at:],
        "number": lambda: _other_number(raw, rng),
        "deep": lambda: rng.choice(DEEP).encode(),
        "huge line": lambda: raw[:at] + b"a" * 3_000_000 + raw[at:],
        "random": lambda: rng.randbytes(rng.choice((1, 100, 10_000))),
        "surrogates": lambda: raw[:at] + b"\xed\xa0\x80" + raw[at:],
        "bomb": lambda: BOMB,
    }
    path.write_bytes(new[how]())
    return how


def _flipped(raw: bytes, rng: Random) -> bytes:
    changed = bytearray(raw)
    for _ in range(min(len(raw), rng.choice((1, 3, 30)))):
        changed[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _other_number(raw: bytes, rng: Random) -> bytes:
    """One run of digits as another number."""
    at = [i for i, byte in enumerate(raw) if 48 <= byte < 58]
    if not at:
        return raw
    start = end = rng.choice(at)
    while end < len(raw) and 48 <= raw[end] < 58:
        end += 1
    return raw[:start] + rng.choice(NUMBERS).encode() + raw[end:]


# ---------------------------------------------------------------- values


def json_value(path: Path, rng: Random) -> str:
    """Other values, keys or types in JSON, or in one line of JSON lines."""
    text = path.read_text()
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    at = rng.randrange(len(lines) or 1)
    value = json.loads(lines[at]) if lines else None
    told = []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value, how = change(value, rng)
        told.append(how)
    lines[at : at + 1] = [json.dumps(value)]
    path.write_text("\n".join(lines) + "\n")
    return ", ".join(told)


def change(value: Any, rng: Random) -> tuple[Any, str]:
    """A JSON value with one place changed, and how."""
    places = list(_places(value))
    if not places or rng.random() < 0.03:
        return rng.choice(VALUES), "another root"
    inner, key = rng.choice(places)
    how = rng.choice(("value", "value", "value", "swap", "drop", "rename", "wrap", "copies"))
    if how == "value":
        inner[key] = rng.choice(VALUES)
        return value, f"{key!r} is {str(inner[key])[:40]!r}"
    if how == "swap":
        other, there = rng.choice(places)
        inner[key], other[there] = json.loads(json.dumps([other[there], inner[key]]))
    elif how == "drop":
        del inner[key]
    elif how == "rename" and isinstance(inner, dict):
        inner[rng.choice(("", "x", "../x", str(key).upper(), "auto_map", "trust_remote_code"))] = inner.pop(key)
    elif how == "wrap":
        inner[key] = rng.choice(([inner[key]], {"a": inner[key]}, str(inner[key])))
    elif how == "copies":
        inner[key] = [inner[key]] * rng.choice((2, 300))
    return value, f"{key!r}: {how}"


def _places(value: Any) -> Any:
    """(list or object, key) of each value inside."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


# ---------------------------------------------------------------- formats


def safetensors_header(path: Path, rng: Random) -> str:
    """Another header, or weights that are no numbers."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    if rng.random() < 0.2:
        length = rng.choice((0, 1, size - 1, size + 8, 1 << 20, 1 << 40, (1 << 64) - 1))
        path.write_bytes(struct.pack("<Q", length) + raw[8:])
        return f"a header of {length}"
    if rng.random() < 0.3:
        bits = rng.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f"))
        at = 8 + size + 4 * rng.randrange(max(1, (len(raw) - 8 - size) // 4))
        path.write_bytes(raw[:at] + bits + raw[at + 4 :])
        return f"{struct.unpack('<f', bits)[0]} among the weights"
    header, how = change(json.loads(raw[8 : 8 + size]), rng)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
    return how


def parquet_columns(path: Path, rng: Random) -> str:
    """A column of another type, another name, without values, twice, or gone; or no rows, or very many."""
    table = pyarrow.parquet.read_table(path)
    name = rng.choice(table.column_names)
    at, rows = table.column_names.index(name), len(table)
    values = {
        "nulls": pyarrow.nulls(rows),
        "null strings": pyarrow.nulls(rows, pyarrow.string()),
        "integers": pyarrow.array(range(rows)),
        "floats": pyarrow.array([float("nan")] * rows),
        "booleans": pyarrow.array([True] * rows),
        "strings": pyarrow.array([rng.choice(NAMES[:5]) for _ in range(rows)]),
        "bytes": pyarrow.array([rng.randbytes(20) for _ in range(rows)]),
        "lists": pyarrow.array([[["a"]]] * rows),
        "structs": pyarrow.array([{"bytes": None, "path": rng.choice(NAMES[:5])}] * rows),
        "other structs": pyarrow.array([{"a": {"b": i}} for i in range(rows)]),
        "dates": pyarrow.array([2**60] * rows, pyarrow.timestamp("ns")),
        "words of a dictionary": pyarrow.array(["a"] * rows).dictionary_encode(),
        "maps": pyarrow.array([[("a", 1)]] * rows, pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    }
    how = rng.choice((*values, "no rows", "many rows", "dropped", "twice", "renamed", "metadata"))
    if how == "no rows":
        table = table.slice(0, 0)
    elif how == "many rows":
        table = pyarrow.table({each: pyarrow.nulls(200_000) for each in table.column_names})
    elif how == "dropped":
        table = table.drop_columns([name])
    elif how == "twice":
        table = table.append_column(name, table.column(at))
    elif how == "renamed":
        new = rng.choice(("", "IMAGE", "image", "a\nb", "../x"))
        table = table.rename_columns([new if each == name else each for each in table.column_names])
    elif how == "metadata":
        table = table.replace_schema_metadata({"huggingface": rng.choice(("{", "[]", '{"info": {"features": 3}}'))})
    else:
        table = table.set_column(at, name, values[how])
    pyarrow.parquet.write_table(table, path)
    return f"{name}: {how}"


def tar_members(path: Path, rng: Random) -> str:
    """A member of another name, kind, size or content."""
    with tarfile.open(path) as tar:
        members = [(each, tar.extractfile(each).read()) for each in tar if each.isfile()]  # type: ignore[union-attr]
    how = rng.choice(("name", "link", "twice", "folder", "pax", "content", "code", "device"))
    at = rng.randrange(len(members))
    info, raw = members[at]
    suffix = os.path.splitext(info.name)[1]
    if how == "name":
        info.name = rng.choice(NAMES) + rng.choice(("", suffix))
    elif how in ("link", "device"):
        info.type, info.linkname, raw = (tarfile.SYMTYPE if how == "link" else tarfile.CHRTYPE), "/etc/hostname", b""
    elif how == "twice":
        members.insert(at, (info, raw))
    elif how == "folder":
        info.type, raw = tarfile.DIRTYPE, b""
    elif how == "pax":
        info.pax_headers = {"comment": "a" * 2_000_000, "size": rng.choice(("-1", "9" * 20, "x"))}
    elif how == "content":
        raw = rng.choice((b"", b"\0" * 100, rng.randbytes(50), *(d.encode() for d in DEEP), b'{"caption": 3}', *MAGIC))
    elif how == "code":
        stem = info.name.removesuffix(suffix)
        members.append((tarfile.TarInfo(stem + rng.choice((".pyd", ".pickle", ".pth"))), pickle.dumps(Planted(path))))
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for each, inner in [*members[:at], (info, raw), *members[at + 1 :]]:
            each.size = len(inner)
            with contextlib.suppress(ValueError, UnicodeError):
                tar.addfile(each, io.BytesIO(inner))
    return f"{how} of {info.name[:40]!r}"


def planted(path: Path, rng: Random, marker: Path) -> str:
    """A pickle that makes `marker`, bare or as torch saves it, alone or beside weights."""
    how = rng.choice(("bare", "torch", "legacy", "beside"))
    if how == "bare":
        path.write_bytes(pickle.dumps(Planted(marker), 2))
        return f"pickle, {how}"
    value: Any = Planted(marker)
    if how == "beside":
        value = {**torch.load(path, weights_only=True), "more": value}
    torch.save(value, path, _use_new_zipfile_serialization=how != "legacy")
    return f"pickle, {how}"


def copy(source: Path, target: Path, own: bool = False) -> None:
    """A file or folder, as it is; without `own` its files are links, which `spoil` parts before it changes one."""
    if not source.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        return _linked(source, target) if not own else shutil.copyfile(source, target) and None
    for where, _, names in os.walk(source):
        folder = os.path.join(target, os.path.relpath(where, source))
        os.makedirs(folder, exist_ok=True)
        for name in names:
            (shutil.copyfile if own else _linked)(os.path.join(where, name), os.path.join(folder, name))


def _linked(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # of another disk
        shutil.copyfile(source, target)
