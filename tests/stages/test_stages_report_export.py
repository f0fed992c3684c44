"""What the report writes beside its page (CSV, LaTeX, Markdown), the paper's own numbers, and evaluate's overlays."""

import csv
import io
import json
import random
import re

import numpy as np
import pytest
from PIL import Image
from test_stages_report import HOSTILE

from stages.overlays import Encoder, heat_maps, keep_attention, queries_from_masks, query_of
from stages.report.cells import Table
from stages.report.examples import grid
from stages.report.export import as_csv, as_latex, as_markdown, latex
from stages.report.paper import FEW_SHOT, LINEAR, POPE, RETRIEVAL, paper_table1, paper_table2, paper_table3


def table() -> Table:
    result = Table(["Model", "a", "b"], name="t", title="T", groups=[("", 1), ("both", 2)])
    result.rows = [["part"], ["x", "1.0 ± 0.1", "−2.0"], ["y & z_1", result.missing("not run"), "50 %"]]
    return result


def test_csv_rows_stand_alone():
    rows = list(csv.reader(io.StringIO(as_csv(table()))))
    assert rows[0] == ["section", "Model", "both: a", "both: b"]
    assert rows[1] == ["part", "x", "1.0 ± 0.1", "−2.0"]
    assert rows[3] == ["[1] not run"]
    dangerous = Table(["a"], rows=[["=HYPERLINK(1)", "b"]])
    assert list(csv.reader(io.StringIO(as_csv(dangerous))))[1][0] == "'=HYPERLINK(1)"


def test_latex_is_balanced_and_literal():
    text = as_latex(table())
    assert r"y \& z\_1 & -- {[}1] & 50 \%" in text and r"1.0 $\pm$ 0.1 & $-$2.0 \\" in text
    assert text.count(r"\begin") == text.count(r"\end") and r"\multicolumn{2}{c}{both}" in text
    assert all(line.count("&") - line.count(r"\&") == 2 for line in text.splitlines() if line.startswith(("x", "y")))
    escaped = latex(HOSTILE + "\\{}~^")
    for character in "$&%#_{}":  # each one behind a backslash, or part of a command
        bare = escaped.replace(f"\\{character}", "").replace("{}", "").replace("{[}", "")
        assert character not in bare, (character, escaped)


def test_markdown_has_one_line_of_headings():
    lines = as_markdown(table()).splitlines()
    assert lines[0] == "| Model | both: a | both: b |" and lines[2] == "| **part** |  |  |"


def test_the_papers_numbers_are_consistent_in_themselves():
    for block in (LINEAR, FEW_SHOT):
        for values in block.values():
            assert np.mean(values[:9]) == pytest.approx(values[9], abs=0.06)
    for values in RETRIEVAL.values():
        assert np.mean(values[:3]) == pytest.approx(values[3], abs=0.06)
        assert np.mean(values[4:7]) == pytest.approx(values[7], abs=0.11)
    assert all(50 <= values[i] <= 50.5 for values in POPE.values() for i in (0, 3))  # at chance
    # differences that the paper prints beside its numbers
    rows = {tuple(row[:2]): row for row in paper_table1().rows if len(row) > 1}
    assert rows["CC12M", "DiffCLIP"][2] == "97.6 (+0.2)"  # of the few-shot block, which comes second
    assert paper_table2().rows[3][2:6] == ["62.2 (−0.3)", "61.5 (−0.6)", "42.3 (+1.0)", "55.3 (0.0)"]


def test_the_papers_tables_are_marked_and_never_in_a_column_with_ours():
    for theirs in (paper_table1(), paper_table2(), paper_table3()):
        assert theirs.published and theirs.title.startswith("The paper's") and "arXiv" in theirs.caption
        assert theirs.name.startswith("paper-")
        assert sum(width for _, width in theirs.groups or [("", len(theirs.columns))]) == len(theirs.columns)
        assert all(len(row) in (1, len(theirs.columns)) for row in theirs.rows)


