"""Why is a POPE score at chance? The causes, each looked at by itself, in the order in which one would hide another."""

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from diffclip.base.console import print_table
from diffclip.base.devices import pick_device
from diffclip.base.errors import InputError
from diffclip.base.files import read_json, read_yaml
from diffclip.base.fingerprint import fingerprint
from diffclip.base.lines import print_line
from diffclip.base.paths import matching
from diffclip.base.schema import CONFIG, RECORD
from diffclip.weights import from_pretrained
from mllm.conversation import AUTO, NoSupervisionError
from mllm.data.examples import ConversationDataset
from mllm.data.images import ImagePlace
from mllm.data.rows import load_rows
from mllm.literal import control_tokens
from mllm.model import FINGERPRINTS, VisionLanguageModel, transform_fingerprint
from mllm.own_template import own_template
from mllm.pope.images import images_of
from mllm.pope.margins import generate, margins, score_margins
from mllm.pope.parsers import parse, parse_strict
from mllm.pope.questions import Answer, Question, read_answers, read_labelled
from mllm.pope.scores import shuffle_images
from mllm.weights import parts


class Finding(NamedTuple):
    """What one look at a run saw."""

    cause: str
    fine: bool | None  # None: could not be looked at
    seen: str
    remedy: str = ""


CAUSES = (
    *("wrong transform", "wrong layer or template", "random or swapped tower", "unloaded projector"),
    *("swapped language model", "no supervised tokens", "no yes/no data"),
    *("label misalignment", "ignored image", "pure yes-bias", "parser"),  # by asking the model
)


def diagnose(
    directory: str | Path,
    questions: Sequence[Question] = (),
    images: Mapping[str, ImagePlace] | None = None,
    answers: Sequence[Answer] = (),
    *,
    asked_images: int = 64,
    device: str | torch.device = "cpu",
) -> Iterator[Finding]:
    """Look at a run of instruct for every cause of a chance score; each of `CAUSES` is found at most once.

    Args:
        directory: the run; what training wrote beside the weights (run.json, config.yaml) is used where it is there.
        questions: POPE with labels, from `mllm.pope.questions.read`; without it the model is not asked anything.
        images: their images, from `mllm.pope.images.find_images`.
        answers: of an earlier evaluation, from `mllm.pope.questions.read_answers`, to be checked against `questions`.
        asked_images: how many images the model is asked about.
    """
    directory = Path(directory)
    prints = _mapping(directory / FINGERPRINTS, read_json)
    record = _mapping(directory / RECORD, read_json)
    config = _mapping(directory / CONFIG, read_yaml)
    model = from_pretrained(AutoModelForImageTextToText, directory).eval().to(device)
    processor = from_pretrained(AutoProcessor, directory)
    yield transform(processor, prints)
    yield settings(model, prints, config)
    current = {name: fingerprint(module) for name, module in parts(model).items()}
    upstream = _mapping(Path(record.get("inputs", {}).get("model", {}).get("path", "")) / RECORD, read_json)
    yield tower(parts(model)["vision_tower"], current, prints, record, upstream)
    yield projector(current, prints, record, upstream)
    wrong = _mismatch("language_model", current, prints, record, {})
    remedy = "put back the weights that the training wrote"
    yield Finding("swapped language model", not wrong, wrong or "the one that was trained", remedy)
    yield from training_data(model, processor, config)
    if not questions:
        unknown = "not looked at: give --pope and --image_root"
        yield from (Finding(cause, None, unknown) for cause in CAUSES[-4:])
        return
    yield from behaviour(VisionLanguageModel(model, processor), questions, images or {}, answers, asked_images)


def transform(processor: Any, prints: dict) -> Finding:
    """Are images prepared as in training?"""
    expected = prints.get("transform")
    if expected is None:
        return Finding("wrong transform", None, f"{FINGERPRINTS} says nothing of the training's")
    same = transform_fingerprint(processor) == expected
    seen = "as in training" if same else "processor_config.json was changed after training"
    return Finding("wrong transform", same, seen, "put back the processor_config.json that the training wrote")


def settings(model: Any, prints: dict, config: dict) -> Finding:
    """Are features taken from the layer, and prompts written in the template, of the training?"""
    cause, expected = "wrong layer or template", prints.get("settings")
    asked, trained = model.config.conversation_template, config.get("template", "plain")
    if trained not in ("plain", asked):
        seen = f"conversation_template is {asked}, config.yaml trained with {trained}"
        return Finding(cause, False, seen, "put back the config.json that the training wrote, or train again")
    if expected is None:
        return Finding(cause, None, f"{FINGERPRINTS} says nothing of the training's")
    current = {name: getattr(model.config, name) for name in expected}
    wrong = [f"{name} is {current[name]}, was {value}" for name, value in expected.items() if current[name] != value]
    seen = "; ".join(wrong) or f"layer {expected['vision_feature_layer']}, {expected['conversation_template']}"
    return Finding(cause, not wrong, seen, "put back the config.json that the training wrote")


