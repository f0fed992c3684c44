"""Tasks that lmms-eval ships, over small sets of our own in the layouts of theirs; and what they ask of a model."""

import os
from pathlib import Path
from types import SimpleNamespace

import lmms_sets
import numpy as np
import pytest
import torch
from launch import call, forked_lmms_eval

from diffclip.base.errors import InputError
from diffclip.base.files import read_json, read_jsonl
from mllm.conversation import prompt
from mllm.lmms_tasks import aggregations, first_word, task_scores, yes_no_label, yes_no_questions, yes_no_scores
from mllm.pope.lmms import Outcome
from mllm.pope.scores import CONTROLS, grey_image

pytestmark = pytest.mark.usefixtures("coarse_figures")

pytest.importorskip("lmms_eval")
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture
def run_dir(assembled, tmp_path):
    assembled.save(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def asked_model(run_dir):
    """model(docs, **options) -> the plugin, asked about documents of task t."""
    from mllm.lmms_plugin import DiffCLIPLlavaForEvaluation

    def make(docs, **options):
        model = DiffCLIPLlavaForEvaluation(str(run_dir), **{"batch_size": 2, "device": "cpu", **options})
        model.task_dict = {"t": {"test": docs}}
        return model

    return make


def requests(kind, arguments):
    from lmms_eval.api.instance import Instance

    return [
        Instance(request_type=kind, arguments=one, idx=0, metadata={"task": "t", "doc_id": i, "repeats": 1})
        for i, one in enumerate(arguments)
    ]


def show(doc):
    return doc["images"]


def direct(assembled, text, images, **options):
    """The model's own answer to a prompt as vicuna writes it, all images in front."""
    model, processor = assembled
    head = prompt([{"from": "human", "value": f"<image>\n{text}" if images else text}], "vicuna")
    head = head.replace("<image>", "\n".join(["<image>"] * len(images)))
    inputs = processor(images=images or None, text=[head], return_tensors="pt")
    tokens = model.generate(**inputs, **{**GREEDY, **options})[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


@pytest.mark.slow
def test_several_images_stand_in_front_of_a_question_in_their_order(asked_model, assembled, picture):
    docs = [{"images": [picture(0), picture(1)]}, {"images": [picture(1), picture(0)]}, {"images": [picture(2)] * 3}]
    model = asked_model(docs)
    texts = ["Is there a star?", "Is there a star?", "<image> and <image> and <image>: is there a star?"]
    answers = model.generate_until(
        requests("generate_until", [(t, GREEDY, show, i, "t", "test") for i, t in enumerate(texts)])
    )
    words = [text.replace("<image>", "").strip() for text in texts]
    assert answers == [direct(assembled, w, doc["images"]) for w, doc in zip(words, docs)]
    assert answers[0] != answers[1]
    wrong = [("<image> <image>: is there?", GREEDY, show, 2, "t", "test")]
    with pytest.raises(InputError, match=r"question 2 of test: .*3 are given"):
        model.generate_until(requests("generate_until", wrong))


def test_likelihoods_see_several_images(asked_model, assembled, picture):
    docs = [{"images": [picture(0), picture(1)]}]
    answer = "no a small circle"
    asked = [("Is there?", lambda doc: answer, show, 0, "t", "test")]
    ((value, _),) = asked_model(docs).loglikelihood(requests("loglikelihood", asked))
    model, processor = assembled
    head = prompt([{"from": "human", "value": "<image>\nIs there?"}], "vicuna").replace("<image>", "<image>\n<image>")
    start = processor(images=docs[0]["images"], text=[head], return_tensors="pt")["input_ids"].shape[1]
    whole = processor(images=docs[0]["images"], text=[f"{head} {answer}"], return_tensors="pt")
    ids = whole["input_ids"][0]
    with torch.no_grad():
        logs = model(**whole).logits[0].log_softmax(-1)
    assert value == pytest.approx(sum(logs[t - 1, ids[t]].item() for t in range(start, len(ids))), abs=1e-4)


def test_the_smallest_value_is_that_of_the_likeliest_choice(asked_model, picture):
    """As lmms-eval's argmin wants it; and a single continuation keeps its log-probability."""
    model = asked_model([{"images": [picture(0)]}, {"images": [picture(1)]}], batch_size=3)
    choices = ["yes", "no", "a small blue circle left of the green star"]

    def values(asked):
        return np.array([value for value, _ in model.loglikelihood(requests("loglikelihood", asked))])

    of_both = values([("What?", choice, show, i, "t", "test") for i in range(2) for choice in choices])
    alone = np.array([values([("What?", choice, show, i, "t", "test")])[0] for i in range(2) for choice in choices])
    np.testing.assert_allclose(of_both, -alone, atol=1e-4)
    assert (alone < 0).all() and of_both[:3].argmin() == alone[:3].argmax()
    bare = model.loglikelihood(requests("loglikelihood", [("", "yes"), ("", "no")]))  # for mutual information
    assert all(value > 0 for value, _ in bare)


def test_lmms_eval_keeps_pairs_of_a_likelihood_as_pairs(asked_model):
    from lmms_eval import evaluator

    asked_model([]), asked_model([])
    for pair in ((-2.5, True), [-2.5, True]):  # the second is what a cache gives
        assert evaluator.unwrap_generation_output(pair) == ((-2.5, True), None)
    assert evaluator.unwrap_generation_output("yes") == ("yes", None)
    assert evaluator.unwrap_generation_output(["a", "b"]) == (["a", "b"], None)


@pytest.mark.slow
def test_a_task_of_rounds_is_told_the_answers_and_asks_on(asked_model, assembled, picture):
    """Documents of one, two and three rounds in one batch; the last shows another image in its second round."""
    docs = [{"rounds": n, "images": [picture(n)]} for n in (1, 2, 3)]

    def ask(doc, previous_output=None, round_idx=None, previous_round_info=None):
        if round_idx == doc["rounds"]:
            return None, None, True, [*previous_output, f"told {previous_round_info}"], None
        images = [picture(9)] if round_idx == 1 else None
        return images, f"You said {previous_output[-1]}. Is it red?", False, previous_output, round_idx

    asked = [("Is there a star?", GREEDY, show, ask, i, "t", "test") for i in range(3)]
    given = asked_model(docs).generate_until_multi_round(requests("generate_until_multi_round", asked))
    for doc, answers in zip(docs, given):
        wanted = [direct(assembled, "Is there a star?", doc["images"])]
        for number in range(1, doc["rounds"]):
            images = [picture(9)] if number == 1 else []
            wanted.append(direct(assembled, f"You said {wanted[-1]}. Is it red?", images))
        assert answers == [*wanted, f"told {doc['rounds'] - 1 or None}"]

    def endless(doc, previous_output, round_idx, previous_round_info):
        return None, "Is it?", False, previous_output, None

    asked = [("Is it?", {"max_new_tokens": 1}, show, endless, 0, "t", "test")]
    with pytest.raises(InputError, match="task t asks more than 100 times"):
        asked_model(docs).generate_until_multi_round(requests("generate_until_multi_round", asked))


@pytest.mark.slow
def test_controls_show_other_images_grey_ones_or_none(asked_model, assembled, picture):
    docs = [{"images": [picture(i // 2)]} for i in range(6)]
    asked = requests("generate_until", [("Is there a star?", GREEDY, show, i, "t", "test") for i in range(6)])
    own = [direct(assembled, "Is there a star?", doc["images"]) for doc in docs]
    assert asked_model(docs).generate_until(asked) == own
    shuffled = asked_model(docs, shown="shuffled").generate_until(asked)
    assert all(answer in own and answer != mine for answer, mine in zip(shuffled, own))
    assert shuffled == asked_model(docs, shown="shuffled").generate_until(asked)
    grey = asked_model(docs, shown="grey").generate_until(asked)
    assert grey == [direct(assembled, "Is there a star?", [grey_image()])] * 6
    marked = [("<image>\nIs there a star?", GREEDY, show, 0, "t", "test")]
    none = asked_model(docs, shown="no_image").generate_until(requests("generate_until", marked))
    assert none == [direct(assembled, "Is there a star?", [])]
    with pytest.raises(InputError, match="question 0 of test: no other question shows other images"):
        asked_model(docs[:2], shown="shuffled").generate_until(asked[:2])
    for option, words in (("shown", "shown is 7"), ("dtype", "dtype is 7")):
        with pytest.raises(InputError, match=words):
            asked_model(docs, **{option: "7"})


def test_an_image_that_cannot_be_read_is_named_with_its_question(asked_model, picture, tmp_path):
    import datasets

    rows = [{"image": {"bytes": content, "path": None}} for content in (lmms_sets._encoded(picture(0))["bytes"], b"x")]
    docs = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    asked = [("Is there?", GREEDY, lambda doc: [doc["image"].convert("RGB")], i, "t", "test") for i in range(2)]
    with pytest.raises(InputError, match="task t, question 1 of test: its image cannot be read"):
        asked_model(docs).generate_until(requests("generate_until", asked))


def test_an_error_in_one_of_several_processes_ends_it_and_is_lmms_evals_else():
    """The others would wait for it in a gathering of results; their launcher ends them where one has failed."""
    from mllm.lmms_repairs import ends_all

    def fails(self, requests):
        raise ValueError("it broke")

    with pytest.raises(ValueError, match="it broke"):
        ends_all(fails)(SimpleNamespace(_world_size=1), [])
    child = os.fork()
    if not child:
        ends_all(fails)(SimpleNamespace(_world_size=2), [])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_dtype_and_device_map_mean_what_they_say(asked_model):
    assert asked_model([], dtype="bfloat16").vlm.model.dtype == torch.bfloat16
    assert asked_model([], dtype="auto", device_map="auto").vlm.model.dtype == torch.float32
    assert asked_model([], device_map="cpu", device=None).device.type == "cpu"
    with pytest.raises(InputError, match="device mars"):
        asked_model([], device_map="mars")


def test_what_is_asked_is_written_down_with_its_images(asked_model, picture, tmp_path):
    docs = [{"images": [picture(i % 2)]} for i in range(3)]
    asked = requests("generate_until", [(f"Is {i}?", GREEDY, show, i, "t", "test") for i in range(3)])
    asked_model(docs, asked=str(tmp_path / "deep" / "asked")).generate_until(asked)
    rows = [row for _, row in read_jsonl(tmp_path / "deep" / "asked.0")]
    assert [(row["task"], row["doc_id"], row["question"]) for row in rows] == [("t", i, f"Is {i}?") for i in range(3)]
    assert rows[0]["images"] == rows[2]["images"] != rows[1]["images"]


@pytest.fixture
def says_yes_or_no(saying):
    return saying("yes", "no")


@pytest.mark.slow
def test_real_tasks_are_scored_with_controls_and_one_that_fails_takes_none_along(
    installed, says_yes_or_no, picture, tmp_path, monkeypatch
):
    says_yes_or_no.save(tmp_path / "model")
    rows = lmms_sets.mme(tmp_path, picture)
    for write in (lmms_sets.gqa, lmms_sets.mmbench, lmms_sets.mmvp, lmms_sets.seedbench):
        write(tmp_path, picture)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    tasks = ["mme,no_such_task", "gqa", "mmbench_en_dev_static, mmvp", "seedbench_ppl"]
    with forked_lmms_eval(), pytest.raises(InputError) as told:
        from stages.evaluate import main

        main(["--mllm", "model", "--tasks", *tasks, "--processes", "1", "--output_dir", "out"])
    assert str(told.value).startswith("lmms-eval: 1 of 6 tasks failed") and "Tasks not found: no_such_task" in str(
        told.value
    )
    metrics = read_json(Path("out/metrics.json"))
    # MME by its own rule and by POPE's, of the model asked directly
    options = {"max_new_tokens": 16, "suppress_tokens": says_yes_or_no.model.generation_config.suppress_tokens}
    posted = [row["question"].replace(" Please answer yes or no.", "") for row in rows]
    posted = [f"{text}\nAnswer the question using a single word or phrase." for text in posted]
    said = [direct(says_yes_or_no, text, [row["image"]], **options) for text, row in zip(posted, rows)]
    right = [first_word(answer) == row["answer"].lower() for answer, row in zip(said, rows)]
    assert metrics["tasks_yes_no/mme/model/accuracy"] == pytest.approx(100 * np.mean(right))
    assert metrics["tasks/mme/questions"] == 8 and metrics["tasks/mme/images"] == 4
    assert metrics["tasks/mme/mme_perception_score_low"] <= metrics["tasks/mme/mme_perception_score"]
    # one question is always yes, the other always no: a rule without eyes is perfect
    assert metrics["tasks_yes_no/mme/blind/accuracy"] == 100
    assert metrics["tasks_yes_no/mme/always_yes/accuracy"] == 50
    passes = {key.split("/")[2] for key in metrics if key.startswith("tasks_yes_no/mme/")}
    assert passes == {"model", "blind", "always_yes", *CONTROLS}
    rows_of = [row for _, row in read_jsonl("out/tasks/mme/questions.jsonl")]
    assert [row["answer"] for row in rows_of if row["pass"] == "model"] == said
    assert len({row["answer"] for row in rows_of if row["pass"] == "grey"}) <= 2
    for key in ("gqa/exact_match", "mmbench_en_dev_static/gpt_eval_score", "mmvp/mmvp_accuracy", "seedbench_ppl/acc"):
        assert 0 <= metrics[f"tasks/{key}"] <= 100
    assert metrics["tasks/gqa/exact_match_low"] <= metrics["tasks/gqa/exact_match"]
    call("stages.report", "out", "--output_dir", "report")
    page = Path("report/report.md").read_text()
    assert "Other tasks of lmms-eval" in page and "blind rule (control)" in page and "exact\\_match" in page


def test_a_mean_over_questions_gets_an_interval_over_images_and_other_numbers_none():
    coin = np.random.default_rng(0)
    images = {i: f"image {i // 5}" for i in range(200)}
    right = [float(coin.random() < 0.3 + 0.4 * (i // 5 % 2)) for i in range(200)]
    samples = [
        {"doc_id": i, "acc": r, "record": {"is_correct": bool(r), "id": 3}, "sum": {"id": i}, "best": r}
        for i, r in enumerate(right)
    ]
    mean = float(np.mean(right))
    told = {"acc,none": mean, "acc_stderr,none": 0.1, "record,none": round(100 * mean, 4), "sum,none": 1234.5,
            "best,none": 1.0, "name,none": "N/A", "alias": "t"}  # fmt: skip
    scores = task_scores(Outcome({"results": {"t": told}}, {"t": samples}), "t", images)
    assert set(scores) == {"questions", "images", "acc", "acc_low", "acc_high", "record", "record_low", "record_high",
                           "sum", "best"}  # fmt: skip
    assert (scores["questions"], scores["images"]) == (200, 40)
    per_image = np.array(right).reshape(40, 5).mean(1)
    normal = 1.96 * per_image.std(ddof=1) / np.sqrt(40)  # of 40 equal clusters
    assert scores["acc_low"] == pytest.approx(mean - normal, abs=0.02)
    assert scores["acc_high"] == pytest.approx(mean + normal, abs=0.02)
    assert scores["record_low"] == pytest.approx(100 * scores["acc_low"])


def test_a_score_that_is_no_mean_gets_its_interval_by_leaving_images_out():
    """F1 of clusters, against its spread over many draws of the same world; and what cannot be had is left out."""

    def f1(records):
        both, any_yes = sum(a and b for a, b in records), sum(a + b for a, b in records)
        return 2 * both / any_yes

    def draw(seed):
        coin = np.random.default_rng(seed)
        bias = np.repeat(coin.random(60), 5)
        return [[bool(coin.random() < 0.5), bool(coin.random() < 0.3 + 0.4 * b)] for b in bias]

    records = draw(0)
    samples = [{"doc_id": i, "f1": record, "all": record} for i, record in enumerate(records)]
    outcome = Outcome({"results": {"t": {"f1,none": f1(records), "all,none": 3.0, "other,none": 0.5}}}, {"t": samples})
    images = {i: f"image {i // 5}" for i in range(300)}
    counts = {"f1": f1, "all": lambda rows: 3.0 if len(rows) == 300 else 1 / 0, "other": len}
    scores = task_scores(outcome, "t", images, counts)
    spread = np.std([f1(draw(seed)) for seed in range(400)])
    half = (scores["f1_high"] - scores["f1_low"]) / 2
    assert scores["f1_low"] < scores["f1"] < scores["f1_high"] and half == pytest.approx(2.09 * spread, rel=0.35)
    assert not {"all_low", "other_low"} & set(scores) and scores["all"] == 3.0


def test_a_tasks_own_aggregation_is_found():
    of_mme = aggregations("mme")
    records = [{"question_id": "a", "category": "count", "score": s} for s in (1.0, 0.0)]
    assert of_mme["mme_perception_score"](records) == 50.0
    assert aggregations("hallusion_bench_image") == {}  # these ask a judge
    assert aggregations("no such task") == {}


def test_yes_no_questions_are_told_from_others():
    samples = [
        {"doc_id": 0, "target": "Yes", "input": "Is it?"},
        {"doc_id": 1, "target": "no.", "input": "Is it?"},
        {"doc_id": 2, "target": "A", "input": "Which?"},
        {"doc_id": 3, "target": "The star is green.", "input": "Is it?", "aAcc": {"gt_answer": "1"}},
        {"doc_id": 4, "target": ["yes"], "input": "Is it?"},
        {"doc_id": 5, "target": 1, "input": "Is it?"},
    ]
    assert [yes_no_label(sample) for sample in samples] == ["yes", "no", "", "yes", "", ""]
    questions = yes_no_questions("t", samples, {0: "a", 1: "a"})
    assert [(q.question_id, q.label, q.image) for q in questions] == [
        ("0", "yes", "a"),
        ("1", "no", "a"),
        ("3", "yes", "3"),
    ]
    assert yes_no_questions("t", samples[:1], {}) == []  # a rule would have nothing to choose between
    table = yes_no_scores(questions, {"model": ["Yes, it is.", "yes", None], "grey": ["No", "no", "no"]})
    assert table["model"]["accuracy"] == pytest.approx(100 / 3) and table["model"]["invalid_rate"] == pytest.approx(
        100 / 3
    )
    assert table["model"]["accuracy_low"] <= table["model"]["accuracy"] <= table["model"]["accuracy_high"]
    assert table["grey"]["accuracy"] == pytest.approx(100 / 3) and table["always_yes"]["recall"] == 100
    assert list(map(first_word, ("No, there is not.", "NO", " yes!", "yesterday", "", None))) == [
        "no", "no", "yes", "invalid", "invalid", "invalid"
    ]  # fmt: skip
