"""The real lmms-eval, offline, with a tiny random model: its answers against the model asked directly."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import run_ranks

from diffclip.base.errors import InputError
from diffclip.base.files import read_jsonl
from mllm.conversation import prompt
from mllm.pope.images import find_images
from mllm.pope.lmms import _run_with_progress, _same, evaluate_with_lmms, score_answers, write_parquet, write_tasks
from mllm.pope.parsers import parse_lmms_eval
from mllm.pope.questions import POST_PROMPT, SPLITS, read
from mllm.pope.scores import CONTROLS, GREY, grey_image, intervals, score, shuffle_images

lmms_eval = pytest.importorskip("lmms_eval")
OBJECTS = ("red square", "small blue circle", "green star")


@pytest.fixture
def pope_dir(tmp_path, picture):
    """POPE about four images; a name and a question hold what some readers take for the end of a line."""
    coin = random.Random(0)
    folder = tmp_path / "pope"
    (folder / "images").mkdir(parents=True)
    names = ["0.png", "1.png", "2\u2028\x85 é.png", "3.png"]
    for i, name in enumerate(names):
        picture(i).save(folder / "images" / name)
    for split in SPLITS:
        with open(folder / f"scenes_pope_{split}.json", "w") as f:
            for i in range(4):
                for n, thing in enumerate(coin.sample(OBJECTS, 2)):
                    space = "\u2028" if i == 3 else " "
                    text = f"Is there a{space}{thing} in the image?"
                    row = {"question_id": 2 * i + n, "image": names[i], "text": text}
                    f.write(json.dumps({**row, "label": coin.choice(("yes", "no"))}) + "\n")
    return folder


@pytest.fixture
def run_dir(assembled, tmp_path):
    assembled.save(tmp_path / "run")
    return tmp_path / "run"


def asked_about(pope_dir):
    """POPE's questions and their images."""
    questions = read(pope_dir)
    return questions, find_images(questions, pope_dir / "images")


