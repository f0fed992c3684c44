"""The report's page: its files, hostile text, and what a real browser makes of it (skipped where none is installed)."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from browser import open_page
from PIL import Image
from test_stages_report import HOSTILE, SPLITS, Page, scores, write_arm, write_examples, write_run

from stages.report.build import build_report
from stages.report.examples import image_data

PAPER = [f"figure{i}" for i in range(1, 7)]
OTHERS = ["pope", "localisation", *(f"loss-{s}" for s in ("language", "pretrain", "align", "instruct"))]
OTHERS += ["lambda", "logit-scale", "cost"]
WIDTHS = (360, 768, 1280)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """Page of three models, one of them wrong in some examples, with everything that evaluate can write."""
    root = tmp_path_factory.mktemp("page")
    for i, model in enumerate(("CLIP-tiny", "DiffCLIP-tiny", "DiffCLIP-dagger-tiny")):
        arm = write_arm(root / "runs", model, lift=1.5 * i)
        place = {"localisation/pointing": 20.0 + i, "localisation/energy": 12.0 + i, "localisation/precision": 15.0}
        metrics = scores(1.5 * i) | place | {"localisation/area": 10.0, "localisation/objects": 12}
        (arm / "evaluate" / "metrics.json").write_text(json.dumps(metrics))
    rows = [json.loads(line) for line in (arm / "evaluate" / "examples.jsonl").read_text().splitlines()]
    for row in rows[:5]:
        row["answer"] = "no"
    (arm / "evaluate" / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build_report([root / "runs"], root / "report")


@pytest.fixture(scope="module")
def browser_page(report):
    """(page, complaints) of one browser for all tests of this file."""
    with open_page(viewport={"width": 1280, "height": 900}, color_scheme="light") as opened:
        opened[0].goto(report.as_uri())
        yield opened


def new_page(browser_page, index: Path) -> tuple:
    """(page, complaints) of another report in the same browser."""
    page = browser_page[0].context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
    page.on("dialog", lambda dialog: complaints.append("an alert opened"))
    page.goto(index.as_uri())
    return page, complaints


@pytest.mark.slow
def test_page_needs_no_network_and_runs_no_script_but_its_own(report):
    import base64
    import hashlib

    page = Page(report)
    assert not {"iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            target = attributes.get(name, "#")
            beside = tag == "a" and (report.parent / target).is_file()  # a figure or table to take away
            assert beside or target.startswith(("data:", "#")), f"<{tag} {name}={target[:60]}>"
        assert not [name for name in attributes if name.startswith("on")]
    assert "url(http" not in page.source and "@import" not in page.source
    scripts = re.findall(r"<script>(.*?)</script>", page.source, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert len(scripts) == 1 and f"script-src 'sha256-{digest}'" in page.source
    assert page.source.count("<script") == 2  # the other holds data
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)), "figures share ids"
    targets = {a["href"][1:] for tag, a in page.tags if tag == "a" and a["href"].startswith("#")}
    assert targets | set(re.findall(r"url\(#([^)]+)\)", page.source)) <= set(ids)


def test_every_figure_is_on_the_page_and_beside_it(report):
    folder = report.parent / "figures"
    assert {path.stem for path in folder.iterdir()} == {*PAPER, *OTHERS}
    page = Page(report)
    assert sum(tag == "svg" for tag, _ in page.tags) == len(PAPER + OTHERS)
    for name in PAPER + OTHERS:
        text = (folder / f"{name}.svg").read_text(encoding="utf-8")
        ElementTree.fromstring(text)
        assert "DiffCLIP-" in text or name == "loss-language"  # "tiny" may stand on a line of its own
        assert Image.open(folder / f"{name}.png").info["dpi"][0] == pytest.approx(300, abs=1)
    # colours follow light and dark
    figures = re.findall(r"<svg.*?</svg>", page.source, flags=re.DOTALL)
    assert not any(re.search(r"#[0-9a-f]{6}\b", figure) for figure in figures)


def test_tables_and_figures_stand_in_the_papers_order(report):
    ids = [a["id"] for _, a in Page(report).tags if "id" in a]
    for kind, count in (("table", 5), ("figure", 6)):
        assert [i for i in ids if re.fullmatch(rf"{kind}\d", i)] == [f"{kind}{n}" for n in range(1, count + 1)]
    assert ids.index("figure3") < ids.index("figure4") < ids.index("table3")  # as their sections follow each other


def test_long_logs_are_averaged_and_short_ones_are_not():
    from stages.report.charts import MOST_POINTS, points_of

    line = [{"step": s, "loss": float(s % 10)} for s in range(1, 10 * MOST_POINTS + 1)]
    shown = points_of(line, "loss")
    assert len(shown) == MOST_POINTS and {value for _, value in shown} == {4.5}  # each the mean of 0 to 9
    assert shown[0][0] == 5.5 and shown[-1][0] == 10 * MOST_POINTS - 4.5
    assert points_of([*line[:7], {"step": 8, "loss": None}], "loss") == [(s, s % 10) for s in range(1, 8)]


def test_docs_explain_every_figure(report):
    text = (Path(__file__).parents[2] / "docs" / "figures.md").read_text(encoding="utf-8")
    titles = re.findall(r'<figure class="figure" id="[^"]*">\s*<h3>(.*?) <span', report.read_text(encoding="utf-8"))
    assert len(titles) == len(PAPER + OTHERS)
    known = {"Figure 2": "Figures 2 and 6", "Figure 6": "Figures 2 and 6", "Training loss": "Losses"}
    for title in titles:
        name = next((shown for start, shown in known.items() if title.startswith(start)), title.split(" by ")[0])
        name = re.sub(r"^(Figure \d)\..*", r"\1,", name).removesuffix(" in pretraining")
        assert re.search(rf"^\*\*{re.escape(name)}", text, flags=re.MULTILINE), title


def test_large_and_broken_images(tmp_path):
    import numpy as np

    run = tmp_path / "runs" / "evaluate"
    write_run(run, "evaluate", metrics=scores())
    write_examples(run, "no")
    noise = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(run / "examples" / "0.png")
    shown = image_data(run, "examples/0.png")
    assert (shown["w"], shown["h"]) == (320, 240) and shown["u"].startswith("data:image/jpeg")
    (run / "examples" / "0.png").write_bytes(b"<svg onload=alert(1)>")
    assert image_data(run, "examples/0.png") is None
    assert image_data(run, "") is image_data(run, "/etc/hostname") is image_data(run, "examples") is None


# --- in the browser -----------------------------------------------------------------------------------------------

CONTRASTS = """
() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = text => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = text;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = c => {
    const [r, g, b] = c.slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = node => {
    for (let n = node; n; n = n.parentElement) {
      const c = rgba(getComputedStyle(n).backgroundColor);
      if (c[3] === 255) return c;
    }
    return [255, 255, 255, 255];
  };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const seen = new Set();
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || ["SCRIPT", "NOSCRIPT", "STYLE"].includes(node.tagName)) continue;
    if (seen.has(node) || !node.getClientRects().length) continue;
    seen.add(node);
    const style = getComputedStyle(node);
    const ink = node.namespaceURI.endsWith("svg") && style.fill !== "none" ? style.fill : style.color;
    const [a, b] = [light(rgba(ink)), light(behind(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) poor.push([node.textContent.slice(0, 40), ratio.toFixed(2)]);
  }
  return [seen.size, poor];
}
"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_aa_in_light_and_dark(browser_page, scheme):
    page, _ = browser_page
    page.emulate_media(color_scheme=scheme)
    read, poor = page.evaluate(CONTRASTS)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    assert read > 500 and poor == []


