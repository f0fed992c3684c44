"""Command lines: any spelling of a flag, the nearest one for what is none, and numbers within their range."""

import math
import random
import subprocess
import sys
from argparse import ArgumentTypeError

import pytest

from diffclip.base.commands import Parser, Range, near, number
from diffclip.base.errors import InputError

FLAGS = ["data_root", "output_dir", "batch_size", "few_shot_episodes", "vision_tower", "learning_rate", "seed"]
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def parser():
    parser = Parser("diffclip thing")
    for flag in FLAGS:
        parser.add_argument(f"--{flag}")
    parser.add_argument("--protocols", nargs="+", choices=("zero_shot", "linear_probe"), default=[])
    parser.add_argument("files", nargs="*")
    return parser


def spelt(flag, chance):
    """A flag with each stroke as the one or the other."""
    return "--" + "".join(chance.choice("-_") if letter == "_" else letter for letter in flag)


@pytest.mark.parametrize("seed", range(20))
def test_every_spelling_of_a_flag_is_that_flag(parser, seed):
    chance = random.Random(seed)
    values = {flag: "".join(chance.choices(ALPHABET + "-_=", k=6)).lstrip("-") + "x" for flag in FLAGS}
    arguments = []
    for flag, value in values.items():
        written = spelt(flag, chance)
        arguments += [f"{written}={value}"] if chance.random() < 0.5 else [written, value]
    options = parser.parse_args(["my-file_name", *arguments])
    assert {flag: vars(options)[flag] for flag in FLAGS} == values  # strokes in values stay
    assert options.files == ["my-file_name"]


def misspelt(word, chance):
    """One letter left out, doubled, replaced, or two of them swapped."""
    at = chance.randrange(1, len(word) - 1)
    return chance.choice(
        [
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[:at] + chance.choice(ALPHABET) + word[at + 1 :],
            word[: at - 1] + word[at] + word[at - 1] + word[at + 1 :],
        ]
    )


@pytest.mark.parametrize("seed", range(40))
def test_a_slip_of_one_letter_is_told_the_flag(parser, seed):
    chance = random.Random(seed)
    flag = chance.choice(FLAGS[:-1])
    wrong = misspelt(flag, chance)
    if wrong.replace("-", "_") == flag:
        return
    with pytest.raises(InputError, match=rf"unknown flag --.*: did you mean --{flag}\?"):
        parser.parse_args([spelt(wrong, chance), "3"])


@pytest.mark.parametrize("word", ["--out", "--data", "--s", "--output_di", "--xyzzyquux"])
def test_flags_are_not_abbreviated(parser, word):
    with pytest.raises(InputError, match=f"unknown flag {word}"):
        parser.parse_args([word, "x"])


def test_choices_and_missing_values_are_named(parser):
    assert parser.parse_args(["--protocols", "linear_probe", "zero_shot"]).protocols == ["linear_probe", "zero_shot"]
    with pytest.raises(InputError, match="--protocols zeroshot: did you mean zero_shot"):
        parser.parse_args(["--protocols", "zeroshot"])
    with pytest.raises(InputError, match="--protocols qqqq: must be one of zero_shot, linear_probe"):
        parser.parse_args(["--protocols", "qqqq"])
    with pytest.raises(InputError, match="expected one argument"):
        parser.parse_args(["--seed"])


def test_verbs_have_flags_and_near_misses_too():
    parser = Parser("diffclip")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("pretrain").add_argument("--train_data", required=True)
    verbs.add_parser("report").add_argument("runs", nargs="+")
    assert parser.parse_args(["pretrain", "--train-data", "a-b"]).train_data == "a-b"
    with pytest.raises(InputError, match="pretrian: did you mean pretrain"):
        parser.parse_args(["pretrian"])
    with pytest.raises(InputError, match="did you mean --train_data"):
        parser.parse_args(["pretrain", "--train_data", "x", "--trian_data", "y"])
    with pytest.raises(InputError, match="train_data"):
        parser.parse_args(["pretrain"])


def test_what_is_far_from_all_gets_the_list_if_it_is_short():
    assert near("qqqq", ["cat", "dog"]) == ": must be one of cat, dog"
    assert "did you mean" not in near("qqqq", [f"name{i}" for i in range(50)])


@pytest.mark.parametrize("seed", range(20))
def test_a_number_is_taken_where_its_range_holds_it(seed):
    chance = random.Random(seed)
    least, most = sorted(round(chance.uniform(-10, 10), 2) for _ in range(2))
    parse = number(float, least, most)
    for value in [least, most, *(chance.uniform(-12, 12) for _ in range(30))]:
        if least <= value <= most:
            assert parse(repr(value)) == value
        else:
            with pytest.raises(ArgumentTypeError, match=r"must be at least .* and at most "):
                parse(repr(value))


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "", "three", "0x10", "1,5"])
@pytest.mark.parametrize("kind", [int, float])
def test_what_is_no_finite_number_is_refused(kind, text):
    parser = Parser("diffclip thing")
    parser.add_argument("--rate", type=number(kind))
    with pytest.raises(InputError, match="--rate"):
        parser.parse_args([f"--rate={text}"])


def test_ends_that_are_not_reached_and_their_names():
    rate = Range(above=0, most=1)
    rate.check(1e-9, "rate")
    rate.check(1, "rate")
    for value in (0, -1, 1.0001, math.nan, math.inf):
        with pytest.raises(InputError, match=r"^rate .*: must be (finite and )?above 0 and at most 1$"):
            rate.check(value, "rate")
    Range().check(-1e300, "x")
    with pytest.raises(InputError, match="must be a finite number"):
        Range().check(math.inf, "x")


def test_a_command_line_needs_nothing_heavy():
    code = "import sys, diffclip.base.commands; print({'torch', 'numpy', 'rich', 'PIL'} & sys.modules.keys())"
    code = "import sys; sys.orig_argv = ['python', '-m', 'diffclip.x']; " + code
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.stdout.strip() == "set()", ended.stderr
