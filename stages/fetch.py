"""Stage 0: get the data. What has arrived stays; the same command goes on with what is missing.

    ./scripts/0_data.sh cc3m --out data            # webdataset shards from the Hub
    ./scripts/0_data.sh pope --out data --dry-run   # what would be fetched, and from where
    ./scripts/0_data.sh pairs URLS.tsv --out data/mine   # a list of addresses and captions, by img2dataset

Each set gets a folder and in it manifest.json: sources, sizes, how much of it arrived.
"""

import argparse
import lzma
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from diffclip.base.errors import InputError, exit_on_input_error
from diffclip.base.files import read_json, read_jsonl, write_json
from diffclip.base.paths import inside

MOST_UNPACKED = 100  # times the archive's size; images are packed once over, text perhaps twenty times


class Hub(NamedTuple):
    """Files of a Hugging Face dataset repository that match one of `files`; archives are unpacked."""

    repo: str
    files: tuple[str, ...]


class Web(NamedTuple):
    """One file; archives are unpacked."""

    url: str
    folder: str = ""  # inside the set's folder


class Pictures(NamedTuple):
    """The images that JSON-lines files already fetched name under "image", one by one."""

    named_in: str
    url: str


class DataSet(NamedTuple):
    """Where a set comes from, and how to count what arrived."""

    sources: tuple[Hub | Web | Pictures, ...]
    count: tuple[str, str]  # (unit, pattern of files): pairs in tars, rows of JSON, or files
    expected: int  # when the set was published
    size: str
    then: str  # what reads it


POPE = "https://raw.githubusercontent.com/AoiDragon/POPE/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco/"
COCO = "http://images.cocodataset.org/"


def _clip_benchmark(name: str, images: int, size: str, train: bool = False) -> DataSet:
    files = ("test/*", "train/*", "*.txt") if train else ("test/*", "*.txt")
    source = Hub(f"clip-benchmark/wds_{name}", files)
    return DataSet(
        (source,), ("pictures", "test/*.tar"), images, size, "diffclip.benchmarks --suite paper --data-root DIR/.."
    )


