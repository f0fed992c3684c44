"""Text files, read and written in one way: JSON, JSON lines and YAML, whole or not at all.

Lines end at `\\n` alone, never at U+2028 or U+0085, which captions and file names hold; a byte order mark is skipped;
gzip is unpacked as it is read; what is not UTF-8, not JSON, nested too deep or longer than memory is an `InputError`
that names the file and the line.
"""

import errno
import gzip
import hashlib
import io
import json
import math
import os
import re
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from diffclip.base.errors import InputError

# Bytes of what is held in memory at once, unpacked. The largest honest files: COCO's annotations, half of the first; a
# row with a few photos in base64; a hundred kilobytes of JSON, and of YAML, which is read at a fiftieth of the pace.
MOST_TEXT, MOST_ROW, MOST_SETTINGS, MOST_YAML = 1 << 30, 256 << 20, 4 << 20, 256 << 10
MOST_TIMES = 200  # a gzip file's size; text packs to a tenth, perhaps a hundredth, zeros to a thousandth
LEAST_UNPACKED = 256 << 20  # bytes that any gzip file may unpack to
DEEPEST = 100  # levels of lists and objects; Python itself gives up at a thousand, and copies of a value sooner
MOST_SHARED = 1_000_000  # values of YAML, each counted as often as it is referred to


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one: temporary file, fsync, rename.

    Text is written as UTF-8; what no UTF-8 can hold (halves of surrogate pairs) as its `\\udc80` escape.
    """
    with whole(path) as temporary:
        temporary.write_bytes(_encoded(content) if isinstance(content, str) else content)


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """`write_whole` for what a library writes: yields a path beside `path` that takes its place at the end.

    An exception inside leaves `path` as it was and nothing beside it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{os.urandom(4).hex()}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_output(path: str | Path, suffixes: Iterable[str] = ()) -> None:
    """Before work whose result is to be written to a file: InputError if that could not be.

    `suffixes`: what the file may end in, like ".png"; nothing means anything.
    """
    path, known = Path(path), tuple(suffixes)
    if known and path.suffix.lower() not in known:
        raise InputError(f"{path}: must end in {', '.join(known[:-1])}{' or ' * (len(known) > 1)}{known[-1]}")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the name of a file in it")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; make it first (mkdir -p {path.parent})")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: nothing can be written into {path.parent}; choose another folder")


def write_json(path: str | Path, value: object) -> None:
    """`write_whole` of a value as indented JSON."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_text(path: str | Path, most: int = MOST_TEXT) -> str:
    """The whole of a UTF-8 file, without a byte order mark.

    InputError if it cannot be read, is not UTF-8, or has more than `most` bytes when it is unpacked.
    """
    with opened(path) as f:
        pieces, size = list[bytes](), 0
        while size <= most and (piece := f.read(PIECE)):  # f.read(most) would take all of that memory at once
            pieces.append(piece)
            size += len(piece)
        if size > most:
            raise InputError(f"{path}: has more than {most:,} bytes, too many for what it should be; write it again")
        try:
            return b"".join(pieces).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 (byte {error.start}); {utf8_remedy(path)}") from None


def open_file(path: str | Path) -> BinaryIO:
    """A file's bytes, as `open` gives them; InputError for a pipe."""
    refuse_pipe(path)
    return open(path, "rb")


def refuse_pipe(path: str | Path) -> None:
    """InputError for a pipe, which would be waited for, perhaps for ever."""
    if Path(path).is_fifo():
        raise InputError(f"{path}: is a pipe, and no file; write what comes through it into a file")


def file_content(path: str | Path) -> bytes:
    """All bytes of a file; OSError for what is none, such as a pipe, which would be waited for."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path} is no file")
    return Path(path).read_bytes()


@contextmanager
def opened(path: str | Path) -> Iterator[IO[bytes]]:
    """A file's bytes, unpacked if it is gzip; InputError if they cannot be read, then or inside the `with`."""
    try:
        with open_file(path) as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            yield cast(IO[bytes], io.BufferedReader(_Unpacked(file, path), PIECE)) if packed else file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: is no whole gzip file ({error}); download or write it again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


class _Unpacked(io.RawIOBase):
    """What a gzip file holds; InputError once that is far more than text packs into a file of its size."""

    def __init__(self, file: BinaryIO, path: str | Path) -> None:
        self.file, self.path = gzip.GzipFile(fileobj=file), path
        self.left = max(MOST_TIMES * os.path.getsize(path), LEAST_UNPACKED)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self.file.read(len(buffer))
        self.left -= len(piece)
        if self.left < 0:
            raise InputError(f"{self.path}: unpacks to over {MOST_TIMES} times its size, as no text does; leave it out")
        buffer[: len(piece)] = piece
        return len(piece)


