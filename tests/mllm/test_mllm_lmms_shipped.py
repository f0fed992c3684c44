"""Task files that lmms-eval ships, started as it is installed, over small sets of ours in the layouts of theirs."""

import contextlib
import json
import sqlite3
from pathlib import Path

import lmms_sets
import numpy as np
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from launch import run_ranks

from diffclip.base.files import read_json, read_jsonl
from mllm import lmms_repairs
from mllm.lmms_tasks import first_word
from mllm.pope.chair import Caption, mentions, read_words, score

lmms_eval = pytest.importorskip("lmms_eval")
pytestmark = pytest.mark.slow
NOUNS = {"dog": "dogs", "cat": "cats", "person": "people", "table": "tables", "bench": "benches"}


@pytest.fixture
def started(installed, tmp_path, monkeypatch):
    """started(model, tasks, options, ranks) -> (scores, answers) by task, of `python -m lmms_eval`."""
    monkeypatch.chdir(tmp_path)
    for name, value in (
        ("LMMS_EVAL_DATASETS_CACHE", tmp_path / "cache"),
        ("NLTK_DATA", tmp_path / "nltk"),
        ("AMBER_BASE_DIR", tmp_path / "amber"),
        ("HF_DATASETS_OFFLINE", 1),
        ("GIT_DIR", tmp_path / "none"),  # --use_cache begins anew with each commit around the environment
    ):
        monkeypatch.setenv(name, str(value))
    lmms_sets.nltk_data(tmp_path / "nltk", NOUNS)

    def start(vlm, tasks, *options, ranks=0, out="out"):
        if not Path("model").exists():
            vlm.save("model")
        command = ["lmms_eval", "--model", "diffclip_llava", "--model_args", "pretrained=model,dtype=float32"]
        ended = run_ranks(ranks, *command, "--tasks", tasks, "--output_path", out, "--log_samples", *options)
        written = next(Path(out).rglob("*_results.json"), None)
        assert written, ended.stdout[-4000:] + ended.stderr[-4000:]
        stamp = written.name.removesuffix("results.json")
        results = read_json(written)["results"]
        scores = {task: {key.split(",")[0]: v for key, v in results[task].items()} for task in results}
        answers = {}
        for task in tasks.split(","):
            rows = [row for _, row in read_jsonl(written.with_name(f"{stamp}samples_{task}.jsonl"))]
            answers[task] = [row["filtered_resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
        return scores, answers

    return start


def direct(vlm, rows, text, **options):
    """The model asked directly."""
    return [vlm.ask(text, [row["image"]], **options) for row in rows]


def by_our_rule(captions, held):
    """CHAIR as mllm.pope.chair has it, in percent."""
    words = read_words([*NOUNS])
    named = [Caption(mentions(text, words), frozenset(there)) for text, there in zip(captions, held)]
    return {name: 100 * value for name, value in score(named).items()}


def judge(request):
    """An answer to HallusionBench's request for a judgement: whoever begins with a dog is right."""
    asked = json.loads(request.rfile.read(int(request.headers["Content-Length"])))["messages"][0]["content"]
    right = asked.split("Prediction answer:")[1].startswith("dog")
    answer = {"choices": [{"message": {"content": "correct" if right else "incorrect"}}]}
    body = json.dumps(answer).encode()
    request.send_response(200)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


def test_a_judged_task_and_captions_on_two_processes_of_accelerate(
    started, talking, picture, tmp_path, server, monkeypatch
):
    """HallusionBench with a judge of ours and lmms-eval's own CHAIR; then once more, from what --use_cache kept."""
    server.do_POST = judge
    monkeypatch.setenv("OPENAI_API_URL", server.address)
    plain = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    for name, value in prepare_multi_gpu_env(launch_command_parser().parse_args([*plain, "script"])).items():
        monkeypatch.setenv(name, value)
    asked, captioned = lmms_sets.hallusion_bench(tmp_path, picture), lmms_sets.coco_cap_chair(tmp_path, picture)
    options = ["--batch_size", "auto", "--use_cache", "kept", "--gen_kwargs", "max_new_tokens=5"]
    tasks = "hallusion_bench_image,coco_cap_chair"
    scores, said = started(talking, tasks, *options, ranks=2)
    answers = direct(talking, asked, asked[0]["question"], max_new_tokens=5)
    captions = direct(talking, captioned, "Please describe this image in detail.", max_new_tokens=5)
    assert said == {"hallusion_bench_image": answers, "coco_cap_chair": captions}
    right = [answer.startswith("dog") for answer in answers]
    assert scores["hallusion_bench_image"]["aAcc"] == pytest.approx(100 * np.mean(right))
    ours = by_our_rule(captions, [[name.split()[-1] for name in row["gt_object"]] for row in captioned])
    assert 0 < ours["chair_i"] < 100
    for name in ("chair_i", "chair_s", "recall"):
        assert scores["coco_cap_chair"][f"coco_cap_{name}"] == pytest.approx(ours[name])

    with contextlib.closing(sqlite3.connect("kept/cache.db")) as kept, kept:  # closed: lmms-eval reads no log of writes
        kept.execute("UPDATE responses SET response = ?", (json.dumps("no dog"),))
    _, again = started(talking, "hallusion_bench_image", *options, "--limit", "3", out="again")
    assert again == {"hallusion_bench_image": ["no dog"] * 3}


def test_amber_scores_captions_as_our_rule_does(started, talking, picture, tmp_path):
    spacy = pytest.importorskip("spacy", reason="spacy is not installed, which AMBER's task compares words with")
    spacy.blank("en").to_disk(tmp_path / "en_core_web_md")  # all words are unlike each other to it
    rows = lmms_sets.amber_g(tmp_path, picture)
    scores, said = started(talking, "amber_g", "--batch_size", "3", "--gen_kwargs", "max_new_tokens=5")
    captions = direct(talking, rows, "Describe this image", max_new_tokens=5)
    assert said == {"amber_g": captions}
    ours = by_our_rule(captions, [row["truth"] for row in rows])
    assert 0 < ours["chair_i"] < 100
    for theirs, name in (("chair", "chair_i"), ("hal", "chair_s"), ("cover", "recall")):
        assert scores["amber_g"][f"amber_{theirs}"] == pytest.approx(ours[name])


def test_naturalbench_counts_groups_of_questions_and_images(started, saying, picture, tmp_path):
    """All of its 7,600 questions, on which the task counts; eight of them differ."""
    vlm = saying("yes", "no")
    rows = lmms_sets.naturalbench(tmp_path, lambda seed: picture(seed, (8, 8)))
    scores, said = started(vlm, "naturalbench", "--batch_size", "8")
    eight = [
        vlm.ask(f"{row['Question']} Please answer Yes or No.", [row["Image"]], max_new_tokens=16) for row in rows[:8]
    ]
    assert said["naturalbench"] == eight * 950
    right = [first_word(answer) == row["Answer"].lower() for answer, row in zip(eight, rows)]
    groups = np.reshape(right, (2, 2, 2))  # (groups, questions, images)
    expected = {"G": groups.all((1, 2)), "Q": groups.all(2), "I": groups.all(1)}
    for name, values in expected.items():
        assert scores["naturalbench"][f"naturalbench_{name}_ACC"] == pytest.approx(values.mean())


def test_task_files_are_the_same_read_in_c():
    lmms_repairs.parse_in_c()
    in_python = next(c for c in yaml.reader.Reader.__subclasses__() if c.__name__ == "FullLoader")  # as it was before
    loaders = [type("Loader", (base,), {}) for base in (in_python, yaml.FullLoader)]
    assert [issubclass(loader, yaml.CFullLoader) for loader in loaders] == [False, True]
    for loader in loaders:
        loader.add_constructor("!function", lambda loader, node: (Path(loader.name).name, node.value))
    files = sorted(Path(lmms_eval.__file__).parent.joinpath("tasks").rglob("*.yaml"))[::20]
    assert len(files) > 50
    for file in files:
        with open(file, "rb") as first, open(file, "rb") as second:
            assert yaml.load(first, loaders[0]) == yaml.load(second, loaders[1]), file