SETS = {
    "cc3m": DataSet(
        (Hub("pixparse/cc3m-wds", ("cc3m-train-*.tar",)),),
        ("pairs", "cc3m-train-*.tar"),
        3_318_333,
        "280 GB",
        "stages.pretrain --train_data 'DIR/cc3m-train-*.tar'",
    ),
    "cc12m": DataSet(
        (Hub("pixparse/cc12m-wds", ("cc12m-train-*.tar",)),),
        ("pairs", "cc12m-train-*.tar"),
        12_423_374,
        "1 TB",
        "stages.pretrain --train_data 'DIR/cc12m-train-*.tar'",
    ),
    "llava-pretrain": DataSet(
        (
            Hub("liuhaotian/LLaVA-Pretrain", ("blip_laion_cc_sbu_558k.json",)),
            Hub("liuhaotian/LLaVA-Pretrain", ("images.zip",)),
        ),
        ("files", "*/*.jpg"),
        558_128,
        "27 GB",
        "stages.align --data DIR/blip_laion_cc_sbu_558k.json --image_root DIR",
    ),
    "llava-coco": DataSet(
        (
            Hub("liuhaotian/LLaVA-Instruct-150K", ("llava_v1_5_mix665k.json",)),
            Web(f"{COCO}zips/train2017.zip", "coco"),
        ),
        ("files", "coco/train2017/*.jpg"),
        118_287,
        "20 GB",
        "stages.instruct --data DIR/llava_v1_5_mix665k.json --image_prefix coco/ --image_root DIR",
    ),
    "pope": DataSet(
        (
            *(Web(f"{POPE}coco_pope_{split}.json") for split in ("random", "popular", "adversarial")),
            Pictures("coco_pope_*.json", f"{COCO}val2014/"),
        ),
        ("files", "images/*.jpg"),
        500,
        "80 MB",
        "stages.evaluate --pope DIR --image_root DIR/images",
    ),
    "imagenet": _clip_benchmark("imagenet1k", 50_000, "7 GB"),
    "imagenet-v2": _clip_benchmark("imagenetv2", 10_000, "1.2 GB"),
    "imagenet-a": _clip_benchmark("imagenet-a", 7_500, "0.7 GB"),
    "imagenet-r": _clip_benchmark("imagenet-r", 30_000, "2.2 GB"),
    "imagenet-sketch": _clip_benchmark("imagenet_sketch", 50_889, "7.6 GB"),
    "flickr8k": _clip_benchmark("flickr8k", 1_000, "0.2 GB"),
    "flickr30k": _clip_benchmark("flickr30k", 1_000, "0.2 GB"),
    "coco": _clip_benchmark("mscoco_captions", 5_000, "0.9 GB"),
    "food101": _clip_benchmark("food101", 25_250, "5 GB", train=True),
    "cifar10": _clip_benchmark("vtab-cifar10", 10_000, "0.2 GB", train=True),
    "cifar100": _clip_benchmark("vtab-cifar100", 10_000, "0.2 GB", train=True),
    "sun397": _clip_benchmark("sun397", 21_750, "20 GB", train=True),
    "aircraft": _clip_benchmark("fgvc_aircraft", 3_333, "3 GB", train=True),
    "dtd": _clip_benchmark("vtab-dtd", 1_880, "0.6 GB", train=True),
    "pets": _clip_benchmark("vtab-pets", 3_669, "0.8 GB", train=True),
    "caltech101": _clip_benchmark("vtab-caltech101", 6_084, "0.7 GB", train=True),
    "flowers": _clip_benchmark("vtab-flowers", 6_149, "0.4 GB", train=True),
    "mmvp": DataSet(
        (Hub("MMVP/MMVP_VLM", ("*",)),),
        ("files", "MLLM_VLM Images/*/*.jpg"),
        270,
        "50 MB",
        "the mmvp/ folder of benchmarks",
    ),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"{', '.join(SETS)}; or: pairs LIST")
    parser.add_argument("--out", default="data", help="folder that gets a folder for each set")
    parser.add_argument("--dry-run", action="store_true", help="say what would be fetched, fetch nothing")
    parser.add_argument("--workers", type=int, default=16, help="connections for many small files")
    options = parser.parse_args(argv)
    out = Path(options.out)
    if options.names[0] == "pairs":
        if len(options.names) != 2:
            raise InputError("pairs needs one list: pairs URLS.tsv (columns url and caption)")
        return fetch_pairs(Path(options.names[1]), out, options.workers, options.dry_run)
    for name in options.names:
        if name not in SETS:
            raise InputError(f"unknown data set {name!r}: choose from {', '.join(SETS)}, or pairs LIST")
    for name in options.names:
        fetch(name, out / name, options.workers, options.dry_run)


def fetch(name: str, folder: Path, workers: int, dry_run: bool) -> None:
    """Fetch one set into `folder`, count what is there, write the manifest.

    Raises:
        InputError: a source refuses or fails; what has arrived stays.
    """
    data = SETS[name]
    print(f"{name}: about {data.size} into {folder}, then: {data.then.replace('DIR', str(folder))}")
    for source in data.sources:
        print(f"  from {_where(source)}")
    if dry_run:
        return
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # the same command twice: the second waits, and finds what the first fetched
        for source in data.sources:
            match source:
                case Hub():
                    fetch_hub(source, folder)
                case Web():
                    fetch_web(source, folder)
                case Pictures():
                    fetch_pictures(source, folder, workers)
        unit, pattern = data.count
        arrived = count(folder, unit, pattern)
        write_manifest(folder, name, [_where(s) for s in data.sources], unit, arrived, data.expected)


def _where(source: Hub | Web | Pictures) -> str:
    match source:
        case Hub():
            return f"hf.co/datasets/{source.repo}: {', '.join(source.files)}"
        case Web():
            return source.url
        case Pictures():
            return f"{source.url}: those named in {source.named_in}"


