"""Draw which patches speak for a text, for models side by side (figure 2 of the paper).

    diffclip maps mug.jpg street.jpg --query "a mug" "a bicycle" \\
        --models runs/clip/pretrain runs/diffclip/pretrain --out fig.png
"""

from diffclip.base.commands import Parser
from diffclip.base.errors import exit_on_input_error
from diffclip.base.imports import importing
from diffclip.base.lines import print_line


def main(argv: list[str] | None = None) -> None:
    parser = Parser("diffclip maps", description=__doc__)
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument(
        "--query", nargs="+", required=True, help="one text for all images, one for each, or several for one image"
    )
    parser.add_argument("--models", nargs="+", required=True, help="run directories, checkpoints or Hub ids")
    parser.add_argument("--out", required=True, help="PNG, PDF or SVG file to write")
    args = parser.parse_args(argv)
    with importing():  # after --help
        from diffclip.figure import figure

    figure(args.images, args.query, args.models, args.out)
    print_line(f"wrote {args.out}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
