"""Fetch a data set into its folder, count what arrived, write the manifest."""

import sys
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
from filelock import FileLock
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from tqdm import tqdm

from diffclip.base import archives
from diffclip.base.download import download
from diffclip.base.errors import InputError, first_line
from diffclip.base.files import read_jsonl, write_json
from diffclip.base.paths import inside
from diffclip.data.shards import IMAGE_SUFFIXES, index_shards
from stages.data_sets import SETS, Hub, Images, Web


def fetch(name: str, folder: Path, workers: int) -> None:
    """Fetch one set into `folder`, count what is there, write the manifest.

    Raises:
        InputError: a source refuses or fails; what has arrived stays.
    """
    data = SETS[name]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # the same command twice: the second waits, and finds what the first fetched
        for source in data.sources:
            match source:
                case Hub():
                    fetch_hub(source, folder)
                case Web():
                    fetch_web(source, folder)
                case Images():
                    fetch_images(source, folder, workers)
        unit, pattern = data.counted
        arrived = count(folder, unit, pattern)
        write_manifest(folder, name, [str(source) for source in data.sources], unit, arrived, data.expected)


def fetch_hub(source: Hub, folder: Path) -> None:
    """Fetch files of a Hub dataset with `huggingface_hub`, which resumes and checks them."""
    missing = [name for name in source.files if not archives.unpacked_mark(folder / name).exists()]
    if not missing:  # an archive that was unpacked and deleted
        return
    try:
        huggingface_hub.snapshot_download(source.repo, repo_type="dataset", allow_patterns=missing, local_dir=folder)
    except GatedRepoError:
        raise InputError(
            f"{source.repo} wants its licence accepted: do so at https://huggingface.co/datasets/{source.repo}, "
            "then `hf auth login`"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise InputError(f"{source.repo}: not fetched ({first_line(error)}); start again to go on") from None
    for archive in [path for pattern in missing for path in sorted(folder.glob(pattern))]:
        if archive.suffix == ".zip":
            archives.unpack(archive, folder)


def fetch_web(source: Web, folder: Path) -> None:
    """Fetch one file; an archive is unpacked and then deleted."""
    into = folder / source.folder
    path = into / source.url.rsplit("/", 1)[1]
    if archives.unpacked_mark(path).exists():
        return
    if not path.exists():  # else it is done, or an archive whose unpacking was interrupted
        download(source.url, path)
    if path.suffix == ".zip" or ".tar" in path.suffixes:
        archives.unpack(path, into)


def fetch_images(source: Images, folder: Path, workers: int) -> None:
    """Fetch what is missing of the images that JSON-lines files name."""
    paths: dict[str, Path] = {}  # by name, all of them below images/
    for file in sorted(folder.glob(source.named_in)):
        for number, row in read_jsonl(file):
            name = row.get("image") if isinstance(row, dict) else None
            paths[str(name)] = inside(folder / "images", name, f"{file}:{number}: image", writing=True)
    missing = [name for name in sorted(paths) if not paths[name].exists()]

    def problem_of(name: str) -> str:
        try:
            download(source.url + urllib.parse.quote(name), paths[name], quiet=True)
            return ""
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(workers) as pool:
        problems = [p for p in tqdm(pool.map(problem_of, missing), "images", len(missing), unit="file") if p]
    if problems:
        print(f"{len(problems)} of {len(paths)} images did not arrive, e.g. {problems[0]}", file=sys.stderr)


def count(folder: Path, unit: str, pattern: str) -> int:
    """Pairs (from the shards' indices, which pretraining uses too), images in tars, or files."""
    files = sorted(folder.glob(pattern))
    if unit == "files":
        return len(files)
    if unit == "pairs":
        return sum(len(shard) for shard in index_shards([str(file) for file in files]))
    total = 0
    for file in files:
        members, ends_early = archives.members(file)
        if ends_early and ends_early != archives.NO_END:
            raise InputError(f"{file}: {ends_early}; delete it and start again")
        total += sum(member.name.lower().endswith(IMAGE_SUFFIXES) for member in members)
    return total


def write_manifest(folder: Path, name: str, sources: list[str], unit: str, arrived: int, expected: int) -> None:
    """Print how much arrived and write manifest.json, whole or not at all."""
    files = [
        path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith((".", "manifest"))
    ]
    share = arrived / expected if expected else 0.0
    manifest = {
        "name": name,
        "sources": sources,
        "date": time.strftime("%Y-%m-%d"),
        "unit": unit,
        "arrived": arrived,
        "expected": expected,
        "share": round(share, 4),
        "bytes": sum(path.stat().st_size for path in files),
        "files": {str(path.relative_to(folder)): path.stat().st_size for path in files[:5000]},
    }
    write_json(folder / "manifest.json", manifest)
    print(f"{name}: {arrived:,} of {expected:,} {unit} ({share:.1%}) in {folder}")
