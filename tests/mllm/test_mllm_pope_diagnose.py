"""Every cause of a POPE score at chance, planted in a model that answers well, and found by name."""

import json
import shutil

import pytest
import torch
import yaml
from test_mllm_pope import write

from diffclip.base.errors import InputError
from diffclip.base.fingerprint import fingerprint
from mllm.assemble import assemble
from mllm.data.examples import ConversationDataset, collate
from mllm.data.rows import load_rows
from mllm.model import VisionLanguageModel
from mllm.pope.__main__ import main
from mllm.pope.diagnose import CAUSES, diagnose
from mllm.pope.images import find_images
from mllm.pope.margins import generate
from mllm.pope.questions import POST_PROMPT, SPLITS, read, read_answers
from mllm.weights import freeze, parts

THINGS = ("red square", "small blue circle", "green star")


def text(thing):
    return f"Is there a {thing} in the image?"


def is_there(i, n):
    return (i + n) % 2 == 0


@pytest.fixture(scope="module")
def healthy(tmp_path_factory, picture, tower_dir, language_dir):
    """A folder with run/ and align/ as training leaves them, of a model that answers POPE's questions, and pope/."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("healthy")
    for folder in ("images", "pope", "run", "align"):
        (root / folder).mkdir()
    for i in range(4):
        picture(i).save(root / f"images/{i}.png")
    for split in SPLITS:
        lines = [
            {"question_id": 3 * i + n, "image": f"{i}.png", "text": text(thing), "label": ("no", "yes")[is_there(i, n)]}
            for i in range(4)
            for n, thing in enumerate(THINGS)
        ]
        write(root / f"pope/x_pope_{split}.json", lines)
    rows = [
        {
            "id": f"{i}{n}",
            "image": f"{i}.png",
            "conversations": [
                {"from": "human", "value": f"<image>\n{text(thing)}{POST_PROMPT}"},
                {"from": "gpt", "value": ("No", "Yes")[is_there(i, n)]},
            ],
        }
        for i in range(4)
        for n, thing in enumerate(THINGS)
    ]
    (root / "rows.json").write_text(json.dumps(rows))
    model, processor = assemble(tower_dir, language_dir, seed=3)
    with torch.no_grad():  # as pretraining leaves a tower
        for module in parts(model)["vision_tower"].modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.mul_(1.01)
    record = {"before": {name: fingerprint(part) for name, part in parts(model).items()}}
    (root / "align" / "run.json").write_text(json.dumps({**record, "after": record["before"]}))
    teach(model, processor, root / "rows.json", root / "images")
    keep(model, processor, root, record["before"])
    return root


def teach(model, processor, rows, images, steps=400):
    dataset = ConversationDataset(load_rows([rows], images), processor, template="vicuna")
    batch = collate(processor)([dataset[i] for i in range(len(dataset))])
    freeze(model, {"projector", "language_model"})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    model.train()
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.01:
            break
    model.eval()


def keep(model, processor, root, before):
    """Save the model with what a stage writes beside it."""
    VisionLanguageModel(model, processor).save(root / "run")
    after = {name: fingerprint(part) for name, part in parts(model).items()}
    inputs = {"model": {"path": str(root / "align")}}
    (root / "run" / "run.json").write_text(json.dumps({"before": before, "after": after, "inputs": inputs}))
    settings = {"data": [str(root / "rows.json")], "image_root": str(root / "images"), "template": "vicuna"}
    (root / "run" / "config.yaml").write_text(yaml.safe_dump({**settings, "max_length": 2048}))


@pytest.fixture
def root(healthy, tmp_path):
    """A copy to plant a fault in."""
    shutil.copytree(healthy, tmp_path / "copy")
    record = json.loads((tmp_path / "copy/run/run.json").read_text())
    record["inputs"]["model"]["path"] = str(tmp_path / "copy/align")
    (tmp_path / "copy/run/run.json").write_text(json.dumps(record))
    settings = (tmp_path / "copy/run/config.yaml").read_text()
    (tmp_path / "copy/run/config.yaml").write_text(settings.replace(str(healthy), str(tmp_path / "copy")))
    return tmp_path / "copy"


def evaluated(root, change=lambda rows: rows):
    """Rows of an evaluation of the model, changed."""
    from mllm.model import load

    vlm = load(root / "run")
    questions = read(root / "pope")
    images = find_images(questions, root / "images")
    answers = generate(vlm, questions, lambda name: images[name].open())
    return change([{**q._asdict(), "answer": answer} for q, answer in zip(questions, answers)])


def found(root, answers=()):
    """(the first cause, all findings) of the run, as the command line names it; `answers` are rows of a file."""
    questions = read(root / "pope")
    write(root / "answers.jsonl", answers)
    given = read_answers(root / "answers.jsonl", questions)
    findings = list(diagnose(root / "run", questions, find_images(questions, root / "images"), given))
    assert [f.cause for f in findings] == list(CAUSES)
    return next((f.cause for f in findings if f.fine is False), None), findings


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_weights(root, change, saved=True):
    """Change the saved model; with `saved`, its fingerprints tell of the new weights, as after a careless save."""
    from mllm.model import load

    vlm = load(root / "run")
    model, processor = vlm
    with torch.no_grad():
        change(parts(model), model, processor)
    (vlm.save if saved else model.save_pretrained)(root / "run")


def forget_training(root):
    """As if the run's records had been lost: only what the model does can tell."""
    (root / "run" / "run.json").unlink()
    shutil.rmtree(root / "align")