def tower(vision_tower: nn.Module, current: dict, prints: dict, record: dict, upstream: dict) -> Finding:
    """Is the vision tower trained, and the one that the run was made with?"""
    cause, remedy = "random or swapped tower", "run align and instruct again with the pretrained tower"
    norms = (m for m in vision_tower.modules() if isinstance(m, (nn.LayerNorm, nn.BatchNorm2d, nn.RMSNorm)))
    start = {"weight": 1.0, "bias": 0.0}
    values = [(p, start[name]) for m in norms for name, p in m.named_parameters(recurse=False) if name in start]
    if values and all(torch.all(p == value) for p, value in values):
        return Finding(cause, False, "all of its norms have weight 1 and bias 0: it was never trained", remedy)
    if wrong := _mismatch("vision_tower", current, prints, record, upstream):
        return Finding(cause, False, wrong, remedy)
    return Finding(cause, True, "trained, and the one of the run" if record else "trained; there is no run.json")


def projector(current: dict, prints: dict, record: dict, upstream: dict) -> Finding:
    """Is the projector the one that was trained?"""
    cause, remedy = "unloaded projector", "run instruct again from the finished align run"
    start = upstream.get("before", {}).get("projector")
    if current["projector"] == start:
        return Finding(cause, False, "it is the one that align started from: nothing was learnt into it", remedy)
    if wrong := _mismatch("projector", current, prints, record, upstream):
        return Finding(cause, False, wrong, remedy)
    if not record and not start:
        return Finding(cause, None, "there is no run.json to compare it with")
    return Finding(cause, True, "the one that was trained")


