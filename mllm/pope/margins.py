"""POPE without generating: how much likelier the model is to begin with yes than with no.

All questions about an image stand in one row behind their common beginning (system prompt, image, first words),
which is computed once: a mask lets each question see that beginning and itself, as if it were asked alone. Language
models that go by no such mask (with recurrent layers, ALiBi, or a window that is shorter than a prompt) are asked one
question a row.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from diffclip.base.devices import pick_device
from diffclip.base.errors import InputError
from diffclip.base.files import json_line, write_json, write_whole
from diffclip.base.lines import print_line
from diffclip.base.schema import MARGINS
from mllm.conversation import IGNORE, question_turn
from mllm.model import VisionLanguageModel, load
from mllm.pope.images import images_of
from mllm.pope.parsers import parse
from mllm.pope.questions import POST_PROMPT, SPLITS, Question, read_labelled, version
from mllm.pope.scores import CONTROLS, GREY, SCORES, blind, folds_of_images, grey_image, score_splits, uses_image
from mllm.pope.tables import print_scores

MARGIN_SCORES = ("accuracy", "auc", "ap", "accuracy_tuned", "yes_rate")


def yes_no_tokens(vlm: VisionLanguageModel) -> tuple[list[int], list[int]]:
    """First tokens of "Yes" and "yes", and of "No" and "no", as the model was trained to write them.

    A token that begins words of both is left out: small vocabularies may spell " yes" and " no" from a lone space on.

    Raises:
        InputError: nothing is left of one of them, so that the first token does not decide.
    """
    first_tokens = []
    for words in (("Yes", "yes"), ("No", "no")):
        turns = ([{"from": "human", "value": "?"}, {"from": "gpt", "value": word}] for word in words)
        labels = (vlm.encode(conversation)["labels"] for conversation in turns)
        first_tokens.append({next(label for label in row if label != IGNORE) for row in labels})
    yes, no = sorted(first_tokens[0] - first_tokens[1]), sorted(first_tokens[1] - first_tokens[0])
    if not (yes and no):
        raise InputError("yes and no begin with the same token of this tokenizer: score generated answers instead")
    return yes, no


def margins(
    vlm: VisionLanguageModel,
    questions: Sequence[Question],
    open_image: Callable[[str], Image.Image],
    *,
    batch_size: int = 16,
    most: int = 32,
) -> np.ndarray:
    """(questions,) float64: log P(yes) - log P(no) at the first token of answers to questions with `POST_PROMPT`.

    Args:
        questions: one that is asked again about the same image, as in several splits, is computed once.
        open_image: gives the image of a name; not called for "" (no image) and `mllm.pope.scores.GREY`.
        batch_size: images at a time.
        most: questions in one row.
    """
    yes, no = yes_no_tokens(vlm)
    asked: dict[str, dict[str, None]] = {}
    for q in questions:
        asked.setdefault(q.shown, {})[q.text] = None
    rows = [
        (shown, list(texts)[first : first + most])
        for shown, texts in asked.items()
        for first in range(0, len(texts), most)
    ]
    rows.sort(key=lambda row: (row[0] == "", len(row[1])))  # alike in length; those without an image by themselves
    if not _stay_apart(vlm, rows):
        rows = [(shown, [text]) for shown, texts in rows for text in texts]
    values: dict[tuple[str, str], float] = {}
    with tqdm(total=len(rows), desc="pope margins", unit="image", disable=None) as bar:
        start = 0
        while start < len(rows):
            batch = [row for row in rows[start : start + batch_size] if (row[0] == "") == (rows[start][0] == "")]
            for (shown, texts), margins_of_row in zip(batch, _batch_margins(vlm, batch, open_image, yes, no)):
                values |= {(shown, text): value for text, value in zip(texts, margins_of_row)}
            start += len(batch)
            bar.update(len(batch))
    return np.array([values[q.shown, q.text] for q in questions])


@torch.no_grad()
def _stay_apart(vlm: VisionLanguageModel, rows: Sequence[tuple[str, list[str]]]) -> bool:
    """Whether prompts in one row see only their beginning and themselves, tried on the longest row without its image.

    Of the image only the placeholders are there, so that the row is as long as it will be.
    """
    shown, texts = max(rows, key=lambda row: (bool(row[0]), len(row[1])), default=("", []))
    if len(texts) < 2:
        return True
    count, lm, device = int(bool(shown)), vlm.model.model.language_model, vlm.model.device
    turns = [[question_turn(text + POST_PROMPT, count)] for text in texts]
    prompts = [
        vlm.encode(each, count, ask=True, name=f"question `{text}`: ")["input_ids"] for each, text in zip(turns, texts)
    ]
    ids, positions, allowed, lasts = pack(prompts)
    mask = _added(allowed[None], vlm.model.dtype)
    inputs = {"input_ids": ids[None], "position_ids": positions[None], "attention_mask": mask}
    try:
        packed = lm(**{name: tensor.to(device) for name, tensor in inputs.items()}, use_cache=False)
    except (ValueError, RuntimeError, TypeError, IndexError):  # of classes that take no such mask, such as Bloom's
        return False
    for prompt, last in ((prompts[0], lasts[0]), (prompts[-1], lasts[-1])):
        alone = lm(input_ids=torch.tensor([prompt], device=device), use_cache=False).last_hidden_state[0, -1].float()
        apart = (packed.last_hidden_state[0, last].float() - alone).abs().max() / alone.abs().max()
        if not apart <= (2e-5 if vlm.model.dtype == torch.float32 else 0.02):  # what rounding alone does
            return False
    return True


def _added(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(rows, tokens, tokens) bool, what each token sees -> (rows, 1, tokens, tokens), as attention adds it."""
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


