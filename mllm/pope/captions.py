"""Captions of a model, or of a file, scored by CHAIR (`mllm.pope.chair`) beside its controls."""

import base64
import io
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffclip.base.console import print_table
from diffclip.base.errors import InputError
from diffclip.base.files import json_line, read_jsonl, write_json, write_whole
from diffclip.base.lines import print_line
from mllm.answer_file import answer_file
from mllm.data.images import find_place
from mllm.pope.chair import SCORES, Caption, Words, controls, intervals, mentions, read_truth, score, verdict
from mllm.pope.images import COCO_FOLDERS
from mllm.pope.scores import grey_image

PASSES = ("model", "shuffled", "grey", "no_image", "blind")
PROMPT, MAX_NEW_TOKENS = "Describe this image in detail.", 128
GREY, NO_IMAGE = "grey", "no_image"  # of the controls whose captions a model writes once, for all images
Scores = dict[str, dict[str, float]]


def read_captions(path: str | Path, truth: Mapping[str, frozenset[str]]) -> dict[str, str]:
    """{image: caption} of a file of rows {image, caption or answer}; InputError for images unknown, or there twice."""
    found: dict[str, str] = {}
    known = {Path(name).stem: name for name in truth}
    for number, row in read_jsonl(path):
        text = row.get("caption", row.get("answer")) if isinstance(row, dict) else None
        if not isinstance(text, str) or not isinstance(row.get("image"), str):
            raise InputError(f"{path}:{number}: not a caption; rows are {{image, caption}}, one a line")
        name = row["image"] if row["image"] in truth else known.get(Path(row["image"]).stem)
        if name is None or name in found:
            why = "is captioned twice" if name else "is not among the annotations' images"
            raise InputError(f"{path}:{number}: image {row['image']} {why}; remove the line")
        found[name] = text
    if not found:
        raise InputError(f"{path}: holds no captions; rows are {{image, caption}}, one a line")
    return found


def write_captions(
    run: str,
    names: Sequence[str],
    image_root: Path,
    out_dir: Path,
    *,
    prompt: str = PROMPT,
    batch_size: int = 16,
    max_new_tokens: int = MAX_NEW_TOKENS,
    device: str | None = None,
) -> tuple[dict[str, str], dict[str, str]]:
    """Ask a model; {image: caption}, and its captions of `GREY` and `NO_IMAGE`, as far as its template allows.

    What an earlier start has answered, in answers.jsonl of `out_dir`, is kept.
    """
    from mllm.model import load

    places = {name: next(filter(None, _places(image_root, name)), None) for name in names}
    if missing := [name for name, place in places.items() if place is None]:
        raise InputError(f"{len(missing)} images are not under {image_root}, e.g. {missing[0]}")
    vlm = load(run, device=device, quiet=True)
    grey_image().save(grey := io.BytesIO(), "PNG")
    rows = [{"id": GREY, "image": "data:image/png;base64," + base64.b64encode(grey.getvalue()).decode()}]
    rows += [{"id": NO_IMAGE}] if vlm.template != "plain" else []  # which has no place for words alone
    controls = len(rows)
    rows += [{"id": name, "image": place} for name, place in places.items() if place]
    source, out = out_dir / "questions.jsonl", out_dir / "answers.jsonl"
    write_whole(source, "".join(json_line({**row, "question": prompt}) for row in rows))
    answer_file(vlm, source, out, image_root, batch_size, max_new_tokens=max_new_tokens)
    said = [row["answer"] for _, row in read_jsonl(out)]  # in the order of the rows
    return dict(zip(places, said[controls:])), dict(zip((GREY, NO_IMAGE), said[:controls]))


def _places(root: Path, name: str) -> Iterable[str | None]:
    """Where an image may lie under `root`: as the annotations have it, or in COCO's usual folders."""
    for folder in COCO_FOLDERS:
        path = f"{folder}/{name}" if folder else name
        yield path if find_place(root, path) else None


def score_captions(
    captions: Mapping[str, str],
    elsewhere: Mapping[str, str],
    truth: Mapping[str, frozenset[str]],
    words: Words,
    out_dir: Path,
    about: Mapping[str, Any],
    seed: int = 0,
) -> Scores:
    """Scores of captions and controls, {one of `PASSES`: scores}, into chair.json, each caption into captions.jsonl.

    Args:
        captions: by image, and `elsewhere` by control, from `write_captions`.
        truth: what images hold and, with `words`, how it is named, from `mllm.pope.chair.read_truth`.
        about: what else chair.json is to say.
        seed: of the controls and of the intervals' resampling.
    """
    named = {name: mentions(text, words) for name, text in captions.items()}
    table = controls(named, truth, seed)
    for who, text in elsewhere.items():
        table[who] = [Caption(mentions(text, words), truth[name]) for name in sorted(named)]
    scores = {who: score(table[who]) for who in PASSES if who in table}
    for name, ends in intervals(table["model"], seed=seed).items():
        scores["model"] |= {f"{name}_{end}": value for end, value in zip(("low", "high"), ends)}
    rows = [
        {"image": n, "caption": captions[n], "objects": named[n], "absent": Caption(named[n], truth[n]).absent,
         "there": sorted(truth[n])}
        for n in sorted(named)
    ]  # fmt: skip
    write_whole(out_dir / "captions.jsonl", "".join(map(json_line, rows)))
    write_json(out_dir / "chair.json", {"images": len(named), "words": len(words), **about, **scores})
    return scores


def run(options: Namespace) -> None:
    """The command `chair`: captions of a model, or of a file, with their scores and controls."""
    if bool(options.run) == bool(options.answers):
        raise InputError("give a RUN, whose captions are to be scored, or --answers FILE with captions; one of them")
    if options.run and not options.image_root:
        raise InputError("--image_root is missing: the folder of the images")
    truth, words = read_truth(options.instances, options.captions, options.synonyms)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    elsewhere: dict[str, str] = {}
    if options.answers:
        captions = read_captions(options.answers, truth)
    else:
        how = {name: getattr(options, name) for name in ("prompt", "batch_size", "max_new_tokens", "device")}
        names = list(truth)[: options.limit or None]
        captions, elsewhere = write_captions(options.run, names, options.image_root, options.output_dir, **how)
    about = {"prompt": options.prompt if options.run else None}
    about["truth"] = "annotations and captions" if options.captions else "annotations alone"
    scores = score_captions(captions, elsewhere, truth, words, options.output_dir, about)
    cells = [[who, *(f"{100 * row[s]:.1f}" for s in SCORES), f"{row['mentions']:.2f}"] for who, row in scores.items()]
    own = scores["model"]
    cells.insert(
        1, ["  95 % interval", *(f"[{100 * own[f'{s}_low']:.1f}, {100 * own[f'{s}_high']:.1f}]" for s in SCORES), ""]
    )
    columns = ["captions", "CHAIR_i", "CHAIR_s", "recall", "objects a caption"]
    print_table(
        columns,
        cells,
        f"CHAIR of {len(captions):,} captions (%, lower is better; recall: higher)",
        [f"the captions {verdict(scores, len(captions))[1]}"],
    )
    print_line(f"wrote {options.output_dir / 'chair.json'}")