def training_data(model: Any, processor: Any, config: dict) -> Iterator[Finding]:
    """Did the rows of the training have supervised tokens, and questions to be answered with yes or no?"""
    data = config.get("data") or []
    try:
        found = all(Path(path).exists() for path in matching(data))
    except InputError:
        found = False
    if not data or not found:
        unknown = "the training's data is not there: run it where the paths of config.yaml hold"
        yield from (Finding(cause, None, unknown) for cause in CAUSES[5:7])
        return
    template = config.get("template", model.config.conversation_template)
    if template == AUTO:
        template = own_template(processor.tokenizer)
    rows = load_rows(
        data,
        config.get("image_root", ""),
        image_prefix=config.get("image_prefix", ""),
        split=config.get("split", ""),
        template=template,
        control=control_tokens(processor.tokenizer),
        max_bad_share=config.get("max_bad_share", 0.0),
    )
    dataset = ConversationDataset(rows, processor, template=template, max_length=config.get("max_length", 2048))
    chosen = range(0, len(rows), max(1, len(rows) // 400))
    empty, answers = 0, []
    for i in chosen:
        answers += [turn["value"] for turn in rows[i].conversation if turn["from"] == "gpt"]
        try:
            dataset[i]
        except NoSupervisionError:
            empty += 1
        except InputError:  # an image that is gone says nothing of labels
            continue
    share = 100 * empty / len(chosen)
    remedy = "raise max_length, or mend the answers; diffclip check names the rows"
    yield Finding("no supervised tokens", empty == 0, f"{share:.0f} % of {len(chosen)} rows have none", remedy)
    predictions = [parse_strict(answer) for answer in answers]
    yes, no = predictions.count("yes"), predictions.count("no")
    seen = f"{yes} yes and {no} no among {len(answers):,} answers"
    yield Finding("no yes/no data", min(yes, no) > 0, seen, "instruct on rows whose answers are Yes and No, both")


def behaviour(
    vlm: VisionLanguageModel,
    questions: Sequence[Question],
    images: Mapping[str, ImagePlace],
    answers: Sequence[Answer],
    asked_images: int,
) -> Iterator[Finding]:
    """What the model answers: labels, use of the image, bias, parser."""
    names = list(dict.fromkeys(q.image for q in questions))
    chosen = set(names[:: max(1, -(-len(names) // asked_images))])
    asked = [q for q in questions if q.image in chosen]

    def open_image(name: str) -> Image.Image:
        return images[name].open()

    own = margins(vlm, asked, open_image)
    yield labels(asked, questions, answers, own)
    other = margins(vlm, shuffle_images(asked), open_image)
    moved = float(np.abs(own - other).max())
    remedy = "align longer, look at the loss of align, and at the projector's learning rate"
    seen = f"another image moves log P(yes) / P(no) by {np.abs(own - other).mean():.3g} in the mean"
    yield Finding("ignored image", moved > 1e-3 * max(1.0, float(np.abs(own).mean())), seen, remedy)
    exact = score_margins(asked, own)["mean"]
    rate = exact["yes_rate"]
    seen = (
        f"yes to {100 * rate:.0f} % by the likelier word, auc {100 * exact['auc']:.0f}, accuracy "
        f"{100 * exact['accuracy']:.0f}, and {100 * exact['accuracy_tuned']:.0f} with a threshold from other images"
    )
    yield Finding("pure yes-bias", 0.02 < rate < 0.98, seen, "balance yes and no in the training; or score by margins")
    sample = asked[:: max(1, len(asked) // 64)]
    yield parser([answer.text for answer in answers] or generate(vlm, sample, open_image))


def labels(
    asked: Sequence[Question], questions: Sequence[Question], answers: Sequence[Answer], own: np.ndarray
) -> Finding:
    """Do an earlier evaluation's labels belong to its questions, and its answers to this model?"""
    cause, remedy = "label misalignment", "match answers and labels by image and question, as mllm.pope score does"
    if not answers:
        return Finding(cause, None, "not looked at: give --answers, the answers.jsonl of an evaluation")
    truth = {q.key: q.label for q in questions}
    if unknown := sum(q.key not in truth for q, _ in answers):
        return Finding(cause, False, f"{unknown} of {len(answers)} rows ask what these files do not", remedy)
    if wrong := sum(q.label not in ("", truth[q.key]) for q, _ in answers):  # "": a file without labels
        return Finding(cause, False, f"{wrong} of {len(answers)} labels are not those of their question", remedy)
    predictions = parse((answer.text for answer in answers), "strict")
    given = {answer.key: prediction for answer, prediction in zip(answers, predictions)}
    pairs = ((given.get(q.key), "yes" if value > 0 else "no") for q, value in zip(asked, own))
    same = [prediction == likelier for prediction, likelier in pairs if prediction in ("yes", "no")]
    if not same:
        return Finding(cause, None, "none of its answers to these questions is yes or no")
    share = float(np.mean(same))
    seen = f"{100 * share:.0f} % of its answers are what this model answers to the same question"
    return Finding(cause, share > 0.8, seen, remedy)


def parser(answers: Sequence[str | None]) -> Finding:
    """Are the model's words read as it means them?"""
    invalid = {name: parse(answers, name).count("invalid") / len(answers) for name in ("lmms_eval", "strict")}
    nulls = sum(answer is None for answer in answers)
    pairs = zip(answers, parse(answers))
    examples = list(dict.fromkeys(a for a, read_as in pairs if read_as == "invalid" and a is not None))[:3]
    seen = f"lmms-eval's rule cannot read {100 * invalid['lmms_eval']:.0f} % of {len(answers)} answers"
    if invalid["strict"] < invalid["lmms_eval"]:
        seen += f", {100 * invalid['strict']:.0f} % without regard to punctuation"
    seen += f"; {nulls} are null, no answer at all" if nulls else ""
    seen += f": {', '.join(map(repr, examples))}" if examples else ""
    remedy = "score with --parser strict, or ask for one word as in the training"
    return Finding("parser", invalid["lmms_eval"] < 0.05, seen, remedy)


def _mismatch(part: str, current: dict, prints: dict, record: dict, upstream: dict) -> str:
    """What a part's fingerprint contradicts, in words, or ""."""
    if prints.get(part, current[part]) != current[part]:
        return "its weights are not those that were saved"
    if record.get("after", {}).get(part, current[part]) != current[part]:
        return "its weights are not those that the training ended with (run.json)"
    start, end = record.get("before", {}).get(part), upstream.get("after", {}).get(part)
    if start and end and start != end:
        return "instruct did not start from what align ended with"
    return ""


def _mapping(path: Path, read: Callable[[Path], Any]) -> dict:
    """What a file of the run holds, or nothing where there is no such file."""
    content = read(path) if path.is_file() else {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no settings by name; put back what the training wrote, or remove it")
    return content


def run(options: Namespace) -> int:
    """Walk the causes of a score at chance and name the first that fails; exit code 1 where there is one."""
    device = pick_device(options.device)
    questions = read_labelled(options.pope) if options.pope else []
    answers = read_answers(options.answers, questions) if options.answers and questions else []
    with TemporaryDirectory() as folder:  # for the images of a parquet file
        images = images_of(questions, options.pope, options.image_root, folder) if questions else {}
        findings = list(diagnose(options.run, questions, images, answers, asked_images=options.images, device=device))
    marks = {True: "ok", False: "FOUND", None: "?"}
    print_table(["", "cause", "seen"], [[marks[f.fine], f.cause, f.seen] for f in findings], f"{options.run}")
    if wrong := next((f for f in findings if f.fine is False), None):
        print_line(f"{wrong.cause}: {wrong.seen}. Remedy: {wrong.remedy}.")
        return 1
    print_line("no cause found; what remains is training: more data, more steps, a better tower")
    return 0
