"""Find the faults of conversations, or describe what a model would learn from them.

`check` takes image-text pairs, too: see `diffclip check --pairs --help`.

diffclip check rows.json --image_root images     # every fault, by row; --json for machines
diffclip stats rows.json --image_root images --model runs/align   # answers, lengths, what is supervised
"""

import sys

from diffclip.base.commands import Parser, number
from diffclip.base.errors import exit_on_input_error
from diffclip.base.paths import folder_of, matching

CHOICES = ("plain", "vicuna", "chatml", "auto")


def main(argv: list[str] | None = None) -> int:
    """`check` lists every fault, and returns 2 if there is one; `stats` says what a model would learn."""
    parser = Parser("diffclip", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="COMMAND")
    for name, what in (("check", "find the faults of the rows"), ("stats", "describe the rows")):
        action = actions.add_parser(name, help=what, description=__doc__)
        action.add_argument(
            "files", nargs="+", help="JSON, JSONL or parquet files, folders of them, globs; hf:owner/name"
        )
        action.add_argument("--image_root", default="", help="folder that image paths start from; that of the files")
        action.add_argument("--image_prefix", default="", help="only rows whose image path starts with this")
        action.add_argument("--split", default="", help="where a folder or the rows name several (train)")
        action.add_argument(
            "--template", default="vicuna", choices=CHOICES, help="prompt format; auto: the model's own"
        )
        action.add_argument("--model", default="", help="a run of align or instruct, to count tokens")
        action.add_argument("--max_length", type=number(int, 1), default=2048, help="longer rows are reported")
        action.add_argument("--output_dir", default="", help="stats: folder for lengths.png and stats.json")
        action.also("--output_dir", "--out")
        action.add_argument("--json", action="store_true", help="print one JSON object instead")
        action.add_argument(
            "--conversations",
            action="store_true",
            help="they are no pairs, where a name such as hf:owner/name could be",
        )
    options = parser.parse_args(argv)
    options.image_root = options.image_root or folder_of(matching(options.files))
    from mllm.data import report

    return report.check(options) if options.action == "check" else report.stats(options)


if __name__ == "__main__":
    with exit_on_input_error():
        sys.exit(main())
