"""Zero-shot classifier and scores against the official numbers, open_clip and hand-made cases."""

import json

import numpy as np
import pytest
import torch

from diffclip.base.backbones import open_clip
from diffclip.base.errors import InputError
from diffclip.benchmarks import prompts, zero_shot


@pytest.fixture(scope="module")
def official(golden):
    folder = golden("07c_zeroshot_retrieval")
    return (
        {k: torch.from_numpy(v) for k, v in np.load(folder / "features.npz").items()},
        {k: torch.from_numpy(v) for k, v in np.load(folder / "classifier.npz").items()},
        json.loads((folder / "expected.json").read_text()),
    )


def test_class_means_match_the_official_classifier(official):
    features, classifier, _ = official
    ours = prompts.class_means(features["zs_text"])
    assert (ours.T - classifier["classifier"]).abs().max() < 1e-6
    logits = 100 * torch.nn.functional.normalize(features["zs_image"], dim=-1) @ ours.T
    assert (logits - classifier["logits"]).abs().max() < 2e-4


@pytest.mark.parametrize("classes,case", [(12, "all12"), (4, "first4_classes_only")])
def test_scores_match_clip_benchmark(official, classes, case):
    features, _, expected = official
    keep = features["zs_target"] < classes
    vectors = prompts.class_means(features["zs_text"])[:classes]
    found = zero_shot.classify(features["zs_image"][keep], vectors, features["zs_target"][keep].long(), block=50)
    metrics = found.metrics()
    want = expected["classification_clip_benchmark"][case]
    assert metrics["top1"] / 100 == pytest.approx(want["acc1"], abs=1e-6)
    assert metrics["mean_per_class"] / 100 == pytest.approx(want["mean_per_class_recall"], abs=1e-6)
    assert ("top5" not in metrics) if classes < 5 else metrics["top5"] / 100 == pytest.approx(want["acc5"], abs=1e-6)


def test_slip_mean_per_class_where_it_is_defined(official):
    """SLIP's own score is NaN as soon as a class without targets is predicted; on the other rows we agree."""
    features, _, expected = official
    found = zero_shot.classify(
        features["zs_image"], prompts.class_means(features["zs_text"]), features["zs_target"].long()
    )
    rows = found.predicted != 11
    assert int((~rows).sum()) == expected["classification_slip"]["n_rows_predicted_11"]
    ours = zero_shot.mean_per_class(found.correct[rows], found.labels[rows])
    assert ours == pytest.approx(expected["classification_slip"]["mean_per_class_rows_not_predicted_11"], abs=1e-3)


def test_classifier_equals_open_clips():
    torch.manual_seed(0)
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    model = open_clip.model.CLIP(24, vision, text).eval()
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    names, templates = ["red circle", "blue star", "dog"], prompts.templates("imagenet7")
    theirs = open_clip.build_zero_shot_classifier(
        model, tokenizer, names, [t.replace("{c}", "{}") for t in templates], num_classes_per_batch=1
    )
    ours = prompts.classifier(model, tokenizer, names, templates, batch_size=4)
    assert ours.shape == (3, 24)
    assert (ours.T - theirs).abs().max() < 1e-6


def test_named_templates():
    assert len(prompts.templates("imagenet7")) == 7
    assert len(prompts.templates("imagenet80")) == 80
    assert prompts.templates("imagenet7")[0] == "itap of a {c}."
    assert "a photo of a {c}." in prompts.templates("imagenet80")


def test_prompts_keep_a_class_together():
    assert prompts.prompts(["a", "b"], ["x {c}", "{c} y"]) == ["x a", "a y", "x b", "b y"]


def test_bad_templates_are_refused(tmp_path):
    with pytest.raises(InputError, match="neither imagenet7"):
        prompts.templates("nowhere.json")
    path = tmp_path / "templates.json"
    path.write_text('["a photo"]')
    with pytest.raises(InputError, match=r"templates\.json.*\{c\}"):
        prompts.templates(path)
    path.write_text('["a photo')
    with pytest.raises(InputError, match="not valid JSON"):
        prompts.templates(path)


def test_mean_per_class_is_the_mean_of_recalls():
    labels = torch.tensor([0, 0, 0, 0, 2, 2, 5])
    correct = torch.tensor([1, 1, 1, 0, 0, 1, 0], dtype=torch.bool)
    assert zero_shot.mean_per_class(correct, labels) == pytest.approx(100 * (0.75 + 0.5 + 0) / 3)
    assert zero_shot.balanced(torch.ones(7), labels).mean() == pytest.approx(1)


@pytest.mark.parametrize("line", ["lambda c: f'a bad photo of a {c}.',", "'a photo of a {}.',", 'f"itap of a {c}.",'])
def test_lines_of_python_are_no_prompts(tmp_path, line):
    (tmp_path / "templates.txt").write_text(f"{line}\n")
    with pytest.raises(InputError, match=r"template 1, .* is Python: write only the text between the quotes"):
        prompts.templates(tmp_path / "templates.txt")
    (tmp_path / "templates.txt").write_text('"{c}", says the label\n')
    assert prompts.templates(tmp_path / "templates.txt") == ['"{c}", says the label']
