"""What a stranger named, in terminals, logs and spreadsheets."""

import csv
import io
import random
import sys
import unicodedata
from itertools import chain

import pytest
from launch import run_program

from diffclip.base.console import print_table
from diffclip.base.lines import csv_text, print_line, printable

HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\nerror: all is well\x9b31m\u202egnp.exe\u2028\ud800"


def random_text(rng: random.Random) -> str:
    odd = "\x00\x07\x08\t\n\r\x1b\x7f\x85\x9b\u2028\u202e\u2066\ud800\udfff=+-@'\",;\\$&<%{é😀 "
    return "".join(rng.choice(odd + "ab1") for _ in range(rng.randrange(12)))


def test_nothing_that_a_terminal_obeys_is_left():
    rng = random.Random(0)
    for text in (HOSTILE, *(random_text(rng) for _ in range(2000))):
        shown = printable(text)
        assert not {"Cc", "Cs", "Zl", "Zp"} & {unicodedata.category(c) for c in shown}
        assert not set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069") & set(shown)
        kept = [c for c in text if unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") and c not in "\u202e\u2066"]
        rest = iter(shown)
        assert all(c in rest for c in kept)  # in their order
    assert printable("plain é 😀 =1") == "plain é 😀 =1"
    assert printable("a\x1b[2J\nb", keep="\n") == "a\\x1b[2J\nb"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_printed_line_is_one_line_in_any_encoding(encoding, monkeypatch):
    for stream, error in (("stdout", False), ("stderr", True)):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(raw, encoding))
        print_line(f"{HOSTILE} é", error=error)
        said = raw.getvalue().decode(encoding)
        assert said.count("\n") == 1 and said.endswith("\n") and printable(said[:-1]) == said[:-1]


def test_tables_show_names_as_they_are(capsys):
    print_table([HOSTILE, "b"], [["x", HOSTILE], [HOSTILE]], HOSTILE, [HOSTILE])
    said = capsys.readouterr().out
    assert said.count(printable(HOSTILE)) == 2  # title and note; a cell keeps its line ends, between its borders
    assert [said.count(printable(line)) for line in HOSTILE.split("\n")] == [5, 5]
    assert printable(said, keep="\n") == said


PROGRAM = f"""
import logging, sys, warnings
from diffclip.base.errors import InputError, exit_on_input_error
hostile = {HOSTILE!r}
with exit_on_input_error():
    logging.warning("logged %s", hostile)
    warnings.warn("warned " + hostile)
    raise {{}}("raised " + hostile)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("error", "code"), [("InputError", 2), ("ValueError", 1)])
def test_errors_warnings_and_logs_of_a_command_obey_nobody(error, code):
    ended = run_program([sys.executable, "-c", PROGRAM.format(error)], check=False)
    assert ended.returncode == code and printable(ended.stderr, keep="\n") == ended.stderr
    for word in ("logged", "warned", "raised"):
        assert f"{word} \\x1b]0;owned" in ended.stderr
    assert "\nerror: all" not in ended.stderr
    assert ("\nerror: raised" in ended.stderr) == (code == 2)
    assert ("\nTraceback (most" in ended.stderr) == ("\nValueError: raised" in ended.stderr) == (code == 1)


def test_no_cell_is_a_formula():
    rng = random.Random(1)
    starts = ["=", "+", "-", "@", "\t=", "\r=", "\n=", " =", "＝", "", "x\r=", 'x"\n=']
    rows = [[rng.choice(starts) + random_text(rng) for _ in range(4)] for _ in range(500)]
    read = list(csv.reader(io.StringIO(csv_text(rows))))
    assert len(read) == len(rows) == csv_text(rows).count("\n") and {len(row) for row in read} == {4}
    for cell, source in zip(chain(*read), chain(*rows)):
        assert cell.lstrip()[:1] not in tuple("=@＝＋－＠")
        assert cell.removeprefix("'") == printable(source) or cell == printable(source)
        if cell.lstrip()[:1] in ("+", "-") and cell.lstrip()[:1]:
            assert not any(c in cell for c in "=@(ab")  # numbers alone
    assert csv_text([["=1+1", "a"], ["-1.5", "+0.4 ± 0.1 [2]"], ["-1+1", -3]]) == (
        "'=1+1,a\n-1.5,+0.4 ± 0.1 [2]\n'-1+1,-3\n"
    )
