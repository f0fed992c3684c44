"""The configurations that come with the package, found by name from any folder, also from an installed wheel.

diffclip config list
diffclip config show paper/align
diffclip config copy quickstart/pretrain mine.yaml
"""

from itertools import takewhile
from pathlib import Path

from diffclip.base.commands import Parser, closest
from diffclip.base.errors import InputError, exit_on_input_error
from diffclip.base.files import read_text, write_whole
from diffclip.base.lines import print_line

CONFIGS = Path(__file__).parent / "configs"


def shipped() -> dict[str, Path]:
    """Every shipped file by its name: `paper/align` for a YAML file, `deepspeed/zero2.json` for a DeepSpeed one."""
    files = sorted(file for file in CONFIGS.rglob("*") if file.suffix in (".yaml", ".json"))
    return {str(file.relative_to(CONFIGS)).removesuffix(".yaml"): file for file in files}


def find(name: str | Path) -> Path:
    """The file of that path or, if there is none, the shipped one of that name.

    Args:
        name: `mine.yaml`, `paper/align`, `paper/align.yaml` or `stages/configs/paper/align.yaml`.

    Raises:
        InputError: neither; the message suggests the nearest shipped name.
    """
    if Path(name).is_file():
        return Path(name)
    known = shipped()
    inner = str(name).removeprefix("stages/configs/").removesuffix(".yaml")
    if inner not in known:
        close = closest(inner, known)
        hint = f"did you mean {close}?" if close else "`diffclip config list` names the shipped ones"
        raise InputError(f"{name}: no such configuration file; {hint}")
    return known[inner]


def summary(file: Path) -> str:
    """What the head of a YAML file says it is for: the first sentence of its comment."""
    comment = takewhile(lambda line: line.startswith("# "), read_text(file).splitlines())
    return " ".join(line.removeprefix("# ") for line in comment).split(". ")[0].rstrip(".")


def main(argv: list[str] | None = None) -> None:
    parser = Parser("diffclip config", description=__doc__)
    commands = parser.add_subparsers(dest="action", required=True, metavar="COMMAND")
    commands.add_parser("list", help="name every shipped configuration and what it is for")
    show = commands.add_parser("show", help="print one")
    copy = commands.add_parser("copy", help="write one to a file of your own, to change it there")
    for command in (show, copy):
        command.add_argument("name", metavar="NAME", help="as `list` has it, e.g. quickstart/align")
    copy.add_argument("to", nargs="?", type=Path, metavar="FILE", help="where to (its last name, in this folder)")
    options = parser.parse_args(argv)
    if options.action == "list":
        for name, file in shipped().items():
            print_line(f"{name:<36} {summary(file)}".rstrip())
        return
    file = find(options.name)
    if options.action == "show":
        print_line(read_text(file), keep="\n", end="")
        return
    to = options.to or Path(file.name)
    if to.exists():
        raise InputError(f"{to}: is there already; name another file")
    write_whole(to, read_text(file))
    print_line(f"wrote {to}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