@torch.no_grad()
def _batch_margins(
    vlm: VisionLanguageModel,
    rows: Sequence[tuple[str, list[str]]],
    open_image: Callable[[str], Image.Image],
    yes: list[int],
    no: list[int],
) -> list[list[float]]:
    """Margins of rows (image, questions), all with an image or all without."""
    model, packed = vlm.model, []
    for shown, texts in rows:
        count, about = int(bool(shown)), shown or "no image"
        names = [f"question `{text}` about {about}: " for text in texts]
        turns = [[question_turn(text + POST_PROMPT, count)] for text in texts]
        encoded = [vlm.encode(t, count, ask=True, name=name) for t, name in zip(turns, names)]
        packed.append(pack([row["input_ids"] for row in encoded]))
    ids = pad_sequence([row[0] for row in packed], batch_first=True, padding_value=vlm.tokenizer.pad_token_id)
    positions = pad_sequence([row[1] for row in packed], batch_first=True)
    device, dtype = model.device, model.dtype
    if all(len(texts) == 1 for _, texts in rows):  # as any batch
        mask = pad_sequence([torch.ones_like(row[0]) for row in packed], batch_first=True)
    else:
        # padding sees itself, so that no row is empty
        allowed = torch.eye(ids.shape[1], dtype=torch.bool).repeat(len(rows), 1, 1)  # (rows, tokens, tokens)
        for of_row, (_, _, seen, _) in zip(allowed, packed):
            of_row[: len(seen), : len(seen)] = seen
        mask = _added(allowed, dtype)
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
    if rows[0][0]:
        inputs["pixel_values"] = vlm.pixels(image_of(shown, open_image) for shown, _ in rows).to(dtype)
    states = model.model(**{name: tensor.to(device) for name, tensor in inputs.items()}, use_cache=False)
    result = []
    for i, (_, _, _, lasts) in enumerate(packed):
        logits = model.logits(states.last_hidden_state[i, lasts]).double()  # (questions, vocabulary)
        result.append((logits[:, yes].logsumexp(-1) - logits[:, no].logsumexp(-1)).tolist())
    return result


