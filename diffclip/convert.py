"""Read a model in any format and write a directory that loads everywhere, or the official code's layout.

diffclip convert checkpoint_best.pt runs/official --lambda_init 0.8
diffclip convert runs/official official.pt
"""

import math

from diffclip.base.commands import Parser, number
from diffclip.base.errors import InputError, exit_on_input_error


def lambda_init(text: str) -> float | str:
    """The value of --lambda_init: "schedule", or a finite number."""
    if text == "schedule":
        return text
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"--lambda_init must be a number or 'schedule': got {text!r}")
    return value


def main(argv: list[str] | None = None) -> None:
    parser = Parser("diffclip convert", description=__doc__)
    parser.add_argument("source", help="directory, checkpoint file, or Hub id")
    parser.add_argument("target", help="directory, or NAME.pt for the official layout")
    parser.add_argument("--lambda_init", type=lambda_init, help="a number, or 'schedule' for DiffCLIP*")
    parser.add_argument("--schedule_base", type=int, default=0, choices=(0, 1), help="what layer 1 counts as")
    parser.add_argument("--heads", type=number(int, 1), nargs=2, metavar=("VISION", "TEXT"), help="of ordinary towers")
    args = parser.parse_args(argv)
    from diffclip.checkpoints import convert  # after --help

    convert(args.source, args.target, lambda_init=args.lambda_init, schedule_base=args.schedule_base, heads=args.heads)
    print(f"wrote {args.target}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