def read_json(path: str | Path, *, unique: bool = False) -> Any:
    """The value of a JSON file; InputError if it cannot be read, is not UTF-8, not JSON, or nested too deep.

    With `unique` also if a key stands twice in an object, of which the last would count.
    """
    return parse_json(read_text(path), str(path), unique=unique)


def read_settings(path: str | Path) -> Any:
    """`read_json` of a file that holds settings and no data: of at most `MOST_SETTINGS` bytes."""
    return parse_json(read_text(path, MOST_SETTINGS), str(path))


def parse_json(text: str | bytes, name: str, *, unique: bool = False) -> Any:
    """`json.loads` whose failures are an `InputError` that calls the text `name`; `unique` as in `read_json`."""
    try:
        value = json.loads(text, object_pairs_hook=_each_key_once if unique else None)
    except RecursionError:
        raise InputError(f"{name}: nested too deep for JSON that a person would write; write it again") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise InputError(f"{name}: not valid JSON: {error}") from None
    marks: tuple[Any, Any] = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    if sum(map(text.count, marks)) > DEEPEST and _levels(value) > DEEPEST:
        raise InputError(f"{name}: nested too deep for JSON that a person would write; write it again")
    return value


def _levels(value: Any, most: float = math.inf) -> float:
    """How deep lists and objects lie in each other; infinite where they are more than `most`, or hold themselves."""
    depth, seen, level = 0, 0, [value]
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth, seen = depth + 1, seen + sum(map(len, level))
        if depth > DEEPEST or seen > most:
            return math.inf
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    return depth


def read_jsonl(path: str | Path, *, damaged: str = "raise") -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of every line that is not blank, one at a time.

    InputError, which names the line, if the file cannot be read, or a line is not UTF-8, not JSON, nested too deep, or
    has a key twice in an object;
    with `damaged` "skip", for logs of ours in which a kill may have left half a line, the rest is read nevertheless.
    """
    with opened(path) as f:
        for number, raw in enumerate(iter(lambda: f.readline(MOST_ROW + 1), b""), 1):  # bytes: lines end at \n alone
            if len(raw) > MOST_ROW:
                raise InputError(f"{path}:{number}: has over {MOST_ROW:,} bytes, too many for a row; write it again")
            line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if not line.strip():
                continue
            try:
                value = parse_json(line.decode("utf-8"), f"{path}:{number}", unique=True)
            except UnicodeDecodeError as error:
                if damaged == "raise":
                    reason = f"not UTF-8 (byte {error.start} of the line); {utf8_remedy(path)}"
                    raise InputError(f"{path}:{number}: {reason}") from None
                continue
            except InputError:
                if damaged == "raise":
                    raise
                continue
            yield number, value


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; ValueError where a key comes again, of which JSON would keep the last without a word."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:200]!r} stands twice in one object: keep one of them")
    return values


PIECE = 1 << 20  # bytes of a file, or characters of an array, that are read at a time
SPACE = re.compile(r"[ \t\r\n]*")


def read_array(path: str | Path) -> Iterator[Any]:
    """The items of a file that holds one JSON array, one at a time: memory for one item, whatever the file's size.

    InputError, which names the item by its number from 0, as `read_jsonl`; also where something follows the array. An
    item may be nested as deep as Python reads, so that whoever reads rows can name one and keep the others.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_each_key_once)
    with opened(path) as f:
        text = io.TextIOWrapper(f, "utf-8-sig")
        buffer, place, number = "", 0, 0

        def more(size: int = PIECE) -> bool:
            nonlocal buffer, place
            try:
                piece = text.read(size)
            except UnicodeDecodeError:
                raise InputError(f"{path}: not UTF-8 (behind item {number}); {utf8_remedy(path)}") from None
            if piece:
                buffer, place = buffer[place:] + piece, 0
            return bool(piece)

        def peek() -> str:
            """The next character that is no space, "" at the end of the file; `place` lies before it."""
            nonlocal place
            while (at := SPACE.match(buffer, place).end()) == len(buffer):  # type: ignore[union-attr]
                place = at
                if not more():
                    return ""
            place = at
            return buffer[at]

        def mark() -> str:
            nonlocal place
            found = peek()
            place += len(found)
            return found

        def item() -> Any:
            nonlocal place
            name, size = f"{path}: item {number}", PIECE
            while True:
                try:
                    value, end = decoder.raw_decode(buffer, place)
                    if isinstance(value, int | float) and end > len(buffer) - 3 and more(size):
                        continue  # a number may go on behind the end
                    place = end
                    return value
                except RecursionError:
                    raise InputError(f"{name}: nested too deep for JSON that a person would write") from None
                except json.JSONDecodeError as error:
                    cut = error.msg.startswith("Unterminated string") or error.pos >= len(buffer) - 12
                    if cut and len(buffer) - place > MOST_ROW:
                        raise InputError(
                            f"{name}: has more than {MOST_ROW:,} characters, too many for a row; write it again"
                        ) from None
                    if cut and more(size):
                        size *= 2  # so that an item of any length is parsed a few times only
                        continue
                    raise InputError(f"{name}: not valid JSON ({error.msg}); mend or remove it") from None
                except ValueError as error:  # a number of thousands of digits, a key that comes again
                    raise InputError(f"{name}: not valid JSON ({error}); mend or remove it") from None

        if mark() != "[":
            raise InputError(f"{path}: is no JSON array; give a list of rows")
        after = mark() if peek() == "]" else ","
        while after == ",":
            peek()
            yield item()
            number += 1
            after = mark()
        if after != "]":
            found = f"`{after}` stands" if after else "the file ends"
            raise InputError(f"{path}: item {number}: {found} where , or ] must; download or write it again")
        if mark():
            raise InputError(f"{path}: something follows the array; give one list of rows, or a row a line (JSONL)")


