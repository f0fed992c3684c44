"""Do the patches that speak for a text lie on the object? Pointing, energy and average precision against masks.

diffclip localise --instances data/segmentation/instances.json --images data/segmentation/images \
    --models runs/clip/pretrain runs/diffclip/pretrain --out localisation.json
"""

from diffclip.base.commands import Parser
from diffclip.base.errors import exit_on_input_error


def main(argv: list[str] | None = None) -> None:
    parser = Parser("diffclip localise", description=__doc__)
    parser.add_argument("--instances", required=True, help="COCO-format annotations with masks")
    parser.add_argument("--images", required=True, help="folder of the images")
    parser.add_argument("--models", nargs="+", required=True, help="run directories, checkpoints or Hub ids")
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args(argv)
    from diffclip.benchmarks.mask_scores import compare

    compare(options.instances, options.images, options.models, options.out, options.device)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
