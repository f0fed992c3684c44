"""Fetch the images of a list of addresses and captions with img2dataset, which keeps its own environment."""

import shutil
import subprocess
from pathlib import Path

import pyarrow
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet

from diffclip.base.errors import InputError
from diffclip.base.files import read_json
from stages.download_sets import write_manifest


def fetch(urls: Path, out: Path, command: list[str]) -> None:
    """Fetch a list of (url, caption) into shards that `stages.pretrain` reads.

    Addresses die: what share arrived, and why the rest did not, is printed and kept.

    Args:
        command: of img2dataset.

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
