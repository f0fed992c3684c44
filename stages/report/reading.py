"""Files of run directories, read forgivingly: what cannot be read becomes a sentence, and all text is printable."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

from diffclip.base import files
from diffclip.base.errors import InputError


def read_json(path: Path, problems: list[str]) -> Any:
    """Parsed and cleaned JSON; None, and a sentence in `problems`, if it cannot be read."""
    return _read(files.read_json, path, problems)


def read_yaml(path: Path, problems: list[str]) -> dict[str, Any]:
    """A YAML file's mapping, cleaned; {} if there is no file or none in it, with a sentence if it cannot be read."""
    return as_dict(_read(files.read_yaml, path, problems)) if path.is_file() else {}


def _read(read: Callable[[Path], Any], path: Path, problems: list[str]) -> Any:
    try:
        return clean(read(path))
    except (InputError, RecursionError) as error:
        reason = clean(str(error).removeprefix(f"{path}: "))[:300]
        problems.append(f"{path}: cannot be read ({reason}); left out")
        return None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Every JSON object of a JSONL file; damaged lines, such as a crash leaves, are skipped."""
    if path.is_file():
        for _, value in files.read_jsonl(path, damaged="skip"):
            try:
                line = clean(value)
            except RecursionError:
                continue
            if isinstance(line, dict):
                yield line


def read_curve(path: Path) -> list[dict[str, float]]:
    """metrics.jsonl by step, losses and validation in one; after a resume the later value of a step counts."""
    by_step: dict[float, dict] = {}
    for line in read_lines(path):
        if is_number(line.get("step")):
            by_step.setdefault(line["step"], {}).update(line)
    return [by_step[step] for step in sorted(by_step)]


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("a/b", leaf) of nested mappings."""
    if not isinstance(value, dict):
        if prefix:
            yield prefix, value
        return
    for key, inner in value.items():
        yield from flat(inner, f"{prefix}/{key}" if prefix else str(key))


def clean(value: Any) -> Any:
    """The same value with control characters, bidirectional overrides and lone surrogates made visible."""
    if isinstance(value, str):
        if value.isprintable() and len(value) <= 4000:  # nearly always, and a hundred times faster
            return value
        return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in value[:4000])
    if isinstance(value, dict):
        return {clean(str(k)): clean(v) for k, v in value.items()}
    if isinstance(value, list):
        if all(type(v) is int for v in value):  # heat maps: ten thousand of them take no time then
            return value
        return [clean(v) for v in value]
    return value


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number of a size that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e15 < value < 1e15


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
