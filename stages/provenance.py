"""Where a run's numbers come from: digests of its inputs, versions of packages, state of the source, hardware; and
`diffclip env`, which prints what can be said without a run.
"""

import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from diffclip.base.cache import cache_dir, keep, kept
from diffclip.base.commands import Parser
from diffclip.base.files import file_sha256
from diffclip.base.lines import print_line
from diffclip.base.schema import RECORD
from diffclip.base.threads import cores
from stages.ledger import read_record
from stages.manifest import sampled_content

PACKAGES = "diffclip-stack torch transformers accelerate deepspeed open_clip_torch timm datasets peft lmms-eval numpy"
REPORTED = (  # with a bug
    "diffclip-stack torch torchvision numpy transformers accelerate deepspeed peft open_clip_torch timm datasets "
    "webdataset lmms-eval clip-benchmark bitsandbytes gradio"
)
VARIABLES = re.compile(r"(DIFFCLIP|OMP|GOMP|MKL|NCCL|CUDA|HF_HUB_OFFLINE|TOKENIZERS|MALLOC)\w*|WORLD_SIZE")
LONG_FILE = 1 << 28  # bytes
SHORT_FILE = 1 << 24  # bytes, below which reading a file is as fast as remembering it


def upstream_model(path: str | Path) -> str:
    """The model name that the run in `path` was made with, e.g. "DiffCLIP-tiny"; the folder's name elsewhere."""
    record = read_record(Path(path)) if (Path(path) / RECORD).is_file() else {}
    return (record or {}).get("model", Path(path).name)


def digest(path: str | Path) -> str:
    """12 hex digits that change when the input changes.

    A file counts with its content, a long one with its size and three of its megabytes, a tar of images with its size
    and 16 blocks of it, so that nobody reads all shards to start; a model directory with
    its weights; any other directory with the names and sizes of its files, so that large data folders take
    milliseconds.
    """
    path = Path(path)
    result = hashlib.sha256()
    if path.is_file() and (size := os.path.getsize(path)) > SHORT_FILE and path.suffix == ".tar":
        result.update(sampled_content(path, size).encode())
    elif path.is_file() and size > LONG_FILE:
        result.update(str(size).encode())
        with open(path, "rb") as f:
            for start in (0, size // 2, size - (1 << 20)):
                f.seek(start)
                result.update(f.read(1 << 20))
    elif path.is_file():
        result.update(bytes.fromhex(_remembered_sha256(path) if size > SHORT_FILE else file_sha256(path)))
    elif weights := sorted(path.glob("*.safetensors")):  # logs and metrics beside them may change
        for file in weights:
            result.update(f"{file.name}{digest(file)}".encode())
    else:
        for folder, folders, files in os.walk(path):
            folders.sort()
            inside = os.path.relpath(folder, path)
            for name in sorted(files):
                size = os.path.getsize(os.path.join(folder, name))
                result.update(f"{inside}/{name}:{size}".encode())
    return result.hexdigest()[:12]


def _remembered_sha256(path: Path) -> str:
    """`file_sha256`, kept in the cache by path, size and times: a thousand shards are read once on a machine."""
    stat = path.stat()
    what = f"{path.absolute()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_ino}"
    file = cache_dir() / "sha256" / hashlib.sha256(os.fsencode(what)).hexdigest()[:32]
    if (known := kept(file)) is not None:
        return known.decode()
    found = file_sha256(path)
    keep(file, found.encode())
    return found


def installed_versions(packages: str = PACKAGES) -> dict[str, str]:
    """Versions of those packages that are installed; by default of those that decide the numbers."""
    versions = {}
    for name in packages.split():
        with suppress(PackageNotFoundError):
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
    return f"{cores()} CPU cores ({platform.machine()})"


def environment() -> Iterator[tuple[str, str]]:
    """(name, value) of everything that is reported; the user's folder is written `~`."""
    yield "python", platform.python_version()
    yield "system", f"{platform.platform()}, {cores()} cores"
    yield from (dict.fromkeys(REPORTED.split(), "not installed") | installed_versions(REPORTED)).items()
    yield "commit", git_state() or "not a checkout"
    import torch  # not at the top: most of what imports this module needs none

    yield "CUDA", f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}" if torch.version.cuda else "none"
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        yield f"GPU {i}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
    yield "OpenMP threads", str(torch.get_num_threads())
    home = str(Path.home())
    for name in sorted(filter(VARIABLES.fullmatch, os.environ)):
        yield name, os.environ[name].replace(home, "~")


def main(argv: list[str] | None = None) -> None:
    """What a bug report needs: versions, devices, the environment variables that decide something, and the commit.

    diffclip env
    """
    Parser("diffclip env", description=main.__doc__).parse_args(argv)
    for name, value in environment():
        print_line(f"{name:<20} {value}")
