"""The walk of a tar finds what Python's tarfile finds, in tars of every format, whole and damaged."""

import gzip
import io
import itertools
import os
import random
import shutil
import subprocess
import tarfile
import tracemalloc

import pytest

from diffclip.base import archives
from diffclip.base.errors import InputError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def random_tar(path, kind: str, rng: random.Random) -> None:
    letters = "abc.-_ é日" if kind != "ustar" else "abc.-_ "
    with tarfile.open(path, "w", format=FORMATS[kind], errors="surrogateescape") as tar:
        for number in range(rng.randrange(1, 25)):
            name = "".join(rng.choices(letters, k=rng.choice([3, 20, 60, 99, 100])))
            folders = [
                "d" * rng.choice([1, 30, 60]) for _ in range(rng.choice([0, 0, 1, 2] if kind == "ustar" else [0, 1, 5]))
            ]
            info = tarfile.TarInfo("/".join([*folders, f"{number}{name}"])[: 99 if kind == "ustar" else 1000])
            if kind == "ustar" and rng.random() < 0.3:
                info.name = "p" * rng.randrange(1, 150) + "/" + info.name[:90]
            if kind == "gnu" and rng.random() < 0.1:
                info.name += os.fsdecode(b"\xe9\xff")
            info.mtime = rng.choice([0, 1_700_000_000, *([1_700_000_000.25, -5] if kind == "pax" else [])])
            info.uid = rng.choice([0, 1000, *([3_000_000_000] if kind != "ustar" else [])])
            info.uname = rng.choice(["", "root", *(["näme"] if kind == "pax" else [])])
            if kind == "pax" and rng.random() < 0.2:
                info.pax_headers = rng.choice([{"comment": "size=7"}, {"path": "other"}, {"mtime": "1\n9 size=5"}])
            choice = rng.random()
            if choice < 0.1:
                info.type = tarfile.DIRTYPE
            elif choice < 0.2:
                info.type, info.linkname = rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE]), "l" * rng.choice([3, 100])
            elif choice < 0.25:
                info.type = rng.choice([tarfile.FIFOTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE])
            content = rng.randbytes(rng.choice([0, 1, 511, 512, 513, 5000])) if info.isreg() else b""
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def listed(members) -> list[tuple]:
    return [(m.name, m.offset, m.offset_data, m.size, m.type, m.linkname, m.issparse()) for m in members]


def plain(monkeypatch, on: bool, path) -> object:
    """What the walk gives with and without the headers that it reads itself."""
    with monkeypatch.context() as patch:
        if not on:
            patch.setattr(archives, "_plain", lambda *arguments: None)
        try:
            found, reason = archives.members(path)
        except InputError as error:
            return str(error)
        return listed(found), reason


@pytest.mark.parametrize("kind", FORMATS)
def test_members_of_random_tars_are_those_of_tarfile(tmp_path, kind):
    for seed in range(60):
        random_tar(tmp_path / "x.tar", kind, random.Random(seed))
        found, reason = archives.members(tmp_path / "x.tar")
        with tarfile.open(tmp_path / "x.tar") as tar:
            assert listed(found) == listed(tar.getmembers()) and not reason, seed


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_joined_and_damaged_tars_are_read_as_tarfile_reads_them(tmp_path, monkeypatch, kind):
    path = tmp_path / "x.tar"
    for seed in range(60):
        rng = random.Random(seed)
        parts = []
        for _ in range(rng.randrange(1, 4)):
            random_tar(path, rng.choice([kind, *FORMATS]), rng)
            parts.append(path.read_bytes())
        whole = bytearray(b"".join(parts))
        damage = rng.random()
        if damage < 0.3:
            del whole[rng.randrange(len(whole)) :]
        elif damage < 0.6:
            for _ in range(rng.randrange(1, 4)):
                whole[rng.randrange(len(whole))] = rng.randrange(256)
        elif damage < 0.7:
            del whole[rng.randrange(len(whole)) // 512 * 512 :]
        path.write_bytes(whole)
        assert plain(monkeypatch, True, path) == plain(monkeypatch, False, path), seed


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME], ids=["pax", "long name"])
@pytest.mark.parametrize("size", [64 << 20, -512])
def test_headers_of_any_length_take_no_memory(kind, size, tmp_path):
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, abs(size)
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if size < 0:
        head[124:136] = b"\xff" * 4 + size.to_bytes(8, "big", signed=True)
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % sum(head)
    with gzip.open(tmp_path / "a.tar.gz", "wb", 1) as file:
        file.write(head + b"0" * abs(size))
    (tmp_path / "a.tar").write_bytes(head + b"0" * (64 << 20))
    tracemalloc.start()
    with pytest.raises(InputError, match=f"a header of {size:,} bytes"):
        archives.unpack(tmp_path / "a.tar.gz", tmp_path / "out")
    with pytest.raises(InputError, match=f"a header of {size:,} bytes"):
        archives.members(tmp_path / "a.tar")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 << 20


def test_a_header_with_another_byte_is_tarfiles_to_judge(tmp_path, monkeypatch):
    """The checksum is mended, so that only the meaning of the field counts."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("a.txt", "b.txt", "c.txt"):
            info = tarfile.TarInfo(name)
            info.size = 5
            tar.addfile(info, io.BytesIO(b"hello"))
    whole = path.read_bytes()
    for field, value in itertools.product(range(100, 512, 3), b"\0 78/\x80\xff"):
        block = bytearray(whole[1024:1536])  # of b.txt
        block[field] = value
        if not 148 <= field < 156:
            block[148:156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
        path.write_bytes(whole[:1024] + block + whole[1536:])
        assert plain(monkeypatch, True, path) == plain(monkeypatch, False, path), (field, value)


@pytest.mark.skipif(not shutil.which("tar"), reason="needs tar")
@pytest.mark.parametrize("options", ["--format=gnu", "--format=posix", "--format=ustar", "--format=v7", "-S"])
def test_tars_of_the_command(tmp_path, monkeypatch, options):
    (tmp_path / "in" / ("d" * 60)).mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("x")
    os.link(tmp_path / "in" / "a.txt", tmp_path / "in" / "b.txt")
    (tmp_path / "in" / "c.txt").symlink_to("a.txt")
    (tmp_path / "in" / ("d" * 60) / ("e" * 30)).write_bytes(b"y" * 1000)
    with open(tmp_path / "in" / "holes", "wb") as f:
        f.seek(1 << 20)
        f.write(b"end")
    subprocess.run(["tar", options, "-cf", tmp_path / "x.tar", "-C", tmp_path / "in", "."], check=True)
    found, _ = archives.members(tmp_path / "x.tar")
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert listed(found) == listed(tar.getmembers())