@pytest.mark.slow
def test_a_healthy_run_has_no_cause(root):
    answers = evaluated(root)
    controls = [{**row, "pass": "no_image", "answer": "I see no image."} for row in answers]  # are not looked at
    cause, findings = found(root, answers + controls)
    assert cause is None and all(f.fine for f in findings)


def test_wrong_transform(root):
    file = root / "run" / "processor_config.json"
    settings = json.loads(file.read_text())
    edit(file, image_processor={**settings["image_processor"], "image_mean": [0.1, 0.1, 0.1]})
    assert found(root)[0] == "wrong transform"


def test_wrong_layer(root):
    edit(root / "run" / "config.json", vision_feature_layer=-1)
    assert found(root)[0] == "wrong layer or template"


def test_asked_in_another_template_than_the_training_s(root):
    file = root / "run" / "config.yaml"
    file.write_text(file.read_text().replace("template: vicuna", "template: chatml"))
    cause, findings = found(root)
    assert cause == "wrong layer or template"
    assert any("is vicuna, config.yaml trained with chatml" in f.seen for f in findings)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "random without records", "swapped", "swapped on disk"])
def test_random_or_swapped_tower(root, kind):
    def change(part, model, processor):
        for module in part["vision_tower"].modules():
            if isinstance(module, torch.nn.LayerNorm) and kind.startswith("random"):
                module.reset_parameters()
            elif hasattr(module, "weight") and not isinstance(module, torch.nn.LayerNorm):
                torch.nn.init.normal_(module.weight, std=0.05)

    change_weights(root, change, saved=kind != "swapped on disk")
    if kind == "random without records":
        forget_training(root)
    cause, findings = found(root)
    assert cause == "random or swapped tower"
    assert ("never trained" in findings[2].seen) == kind.startswith("random")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["as align started", "drawn anew"])
def test_unloaded_projector(root, kind, tower_dir, language_dir):
    def change(part, model, processor):
        seed = 3 if kind == "as align started" else 4
        fresh = assemble(tower_dir, language_dir, seed=seed)[0].model.multi_modal_projector
        part["projector"].load_state_dict(fresh.state_dict())

    change_weights(root, change)
    if kind == "as align started":  # the run's own record agrees: it saved a projector that it never loaded
        record = json.loads((root / "run/run.json").read_text())
        edit(root / "run/run.json", after={**record["after"], "projector": record["before"]["projector"]})
    assert found(root)[0] == "unloaded projector"


def test_no_supervised_tokens(root):
    settings = yaml.safe_load((root / "run/config.yaml").read_text())
    (root / "run/config.yaml").write_text(yaml.safe_dump({**settings, "max_length": 30}))
    assert found(root)[0] == "no supervised tokens"


def test_no_yes_no_data(root):
    rows = json.loads((root / "rows.json").read_text())
    for row in rows:
        row["conversations"][1]["value"] = "a red square"
    (root / "rows.json").write_text(json.dumps(rows))
    assert found(root)[0] == "no yes/no data"


