"""POPE on the command line.

python -m mllm.pope check POPE --image_root IMAGES              # which release, are its images there
python -m mllm.pope score POPE ANSWERS.jsonl                    # answers of any program, matched by question
python -m mllm.pope margins RUN --pope POPE --image_root IMAGES --out DIR   # exact yes/no scores, without generating
python -m mllm.pope compare EVALUATE_A EVALUATE_B               # the paper's table 3 with McNemar's test
python -m mllm.pope diagnose RUN --pope POPE --image_root IMAGES  # why is the score at chance?
python -m mllm.pope audit 50.14 50.07 98.21 --questions 2910 3000   # which counts stand behind published scores
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffclip.base.errors import InputError, exit_on_input_error
from diffclip.base.files import json_line, write_json, write_whole
from mllm.pope.questions import (
    SPLITS,
    answered,
    find_images,
    images_of,
    index,
    read,
    read_answers,
    read_labelled,
    version,
)
from mllm.pope.scores import PARSERS, SCORES, blind, intervals, parse, score, score_splits


def table_of(scores: dict[str, dict[str, float]], columns: Sequence[str]) -> list[list[str]]:
    """Rows of percentages for the console: a split each."""
    return [[split, *(f"{100 * row[name]:.1f}" for name in columns)] for split, row in scores.items()]


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def check_files(options: argparse.Namespace) -> None:
    """Which release the files are, whether an oracle scores 100 on them, whether their images are there."""
    questions = read(options.pope, options.labels)
    print(version(questions))
    if all(q.label for q in questions):
        oracle = score_splits(questions, [q.label for q in questions])["mean"]["accuracy"]
        blind_rule = score_splits(questions, blind(questions))
        shown = ", ".join(f"{split} {100 * row['accuracy']:.1f}" for split, row in blind_rule.items())
        print(f"an oracle scores {100 * oracle:.1f}; the best rule that sees no image: {shown}")
    else:
        print("no labels: give --labels, the official files")
    if options.image_root:
        print(f"{len(find_images(questions, options.image_root)):,} images found under {options.image_root}")


def score_file(options: argparse.Namespace) -> None:
    """Scores of a file of answers by every parser, intervals, and the blind rule beside them."""
    questions = read_labelled(options.pope, options.labels)
    answers = read_answers(options.answers, questions)
    print(version(questions))
    tell_of_nulls(answers, options.answers)
    for name in PARSERS:
        said = parse(answers, name)
        show(
            f"{options.answers.name}, parser {name} (%)",
            ["split", *SCORES],
            table_of(score_splits(questions, said), SCORES),
        )
        if name == options.parser:
            for split, ends in intervals(questions, said).items():
                low, high = ends["accuracy"]
                print(f"{split}: accuracy between {100 * low:.1f} and {100 * high:.1f} (95 %, images resampled)")
            verdict = uses_image(score_splits(questions, said), score_splits(questions, blind(questions)))
    print(verdict)


def tell_of_nulls(answers: Sequence[str | None], name: Path) -> None:
    """Say how many answers are none at all."""
    nulls = sum(answer is None for answer in answers)
    if nulls:
        print(f"{name}: {nulls:,} of {len(answers):,} answers are null; they count as invalid, which is wrong")


def uses_image(model: dict[str, dict[str, float]], blind_rule: dict[str, dict[str, float]]) -> str:
    """One sentence: whether a model beats the best rule that sees no image."""
    own, other = 100 * model["mean"]["accuracy"], 100 * blind_rule["mean"]["accuracy"]
    verdict = "uses the image" if own > other else "does not use the image"
    return f"the model {verdict}: accuracy {own:.1f} against {other:.1f} of the best rule that sees no image"


def compare_runs(options: argparse.Namespace) -> None:
    """The paper's table 3 for two evaluations, with McNemar's exact test for every split."""
    import numpy as np

    from diffclip.base.statistics import mcnemar

    def right_and_said(folder: Path) -> dict[tuple, tuple[str, str]]:
        file = folder / "pope" / "answers.jsonl" if folder.is_dir() else folder
        if not file.is_file():
            raise InputError(f"{file}: no such file; give a run of stages.evaluate that had POPE")
        pairs = index(answered(file), lambda pair: pair[0].key, str(file))
        wrong = next((q for q, _ in pairs.values() if q.split not in SPLITS or q.label not in ("yes", "no")), None)
        if wrong:
            raise InputError(
                f"{file}: `{wrong.image}`, `{wrong.text}` has split `{wrong.split}` and label `{wrong.label}`; rows "
                f"need a split of {', '.join(SPLITS)} and the label yes or no, as stages.evaluate writes them"
            )
        answers = [answer for _, answer in pairs.values()]
        tell_of_nulls(answers, file)
        labels = [q.label for q, _ in pairs.values()]
        return dict(zip(pairs, zip(labels, parse(answers, options.parser))))

    first, second = right_and_said(options.runs[0]), right_and_said(options.runs[1])
    if first.keys() != second.keys():
        raise InputError(
            f"{options.runs[0]} and {options.runs[1]} answer different questions; evaluate both on the same"
        )
    rows = []
    for split in [split for split in SPLITS if any(key[0] == split for key in first)]:
        keys = [key for key in first if key[0] == split]
        right = [np.array([one[key][0] == one[key][1] for key in keys]) for one in (first, second)]
        p = mcnemar(*right)
        for name, one in zip(options.runs, (first, second)):
            found = score([one[key][1] for key in keys], [one[key][0] for key in keys])
            rows.append([split, str(name), *(f"{100 * found[s]:.1f}" for s in SCORES[:5]), f"{p:.2g}"])
    show("POPE (%)", ["split", "run", "accuracy", "precision", "recall", "f1", "yes", "McNemar p"], rows)


def score_margins_of(options: argparse.Namespace) -> None:
    """Exact yes/no scores of a model with all controls, into margins.json and margins.jsonl."""
    from mllm.pope import margins as pope_margins
    from mllm.pope.lmms import CONTROLS

    vlm, questions, open_image = load_with_questions(options)
    options.out.mkdir(parents=True, exist_ok=True)
    scores: dict[str, Any] = {}
    lines = []
    for name in ("model", *CONTROLS):
        asked = CONTROLS[name](questions, 0) if name in CONTROLS else questions
        values = pope_margins.margins(vlm, asked, open_image, batch_size=options.batch_size)
        scores[name] = pope_margins.score_margins(asked, values)
        lines += [{"pass": name, **q._asdict(), "margin": value} for q, value in zip(asked, values.tolist())]
        columns = pope_margins.MARGIN_SCORES
        show(f"{name} (%)", ["split", *columns], table_of(scores[name], columns))
    scores["blind"] = score_splits(questions, blind(questions))
    print(uses_image(scores["model"], scores["blind"]))
    if options.generate:
        answers = pope_margins.generate(vlm, questions, open_image, batch_size=options.batch_size)
        scores["generated"] = score_splits(questions, parse(answers))
        show("generated answers (%)", ["split", *SCORES], table_of(scores["generated"], SCORES))
        lines += [{"pass": "generated", **q._asdict(), "answer": said} for q, said in zip(questions, answers)]
    write_whole(options.out / "margins.jsonl", "".join(map(json_line, lines)))
    write_json(options.out / "margins.json", {"version": version(questions), **scores})
    print(f"wrote {options.out / 'margins.json'}")


def load_with_questions(options: argparse.Namespace) -> tuple[Any, list[Any], Callable[[str], Any]]:
    """The model on its device, the labelled questions, and what opens their images."""
    from mllm.model import load

    questions = read_labelled(options.pope)
    places = images_of(questions, options.pope, options.image_root, options.out / "images")
    vlm = load(options.run, device=options.device, quiet=True)
    return vlm, questions, lambda name: places[name].open()


def diagnose(options: argparse.Namespace) -> int:
    """Walk the causes of a score at chance and name the first that fails; exit code 1 where there is one."""
    from mllm.pope.diagnose import run

    return run(options)


def audit_scores(options: argparse.Namespace) -> None:
    """The whole numbers that published accuracy, precision and recall allow."""
    from mllm.pope.audit import audit

    audit(options)


def main(argv: list[str] | None = None) -> int | None:
    parser = argparse.ArgumentParser(
        "python -m mllm.pope", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, call: Callable[[Any], Any], *positional: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=call.__doc__.split("\n")[0], description=call.__doc__)
        one.set_defaults(call=call)
        for argument in positional:
            one.add_argument(argument, type=Path, metavar=argument.upper())
        return one

    check = command("check", check_files, "pope")
    scored = command("score", score_file, "pope", "answers")
    for one in (check, scored):
        one.add_argument("--labels", type=Path, help="the official files, where POPE has no labels")
    compare = command("compare", compare_runs)
    compare.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="two runs of stages.evaluate")
    for one in (scored, compare):
        one.add_argument("--parser", choices=PARSERS, default="lmms_eval", help="how answers are read (lmms_eval)")
    exact = command("margins", score_margins_of, "run")
    exact.add_argument("--pope", type=Path, help="POPE's files", required=True)
    exact.add_argument("--out", type=Path, required=True, help="folder to write")
    exact.add_argument("--batch_size", type=int, default=16, help="images at a time (16)")
    exact.add_argument("--generate", action="store_true", help="answers by greedy generation, too")
    walk = command("diagnose", diagnose, "run")
    walk.add_argument("--pope", type=Path, help="POPE's files")
    walk.add_argument("--answers", type=Path, help="an answers.jsonl with labels to check (pope/ of evaluate)")
    walk.add_argument("--pictures", type=int, default=64, help="how many images to ask about (64)")
    for one in (exact, walk):
        one.add_argument("--device", help="cuda, cpu, ... (cuda where there is one)")
    for one in (check, exact, walk):
        one.add_argument("--image_root", type=Path, help="folder of the images (not for parquet)")
    audited = command("audit", audit_scores)
    for name in ("accuracy", "precision", "recall"):
        audited.add_argument(name, type=float, help="in percent, with two decimals")
    audited.add_argument(
        "--questions", type=int, nargs="+", default=[2910, 3000], help="how many there were (2910 3000)"
    )
    options = parser.parse_args(argv)
    return options.call(options)


if __name__ == "__main__":
    with exit_on_input_error():
        sys.exit(main())