def pack(prompts: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    """Lay prompts of token ids behind their common beginning in one row; each keeps at least its last token to itself.

    Returns:
        ids (tokens,) int64; position_ids (tokens,), which go on from the beginning in each prompt; (tokens, tokens)
        bool, what each token sees; the place of each prompt's last token.
    """
    columns = zip(*(ids[:-1] for ids in prompts))
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    ids, positions, owner, lasts = list(prompts[0][:shared]), list(range(shared)), [-1] * shared, []
    for number, prompt in enumerate(prompts):
        ids += prompt[shared:]
        positions += range(shared, len(prompt))
        owner += [number] * (len(prompt) - shared)
        lasts.append(len(ids) - 1)
    owners = torch.tensor(owner)
    causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    allowed = causal & ((owners[None] == owners[:, None]) | (owners[None] == -1))
    return torch.tensor(ids), torch.tensor(positions), allowed, lasts


def score_margins(questions: Sequence[Question], values: np.ndarray, seed: int = 0) -> dict[str, dict]:
    """Scores of margins for every split that occurs, and under "mean" their plain average.

    accuracy at margin 0; auc, the share of (yes, no) pairs of questions in the right order; ap, the average precision;
    accuracy_tuned, at the threshold that is best in the other folds of images; yes_rate at 0. All in [0, 1].
    """
    fold_of = folds_of_images(questions, seed)
    table: dict[str, dict[str, float]] = {}
    for split in SPLITS:
        chosen = [i for i, q in enumerate(questions) if q.split == split]
        if not chosen:
            continue
        margin = np.asarray(values)[chosen]
        is_yes = np.array([questions[i].label == "yes" for i in chosen])
        fold = np.array([fold_of[questions[i].image] for i in chosen])
        right = np.zeros(len(chosen), bool)
        for held_out in (fold == number for number in set(fold.tolist())):
            threshold = best_threshold(margin[~held_out], is_yes[~held_out])
            right[held_out] = (margin[held_out] > threshold) == is_yes[held_out]
        both = is_yes.any() and not is_yes.all()
        table[split] = {
            "accuracy": float(((margin > 0) == is_yes).mean()),
            "auc": float(roc_auc_score(is_yes, margin)) if both else float("nan"),
            "ap": float(average_precision_score(is_yes, margin)) if is_yes.any() else float("nan"),
            "accuracy_tuned": float(right.mean()),
            "yes_rate": float((margin > 0).mean()),
            "n": len(chosen),
        }
    mean = {name: float(np.mean([row[name] for row in table.values()])) for name in MARGIN_SCORES}
    return {**table, "mean": {**mean, "n": len(questions)}}


def best_threshold(margin: np.ndarray, is_yes: np.ndarray) -> float:
    """The threshold with the most right answers when yes is said above it; 0 where there is nothing to learn from."""
    if not len(margin):
        return 0.0
    order = np.argsort(margin)
    margin, is_yes = margin[order], is_yes[order]
    right = np.concatenate([[is_yes.sum()], is_yes.sum() + np.cumsum(np.where(is_yes, -1, 1))])  # no up to place i
    ends = np.concatenate([[margin[0] - 1], (margin[1:] + margin[:-1]) / 2, [margin[-1] + 1]])
    possible = np.concatenate([[True], margin[1:] > margin[:-1], [True]])  # equal margins cannot be told apart
    return float(ends[np.where(possible, right, -1).argmax()])


def predictions(values: np.ndarray, threshold: float = 0.0) -> list[str]:
    """Margins as yes or no, for `mllm.pope.scores.score_splits`."""
    return ["yes" if value > threshold else "no" for value in values]


def generate(
    vlm: VisionLanguageModel,
    questions: Sequence[Question],
    open_image: Callable[[str], Image.Image],
    *,
    batch_size: int = 16,
) -> list[str]:
    """Greedy answers to questions, each asked once about an image; arguments as in `margins`."""
    asked = list(dict.fromkeys((q.shown, q.text) for q in questions))
    answers: dict[tuple[str, str], str] = {}
    for first in tqdm(range(0, len(asked), batch_size), desc="pope answers", disable=None):
        batch = asked[first : first + batch_size]
        turns = [[question_turn(text + POST_PROMPT, bool(shown))] for shown, text in batch]
        images = [[image_of(shown, open_image)] if shown else [] for shown, _ in batch]
        answers |= dict(zip(batch, vlm.answer(turns, images, max_new_tokens=16)))
    return [answers[q.shown, q.text] for q in questions]


def image_of(shown: str, open_image: Callable[[str], Image.Image]) -> Image.Image:
    """The image of a question, or the grey one of the control."""
    return grey_image() if shown == GREY else open_image(shown)


def run(options: Namespace) -> None:
    """Exact yes/no scores of a model with all controls, into margins.json and margins.jsonl."""
    device = pick_device(options.device)
    questions = read_labelled(options.pope)
    images = images_of(questions, options.pope, options.image_root, options.output_dir / "images")
    vlm = load(options.run, device=device, quiet=True)

    def open_image(name: str) -> Image.Image:
        return images[name].open()

    options.output_dir.mkdir(parents=True, exist_ok=True)
    scores: dict[str, Any] = {}
    lines = []
    for name in ("model", *CONTROLS):
        asked = CONTROLS[name](questions, 0) if name in CONTROLS else questions
        values = margins(vlm, asked, open_image, batch_size=options.batch_size)
        scores[name] = score_margins(asked, values)
        lines += [{"pass": name, **q._asdict(), "margin": value} for q, value in zip(asked, values.tolist())]
        print_scores(f"{name} (%)", scores[name], MARGIN_SCORES)
    scores["blind"] = score_splits(questions, blind(questions))
    print_line(uses_image(scores["model"], scores["blind"]))
    if options.generate:
        answers = generate(vlm, questions, open_image, batch_size=options.batch_size)
        scores["generated"] = score_splits(questions, parse(answers))
        print_scores("generated answers (%)", scores["generated"], SCORES)
        lines += [{"pass": "generated", **q._asdict(), "answer": text} for q, text in zip(questions, answers)]
    write_whole(options.output_dir / MARGINS, "".join(map(json_line, lines)))
    write_json(options.output_dir / "margins.json", {"version": version(questions), **scores})
    print_line(f"wrote {options.output_dir / 'margins.json'}")
