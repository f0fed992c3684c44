"""python -m mllm.pope: what its commands print and write, against the functions behind them."""

import json
import subprocess
import sys

import numpy as np
import pytest
from launch import ROOT
from test_mllm_pope import rows, write

from diffclip.base.errors import InputError, exit_on_input_error
from mllm.pope.__main__ import main
from mllm.pope.images import find_images
from mllm.pope.margins import margins
from mllm.pope.questions import SPLITS, read


@pytest.fixture
def pope(tmp_path, picture):
    """The official three files about six images, and the images."""
    for split in SPLITS:
        write(tmp_path / f"coco_pope_{split}.json", rows(split))
    (tmp_path / "images").mkdir()
    for i in range(6):
        picture(i).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def answers(pope, says, file):
    lines = [{"pass": "model", **q._asdict(), "answer": says(q)} for q in read(pope)]
    file.parent.mkdir(parents=True, exist_ok=True)
    write(file, lines)


def test_check_names_release_oracle_blind_rule_and_pictures(pope, capsys):
    main(["check", str(pope), "--image_root", str(pope / "images")])
    out = capsys.readouterr().out
    assert "random 24: no public release" in out and "; digest " in out
    assert "an oracle scores 100.0" in out and "6 images found" in out
    (pope / "images" / "4.png").unlink()
    with pytest.raises(InputError, match=r"1 images.*4\.png"):
        main(["check", str(pope), "--image_root", str(pope / "images")])


def test_score_says_whether_the_image_is_used(pope, capsys):
    answers(pope, lambda q: q.label.title(), pope / "oracle.jsonl")
    main(["score", str(pope), str(pope / "oracle.jsonl")])
    assert "the model uses the image: accuracy 100.0" in capsys.readouterr().out
    answers(pope, lambda q: "Yes.", pope / "yes.jsonl")
    main(["score", str(pope), str(pope / "yes.jsonl"), "--parser", "strict"])
    out = capsys.readouterr().out
    assert "the model does not use the image: accuracy 25.0" in out
    assert "parser lmms_eval" in out and "100.0" in out  # all invalid by lmms-eval's rule
    assert "parser lmms_eval: 72 of 72 answers are neither yes nor no, e.g. random 0.png, Is there a cat" in out
    assert "parser strict: 72" not in out


def test_compare_has_the_papers_columns_and_mcnemars_p(pope, capsys, tmp_path):
    """One model is right on all 24 questions of a split, the other on 18: p = 2 / 2^6."""
    answers(pope, lambda q: q.label, tmp_path / "a" / "pope" / "answers.jsonl")
    answers(pope, lambda q: "no", tmp_path / "b" / "pope" / "answers.jsonl")
    main(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    out = capsys.readouterr().out
    assert out.count("0.031") == 6 and "100.0" in out and "75.0" in out
    write(tmp_path / "b" / "pope" / "answers.jsonl", [])
    with pytest.raises(InputError, match="different questions"):
        main(["compare", str(tmp_path / "a"), str(tmp_path / "b")])


def test_null_answers_are_told_of(pope, capsys, tmp_path):
    answers(pope, lambda q: None, tmp_path / "a" / "pope" / "answers.jsonl")
    answers(pope, lambda q: q.label, tmp_path / "b" / "pope" / "answers.jsonl")
    main(["score", str(pope), str(tmp_path / "a" / "pope" / "answers.jsonl")])
    out = capsys.readouterr().out
    assert "72 of 72 answers are null" in out and "does not use the image: accuracy 0.0" in out
    main(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert "72 of 72 answers are null" in capsys.readouterr().out


def test_compare_matches_answers_as_all_else_does(pope, capsys, tmp_path):
    """One of the evaluations was asked POPE's misspelt questions; an answer holds what is no line end."""
    answers(pope, lambda q: f"{q.label} \u2028", tmp_path / "a" / "pope" / "answers.jsonl")
    answers(pope, lambda q: "no", tmp_path / "b.jsonl")
    text = (tmp_path / "b.jsonl").read_text().replace("image?", "imange?").replace('"0.png"', '"0.jpg"')
    (tmp_path / "b.jsonl").write_text(text)
    main(["compare", str(tmp_path / "a"), str(tmp_path / "b.jsonl"), "--parser", "strict"])
    assert capsys.readouterr().out.count("0.031") == 6
    write(tmp_path / "b.jsonl", [{"image": "0.png", "text": "Is there a cat in the image?", "answer": "no"}])
    with pytest.raises(InputError, match=r"b\.jsonl: `0\.png`.* has split `` and label ``"):
        main(["compare", str(tmp_path / "a"), str(tmp_path / "b.jsonl")])


def test_margins_with_all_controls(pope, assembled, tmp_path):
    assembled.save(tmp_path / "run")
    place = ["--pope", str(pope), "--image_root", str(pope / "images"), "--out", str(tmp_path / "out")]
    main(["margins", str(tmp_path / "run"), *place, "--device", "cpu", "--generate"])
    scores = json.loads((tmp_path / "out" / "margins.json").read_text())
    assert {"model", "shuffled", "grey", "no_image", "blind", "generated", "version"} == set(scores)
    lines = [json.loads(line) for line in (tmp_path / "out" / "margins.jsonl").read_text().splitlines()]
    questions = read(pope)
    images = find_images(questions, pope / "images")
    direct = margins(assembled, questions, lambda name: images[name].open(), batch_size=1)
    own = [line["margin"] for line in lines if line["pass"] == "model"]
    np.testing.assert_allclose(own, direct, atol=1e-4)
    grey = {line["text"]: set() for line in lines}
    for line in lines:
        if line["pass"] == "grey":
            grey[line["text"]].add(round(line["margin"], 4))
    assert all(len(values) == 1 for values in grey.values())  # one image for all
    with pytest.raises(InputError, match="--image_root is missing"):
        main(["margins", str(tmp_path / "run"), "--pope", str(pope), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--device", "mars"], "device mars: not on this machine"),
        (["--batch_size", "0"], "'0' must be at least 1"),
        (["--batchsize", "1"], "unknown flag --batchsize: did you mean --batch_size"),
        (["--batch-size", "-1"], "'-1' must be at least 1"),
    ],
)
def test_flags_are_refused_at_once(tmp_path, flags, words):
    command = ["margins", str(tmp_path / "no_run"), "--pope", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]
    with pytest.raises(InputError, match=words):
        main([*command, *flags])
    with pytest.raises(InputError, match=r"audit|COMMAND"):
        main(["adit", "50", "50", "50"])
    with pytest.raises(InputError, match="'101' must be at least 0 and at most 100"):
        main(["audit", "101", "50", "50"])


def test_help_starts_without_the_libraries():
    command = [sys.executable, "-X", "importtime", "-m", "mllm.pope", "diagnose", "--help"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    imported = {line.split("|")[-1].strip().split(".")[0] for line in ended.stderr.splitlines()}
    assert "--image_root" in ended.stdout and not imported & {"torch", "numpy", "scipy", "rich", "pyarrow"}


def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended, exit_on_input_error():
        main(["check", str(tmp_path / "nowhere")])
    errors = capsys.readouterr().err
    assert ended.value.code == 2 and errors.startswith("error: ") and errors.count("\n") == 1