@pytest.mark.parametrize("kind", ["labels", "answers"])
def test_label_misalignment(root, kind):
    """Labels, or answers, taken from the lines of a file in another order."""

    def moved(rows):
        name = {"labels": "label", "answers": "answer"}[kind]
        return [{**row, name: other[name]} for row, other in zip(rows, rows[1:] + rows[:1])]

    cause, findings = found(root, evaluated(root, moved))
    assert (cause == "label misalignment" and "not those of their question" in findings[7].seen) or kind == "answers"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["misspelt", "without the file's ending", "no labels", "llava"])
def test_the_same_questions_in_other_words_are_not_misaligned(root, form):
    """Answers meet questions by `Question.key` here as everywhere: POPE's own slips do not make others of them."""
    if form == "misspelt":  # in POPE's files, not in the answers, which another copy was asked for
        for file in (root / "pope").iterdir():
            file.write_text(file.read_text().replace("image?", "imange?"))

    def told(rows):
        if form == "llava":
            number = {"random": 0, "popular": 100, "adversarial": 200}
            for file in (root / "pope").iterdir():  # ids that tell the splits apart, as in LLaVA's file
                split = file.stem.split("_")[-1]
                lines = [json.loads(line) for line in file.read_text().splitlines()]
                write(file, [{**line, "question_id": number[split] + line["question_id"]} for line in lines])
            return [
                {
                    "question_id": number[row["split"]] + int(row["question_id"]),
                    "prompt": row["text"] + POST_PROMPT,
                    "text": row["answer"],
                }
                for row in rows
            ]
        if form == "no labels":
            return [{"image": row["image"], "question": row["text"], "answer": row["answer"]} for row in rows]
        name = (lambda image: image.split(".")[0]) if form.startswith("without") else str
        return [{**r, "image": name(r["image"]), "text": r["text"].replace("imange?", "image?")} for r in rows]

    answers = told(evaluated(root))
    if form == "no labels":
        answers = [row for i, row in enumerate(answers) if row not in answers[:i]]
    _, findings = found(root, answers)
    assert findings[7].fine and findings[7].seen.startswith("100 % of its answers")


def test_null_answers_are_invalid_and_counted(root):
    _, findings = found(root, evaluated(root, lambda rows: [{**row, "answer": None} for row in rows]))
    assert findings[7].fine is None and "yes or no" in findings[7].seen
    assert findings[10].fine is False and "100 % of 36 answers; 36 are null" in findings[10].seen


def test_ignored_image(root):
    change_weights(root, lambda part, *_: part["projector"].weight.zero_())
    forget_training(root)
    assert found(root)[0] == "ignored image"


@pytest.mark.slow
def test_pure_yes_bias(root):
    """Taught on yes alone behind its other lessons: it still looks, and says yes."""
    rows = json.loads((root / "rows.json").read_text())
    for row in rows:
        row["conversations"][1]["value"] = "Yes"
    (root / "yes.json").write_text(json.dumps(rows))
    change_weights(root, lambda part, model, processor: tilt(model, processor, root))
    forget_training(root)
    cause, findings = found(root)
    assert cause == "pure yes-bias" and "yes to 100 %" in findings[9].seen


def tilt(model, processor, root):
    with torch.enable_grad():
        for _ in range(40):
            teach(model, processor, root / "yes.json", root / "images", steps=1)


@pytest.mark.slow
def test_parser(root):
    dotted = evaluated(root, lambda rows: [{**row, "answer": row["answer"] + "."} for row in rows])
    cause, findings = found(root, dotted)
    assert cause == "parser" and "0 % without regard to punctuation" in findings[10].seen


def test_command_line_names_the_cause(root, capsys):
    edit(root / "run" / "config.json", vision_feature_layer=-1)
    command = ["diagnose", str(root / "run"), "--pope", str(root / "pope"), "--image_root", str(root / "images")]
    assert main([*command, "--device", "cpu"]) == 1
    assert "wrong layer or template: vision_feature_layer is -1, was -2. Remedy: " in capsys.readouterr().out
    assert main(["diagnose", str(root / "run"), "--device", "cpu"]) == 1
    (root / "answers.jsonl").write_text('{"split": "random", "image": "0.png", "text": "Is th')
    with pytest.raises(InputError, match=r"answers\.jsonl:1: not valid JSON"):
        main([*command, "--device", "cpu", "--answers", str(root / "answers.jsonl")])
