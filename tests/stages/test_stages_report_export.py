"""What the report writes beside its page (CSV, LaTeX, Markdown), the paper's own numbers, and evaluate's overlays."""

import csv
import io
import json
import random
import re

import numpy as np
import pytest
import torch
from PIL import Image
from test_stages_report import HOSTILE

import diffclip
from diffclip.attention_maps import layer_maps, relevance
from stages.overlays import Encoder, both_maps, heat_maps, keep_attention, queries_from_masks, query_of
from stages.report.cells import Table
from stages.report.examples import Map, grid
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
    torch.manual_seed(0)
    model = diffclip.build("DiffCLIP-tiny", init="matched").eval()
    encoder = Encoder(
        model, diffclip.transforms(model.model_config, train=False), diffclip.tokenizer(model.model_config)
    )
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    mask = np.zeros((60, 90), dtype=bool)
    mask[:30, 15:45] = True  # the upper left quarter of the middle square, which the crop shows
    items = [
        (tmp_path / "wide.png", "star", mask),
        (tmp_path / "wide.png", "cup", ~mask),
        (tmp_path / "b", "cup", mask),
    ]
    queries = queries_from_masks(items)
    assert [(path, [*masks]) for path, masks in queries] == [(tmp_path / "wide.png", ["a star", "a cup"])]  # not of one
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
    outline = np.array(rows[0]["outline"])
    half = len(outline) // 2
    assert (outline[:half, :half] == 255).all() and outline.sum() == 255 * half * half
    assert (np.array(rows[1]["outline"]) == 255 - outline).all()
    maps = {name: torch.tensor(grid).double() for name, grid in rows[0]["maps"].items()}
    truths = {name: m[0].double().mean(0) for name, m in layer_maps(model, encoder.transform(picture)[None]).items()}
    scale = 255 / max(truths["A1"].max(), truths["A2"].max())  # one for both
    assert all(torch.allclose(maps[name], truths[name] * scale, atol=0.51) for name in ("A1", "A2"))
    largest = truths["difference"].abs().max()
    assert torch.allclose((maps["difference"] - 128) / 127, truths["difference"] / largest, atol=0.51 / 127)


def test_plain_towers_have_no_two_maps():
    model = diffclip.build("CLIP-tiny").eval()
    encoder = Encoder(model, diffclip.transforms(model.model_config, train=False), lambda texts: None)
    assert both_maps(encoder, Image.new("RGB", (60, 60))) == {}


def test_the_edge_of_an_object_is_drawn_white_inside_and_black_outside():
    mask = np.zeros((8, 8), dtype=int)
    mask[2:6, 2:6] = 255
    one = Map("a.png", "a star", Image.new("RGB", (8, 8), (90, 90, 90)), outline=mask.tolist())
    shown = one.outlined(one.pixels(8))[:, :, 0]
    white, black = shown == 255, shown == 0
    assert white.sum() == 12 and (mask[white] == 255).all()  # a ring of 4 x 4 without its 2 x 2
    assert black.sum() == 20 and (mask[black] == 0).all()  # and the ring around it
    assert (one.pixels(8) == 90).all()
    none = Map("a.png", "a star", one.image)
    assert (none.outlined(none.pixels(8)) == 90).all()


def test_a_signed_map_is_red_above_zero_and_blue_below():
    one = Map("a.png", "a star", Image.new("RGB", (4, 4), (128, 128, 128)))
    low, zero, high = (one.tinted([[value]], 4)[0, 0].astype(int) for value in (1, 128, 255))
    assert high[0] > high[2] + 50 and low[2] > low[0] + 50 and abs(zero[0] - zero[2]) < 10


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
