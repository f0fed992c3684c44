"""Fetch a data set, or with img2dataset the images of a list of addresses; count what arrived, write the manifest."""

import shutil
import subprocess
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import huggingface_hub
import pyarrow
import pyarrow.compute
import pyarrow.csv
from filelock import FileLock
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from tqdm import tqdm

from diffclip.base import archives, parquet
from diffclip.base.download import download
from diffclip.base.errors import InputError, first_line
from diffclip.base.files import read_json, read_jsonl, write_json
from diffclip.base.lines import print_line
from diffclip.base.paths import inside
from diffclip.data import shard_sizes
from diffclip.data.shards import IMAGE_SUFFIXES, index_shards
from stages.data_sets import SETS, Hub, Images, Web

LARGEST_IMAGE = 1 << 26  # bytes


def fetch_set(name: str, folder: Path, workers: int) -> None:
    """Fetch one set into `folder`, count what is there, write the manifest.

    Raises:
        InputError: a source refuses or fails; what has arrived stays.
    """
    data = SETS[name]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror}); choose another --output_dir") from None
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
        write_manifest(folder, name, data.sources, unit, count(folder, unit, pattern), data.expected)


def fetch_hub(source: Hub, folder: Path) -> None:
    """Fetch files of a Hub dataset with `huggingface_hub`, which resumes and checks them.

    Raises:
        InputError: the Hub refuses or fails, or nothing is there afterwards.
    """
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
    arrived = [path for pattern in missing for path in sorted(folder.glob(pattern))]
    if not arrived:  # without a network it only warns, once the folder is there
        raise InputError(f"{source.repo}: nothing of it arrived; start again where the Hub can be reached")
    for archive in arrived:
        if archive.suffix == ".zip":
            archives.unpack(archive, folder)


def fetch_web(source: Web, folder: Path) -> None:
    """Fetch one file; an archive is unpacked and then deleted."""
    into = folder / source.folder
    path = into / source.url.rsplit("/", 1)[1]
    if archives.unpacked_mark(path).exists():
        return
    if not path.exists():  # else it is done, or an archive whose unpacking was interrupted
        download(source.url, path, digest=source.digest)
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
            download(source.url + urllib.parse.quote(name), paths[name], most=LARGEST_IMAGE, quiet=True)
            return ""
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(workers) as pool:
        problems = [p for p in tqdm(pool.map(problem_of, missing), "images", len(missing), unit="file") if p]
    if problems:
        print_line(f"{len(problems)} of {len(paths)} images did not arrive, e.g. {problems[0]}", error=True)


def fetch_pairs(urls: Path, out: Path, command: list[str]) -> None:
    """Fetch a list of (url, caption) into shards that `stages.pretrain` reads, by a `command` of img2dataset.

    Addresses die: what share arrived, and why the rest did not, is printed and kept.

    Raises:
        InputError: img2dataset is missing or fails, or the list is refused by `check_addresses`.
    """
    if shutil.which(command[0]) is None:
        raise InputError(
            "img2dataset is not on the path; its packages clash with ours, so give it an environment of its own "
            "(./scripts/0_data.sh pairs … does)"
        )
    check_addresses(urls)
    ended = subprocess.run(command, check=False)
    if ended.returncode:
        raise InputError(f"img2dataset ended with code {ended.returncode}: see the lines above, then start again")
    stats = [read_json(path) for path in sorted(out.glob("*_stats.json"))]
    tried, arrived = sum(s["count"] for s in stats), sum(s["successes"] for s in stats)
    reasons: Counter[str] = Counter()
    for shard in stats:
        reasons.update(shard["status_dict"])
    del reasons["success"]
    for reason, times in reasons.most_common(5):
        print_line(f"  {times:,} times: {reason}")
    write_manifest(out, urls.stem, [urls], "pairs", arrived, tried)


def write_sizes(pattern: str, output: str) -> None:
    """Count the samples of a source's shards, write down how many each has, and say where."""
    print_line(f"wrote {shard_sizes.write_manifest(pattern, output)}")


def check_addresses(urls: Path) -> None:
    """InputError if the list lacks its columns, or holds an address that is not on the web.

    img2dataset would fetch it all the same: `file:///home/me/private.jpg` becomes an image of the shards.
    """
    with parquet.readable(urls, "a list"):
        if urls.suffix == ".parquet":
            names, batches = parquet.schema(urls).names, parquet.batches(urls, ["url"])
        else:
            options = pyarrow.csv.ParseOptions(delimiter="\t" if urls.suffix == ".tsv" else ",")
            batches = pyarrow.csv.open_csv(urls, parse_options=options)
            names = batches.schema.names
        missing = [name for name in ("url", "caption") if name not in names]
        if missing:
            raise InputError(f"{urls}: has no column {', '.join(missing)}, but {', '.join(names)}; rename them")
        for batch in batches:
            column = batch.column("url").cast(pyarrow.string())
            web = pyarrow.compute.match_substring_regex(column, "^$|^(?i:https?)://").fill_null(True)
            if not pyarrow.compute.all(web, min_count=0).as_py():
                first = column.filter(pyarrow.compute.invert(web))[0].as_py()
                raise InputError(f"{urls}: the address {first[:200]!r} is not http or https; take such rows out")


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


def write_manifest(folder: Path, name: str, sources: Iterable[object], unit: str, arrived: int, expected: int) -> None:
    """Print how much arrived and write manifest.json, whole or not at all."""
    paths = (path for path in sorted(folder.rglob("*")) if not path.name.startswith((".", "manifest")))
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in paths if path.is_file()}
    share = arrived / expected if expected else 0.0
    manifest = {
        "name": name,
        "sources": list(map(str, sources)),
        "date": time.strftime("%Y-%m-%d"),
        "unit": unit,
        "arrived": arrived,
        "expected": expected,
        "share": round(share, 4),
        "bytes": sum(sizes.values()),
        "files": dict(islice(sizes.items(), 5000)),
    }
    write_json(folder / "manifest.json", manifest)
    print_line(f"{name}: {arrived:,} of {expected:,} {unit} ({share:.1%}) in {folder}")
