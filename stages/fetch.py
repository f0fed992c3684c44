"""Stage 0: get the data. What has arrived stays; the same command goes on with what is missing.

    diffclip data cc3m --output_dir data                 # webdataset shards from the Hub
    diffclip data pope --output_dir data --dry_run       # what would be fetched, and from where
    diffclip data pairs URLS.tsv --output_dir data/mine  # a list of addresses and captions, by img2dataset
    diffclip data index 's3://bucket/cc12m/*.tar'        # how many samples each shard holds, for `order: stream`

`scripts/0_data.sh` is the same, and brings img2dataset in an environment of its own.

Each set gets a folder and in it manifest.json: sources, sizes, how much of it arrived.
"""

from pathlib import Path

from diffclip.base.commands import Parser, near, number
from diffclip.base.errors import InputError, exit_on_input_error
from diffclip.base.lines import print_line
from stages.data_sets import SETS

KINDS = {".tsv": "tsv", ".csv": "csv", ".parquet": "parquet"}  # of lists of addresses


def main(argv: list[str] | None = None) -> None:
    """Fetch sets, or the images of a list; a dry run needs the standard library alone."""
    parser = Parser("diffclip data", description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"{', '.join(SETS)}; or: pairs LIST; or: index SHARDS")
    parser.add_argument("--output_dir", default="data", help="folder that gets a folder for each set")
    parser.also("--output_dir", "--out")
    parser.add_argument("--dry_run", action="store_true", help="print what would be fetched, fetch nothing")
    parser.add_argument("--workers", type=number(int, 1), default=16, help="connections for many small files")
    parser.add_argument("--output", default="", help="of index: where its file goes, if not beside the shards")
    options = parser.parse_args(argv)
    out = Path(options.output_dir)
    pairs, index = options.names[0] == "pairs", options.names[0] == "index"
    if index:
        if len(options.names) != 2:
            raise InputError("index needs one pattern of shards, in quotes: index 's3://bucket/cc12m/*.tar'")
    elif pairs:
        if len(options.names) != 2:
            raise InputError("pairs needs one list: pairs URLS.tsv (columns url and caption)")
        urls = Path(options.names[1])
        command = img2dataset(urls, out, options.workers)
        print_line(" ".join(command))
    else:
        for name in options.names:
            if name not in SETS:
                raise InputError(f"unknown data set {name!r}{near(name, [*SETS, 'pairs'])}")
        for name in options.names:
            data, folder = SETS[name], out / name
            then = data.then.replace("DIR", str(folder)).replace("OUT", str(out))
            print_line(f"{name}: about {data.size} into {folder}, then: {then}")
            for source in data.sources:
                print_line(f"  from {source}")
    if options.dry_run:
        return
    from stages import download

    if index:
        return download.write_sizes(options.names[1], options.output)
    if pairs:
        return download.fetch_pairs(urls, out, command)
    for name in options.names:
        download.fetch_set(name, out / name, options.workers)


def img2dataset(urls: Path, out: Path, workers: int) -> list[str]:
    """The command that fetches a list of (url, caption) into shards which `stages.pretrain` reads.

    Raises:
        InputError: there is no such list, or it is of another kind.
    """
    if not urls.is_file():
        raise InputError(f"{urls}: no such file; it must hold the columns url and caption")
    if urls.suffix not in KINDS:
        raise InputError(f"{urls}: unknown kind of list; use .tsv, .csv or .parquet with the columns url and caption")
    return [
        *("img2dataset", f"--url_list={urls}", f"--input_format={KINDS[urls.suffix]}", "--url_col=url"),
        *("--caption_col=caption", "--output_format=webdataset", f"--output_folder={out}", "--image_size=256"),
        *("--resize_mode=keep_ratio", "--resize_only_if_bigger=True", "--incremental_mode=incremental"),
        *(f"--thread_count={workers * 4}", "--processes_count=4", "--enable_wandb=False", "--retries=1"),
    ]


if __name__ == "__main__":
    with exit_on_input_error():
        main()
