"""Tables on the console: whole cells whatever they hold, numbers to the right, headings and notes."""

import pytest

from diffclip.base.console import print_table


def printed(capsys, *arguments, **options):
    print_table(*arguments, **options)
    return capsys.readouterr().out.splitlines()


def test_cells_stand_under_their_columns(capsys):
    lines = printed(capsys, ["score", "a", "b"], [["top1", "5.0", "61.25"], ["R@10", "100.0", "7"]], "CLIP", ["a note"])
    assert lines[0].strip() == "CLIP" and lines[-1] == "a note"
    top, recall = (next(line for line in lines if name in line) for name in ("top1", "R@10"))
    assert len(top) == len(recall) and top.index("5.0") + 3 == recall.index("100.0") + 5  # numbers end together
    assert top.index("top1") == recall.index("R@10")


@pytest.mark.parametrize("text", ["[red]x[/red]", "[/]", "ImageNet-V2 [n.s.]", ":smile:", "日本"])
def test_text_is_shown_as_it_is(capsys, text):
    lines = printed(capsys, ["", text], [[text, text], [text]], text, [text])
    assert sum(line.count(text) for line in lines) == 6


def test_long_rows_in_files_do_not_wrap(capsys):
    cells = [f"model-{i:02d} {'x' * 20}" for i in range(6)]
    (line,) = (line for line in printed(capsys, [""] * 6, [cells]) if "model-00" in line)
    assert all(cell in line for cell in cells)


def test_headings_lines_and_no_header(capsys):
    rows = [["first", "1"], ["heading"], ["second", "2"], [], ["third", "3"]]
    lines = printed(capsys, ["", ""], rows)
    place = {name: next(i for i, line in enumerate(lines) if name in line) for name in ("first", "heading", "second")}
    assert place["heading"] == place["first"] + 2 and place["second"] == place["heading"] + 1  # a line above it
    assert "third" in lines[place["second"] + 2]
    assert "first" in lines[1]  # below the upper edge: there is no header


def test_a_cell_of_two_lines_stays_in_its_column(capsys):
    lines = printed(capsys, ["", "a\nb"], [["first\nsecond", "1"]])
    first, second = (next(line for line in lines if name in line) for name in ("first", "second"))
    assert first.index("first") == second.index("second") and len(first) == len(second)
