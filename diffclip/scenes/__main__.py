"""The built-in world of coloured shapes, as files of every format that the stages read.

diffclip scenes show --seed 0 sheet.png
diffclip scenes export DIR --seed 0 --pairs 20000 --conversations 6000 --size 64
"""

from argparse import ArgumentDefaultsHelpFormatter
from pathlib import Path

from diffclip.base.commands import Parser, number
from diffclip.base.errors import exit_on_input_error
from diffclip.scenes.export import COUNTS, PARTS, export
from diffclip.scenes.sheet import show


def main(argv: list[str] | None = None) -> None:
    parser = Parser("diffclip scenes", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    how = {"formatter_class": ArgumentDefaultsHelpFormatter}
    to_files = commands.add_parser("export", help="write training and test sets to a folder", **how)
    to_files.add_argument("directory", type=Path)
    to_files.add_argument("--seed", type=int, default=0, help="seed of the world")
    to_files.add_argument("--size", type=number(int, 32), default=64, help="side of the images in pixels")
    for name, (default, text) in COUNTS.items():
        to_files.add_argument(f"--{name}", type=number(int, 1), default=default, help=text)
    to_files.add_argument("--only", help="comma-separated parts to write: " + ", ".join(PARTS))
    sheet = commands.add_parser("show", help="draw a contact sheet to look at", **how)
    sheet.add_argument("path", type=Path)
    sheet.add_argument("--seed", type=int, default=0, help="seed of the world")
    options = parser.parse_args(argv)
    if options.command == "show":
        show(options.path, options.seed)
    else:
        export(options.directory, options)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