@pytest.mark.parametrize(
    ("question", "query"),
    [
        ("Is there a red car in the image?", "a red car"),
        ("Is there an arrow in the image?", "an arrow"),
        ("is there any dog in this image? ", "a dog"),
        ("What is in the image?", ""),
        ("", ""),
    ],
)
def test_the_object_of_a_question(question, query):
    assert query_of(question) == query


@pytest.mark.parametrize(
    "value", [None, [], [[]], [[1], [1, 2]], [[256]], [[-1]], [["1"]], [[1.5]], ["ab"], [5], {"a": 1}, [[0] * 65]]
)
def test_a_damaged_heat_map_is_none(value):
    assert grid(value) is None


def test_evaluate_keeps_the_relevance_of_the_models_own_crop(tmp_path):
    import torch

    import diffclip
    from diffclip.attention_maps import relevance

    torch.manual_seed(0)
    model = diffclip.build("DiffCLIP-tiny", init="matched").eval()
    encoder = Encoder(
        model, diffclip.transforms(model.model_config, train=False), diffclip.tokenizer(model.model_config)
    )
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    items = [(tmp_path / "wide.png", "star", None), (tmp_path / "wide.png", "cup", None), (tmp_path / "b", "cup", None)]
    queries = queries_from_masks(items)
    assert queries == [(tmp_path / "wide.png", ["a star", "a cup"])]  # an image with one object shows nothing
    assert keep_attention(encoder, queries, tmp_path / "run") == 2
    rows = [json.loads(line) for line in (tmp_path / "run" / "attention.jsonl").read_text().splitlines()]
    picture = Image.open(tmp_path / "wide.png").convert("RGB")
    truth = relevance(model, encoder.transform(picture)[None], encoder.tokenizer(["a cup"]))[0]
    heat = torch.tensor(rows[1]["heat"])
    assert rows[1]["query"] == "a cup" and heat.shape == truth.shape
    assert torch.allclose(heat / 255, truth / truth.max(), atol=0.5 / 255 + 1e-4)
    shown = Image.open(tmp_path / "run" / rows[0]["image"])
    assert shown.width == shown.height >= 200
    assert heat_maps(encoder, [picture], ["a cup"])[0] == rows[1]["heat"]


def test_no_text_breaks_out_of_its_cell():
    """Random names in every place of a table, as CSV, Markdown and LaTeX."""
    rng = random.Random(0)
    odd = "\x1b\r\n\t=+-@|`*_[]()<>&$%#{}\\~^\"'\u2028\u202e\ud800é ab1"

    def text() -> str:
        return "".join(rng.choice(odd) for _ in range(rng.randrange(1, 9)))

    for _ in range(300):
        made = Table([text() for _ in range(3)], [[text() for _ in range(3)], [text()], [text() for _ in range(3)]])
        made.title, made.caption, made.name, made.notes = text(), text(), "t", [text()]
        cells = [cell for row in csv.reader(io.StringIO(as_csv(made))) for cell in row]
        assert len(cells) == 13 and not any(re.match(r"\s*[=@]|\s*[+-](?![\d.,]+$)", cell) for cell in cells)
        lines = as_markdown(made).splitlines()
        rows = [line for line in lines if line.startswith("| ")]
        assert len(rows) == 5 and all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 4 for row in rows)
        assert not any(re.search(r"[<>\x1b\u202e]", line) for line in lines)
        tex = as_latex(made)
        body = re.search(r"\\toprule\n(.*)\n\\bottomrule", tex, re.DOTALL)[1].splitlines()
        assert len(body) == 5 and not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", tex)
        for line in (body[0], body[2], body[4]):
            assert len(re.findall(r"(?<!\\)&", line)) == 2 and not re.search(r"(?<!\\)[%#]", line)
        bare = re.sub(r"\\\\|\\[{}]", "", tex)
        assert bare.count("{") == bare.count("}")