def ask_directly(model, processor, picture, text, **options):
    turns = [{"from": "human", "value": f"{'<image>' if picture else ''}\n{text}{POST_PROMPT}".lstrip()}]
    inputs = processor(images=[picture] if picture else None, text=[prompt(turns, "vicuna")], return_tensors="pt")
    tokens = model.generate(**inputs, **{"max_new_tokens": 16, **options})[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


@pytest.mark.slow
def test_lmms_eval_on_two_processes_gives_the_models_own_answers(
    installed, assembled, run_dir, pope_dir, picture, tmp_path
):
    out = tmp_path / "out"
    questions, images = asked_about(pope_dir)
    scores = evaluate_with_lmms(run_dir, questions, images, out, batch_size=5, processes=2, seed=1)
    passes = {"model": questions, **{name: control(questions, 1) for name, control in CONTROLS.items()}}
    shown = {q.image: picture(int(q.image[0])) for q in questions} | {GREY: grey_image(), "": None}
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    given = {name: [line["answer"] for line in lines if line["pass"] == name] for name in passes}
    for name, asked in passes.items():
        direct = [ask_directly(*assembled, shown[q.shown], q.text) for q in asked]
        assert given[name] == direct
        for split, row in score_answers(asked, direct).items():
            assert scores[name][split] | row == scores[name][split]
    said = [parse_lmms_eval(answer) for answer in given["model"]]
    low, high = intervals(questions, said, seed=1)["mean"]["accuracy"]
    assert (scores["model"]["mean"]["accuracy_low"], scores["model"]["mean"]["accuracy_high"]) == (low, high)
    assert given["model"] != given["shuffled"]  # the model looks at what it is shown
    assert scores["always_yes"]["mean"]["yes_rate"] == 1.0 and set(scores["blind"]) == {*SPLITS, "mean"}


@pytest.mark.slow
def test_lmms_evals_own_pope_task_runs(installed, assembled, run_dir, pope_dir, picture, tmp_path, monkeypatch):
    """The standard task, whose set of the Hub lies in a folder of its name, where `datasets` looks first."""
    questions, images = asked_about(pope_dir)
    task = Path(lmms_eval.__file__).parent / "tasks" / "pope" / "pope.yaml"
    name = next(line.split()[1] for line in task.read_text().splitlines() if line.startswith("dataset_path:"))
    cwd = tmp_path / "elsewhere"  # not beside a folder named like the task
    (cwd / name / "data").mkdir(parents=True)
    write_parquet(questions, images, cwd / name / "data" / "test-00000-of-00001.parquet")
    command = ["lmms_eval", "--model", "diffclip_llava", "--tasks", "pope", "--log_samples"]
    command += ["--model_args", f"pretrained={run_dir}", "--batch_size", "3", "--output_path", "out"]
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(cwd)
    run_ranks(0, *command)
    (samples,) = (cwd / "out").rglob("*_samples_pope.jsonl")
    rows = sorted((row for _, row in read_jsonl(samples)), key=lambda row: row["doc_id"])
    given = [row["filtered_resps"] for row in rows]
    given = [one[0] if isinstance(one, list) else one for one in given]
    direct = [ask_directly(*assembled, picture(int(q.image[0])), q.text) for q in questions]
    assert [a[:4] for a in given] == [a[:4] for a in direct]  # the task allows longer answers


@pytest.mark.slow
def test_the_command_with_batch_size_auto_heeds_a_tasks_options(
    installed, assembled, run_dir, pope_dir, picture, tmp_path
):
    """`lmms-eval` as a user types it, on a task whose options are those that other models' tasks have."""
    questions, images = asked_about(pope_dir)
    questions = [q for q in questions if q.split == questions[0].split]
    (tmp_path / "tasks").mkdir()
    write_parquet(questions, images, tmp_path / "tasks" / "tiny.parquet")
    write_tasks(tmp_path / "tasks", {"tiny": tmp_path / "tasks" / "tiny.parquet"})
    file = tmp_path / "tasks" / "tiny.yaml"
    options = "  max_gen_toks: 5\n  temperature: 0\n  do_sample: true\n  top_p: 0\n  repetition_penalty: 1.7\n"
    options += "  until: []\n  image_aspect_ratio: pad\n"
    file.write_text(file.read_text().replace("  max_new_tokens: 16\n  do_sample: false\n", options))
    command = [str(Path(sys.executable).with_name("lmms-eval")), "--model", "diffclip_llava", "--tasks", "tiny"]
    command += ["--model_args", f"pretrained={run_dir}", "--include_path", str(tmp_path / "tasks")]
    command += ["--batch_size", "auto", "--output_path", str(tmp_path / "out"), "--log_samples"]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    cache = {"LMMS_EVAL_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": paths}
    told = subprocess.run(command, cwd=tmp_path, env={**os.environ, **cache}, capture_output=True, text=True)
    assert "without the generation options image_aspect_ratio" in told.stdout + told.stderr, told.stderr[-4000:]
    (samples,) = (tmp_path / "out").rglob("*_samples_tiny.jsonl")
    rows = sorted((row for _, row in read_jsonl(samples)), key=lambda row: row["doc_id"])
    options = {"max_new_tokens": 5, "repetition_penalty": 1.7, "do_sample": False}
    direct = [ask_directly(*assembled, picture(int(q.image[0])), q.text, **options) for q in questions]
    assert [row["filtered_resps"] for row in rows] == direct
    assert direct != [ask_directly(*assembled, picture(int(q.image[0])), q.text, max_new_tokens=5) for q in questions]


def test_an_lmms_eval_that_fails_is_an_error(installed, tmp_path, pope_dir, monkeypatch):
    """lmms-eval prints its errors, writes nothing and exits with 0, like this stand-in."""
    stand_in = tmp_path / "python"
    stand_in.write_text("#!/bin/sh\necho 'Error during evaluation: it broke' >&2\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr("mllm.pope.lmms.sys.executable", str(stand_in))
    with pytest.raises(InputError, match=r"code 0 and no results.*it broke"):
        evaluate_with_lmms(tmp_path / "run", *asked_about(pope_dir), tmp_path / "out", controls=())


@pytest.mark.parametrize("rules", [1, 2])
def test_a_tasks_own_conversion_to_rgb_shows_what_our_decoder_shows(rules, tmp_path):
    """lmms-eval's tasks say `doc["image"].convert("RGB")`, on what `datasets` has decoded."""
    import io

    import datasets
    import numpy as np
    from PIL import EpsImagePlugin, Image

    from diffclip.base.images import decode, rgb_by
    from mllm.lmms_plugin import DiffCLIPLlavaForEvaluation

    exif = Image.Exif()
    exif[274] = 6
    ramp = np.arange(64).reshape(8, 8)
    made = {
        "turned": (Image.fromarray(np.uint8(3 * ramp[:, :4])), "JPEG", {"exif": exif}),
        "deep": (Image.fromarray(np.uint16(1000 * ramp)), "PNG", {}),
        "drawing": (Image.fromarray(np.dstack([0 * ramp] * 3 + [4 * ramp]).astype(np.uint8)), "PNG", {}),
    }
    contents = []
    for image, kind, options in made.values():
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        contents.append(buffer.getvalue())
    features = datasets.Features({"image": datasets.Image(), "more": [datasets.Image()]})
    encoded = [{"bytes": content, "path": None} for content in contents]
    rows = datasets.Dataset.from_dict({"image": encoded, "more": [[one, one] for one in encoded]}, features=features)
    plugin = DiffCLIPLlavaForEvaluation.__new__(DiffCLIPLlavaForEvaluation)  # no model is needed for this
    plugin.task_dict, plugin.rgb = {"t": {"test": rows}}, rgb_by(rules)
    for i, content in enumerate(contents):
        wanted = rgb_by(rules)(decode(content))
        first = plugin._images(lambda doc: [doc["image"].convert("RGB")], i, "t", "test")
        rest = plugin._images(lambda doc: [one.convert("RGB") for one in doc["more"]], i, "t", "test")
        (file := tmp_path / str(i)).write_bytes(content)
        opened = plugin._images(lambda doc, file=file: [Image.open(file).convert("RGB")], i, "t", "test")
        for seen in (*first, *rest, *opened):
            assert seen.size == wanted.size and seen.tobytes() == wanted.tobytes()
    assert not EpsImagePlugin.has_ghostscript()


def test_scores_that_differ_from_lmms_evals_are_an_error():
    scores = score(["yes", "no"], ["yes", "yes"])
    _same(scores, dict(scores), "t")
    with pytest.raises(RuntimeError, match="recall"):
        _same(scores, {**scores, "recall": 1.0}, "t")


def test_unknown_controls_and_missing_pictures_are_refused(pope_dir, tmp_path):
    with pytest.raises(InputError, match="mirrored"):
        evaluate_with_lmms(tmp_path, *asked_about(pope_dir), tmp_path / "out", controls=("mirrored",))
    with pytest.raises(InputError, match=r"4 images.*0\.png"):
        find_images(read(pope_dir), pope_dir / "nowhere")
    questions, images = asked_about(pope_dir)
    with pytest.raises(InputError, match="no labels"):
        evaluate_with_lmms(tmp_path, [q._replace(label="") for q in questions], images, tmp_path / "out")


def test_parquet_has_the_hubs_columns_and_the_images(pope_dir, picture, tmp_path):
    import datasets

    questions, images = asked_about(pope_dir)
    questions = shuffle_images(questions)
    write_parquet(questions, images, tmp_path / "x.parquet")
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "x.parquet"), split="train", cache_dir=tmp_path)
    assert rows.column_names == ["question_id", "question", "answer", "image_source", "image", "category"]
    for row, q in zip(rows, questions):
        assert (row["category"], row["image_source"], row["question"], row["answer"]) == (q[:4])
        assert row["image"].convert("RGB").tobytes() == picture(int(q.shown[0])).tobytes()