@pytest.mark.parametrize("width", WIDTHS)
def test_no_horizontal_scroll_at_any_width_and_figures_fill_it(browser_page, width):
    page, _ = browser_page
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.evaluate("[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().toJSON())")
    assert len(boxes) == len(PAPER + OTHERS)
    assert all(box["width"] > 250 and box["height"] > 60 and box["right"] <= width for box in boxes)


def test_wide_tables_fit_on_printed_pages(browser_page):
    page, _ = browser_page
    page.set_viewport_size({"width": 720, "height": 1000})  # A4 without its margins
    page.emulate_media(media="print")
    wide = page.evaluate("[...document.querySelectorAll('table')].filter(t => t.offsetWidth > 720).length")
    hidden = page.evaluate("getComputedStyle(document.querySelector('nav')).display")
    page.emulate_media(media="screen")
    assert wide <= 1 and hidden == "none"  # the table of all scores of three models may be cut


def test_keyboard_reaches_everything_and_walks_the_examples(browser_page):
    page, _ = browser_page
    page.set_viewport_size({"width": 1280, "height": 900})
    page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    # every scrollable region and every control can be focused
    missed = page.evaluate(
        "[...document.querySelectorAll('a, button, select, input, summary, .scroll')]"
        ".filter(n => !n.hidden && n.tabIndex < 0).length"
    )
    assert missed == 0
    page.focus("#tiles .tile")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.number") == "2"
    assert page.get_attribute("#tiles .tile:nth-child(3)", "aria-pressed") == "true"
    page.keyboard.press("Home")
    assert page.evaluate("document.activeElement.dataset.number") == "0"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "the focus cannot be seen"


