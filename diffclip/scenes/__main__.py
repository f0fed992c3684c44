"""The built-in world of coloured shapes, as files of every format that the stages read.

diffclip scenes show --seed 0 sheet.png
diffclip scenes export DIR --seed 0 --pairs 20000 --conversations 6000 --size 64
"""

from argparse import ArgumentDefaultsHelpFormatter as Defaults
from dataclasses import fields
from pathlib import Path

from diffclip.base.commands import Parser, near, number
from diffclip.base.errors import InputError, exit_on_input_error
from diffclip.scenes.options import PARTS, Options


def main(argv: list[str] | None = None) -> None:
    """`export` writes training and test sets, `show` draws a contact sheet."""
    parser = Parser("diffclip scenes", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    to_files = commands.add_parser("export", help="write training and test sets to a folder", formatter_class=Defaults)
    to_files.add_argument("directory", type=Path)
    for option in fields(Options):
        kind = number(int, option.metadata["range"].least, option.metadata["range"].most)
        to_files.add_argument(f"--{option.name}", type=kind, default=option.default, help=option.metadata["help"])
    to_files.add_argument("--only", help="comma-separated parts to write: " + ", ".join(PARTS))
    to_image = commands.add_parser("show", help="draw a contact sheet to look at", formatter_class=Defaults)
    to_image.add_argument("path", type=Path)
    to_image.add_argument("--seed", type=number(int, 0), default=0, help="seed of the world")
    arguments = parser.parse_args(argv)
    from diffclip.scenes import export

    if arguments.command == "show":
        return export.show(arguments.path, arguments.seed)
    parts = arguments.only.split(",") if arguments.only else list(PARTS)
    for part in parts:
        if part not in PARTS:
            raise InputError(f"--only {part} is not a part of the export{near(part, PARTS)}")
    options = Options(**{option.name: getattr(arguments, option.name) for option in fields(Options)})
    export.export(arguments.directory, options, parts)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
