"""Where a run's numbers come from: digests of its inputs, versions of packages, state of the source, hardware."""

import hashlib
import os
import platform
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from diffclip.base.files import read_json
from diffclip.base.schema import RECORD

PACKAGES = [
    "diffclip-stack",
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "open_clip_torch",
    "timm",
    "datasets",
    "peft",
    "lmms-eval",
    "numpy",
]
LONG_FILE = 1 << 28  # bytes


def upstream_model(path: str | Path) -> str:
    """The model name that the run in `path` was made with, e.g. "DiffCLIP-tiny"; the folder's name elsewhere."""
    record = Path(path) / RECORD
    if record.is_file():
        return read_json(record).get("model", Path(path).name)
    return Path(path).name


def digest(path: str | Path) -> str:
    """12 hex digits that change when the input changes.

    A file counts with its content, a long one (shards) with its size and three of its megabytes; a model directory
    with its weights; any other directory with the names and sizes of its files, so that large data folders take
    milliseconds.
    """
    path = Path(path)
    result = hashlib.sha256()
    if path.is_file():
        with open(path, "rb") as f:
            size = os.path.getsize(path)
            if size > LONG_FILE:
                result.update(str(size).encode())
                for start in (0, size // 2, size - (1 << 20)):
                    f.seek(start)
                    result.update(f.read(1 << 20))
                return result.hexdigest()[:12]
            if sys.version_info >= (3, 11):
                result.update(hashlib.file_digest(f, "sha256").digest())
            else:
                result.update(f.read())
        return result.hexdigest()[:12]
    weights = sorted(path.glob("*.safetensors"))
    if weights:  # a model directory is its weights; logs and metrics beside them may change
        for file in weights:
            result.update(f"{file.name}{digest(file)}".encode())
        return result.hexdigest()[:12]
    for folder, folders, files in os.walk(path):
        folders.sort()
        for name in sorted(files):
            size = os.path.getsize(os.path.join(folder, name))
            result.update(f"{os.path.relpath(folder, path)}/{name}:{size}".encode())
    return result.hexdigest()[:12]


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers; those not installed are left out."""
    versions = {}
    for name in PACKAGES:
        with suppress(ImportError):
            versions[name] = version(name)
    return versions


def git_state() -> str:
    """Commit of the source tree, with `+changes` if files differ from it; "" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty=+changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def hardware() -> str:
    """The device in words, e.g. "4 x NVIDIA A100-SXM4-80GB" or "2 CPU cores"."""
    import torch  # not at the top: a finished run answers without it

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{len(os.sched_getaffinity(0))} CPU cores ({platform.machine()})"