def test_task_files_are_movable_and_name_functions_that_exist(tmp_path):
    from lmms_eval.utils import load_yaml_config

    assert write_tasks(tmp_path / "..", {}) == []
    (tmp_path / "x.parquet").touch()
    assert write_tasks(tmp_path, {"my_pope": tmp_path / "x.parquet"}, post_prompt="\nYes or no?") == ["my_pope"]
    assert str(tmp_path) not in (tmp_path / "my_pope.yaml").read_text()
    config = load_yaml_config(str(tmp_path / "my_pope.yaml"))
    assert config["dataset_kwargs"]["data_files"]["test"] == str(tmp_path / "x.parquet")
    kwargs = config["lmms_eval_specific_kwargs"]["default"]
    assert config["doc_to_text"]({"question": "A?"}, kwargs) == "A?\nYes or no?"
    record = config["process_results"]({"answer": "no"}, ["No"])
    assert {m["metric"]: m["aggregation"]([record[m["metric"]]]) for m in config["metric_list"]} == {
        "accuracy": 1.0, "precision": 0.0, "recall": 0.0, "f1": 0.0, "yes_rate": 0.0, "invalid_rate": 0.0
    }  # fmt: skip


@pytest.fixture
def evaluation_model(run_dir):
    from mllm.lmms_plugin import DiffCLIPLlavaForEvaluation

    return DiffCLIPLlavaForEvaluation(str(run_dir), batch_size=2, device="cpu")


