"""POPE on the command line.

diffclip pope check POPE --image_root IMAGES              # which release, are its images there
diffclip pope score POPE ANSWERS.jsonl                    # answers of any program, matched by question
diffclip pope margins RUN --pope POPE --image_root IMAGES --output_dir DIR   # exact scores, without generating
diffclip pope chair RUN --instances JSON --captions JSON --image_root IMAGES --output_dir DIR   # free captions: CHAIR
diffclip pope compare EVALUATE_A EVALUATE_B               # the paper's table 3 with McNemar's test
diffclip pope diagnose RUN --pope POPE --image_root IMAGES  # why is the score at chance?
diffclip pope audit 50.14 50.07 98.21 --questions 2910 3000   # which counts stand behind published scores
"""

import sys
from importlib import import_module
from pathlib import Path

from diffclip.base.commands import Parser, number
from diffclip.base.errors import exit_on_input_error
from mllm.pope.parsers import PARSERS


def arguments() -> Parser:
    """The command line; `work` of what it parses names the module of this package, and the function, to call."""
    parser = Parser("diffclip pope", __doc__)
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")

    def verb(name: str, work: str, what: str, *positional: str) -> Parser:
        command = verbs.add_parser(name, help=what, description=what)
        command.set_defaults(work=work)
        for argument in positional:
            command.add_argument(argument, type=Path, metavar=argument.upper())
        return command

    check = verb("check", "tables.check", "which release the files are, and whether their images are there", "pope")
    score = verb(
        "score", "tables.score_file", "scores of a file of answers, and of a rule without eyes", "pope", "answers"
    )
    for command in (check, score):
        command.add_argument("--labels", type=Path, help="the official files, where POPE has no labels")
    compare = verb("compare", "tables.compare", "the paper's table 3 for two evaluations, with McNemar's exact test")
    compare.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="two runs of stages.evaluate")
    for command in (score, compare):
        command.add_argument("--parser", choices=PARSERS, default="lmms_eval", help="how answers are read (lmms_eval)")
    margins = verb("margins", "margins.run", "exact yes/no scores of a model, and of all controls", "run")
    margins.add_argument("--pope", type=Path, help="POPE's files", required=True)
    margins.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    margins.also("--output_dir", "--out")
    margins.add_argument("--batch_size", type=number(int, 1), default=16, help="images at a time (16)")
    margins.add_argument("--generate", action="store_true", help="answers by greedy generation, too")
    diagnose = verb("diagnose", "diagnose.run", "why is a score at chance? Exit code 1 where a cause is found", "run")
    diagnose.add_argument("--pope", type=Path, help="POPE's files")
    diagnose.add_argument("--answers", type=Path, help="an answers.jsonl to check (pope/ of evaluate)")
    diagnose.add_argument(
        "--images", "--pictures", type=number(int, 2), default=64, help="how many images to ask about (64)"
    )
    chair = verb("chair", "captions.run", "objects named in free captions that are not there (CHAIR), with controls")
    chair.add_argument("run", nargs="?", metavar="RUN", help="a run of instruct or align, or a Hub id")
    chair.add_argument("--answers", type=Path, help="captions of any program instead: rows {image, caption}")
    chair.add_argument("--instances", type=Path, required=True, help="COCO's instances_*.json, or of that form")
    chair.add_argument("--captions", type=Path, help="COCO's captions_*.json of the same images")
    chair.add_argument("--synonyms", type=Path, help="lines `object, synonym, ...`, as CHAIR's authors publish")
    chair.add_argument("--prompt", default="Describe this image in detail.", help="what is asked (%(default)s)")
    chair.add_argument("--max_new_tokens", type=number(int, 1), default=128, help="longest caption (128)")
    chair.add_argument("--batch_size", type=number(int, 1), default=16, help="images at a time (16)")
    chair.add_argument("--limit", type=number(int, 0), default=0, help="the first so many images; 0: all (0)")
    chair.add_argument("--image_root", type=Path, help="folder of the images")
    chair.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    for command in (margins, diagnose, chair):
        command.add_argument("--device", help="cuda, cpu, ... (cuda where there is one)")
    for command in (check, margins, diagnose):
        command.add_argument("--image_root", type=Path, help="folder of the images (not for parquet)")
    audit = verb("audit", "tables.audit", "the whole numbers that published accuracy, precision and recall allow")
    for share in ("accuracy", "precision", "recall"):
        audit.add_argument(share, type=number(float, 0, 100), help="in percent, with two decimals")
    audit.add_argument(
        "--questions", type=number(int, 1), nargs="+", default=[2910, 3000], help="how many there were (2910 3000)"
    )
    return parser


def main(argv: list[str] | None = None) -> int | None:
    options = arguments().parse_args(argv)
    module, function = options.work.split(".")
    return getattr(import_module(f"mllm.pope.{module}"), function)(options)


if __name__ == "__main__":
    with exit_on_input_error():
        sys.exit(main())
