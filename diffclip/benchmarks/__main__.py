"""Score models on every CLIP benchmark found under a folder and print one table.

diffclip benchmark --model runs/clip runs/diffclip --data_root data/scenes --output_dir results

With more devices, the same numbers: torchrun --nproc-per-node 8 -m diffclip benchmark ...
`diffclip benchmark data check` lists the paper's sets and how to get them, `data download SET...` fetches some.
"""

import sys
from pathlib import Path

from diffclip.base.commands import Parser, near, number
from diffclip.base.errors import InputError, exit_on_input_error
from diffclip.base.imports import importing
from diffclip.benchmarks import PROTOCOLS, TORCHVISION


def parser() -> Parser:
    """The command line of `run`, the verb that may be left out."""
    p = Parser("diffclip benchmark", description=__doc__)
    models = p.add_argument_group("models")
    models.add_argument(
        "--model",
        nargs="+",
        required=True,
        metavar="PATH | NAME=PATH,...",
        help="run directories or checkpoints, several paths for the seeds of one model; the first is the reference",
    )
    models.add_argument("--device", help="cuda, cpu, ... (cuda where there is one)")
    models.add_argument("--precision", choices=("float32", "tf32", "bfloat16", "float16"), default="float32")
    models.add_argument("--batch_size", type=number(int, 1), default=128, help="images, or texts, at a time (128)")
    models.add_argument("--workers", type=number(int, 0), help="loader processes (up to 8 with a GPU, else none)")
    data = p.add_argument_group("data and results")
    data.add_argument(
        "--data_root", type=Path, required=True, help="folder with classification/, shifts/, retrieval/, mmvp/"
    )
    data.add_argument("--suite", help="`paper`, or a YAML file that names the folders; else they are found by layout")
    data.add_argument("--output_dir", type=Path, required=True, help="where scores, outcomes, features go")
    p.also("--output_dir", "--out")
    protocols = p.add_argument_group("protocols")
    protocols.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=[*PROTOCOLS], help="which to run (all)")
    protocols.add_argument("--templates", help="imagenet7, imagenet80 or a JSON file, instead of each set's own")
    protocols.add_argument("--probe", choices=("exact", "fast"), default="exact", help="linear-probe solver (exact)")
    protocols.add_argument(
        "--probe_features",
        choices=("before", "after"),
        default="before",
        help="probe and few-shot before the projection, as the protocol has it, or after (before)",
    )
    protocols.add_argument("--episodes", type=number(int, 1), default=5000, help="few-shot episodes (5000)")
    protocols.add_argument("--way", type=number(int, 1), default=5, help="classes of a few-shot episode (5)")
    protocols.add_argument("--shot", type=number(int, 1), default=5, help="images of each class to learn from (5)")
    protocols.add_argument("--seed", type=number(int, 0), default=0, help="draws the few-shot episodes (0)")
    return p


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["data"]:
        return data(arguments[1:])
    options = parser().parse_args(arguments[1:] if arguments[:1] == ["run"] else arguments)
    name_or_file("--suite", options.suite, ["paper"])
    name_or_file("--templates", options.templates, ["imagenet7", "imagenet80"])
    with importing():
        from diffclip.benchmarks.evaluate import run

    run(options)


def data(arguments: list[str]) -> None:
    """`data check` and `data download`."""
    p = Parser("diffclip benchmark data", description="The paper's sets.")
    p.add_argument("action", choices=("check", "download"), help="list all sets, or fetch some with torchvision")
    p.add_argument("sets", nargs="*", metavar="SET", help=f"what to fetch: {', '.join(TORCHVISION)}")
    p.add_argument("--data_root", type=Path, required=True, help="folder with a folder for each set")
    options = p.parse_args(arguments)
    for name in options.sets:
        if name not in TORCHVISION:
            raise InputError(f"data download: {name}{near(name, TORCHVISION)}; 0_data.sh fetches the others")
    if options.action == "download" and not options.sets:
        raise InputError(f"data download: name sets among {', '.join(TORCHVISION)}; 0_data.sh fetches the others")
    from diffclip.benchmarks import paper

    if options.action == "download":
        paper.download(options.sets, options.data_root)
    else:
        paper.print_check(options.data_root)


def name_or_file(flag: str, value: str | None, known: list[str]) -> None:
    """Refuse what is neither one of the known names nor a file."""
    if value and value not in known and not Path(value).is_file():
        raise InputError(f"{flag} {value}: no such file{near(value, known)}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