def test_an_example_shows_image_question_answers_and_attention(browser_page):
    page, _ = browser_page
    page.hover("#tiles .tile:nth-child(2)")
    panel = page.inner_text("#panel")
    assert "Is there a red circle in the image?" in panel and "right answer: yes" in panel
    rows = [row.split() for row in page.locator("#panel tr").all_inner_texts()[1:]]
    assert rows == [["CLIP-tiny", "yes", "✓", "no"], ["DiffCLIP-tiny", "yes", "✓", "no"],
                    ["DiffCLIP-dagger-tiny", "no", "✗", "no"]]  # fmt: skip
    assert page.locator("#panel img").count() == 4 and page.locator("#panel canvas").count() == 3
    # the brightest patch is where the map has its maximum: second row, first column
    patch = "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 === 0)"
    reds = page.eval_on_selector("#panel canvas", patch)
    assert len(reds) == 4 and max(reds) == reds[2]


def test_wrong_and_changed_answers_can_be_filtered(browser_page):
    page, _ = browser_page
    for outcome, expected in {"wrong": 5, "changed": 5, "wrong-0": 0, "wrong-2": 5, "all": 36, "same": 5}.items():
        page.select_option("#filter-outcome", outcome)
        assert page.inner_text("#example-count") == f"{expected} of 36 examples", outcome
    page.select_option("#filter-outcome", "all")
    page.select_option("#filter-split", "popular")
    assert page.inner_text("#example-count") == "12 of 36 examples"
    page.fill("#filter-words", "blue")
    assert page.inner_text("#panel") == "No example passes these filters."
    page.fill("#filter-words", "")
    page.select_option("#filter-split", "all")
    assert page.locator("#tiles .tile").count() == 30
    page.click("#more")
    assert page.locator("#tiles .tile").count() == 36 and page.is_hidden("#more")


def test_on_a_phone_the_example_in_hand_stays_in_view(browser_page):
    page, _ = browser_page
    page.set_viewport_size({"width": 375, "height": 720})
    page.click("#tiles .tile:nth-child(25)")
    panel, tile = (page.locator(name).bounding_box() for name in ("#panel", "#tiles .tile:nth-child(25)"))
    assert panel["y"] >= 0 and panel["y"] + panel["height"] <= 720 and 0 <= tile["y"] <= 720
    assert page.get_attribute("#tiles .tile:nth-child(25)", "aria-pressed") == "true"
    page.set_viewport_size({"width": 1280, "height": 900})


def test_the_page_is_short_until_it_is_unfolded_and_its_index_unfolds_it(browser_page):
    page, _ = browser_page
    page.set_viewport_size({"width": 1280, "height": 900})
    folded = "[...document.querySelectorAll('details.section')].map(d => d.id)"
    assert {"run", "all-scores", "details", "curves", "methods"} <= set(page.evaluate(folded))
    assert page.evaluate("document.querySelectorAll('details[open]').length") == 0
    height = page.evaluate("document.documentElement.scrollHeight")
    page.click("nav a[href='#run']")
    page.wait_for_function("document.getElementById('run').open")
    assert page.is_visible("#setup") and page.evaluate("document.querySelectorAll('details[open]').length") == 1
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollHeight") > 2 * height
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = false)")


def test_what_is_wider_than_a_phone_says_that_it_scrolls(browser_page):
    page, _ = browser_page
    page.set_viewport_size({"width": 360, "height": 800})
    wider = "n => n.scrollWidth > n.clientWidth + 1"
    page.wait_for_function("document.querySelector('nav ul').classList.contains('sideways')")
    places = "[...document.querySelectorAll('main > section .scroll, nav ul')]"
    assert page.evaluate(f"{places}.filter({wider}).length") >= 4
    assert page.evaluate(f"{places}.every(n => n.classList.contains('sideways') === ({wider})(n))")
    said = page.evaluate("getComputedStyle(document.querySelector('.scroll.sideways'), '::before').content")
    assert "scroll sideways" in said
    page.set_viewport_size({"width": 1280, "height": 900})
    page.wait_for_function("!document.querySelector('#summary .scroll').classList.contains('sideways')")