def fetch_hub(source: Hub, folder: Path) -> None:
    """Fetch files of a Hub dataset with `huggingface_hub`, which resumes and checks them."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    wanted = [name for name in source.files if not _unpacked(folder / name).exists()]
    if not wanted:  # an archive that was unpacked and deleted
        return
    try:
        huggingface_hub.snapshot_download(source.repo, repo_type="dataset", allow_patterns=wanted, local_dir=folder)
    except GatedRepoError:
        raise InputError(
            f"{source.repo} wants its licence accepted: do so at https://huggingface.co/datasets/{source.repo}, "
            "then `hf auth login`"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise InputError(f"{source.repo}: not fetched ({first}); start again to go on") from None
    for archive in [path for pattern in wanted for path in sorted(folder.glob(pattern))]:
        if archive.suffix == ".zip":
            unpack(archive, folder)


def fetch_web(source: Web, folder: Path) -> None:
    """Fetch one file; an archive is unpacked and then deleted."""
    from diffclip.base.download import download

    into = folder / source.folder
    path = into / source.url.rsplit("/", 1)[1]
    if _unpacked(path).exists():
        return
    if not path.exists():  # else it is done, or an archive whose unpacking was interrupted
        download(source.url, path)
    if path.suffix == ".zip" or ".tar" in path.suffixes:
        unpack(path, into)


def fetch_pictures(source: Pictures, folder: Path, workers: int) -> None:
    """Fetch what is missing of the images that JSON-lines files name."""
    from tqdm import tqdm

    from diffclip.base.download import download

    paths: dict[str, Path] = {}  # by name, all of them below images/
    for file in sorted(folder.glob(source.named_in)):
        for number, row in read_jsonl(file):
            name = row.get("image") if isinstance(row, dict) else None
            paths[str(name)] = inside(folder / "images", name, f"{file}:{number}: image", writing=True)
    missing = [name for name in sorted(paths) if not paths[name].exists()]

    def one(name: str) -> str:
        try:
            download(source.url + urllib.parse.quote(name), paths[name], quiet=True)
            return ""
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(workers) as pool:
        problems = [p for p in tqdm(pool.map(one, missing), "pictures", len(missing), unit="file") if p]
    if problems:
        print(f"{len(problems)} of {len(paths)} images did not arrive, e.g. {problems[0]}", file=sys.stderr)


def unpack(archive: Path, into: Path) -> None:
    """Unpack the files of a zip or tar into a folder beside and move it into `into`; then delete the archive.

    Links and devices are left out.

    Raises:
        InputError: a member would land outside, the archive is broken, or it would unpack to more than
            `MOST_UNPACKED` times its size or than the disk has room for; nothing is in `into` then.
    """
    temporary = archive.with_name(f"{archive.name}.unpacking")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    print(f"  unpacking {archive.name}")
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as packed:
                files = [info for info in packed.infolist() if not info.is_dir()]
                _check_members(archive, temporary, ((info.filename, info.file_size) for info in files))
                packed.extractall(temporary, files)
        else:
            with tarfile.open(archive) as packed:
                _check_members(archive, temporary, ((m.name, m.size) for m in packed if m.isfile()))
                members = [m for m in packed if m.isfile()]
                # the filter came with 3.11.4, Debian 12 has 3.11.2
                safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
                packed.extractall(temporary, members, **safely)
        shutil.copytree(temporary, into, dirs_exist_ok=True, copy_function=shutil.move)
    except BROKEN_ARCHIVE as error:
        full = isinstance(error, OSError) and error.errno is not None
        remedy = "make room or mend the folder, and start again" if full else "delete it and start again"
        raise InputError(f"{archive}: not unpacked ({error or type(error).__name__}); {remedy}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _unpacked(archive).touch()
    archive.unlink()


# RuntimeError: encrypted; NotImplementedError: a compression that Python does not know
BROKEN_ARCHIVE = (
    *(zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, zlib.error),
    *(lzma.LZMAError, RuntimeError, NotImplementedError, ValueError),
)


def _check_members(archive: Path, folder: Path, members: Iterable[tuple[str, int]]) -> None:
    """InputError for (name, size) of a member that leads outside, or at which they all become too much."""
    packed, room, total = archive.stat().st_size, shutil.disk_usage(folder).free, 0
    for name, size in members:
        inside(folder, name, f"{archive}: member", writing=True)
        total += size
        if total > max(MOST_UNPACKED * packed, 1 << 20):
            raise InputError(f"{archive}: unpacks to over {MOST_UNPACKED} times its size: not unpacked; delete it")
        if total > room:
            raise InputError(f"{archive}: unpacks to more than the {room:,} bytes that are free; make room")


def _unpacked(archive: Path) -> Path:
    return archive.with_name(f".{archive.name}.unpacked")


def count(folder: Path, unit: str, pattern: str) -> int:
    """Pairs (from the shards' indices, which pretraining uses too), images in tars, or files."""
    from diffclip.data.shards import IMAGE_SUFFIXES, index_shards

    files = sorted(folder.glob(pattern))
    if unit == "files":
        return len(files)
    if unit == "pairs":
        return sum(len(shard) for shard in index_shards([str(file) for file in files]))
    total = 0
    for file in files:
        try:
            with tarfile.open(file) as tar:
                total += sum(member.name.lower().endswith(IMAGE_SUFFIXES) for member in tar)
        except tarfile.TarError as error:
            raise InputError(f"{file}: not a whole tar ({error}); delete it and start again") from None
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


def fetch_pairs(urls: Path, out: Path, workers: int, dry_run: bool) -> None:
    """Fetch a list of (url, caption) with img2dataset into shards that `stages.pretrain` reads.

    Addresses die: what share arrived, and why the rest did not, is printed and kept.
    """
    if not urls.is_file():
        raise InputError(f"{urls}: no such file; it must hold the columns url and caption")
    kinds = {".tsv": "tsv", ".csv": "csv", ".parquet": "parquet"}
    if urls.suffix not in kinds:
        raise InputError(f"{urls}: unknown kind of list; use .tsv, .csv or .parquet with the columns url and caption")
    command = [
        *("img2dataset" if dry_run else _img2dataset(), f"--url_list={urls}", f"--input_format={kinds[urls.suffix]}"),
        *("--url_col=url", "--caption_col=caption", "--output_format=webdataset", f"--output_folder={out}"),
        *(
            "--image_size=256",
            "--resize_mode=keep_ratio",
            "--resize_only_if_bigger=True",
            "--incremental_mode=incremental",
        ),
        *(f"--thread_count={workers * 4}", "--processes_count=4", "--enable_wandb=False", "--retries=1"),
    ]
    print(" ".join(command))
    if dry_run:  # before anything is installed
        return
    check_addresses(urls)
    ended = subprocess.run(command, check=False)
    if ended.returncode:
        raise InputError(f"img2dataset ended with code {ended.returncode}: see the lines above, then start again")
    stats = [read_json(path) for path in sorted(out.glob("*_stats.json"))]
    tried, arrived = sum(s["count"] for s in stats), sum(s["successes"] for s in stats)
    reasons: dict[str, int] = {}
    for shard in stats:
        for reason, times in shard["status_dict"].items():
            if reason != "success":
                reasons[reason] = reasons.get(reason, 0) + times
    for reason, times in sorted(reasons.items(), key=lambda item: -item[1])[:5]:
        print(f"  {times:,} times: {reason}")
    write_manifest(out, urls.stem, [str(urls)], "pairs", arrived, tried)


def check_addresses(urls: Path) -> None:
    """InputError if the list lacks its columns, or holds an address that is not on the web.

    img2dataset would fetch it all the same: `file:///home/me/private.jpg` becomes an image of the shards.
    """
    import pyarrow
    import pyarrow.compute
    import pyarrow.csv
    import pyarrow.parquet

    try:
        if urls.suffix == ".parquet":
            table = pyarrow.parquet.ParquetFile(urls)
            names, batches = table.schema_arrow.names, table.iter_batches(columns=["url"])
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
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{urls}: cannot be read as a list ({' '.join(str(error).split())[:200]})") from None


def _img2dataset() -> str:
    """The path of the program."""
    found = shutil.which("img2dataset")
    if found is None:
        raise InputError(
            "img2dataset is not on the path; its packages clash with ours, so give it an environment of its own "
            "(./scripts/0_data.sh pairs … does)"
        )
    return found


if __name__ == "__main__":
    with exit_on_input_error():
        main()
