"""All protocols end to end: an oracle scores 100 on every format, a blind model is at chance, bad data is named."""

import io
import json
import tarfile

import pytest
from oracle import COLOURS, Oracle, evaluate, preprocess, tokenizer, write_data
from safetensors.torch import load_file
from torch import nn

import diffclip
from diffclip.base.errors import InputError
from diffclip.benchmarks import PROTOCOLS, datasets
from diffclip.benchmarks import __main__ as command


@pytest.fixture
def root(tmp_path):
    write_data(tmp_path / "data")
    return tmp_path / "data"


def test_an_oracle_scores_100_everywhere(root, tmp_path):
    metrics = evaluate(root, tmp_path / "out")
    scores = {key: value for key, value in metrics.items() if key.rsplit("/", 1)[-1] not in ("C", "sd", "ci95")}
    assert set(scores.values()) == {100.0}
    assert {key.split("/")[0] for key in scores} == set(PROTOCOLS)
    expected = {
        *(f"zero_shot/colour/{score}" for score in ("top1", "top5", "mean_per_class")),
        *("shift/dim/top1", "shift/dim/mean_per_class", "shift/average", "shift/average_with_base"),
        *(f"retrieval/{way}/R@{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)),
        *("linear_probe/colour/accuracy", "linear_probe/colour/mean_per_class", "few_shot/colour/accuracy"),
        *("mmvp/Warm", "mmvp/Cold", "mmvp/average"),
    }
    known = {key.split("/")[0] for key in expected}
    assert {key for key in scores if key.split("/")[0] in known} == expected


def test_shots_ways_and_features_by_choice(root, tmp_path):
    class Forget(nn.Identity):
        def forward(self, features):
            return features * 0 + 1

    projected = Oracle()
    projected.visual.head = Forget()

    options = {"protocols": ["linear_probe", "few_shot"], "way": 3, "shot": 1}
    seen = evaluate(root, tmp_path / "a", projected, **options)
    lost = evaluate(root, tmp_path / "b", projected, probe_features="after", **options)
    assert seen["few_shot/colour/accuracy"] == seen["linear_probe/colour/accuracy"] == 100
    assert lost["few_shot/colour/accuracy"] == pytest.approx(100 / 3)  # three ways
    assert lost["linear_probe/colour/accuracy"] == pytest.approx(100 / 6)
    about = json.loads((tmp_path / "b/clip_benchmarks.json").read_text())["about"]
    assert about["few_shot"]["shot"] == 1 and about["probe_features"] == "after"
    with pytest.raises(InputError, match="neither before nor after"):
        evaluate(root, tmp_path / "c", probe_features="middle")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["shards", "parquet"])