def append_jsonl(path: str | Path, records: Iterable[object]) -> None:
    """`append` of a line for each record."""
    append(path, "".join(json_line(record) for record in records))


def append(path: str | Path, lines: str) -> None:
    """Append lines to a file in one write, since several processes may share it; InputError where it cannot be.

    Half a line that a kill left at the end stays a line of its own. A full disk and the like stay what they are.
    """
    try:
        refuse_pipe(path)
        with open(path, "ab+") as f:
            if f.tell():
                f.seek(-1, os.SEEK_END)
                if f.read(1) != b"\n":
                    lines = "\n" + lines
            f.write(_encoded(lines))
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENXIO):
            raise
        raise InputError(f"{path}: nothing can be appended to it ({error.strerror}); move it away") from None


def json_line(record: object) -> str:
    """One line of a JSON lines file; the line ends that other readers see inside strings are escaped."""
    text = json.dumps(record, ensure_ascii=False)
    for character in ("\u2028", "\u2029", "\x85"):
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text + "\n"


def cut_to_whole_lines(path: str | Path) -> int:
    """Cut half a line, left by a kill, off the end of a file; returns how many lines it has then, 0 for no file."""
    content = Path(path).read_bytes() if os.path.exists(path) else b""
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) != len(content):
        os.truncate(path, len(whole))
    return whole.count(b"\n")


def read_yaml(path: str | Path) -> Any:
    """The value of a YAML file, plain types only; InputError as `read_json`."""
    return parse_yaml(read_text(path, MOST_YAML), str(path))


def parse_yaml(text: str, name: str) -> Any:
    """The value of YAML, plain types only, whose failures are an `InputError` that calls the text `name`."""
    import yaml  # not at the top: `0_data.sh --dry-run` runs before anything is installed

    try:
        value = yaml.safe_load(text)
    except RecursionError:
        raise InputError(f"{name}: nested too deep for YAML that a person would write; write it again") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        raise InputError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    if _levels(value, MOST_SHARED) > DEEPEST:  # of which a few lines of references make billions
        raise InputError(f"{name}: nested too deep for YAML that a person would write; write it again")
    return value


def share(path: str | Path) -> None:
    """Let others read a file as far as the umask lets them, where a library wrote it for its owner alone."""
    umask = os.umask(0o077)
    os.umask(umask)
    if os.stat(path).st_mode & 0o777 == 0o600:
        os.chmod(path, 0o666 & ~umask)


def file_sha256(path: str | Path) -> str:
    """Hex digest of a file's content."""
    return file_digest(path, "sha256")


def file_digest(path: str | Path, kind: str) -> str:
    """Hex digest of a file's content by an algorithm of hashlib."""
    digest = hashlib.new(kind)
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", errors="backslashreplace")


def utf8_remedy(path: str | Path) -> str:
    """How a message about a file that is not UTF-8 goes on."""
    with open(path, "rb") as f:
        encoding = "utf-16" if f.read(2) in (b"\xff\xfe", b"\xfe\xff") else "latin1"
    return f"convert it, e.g. by `iconv -f {encoding} -t utf-8 {path} > new{Path(path).suffix}`"