def show(doc):
    return [doc["image"]] if doc else []


def requests(kind, arguments):
    from lmms_eval.api.instance import Instance

    return [
        Instance(request_type=kind, arguments=a, idx=0, metadata={"task": "t", "doc_id": i, "repeats": 1})
        for i, a in enumerate(arguments)
    ]


@pytest.mark.slow
def test_loglikelihood_is_the_sum_over_the_answers_tokens(evaluation_model, assembled, picture):
    model, processor = assembled
    docs = [{"image": picture(0)}, {"image": picture(1)}, {}]
    evaluation_model.task_dict = {"t": {"test": docs}}
    answers = ["yes", "no a small circle", "red"]
    asked = [("Is there?", a, show, i, "t", "test") for i, a in enumerate(answers)]
    got = evaluation_model.loglikelihood(requests("loglikelihood", asked))
    for (value, _), doc, answer in zip(got, docs, answers):
        turns = [{"from": "human", "value": "<image>\nIs there?" if doc else "Is there?"}]
        head = prompt(turns, "vicuna")
        pictures = [doc["image"]] if doc else None
        before = processor(images=pictures, text=[head], return_tensors="pt")
        whole = processor(images=pictures, text=[f"{head} {answer}"], return_tensors="pt")
        start = before["input_ids"].shape[1]
        with torch.no_grad():
            logs = model(**whole).logits[0].log_softmax(-1)
        ids = whole["input_ids"][0]
        expected = sum(logs[t - 1, ids[t]].item() for t in range(start, len(ids)))
        assert value == pytest.approx(expected, abs=1e-4)
    assert not any(is_greedy for _, is_greedy in got)


def test_loglikelihood_knows_what_greedy_decoding_would_write(evaluation_model, picture):
    evaluation_model.task_dict = {"t": {"test": [{"image": picture(0)}]}}
    (wanted,) = evaluation_model.vlm.tokenizer(" yes")["input_ids"]
    evaluation_model.vlm.model.lm_head.register_forward_hook(
        lambda module, args, logits: logits + 1000 * torch.nn.functional.one_hot(torch.tensor(wanted), logits.shape[-1])
    )
    asked = [("Is there?", answer, show, 0, "t", "test") for answer in ("yes", "no", "yes yes", "yes no")]
    got = evaluation_model.loglikelihood(requests("loglikelihood", asked))
    assert [is_greedy for _, is_greedy in got] == [True, False, True, False]
    assert got[0][0] == pytest.approx(0.0, abs=1e-6)


def test_equal_questions_are_answered_once_and_stop_words_cut(evaluation_model, assembled, picture, monkeypatch):
    docs = [{"image": picture(i % 2)} for i in range(6)]
    evaluation_model.task_dict = {"t": {"test": docs}}
    options = {"max_new_tokens": 6, "do_sample": False}
    asked = [("Is there a red square?", options, show, i, "t", "test") for i in range(6)]
    batches = []
    generate = evaluation_model.vlm.model.generate
    monkeypatch.setattr(
        evaluation_model.vlm.model, "generate", lambda **k: batches.append(len(k["input_ids"])) or generate(**k)
    )
    answers = evaluation_model.generate_until(requests("generate_until", asked))
    assert batches == [2]
    assert answers[:2] * 3 == answers and answers[0] != answers[1]
    stop = answers[0][1:3]
    cut = evaluation_model.generate_until(
        requests("generate_until", [("Is there a red square?", {**options, "until": [stop]}, show, 0, "t", "test")])
    )
    assert cut == [answers[0].split(stop)[0].strip()]