def test_numbered_labels_give_the_same_scores_as_class_folders(root, tmp_path, form):
    """The same images in clip-benchmark's shards, or in parquet, in another order."""
    names = list(COLOURS)
    sets = {("classification", "colour", split): names for split in ("train", "val", "test")}
    sets[("shifts", "dim", "test")] = ["pink", "lime", "black"]
    other = tmp_path / "other"
    for (part, name, split), classes in sets.items():
        folder = root / part / name / (split if part == "classification" else "")
        rows = [(path.read_bytes(), c) for c, n in enumerate(classes) for path in (folder / f"{n}_thing").glob("*.png")]
        target = other / part / name
        (target / split).mkdir(parents=True)
        if form == "parquet":
            import pyarrow
            import pyarrow.parquet

            images, labels = zip(*rows)
            table = pyarrow.table({"image": [{"bytes": data, "path": None} for data in images], "label": labels})
            pyarrow.parquet.write_table(table, target / split / "0.parquet")
        else:
            with tarfile.open(target / split / "0.tar", "w") as tar:
                for number, (data, label) in enumerate(rows):
                    for suffix, content in (("webp", data), ("cls", str(label).encode())):
                        info = tarfile.TarInfo(f"s{number:07d}.{suffix}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
        (target / "classnames.txt").write_text("\n".join(f"{n} thing" for n in classes))
    (other / "classification/colour/zeroshot_classification_templates.txt").write_text("a {c} here\n{c}\n")
    # the official fit of these few rows stays at zero or leaves it by the order of the labels alone
    wanted, found = (evaluate(where, tmp_path / out, probe="fast") for where, out in ((root, "a"), (other, "b")))
    assert {key: wanted[key] for key in found} == found and found["shift/dim/top1"] == 100
    blind = evaluate(other, tmp_path / "c", Oracle(blind=True))
    assert blind["shift/dim/top1"] == pytest.approx(100 / 3)
    (other / "classification/colour/classnames.txt").write_text("red thing\nlime thing")
    with pytest.raises(InputError, match="label 5 has no prompt name, there are 2"):
        evaluate(other, tmp_path / "d")


def test_a_blind_model_is_at_chance(root, tmp_path):
    metrics = evaluate(root, tmp_path / "out", Oracle(blind=True))
    assert metrics["zero_shot/colour/top1"] == pytest.approx(100 / 6)
    assert metrics["zero_shot/colour/top5"] == pytest.approx(500 / 6)
    assert metrics["shift/dim/top1"] == pytest.approx(100 / 3)
    assert metrics["retrieval/text_to_image/R@1"] == pytest.approx(100 / 6)
    assert metrics["linear_probe/colour/accuracy"] == pytest.approx(100 / 6)
    assert metrics["few_shot/colour/accuracy"] == pytest.approx(20)
    assert metrics["mmvp/average"] == 0


@pytest.mark.slow
def test_outcomes_average_to_the_scores_and_a_rerun_repeats_them(root, tmp_path):
    metrics = evaluate(root, tmp_path / "out")
    outcomes = load_file(tmp_path / "out/clip_outcomes.safetensors")
    for key, values in outcomes.items():
        assert 100 * values.double().mean().item() == pytest.approx(metrics[key])
    assert len(outcomes["zero_shot/colour/top1"]) == 42
    assert len(outcomes["retrieval/text_to_image/R@1"]) == 12
    assert set(metrics) - set(outcomes) >= {"mmvp/Warm"}
    stored = json.loads((tmp_path / "out/clip_benchmarks.json").read_text())
    assert stored["metrics"] == metrics == evaluate(root, tmp_path / "out")


def test_only_what_is_asked_and_possible_runs(root, tmp_path):
    found = evaluate(root, tmp_path / "out", protocols=["shift", "mmvp"])
    assert {key.split("/")[0] for key in found} == {"shift", "mmvp"}
    for split in ("train", "val"):
        (root / "classification/colour" / split).rename(tmp_path / split)
    found = evaluate(root, tmp_path / "out", protocols=["zero_shot", "linear_probe", "few_shot"])
    assert "zero_shot/colour/top1" in found and "linear_probe/colour/accuracy" not in found
    skipped = json.loads((tmp_path / "out/clip_benchmarks.json").read_text())["skipped"]
    assert set(skipped) == {"linear_probe/colour", "few_shot/colour"}


def test_a_suite_file_gives_the_same_as_the_layout(root, tmp_path):
    (root / "classification/colour").rename(root / "elsewhere")
    (root / "shifts/dim").rename(root / "other")
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "classification: {colour: {folder: elsewhere, metric: mean_per_class}}\n"
        "shifts: {dim: {folder: other, of: colour}}\n"
        "retrieval: {flags: {path: retrieval/00000.tar}}\n"
    )
    found = evaluate(root, tmp_path / "out", suite=datasets.read_suite_file(suite))
    assert (
        found["zero_shot/colour/top1"] == found["shift/dim/top1"] == found["retrieval/flags/image_to_text/R@1"] == 100
    )


@pytest.mark.parametrize(
    "suite,message",
    [
        ({"images": {}}, "unknown key images; use classification, shifts, retrieval, mmvp"),
        ({"classification": {"a": {"folder": "x", "metrics": "y"}}}, "classification a: unknown key metrics"),
        ({"retrieval": {"a": {}}}, "retrieval a: path is missing"),
        ({"classification": {"a": {"folder": "gone"}}}, "gone does not exist"),
        ({"shifts": {"a": {"folder": "shifts/dim"}}}, "no classification set has all of its classes"),
        ({"shifts": {"a": {"folder": "shifts/dim", "of": "b"}}}, "not a classification set"),
        ({"classification": {"a": {"folder": "classification/colour", "metric": "f1"}}}, "metric f1"),
    ],
)
def test_bad_suites_are_named(root, suite, message):
    with pytest.raises(InputError, match=message):
        datasets.read(root, suite)


def rename_class(root):
    (root / "classification/colour/test/red_thing").rename(root / "classification/colour/test/green_thing")