def test_nothing_complained(browser_page):
    assert browser_page[1] == []


@pytest.mark.slow
def test_hostile_text_stays_text_in_the_browser(tmp_path, browser_page):
    run = tmp_path / "runs" / "evaluate"
    metrics = scores() | {f"mmvp/{HOSTILE}": 50.0, f"zero_shot/{HOSTILE}/top1": 50.0, f"odd{HOSTILE}": HOSTILE}
    write_run(run, "evaluate", model=HOSTILE, command=HOSTILE, hardware=HOSTILE, git=HOSTILE, metrics=metrics)
    write_run(tmp_path / "runs" / "pretrain", "pretrain", model=HOSTILE, config={"init": HOSTILE})
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    write_examples(run, HOSTILE, question=HOSTILE, image="../../secret.png")
    row = {"image": "../../secret.png", "file": HOSTILE, "query": HOSTILE, "heat": [[1]]}
    (run / "attention.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"heat": HOSTILE}))
    index = build_report([tmp_path / "runs"], tmp_path / "report")
    page = Page(index)
    assert page.source.lower().count("<script") == 2 and "alert(1)</script>" not in page.source
    assert "\u202e" not in page.source and "\x1b" not in page.source
    assert page.words.count('<script>alert(1)</script>|`$x$_"&amp;') > 20
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "<script" not in text
    seeds = [line for line in text.splitlines() if line.startswith("| seeds")]
    assert len(re.findall(r"(?<!\\)\|", seeds[0])) == 3, "a name broke the table"
    for path in (tmp_path / "report" / "tables").glob("*.tex"):
        assert not re.search(r"(?<!\\)[$&#_%]x?\$_|<script", path.read_text(encoding="utf-8")), path.name
    figures = [ElementTree.parse(path) for path in (tmp_path / "report" / "figures").glob("*.svg")]
    assert figures and not [e for figure in figures for e in figure.iter() if e.tag.endswith("script")]
    opened, complaints = new_page(browser_page, index)
    shown = opened.inner_text("#panel")
    assert "<script>alert(1)</script>" in shown and "image missing" in shown
    assert "<script>alert(1)</script>" in opened.inner_text("#panel h3")
    assert opened.locator("#panel script, #tiles script, option script").count() == 0
    assert opened.locator("#tiles img").count() == 0, "an image outside the run was shown"
    assert complaints == []


@pytest.mark.slow
def test_ten_thousand_examples_make_no_page_that_freezes(tmp_path, browser_page):
    import numpy as np

    run = tmp_path / "runs" / "evaluate"
    write_run(run, "evaluate", metrics=scores())
    (run / "examples").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (200, 96, 96, 3), dtype=np.uint8)
    for i, pixels in enumerate(noise):
        Image.fromarray(pixels).save(run / "examples" / f"{i}.png")
    heat = [[(7 * i + 13 * j) % 256 for j in range(14)] for i in range(14)]
    with open(run / "examples.jsonl", "w", encoding="utf-8") as f:
        for i in range(10_000):
            row = {
                "split": SPLITS[i % 3],
                "question_id": i,
                "question": f"Is there thing {i} in the image? " + "x" * 400,
            }
            row |= {"label": "no", "answer": "yes" if i % 100 == 0 else "no", "image": f"examples/{i % 200}.png"}
            row |= {"answer_shuffled": "no " * 1300, "query": "a thing", "heat": heat}
            f.write(json.dumps(row) + "\n")
    index = build_report([tmp_path / "runs"], tmp_path / "report")
    assert index.stat().st_size < 20e6
    page, complaints = new_page(browser_page, index)
    total = int(page.inner_text("#example-count").split()[2].replace(",", ""))
    assert total > 5000 and page.locator("#tiles .tile").count() == 30
    page.select_option("#filter-outcome", "wrong")
    assert int(page.inner_text("#example-count").split()[0]) == pytest.approx(total / 100, abs=40)
    assert page.locator("#tiles img").count() == 30 and complaints == []
