"""Read a model in any format and write a directory that loads everywhere, or what runs without this package.

diffclip convert checkpoint_best.pt runs/official --lambda_init 0.8
diffclip convert runs/official official.pt
diffclip convert runs/official --to onnx exported
"""

from diffclip.base.commands import Parser, number
from diffclip.base.errors import InputError, exit_on_input_error
from diffclip.base.lines import print_line
from diffclip.variants import lambda_init_of

FORMS = ("open_clip", "onnx", "pt2", "official")


def lambda_init(text: str) -> float | str:
    """The value of --lambda_init: "schedule", or a finite number."""
    value = lambda_init_of(text)
    if value is None:
        raise InputError(f"--lambda_init must be a number or 'schedule': got {text!r}")
    return value


def main(argv: list[str] | None = None) -> None:
    parser = Parser("diffclip convert", description=__doc__)
    parser.add_argument("source", help="directory, checkpoint file, or Hub id")
    parser.add_argument("target", help="directory, or NAME.pt for the official layout")
    parser.add_argument("--to", choices=FORMS, help="for use without this package, checked against SOURCE")
    parser.add_argument("--lambda_init", type=lambda_init, help="a number, or 'schedule' for DiffCLIP*")
    parser.add_argument("--schedule_base", type=int, default=0, choices=(0, 1), help="what layer 1 counts as")
    parser.add_argument("--heads", type=number(int, 1), nargs=2, metavar=("VISION", "TEXT"), help="of ordinary towers")
    args = parser.parse_args(argv)
    imported = {"lambda_init": args.lambda_init, "schedule_base": args.schedule_base, "heads": args.heads}
    if not args.to:
        from diffclip.checkpoints import convert  # after --help

        convert(args.source, args.target, **imported)
        print_line(f"wrote {args.target}")
        return
    from diffclip.export import export

    difference = export(args.source, args.to, args.target, **imported)
    said = ", ".join(f"{tower}s {value:.1e}" for tower, value in difference.items())
    print_line(f"wrote {args.target}; unit-length features differ from those of {args.source} by at most: {said}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