def empty_class(root):
    (root / "classification/colour/val/novel").mkdir()
    names = json.loads((root / "classification/colour/classnames.json").read_text())
    (root / "classification/colour/classnames.json").write_text(json.dumps([*names, "novel"]))


def no_prompt(root):
    (root / "classification/colour/classnames.json").write_text('["red thing", ""]')


def not_trained(root):
    (root / "classification/colour/train/red_thing").rename(root / "moved")


def no_data(root):
    for part in ("classification", "shifts", "retrieval", "mmvp"):
        (root / part).rename(root.parent / part)


def corrupt(root):
    (root / "shifts/dim/pink_thing/0.png").write_bytes(b"not an image")


@pytest.mark.slow
@pytest.mark.parametrize(
    "spoil,message",
    [
        (rename_class, "test/green_thing has no prompt name"),
        (empty_class, "val/novel holds no images"),
        (no_prompt, "classnames.json.*no prompt name"),
        (not_trained, "train has no images of 'red thing'"),
        (no_data, "holds none of classification/"),
        (corrupt, "pink_thing/0.png cannot be read as an image"),
    ],
)
def test_bad_data_is_named(root, tmp_path, spoil, message):
    spoil(root)
    with pytest.raises(InputError, match=message):
        evaluate(root, tmp_path / "out")


def test_class_names_as_an_object_and_without_a_file(root):
    path = root / "classification/colour/classnames.json"
    path.write_text(json.dumps({f"{c}_thing": f"a {c} THING" for c in COLOURS}))
    read = datasets.read(root, datasets.suite_from_folder(root)).classification["colour"]
    assert read.classnames[0] == "a red THING"
    assert read.splits["test"].labels[-1] == 3  # the last folder is white_thing
    path.unlink()
    read = datasets.read(root, datasets.suite_from_folder(root)).classification["colour"]
    assert read.classnames[0] == "black thing"


def test_real_folders(shared_data):
    root = shared_data("cifar10").parent
    suite = {
        "classification": {"cifar10": {"folder": "cifar10"}, "fashion": {"folder": "fashion/imagefolder"}},
        "retrieval": {"flickr8k": {"path": "flickr8k/retrieval_dev/wds"}},
    }
    data = datasets.read(root, suite)
    assert len(data.classification["cifar10"].classnames) == 10
    assert "Casual Shoes" in data.classification["fashion"].classnames
    assert len(data.classification["fashion"].splits["test"]) == 600
    assert len(data.retrieval["flickr8k"].captions) == 5000


@pytest.mark.slow
def test_command_line_compares_models(root, tmp_path, monkeypatch, capsys):
    models = {"sighted": Oracle(), "blind": Oracle(blind=True)}
    monkeypatch.setattr(
        diffclip, "load", lambda path: (models[path.split("/")[-1]], preprocess, tokenizer), raising=False
    )
    arguments = ["--model", "runs/sighted", "runs/blind", "--data-root", str(root), "--out", str(tmp_path / "out")]
    command.main([*arguments, "--episodes", "50"])
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if "zero_shot/colour/top1" in line)
    assert "100.0" in row and "16.7" in row and "-83.3 [" in row and "n.s." not in row
    assert (tmp_path / "out/blind/clip_benchmarks.json").exists()
    with pytest.raises(InputError, match="nowhere does not exist: give the folder that holds the benchmark data"):
        command.main(["run", *arguments, "--data-root", "nowhere"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--suite", "papr"], "--suite papr: no such file: did you mean paper"),
        (["--templates", "imagenet8"], "--templates imagenet8: no such file: did you mean imagenet80"),
        (["--protocols", "few-shot"], "--protocols few-shot: did you mean few_shot"),
        (["--probe", "fst"], "--probe fst: did you mean fast"),
        (["--episodes", "0"], "must be at least 1"),
        (["--workers", "-1"], "--workers"),
        (["--seed=-1"], "must be at least 0"),
        (["--batch_size", "nan"], "must be at least 1"),
        (["--date-root", "x"], "unknown flag --date-root: did you mean --data_root"),
        (["--device", "mars"], "device mars: not on this machine"),
    ],
)
def test_slips_on_the_command_line_are_named(arguments, message, root, tmp_path):
    with pytest.raises(InputError, match=message):
        command.main(["--model", "runs/x", "--data_root", str(root), "--output_dir", str(tmp_path), *arguments])
