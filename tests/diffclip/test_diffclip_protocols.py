"""Every protocol of the table, of whatever kind, has all that a protocol needs; a new one is told what it lacks."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from oracle import Oracle, evaluate, write_data
from safetensors.torch import load_file

from diffclip.base.errors import InputError
from diffclip.benchmarks import PROTOCOLS, Entry, datasets
from diffclip.benchmarks.__main__ import parser
from diffclip.benchmarks.comparison import COMPARED
from diffclip.benchmarks.features import Encoder
from diffclip.benchmarks.protocol import Protocol, load
from stages.report.tables import SECTIONS

NO_PERCENT = ("C", "sd", "ci95")  # ends of numbers that are no score


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Data for every part of a suite."""
    root = tmp_path_factory.mktemp("protocols") / "data"
    write_data(root)
    return root


@pytest.fixture(scope="module")
def data(root):
    return datasets.read(root, datasets.suite_from_folder(root))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_module_has_the_protocol(name):
    assert isinstance(load(name), Protocol)
    assert PROTOCOLS[name].part in datasets.KEYS or load(name).read, f"who reads the part {PROTOCOLS[name].part}?"


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_command_line_offers_it_and_suggests_it(name):
    required = ["--model", "m", "--data_root", "d", "--output_dir", "o"]
    assert parser().parse_args([*required, "--protocols", name]).protocols == [name]
    with pytest.raises(InputError, match=f"--protocols {name}s: did you mean {name}"):
        parser().parse_args([*required, "--protocols", f"{name}s"])


@pytest.mark.parametrize("part", dict.fromkeys(entry.part for entry in PROTOCOLS.values()))
def test_data_that_is_not_there_is_named(tmp_path, part):
    entry = {"path" if part == "retrieval" else "folder": "gone"}
    with pytest.raises(InputError, match="gone"):
        datasets.read(tmp_path, {part: entry if part in datasets.OWN else {"x": entry}})
    with pytest.raises(InputError, match=f"suite: {part} .*unknown key other"):
        datasets.read(tmp_path, {part: entry | {"other": 1} if part in datasets.OWN else {"x": entry | {"other": 1}}})


@pytest.mark.parametrize("name", PROTOCOLS)
def test_scores_outcomes_and_tables(root, data, tmp_path, name):
    part = PROTOCOLS[name].part
    assert data.sets(part), f"tests/diffclip/oracle.py: write_data has no {part} to score {name} on"
    metrics = evaluate(root, tmp_path, protocols=(name,))
    scores = {key: value for key, value in metrics.items() if key.rsplit("/", 1)[-1] not in NO_PERCENT}
    assert scores and all(key.startswith(f"{name}/") for key in metrics)
    assert set(scores.values()) == {100.0}  # percent, of a model that is always right
    outcomes = load_file(tmp_path / "clip_outcomes.safetensors")
    assert outcomes and outcomes.keys() <= scores.keys(), "outcomes are kept under the name of their score"
    assert all(100 * values.double().mean().item() == pytest.approx(scores[key]) for key, values in outcomes.items())
    assert any(key.rsplit("/", 1)[-1] in COMPARED for key in outcomes), "no score of it would be compared"
    for heading, pattern in PROTOCOLS[name].tables.items():
        assert any(re.fullmatch(pattern, key) for key in scores), f"the report's table {heading!r} would be empty"
    assert PROTOCOLS[name].tables, "the report has no table of it"


def test_the_report_has_the_tables_of_all():
    tables = {table for entry in PROTOCOLS.values() for table in entry.tables.items()}
    assert tables <= {section[:2] for section in SECTIONS}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_blind_model_scores_less(root, tmp_path, name):
    scores = evaluate(root, tmp_path, Oracle(blind=True), protocols=(name,))
    outcomes = load_file(tmp_path / "clip_outcomes.safetensors")
    assert any(scores[key] < 60 for key in outcomes)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_its_images_are_those_that_it_encodes(root, data, tmp_path, name, monkeypatch):
    """With several devices all of them are encoded before."""
    protocol, encoded = load(name), set()
    announced = [
        images.digest
        for set_name, dataset in data.sets(PROTOCOLS[name].part).items()
        for images in protocol.images(set_name, dataset).values()
    ]
    encode = Encoder.images
    monkeypatch.setattr(
        Encoder, "images", lambda self, images, *rest: encoded.add(images.digest) or encode(self, images, *rest)
    )
    evaluate(root, tmp_path, protocols=(name,))
    assert encoded == set(announced)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_what_it_cannot_score_is_skipped_with_the_reason(root, tmp_path, name):
    """Only test images are there: it scores them, or says why not; without its part nothing of it is scored."""
    for source in root.rglob("*"):
        if source.is_file() and not {"train", "val"} & set(source.parts):
            target = tmp_path / "data" / source.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    metrics = evaluate(tmp_path / "data", tmp_path / "out", protocols=(name,))
    skipped = json.loads((tmp_path / "out/clip_benchmarks.json").read_text())["skipped"]
    assert bool(metrics) != bool(skipped) and all(key.startswith(f"{name}/") for key in skipped)
    other = next(entry.part for entry in PROTOCOLS.values() if entry.part not in (PROTOCOLS[name].part, "shifts"))
    suite = {other: datasets.suite_from_folder(root)[other]}
    missing = {f"{PROTOCOLS[name].part}/x": "download it"}
    assert evaluate(root, tmp_path / "none", protocols=(name,), suite=suite, missing=missing) == {}
    assert json.loads((tmp_path / "none/clip_benchmarks.json").read_text())["skipped"] == missing


def add_entry(monkeypatch, name, entry, module):
    monkeypatch.setitem(sys.modules, f"diffclip.benchmarks.{name}", module)
    monkeypatch.setitem(PROTOCOLS, name, entry)


def test_the_pages_example_is_a_protocol(root, data, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/add_benchmark.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    ((name, entry),) = eval("{" + re.search(r'^    ("nearest": Entry.*)$', page, re.MULTILINE)[1] + "}").items()
    module = ModuleType(name)
    exec(code, module.__dict__)
    add_entry(monkeypatch, name, entry, module)
    test_scores_outcomes_and_tables(root, data, tmp_path, name)
    test_its_images_are_those_that_it_encodes(root, data, tmp_path / "again", name, monkeypatch)


def test_data_of_its_own_needs_no_more_than_the_entry(tmp_path, monkeypatch):
    def score(evaluation, name, value):
        evaluation.add("brightness", {"accuracy": value}, {"accuracy": torch.ones(3)})

    module = ModuleType("brightness")
    module.PROTOCOL = Protocol(lambda name, value: {}, score, read=lambda folder: len(list(folder.iterdir())) * 50.0)
    add_entry(monkeypatch, "brightness", Entry("lamps", {"Brightness": r"brightness/accuracy"}), module)
    monkeypatch.setitem(datasets.OWN, "lamps", "brightness")
    monkeypatch.setattr(datasets, "PARTS", (*datasets.PARTS, "lamps"))
    for name in "ab":
        (tmp_path / "data" / "lamps" / name).mkdir(parents=True)
    assert evaluate(tmp_path / "data", tmp_path / "out", protocols=("brightness", "mmvp")) == {
        "brightness/accuracy": 100
    }