def test_generation_options_reach_generate(evaluation_model, assembled, picture):
    evaluation_model.task_dict = {"t": {"test": [{"image": picture(0)}]}}

    def ask(**options):
        asked = [("Is there a red square?", options, show, 0, "t", "test")]
        return evaluation_model.generate_until(requests("generate_until", asked))[0]

    def direct(**options):
        text = prompt([{"from": "human", "value": "<image>\nIs there a red square?"}], "vicuna")
        inputs = assembled[1](images=[picture(0)], text=[text], return_tensors="pt")
        tokens = assembled[0].generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        return assembled[1].tokenizer.decode(tokens, skip_special_tokens=True).strip()

    greedy = direct(max_new_tokens=12)
    assert ask(max_new_tokens=12, do_sample=True, temperature=0) == greedy
    assert ask(max_gen_toks=12, do_sample=True, temperature=0.0, top_p=0.5, top_k=3) == greedy
    assert ask(max_gen_toks=12, until=None, max_new_tokens=None) == greedy
    assert ask(max_new_tokens=12, do_sample=True, temperature=3.0, top_k=1) == greedy  # the likeliest word alone
    assert ask(max_new_tokens=12, do_sample=True, temperature=3.0, top_p=0) == greedy
    assert ask(max_new_tokens=12, repetition_penalty=1.7) == direct(max_new_tokens=12, repetition_penalty=1.7) != greedy
    assert ask(max_new_tokens=12, num_beams=3) == direct(max_new_tokens=12, num_beams=3)


@pytest.mark.slow
def test_batch_size_auto_halves_where_memory_runs_out(run_dir, picture, monkeypatch):
    from mllm.lmms_plugin import DiffCLIPLlavaForEvaluation

    asked = [("Is there a red square?", {"max_new_tokens": 6}, show, i, "t", "test") for i in range(7)]
    likely = [("Is there a red square?", "yes", show, i, "t", "test") for i in range(7)]
    docs = {"t": {"test": [{"image": picture(i)} for i in range(7)]}}
    wanted = DiffCLIPLlavaForEvaluation(str(run_dir), batch_size=1, device="cpu")
    wanted.task_dict = docs

    def model(**options):
        one = DiffCLIPLlavaForEvaluation(str(run_dir), device="cpu", **options)
        one.task_dict, sizes, forward = docs, [], one.vlm.model.model.forward

        def scarce(*args, **inputs):
            rows = len(inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs["inputs_embeds"])
            if rows > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            sizes.append(rows)
            return forward(*args, **inputs)

        monkeypatch.setattr(one.vlm.model.model, "forward", scarce)
        return one, sizes

    auto, sizes = model(batch_size="auto")
    assert auto.batch_size > 2
    assert auto.generate_until(requests("generate_until", asked)) == wanted.generate_until(
        requests("generate_until", asked)
    )
    assert auto.batch_size == 2 == max(sizes)
    auto, _ = model(batch_size="auto:4", max_batch_size=5)
    assert auto.batch_size == 5
    found = auto.loglikelihood(requests("loglikelihood", likely))
    assert auto.batch_size <= 2
    for (value, greedy), (other, same) in zip(found, wanted.loglikelihood(requests("loglikelihood", likely))):
        assert value == pytest.approx(other, abs=1e-4) and greedy == same
    with pytest.raises(torch.OutOfMemoryError):
        model(batch_size=4)[0].generate_until(requests("generate_until", asked))
    for size in ("many", 0, -1):
        with pytest.raises(InputError, match="batch_size is"):
            DiffCLIPLlavaForEvaluation(str(run_dir), batch_size=size, device="cpu")


def test_no_question_gets_its_neighbours_image(evaluation_model, picture):
    """One question shows an image that it does not have, another has two: their numbers agree, and nothing else."""
    docs = [{"images": [picture(0), picture(1)]}, {"images": []}]
    evaluation_model.task_dict = {"t": {"test": docs}}
    for kind, options in (("generate_until", {"max_new_tokens": 4}), ("loglikelihood", "yes")):
        for first, words in (
            (0, "question 0 of test: .* shows 1 images, but 2"),
            (1, "question 1 .* but 0 are given"),
        ):
            order = [first, 1 - first]
            asked = [("<image>\nIs there?", options, lambda doc: doc["images"], i, "t", "test") for i in order]
            with pytest.raises(InputError, match=words):
                getattr(evaluation_model, kind)(requests(kind, asked))


def test_odd_files_and_names_do_not_end_an_evaluation(run_dir, picture, tmp_path):
    from mllm.lmms_plugin import DiffCLIPLlavaForEvaluation

    question = "Is there a\u2028red\x85 square?"
    kept = tmp_path / "new [1]" / "answers[0]\u2028"

    def answer():
        model = DiffCLIPLlavaForEvaluation(str(run_dir), batch_size=2, device="cpu", answers=str(kept))
        model.task_dict, passes = {"t": {"test": [{"image": picture(0)}]}}, []
        model.vlm.model.lm_head.register_forward_hook(lambda *_: passes.append(1))
        asked = [(question, {"max_new_tokens": 4}, show, 0, "t", "test")]
        return model.generate_until(requests("generate_until", asked)), len(passes)

    first, passes = answer()
    assert passes
    with open(f"{kept}.0", "ab") as f:
        f.write(b'[1, 2]\n"x"\n{"a": "\xff"}\n\n{"half')
    (kept.parent / f"{kept.name}.folder").mkdir()
    assert answer() == (first, 0)


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_from_what_it_had_answered(run_dir, assembled, picture, tmp_path, monkeypatch):
    from mllm.lmms_plugin import DiffCLIPLlavaForEvaluation

    docs = [{"image": picture(i)} for i in range(5)]
    options = {"max_new_tokens": 6, "do_sample": False}
    asked = requests("generate_until", [("Is there a star?", options, show, i, "t", "test") for i in range(5)])

    def started(run=run_dir):
        model = DiffCLIPLlavaForEvaluation(str(run), batch_size=2, device="cpu", answers=str(tmp_path / "answered"))
        model.task_dict = {"t": {"test": docs}}
        batches = []
        generate = model.vlm.model.generate

        def counted(**inputs):
            if len(batches) == limit:
                raise KeyboardInterrupt
            batches.append(len(inputs["input_ids"]))
            return generate(**inputs)

        monkeypatch.setattr(model.vlm.model, "generate", counted)
        return model, batches

    limit = 2
    with pytest.raises(KeyboardInterrupt):
        started()[0].generate_until(asked)
    with open(tmp_path / "answered.0", "a") as f:
        f.write('\n{"half a li')
    limit = 9
    model, batches = started()
    answers = model.generate_until(asked)
    assert batches == [1]  # four of five were there
    fresh = DiffCLIPLlavaForEvaluation(str(run_dir), batch_size=5, device="cpu")
    fresh.task_dict = {"t": {"test": docs}}
    assert fresh.generate_until(asked) == answers and len(set(answers)) > 1
    model, batches = started()
    assert model.generate_until(asked) == answers and batches == []
    with torch.no_grad():  # answers of other weights are of no use
        assembled[0].lm_head.weight.mul_(1.5)
    assembled.save(tmp_path / "other")
    model, batches = started(tmp_path / "other")
    model.generate_until(asked)
    assert batches == [2, 2, 1]


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_of_questions_is_drawn_on_a_terminal_alone(tmp_path, capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    program = "print('a library'); print('diffclip_llava: 50%', end='\\r'); print('diffclip_llava: 100%')"
    assert _run_with_progress([sys.executable, "-c", program], dict(os.environ), tmp_path / "log") == 0
    drawn = capsys.readouterr().err
    assert drawn == ("\rdiffclip_llava: 50%\rdiffclip_llava: 100%\n" if terminal else "")
    assert (tmp_path / "log").read_text() == "a library\ndiffclip_llava: 50%\ndiffclip_llava: 100%\n"
