"""Stage 4: evaluate. The CLIP benchmarks for a pretrained dual encoder and POPE, through lmms-eval, for the
multimodal model built on it; either half may be left out.

    python -m stages.evaluate --clip runs/diffclip --clip_data data/scenes --mllm runs/instruct \
        --pope data/pope --image_root data/pope/images --output_dir runs/evaluate
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from diffclip.base.errors import InputError, exit_on_input_error
from diffclip.base.files import json_line, read_jsonl, write_json, write_whole
from stages.config import parse, require
from stages.overlays import (
    GRID,
    Encoder,
    heat_maps,
    keep_attention,
    localisation,
    queries_from_masks,
    query_of,
    why_no_maps,
)
from stages.run import Run, end_with_pipeline, upstream_model

if TYPE_CHECKING:
    from mllm.data.rows import Picture
    from mllm.pope.questions import Question


@dataclass
class EvaluateConfig:
    """Settings of evaluation."""

    output_dir: str = field(default="", metadata={"help": "the run directory to write"})
    seed: int = field(default=0, metadata={"help": "of few-shot episodes and image shuffling"})
    clip: str = field(default="", metadata={"help": "a pretraining run, or any checkpoint diffclip.load reads"})
    clip_data: str = field(
        default="",
        metadata={"help": "folder of classification/, shifts/, retrieval/, mmvp/, segmentation/, as far as there"},
    )
    few_shot_episodes: int = field(default=5000, metadata={"help": "5-way 5-shot episodes"})
    linear_probe: str = field(
        default="exact", metadata={"help": "exact, the official solver, or fast, within some tenths of a point of it"}
    )
    mllm: str = field(default="", metadata={"help": "an instruction run"})
    pope: str = field(default="", metadata={"help": "POPE: the official folder, LLaVA's file, or the Hub's parquet"})
    pope_labels: str = field(default="", metadata={"help": "the official folder, where `pope` is LLaVA's file"})
    image_root: str = field(default="", metadata={"help": "folder of POPE's images (parquet has them inside)"})
    batch_size: int = field(default=64, metadata={"help": "images, or questions, at a time"})
    processes: int = field(default=0, metadata={"help": "of lmms-eval, sharing the questions; 0: one a GPU"})
    examples: int = field(default=240, metadata={"help": "answers kept with their images for the report"})
    masked_objects: int = field(
        default=2000,
        metadata={"help": "objects of clip_data's segmentation/ (COCO format) that attention is scored on"},
    )


def main(argv: list[str] | None = None) -> None:
    end_with_pipeline()
    config = parse(EvaluateConfig, __doc__, argv)
    require(config, "output_dir")
    if not (config.clip or config.mllm):
        raise InputError("nothing to evaluate: give --clip RUN and --clip_data, or --mllm RUN, --pope and --image_root")
    if config.linear_probe not in ("exact", "fast"):
        raise InputError(f"linear_probe: {config.linear_probe!r} is neither exact nor fast")
    require(config, *(["clip_data"] if config.clip else []), *(["pope"] if config.mllm else []))
    evaluate(config)


def evaluate(config: EvaluateConfig) -> None:
    """Run what the settings name and write metrics.json (percent), examples.jsonl and attention.jsonl.

    metrics.json grows with every part, so that one that fails leaves the scores of those before it; the same command
    then takes up the stored features and answers, and runs the rest.
    """
    from diffclip.checkpoints import locate

    named = ("clip", "clip_data", "mllm", "pope", "pope_labels", "image_root")
    inputs = {name: getattr(config, name) for name in named if getattr(config, name)}
    if config.clip and not Path(config.clip).exists():
        inputs["clip"] = str(locate(config.clip))  # a Hub id: where its copy lies
    run = Run("evaluate", config, inputs)
    if run.finished:
        return
    run.note(model=upstream_model(config.clip or config.mllm))
    metrics: dict[str, float] = {}

    def keep(scores: Mapping[str, float]) -> None:
        metrics.update(scores)
        write_json(run.path / "metrics.json", metrics)

    encoder = load_encoder(config.clip) if config.clip else None
    if encoder:
        keep(clip_metrics(config, run, encoder))
        missing = why_no_maps(encoder)
        if missing:
            run.note(attention=missing)
            run.say(f"evaluate: {missing}")
        else:
            keep(attention_metrics(config, run, encoder))
    if config.mllm:
        questions, images = pope_questions(config, run)
        keep(margin_metrics(config, run, questions, images))
        keep(pope_metrics(config, run, questions, images))
        keep_examples(config, run, images, encoder if encoder and not missing else None)
    run.finish(metrics)


def load_encoder(path: str) -> Encoder:
    """A dual encoder, on the GPU if there is one."""
    import torch

    import diffclip

    model, transform, tokenizer = diffclip.load(path)
    return Encoder(model.to("cuda" if torch.cuda.is_available() else "cpu"), transform, tokenizer)


def clip_metrics(config: EvaluateConfig, run: "Run", encoder: Encoder) -> dict[str, float]:
    """Zero-shot, shifts, retrieval, linear probe, few-shot and MMVP-VLM on what `clip_data` holds, in percent."""
    from diffclip.benchmarks import evaluate_clip

    metrics = evaluate_clip(
        *encoder,
        config.clip_data,
        run.path,
        seed=config.seed,
        episodes=config.few_shot_episodes,
        probe=config.linear_probe,
        batch_size=config.batch_size,
    )
    run.say(f"evaluate: {len(metrics)} scores of {config.clip} on {config.clip_data}")
    return metrics


def attention_metrics(config: EvaluateConfig, run: "Run", encoder: Encoder) -> dict[str, float]:
    """Attention maps for the report, and their scores against the masks of `clip_data`/segmentation, if there are."""
    from diffclip.benchmarks.localisation import read_masks

    folder = Path(config.clip_data) / "segmentation"
    if not (folder / "instances.json").is_file():
        run.note(attention=f"no attention maps: {folder}/instances.json is not there")
        return {}
    try:
        items = list(islice(read_masks(folder / "instances.json", folder / "images"), config.masked_objects))
    except ImportError:
        run.note(attention="no attention maps: pycocotools is not installed (pip install '.[eval]')")
        return {}
    maps = keep_attention(encoder, queries_from_masks(items), run.path)
    metrics = localisation(encoder, items, run.path)
    run.say(f"evaluate: {maps} attention maps kept, {len(items)} objects compared with their masks")
    return metrics


def pope_questions(config: EvaluateConfig, run: "Run") -> tuple[list["Question"], dict[str, "Picture"]]:
    """POPE's questions with labels, and their images."""
    from mllm.pope.questions import images_of, read_labelled, version

    questions = read_labelled(config.pope, config.pope_labels or None)
    run.note(pope=version(questions))
    return questions, images_of(questions, config.pope, config.image_root, run.path / "pope" / "images")


def pope_metrics(
    config: EvaluateConfig, run: "Run", questions: Sequence["Question"], images: Mapping[str, "Picture"]
) -> dict[str, float]:
    """POPE of the multimodal model and its controls in percent, by generated answers."""
    import torch

    from mllm.pope.lmms import evaluate_with_lmms

    scores = evaluate_with_lmms(
        config.mllm,
        questions,
        images,
        run.path / "pope",
        batch_size=config.batch_size,
        processes=config.processes or max(1, torch.cuda.device_count()),
        seed=config.seed,
    )
    metrics: dict[str, float] = {}
    for who, table in scores.items():
        prefix = "pope" if who == "model" else f"pope_{who}"
        for split, row in table.items():
            metrics[f"{prefix}/{split}/questions"] = row.pop("n")
            metrics |= {f"{prefix}/{split}/{name}": 100 * value for name, value in row.items()}
    run.say(
        f"evaluate: POPE accuracy {metrics['pope/mean/accuracy']:.1f} (yes rate {metrics['pope/mean/yes_rate']:.1f}), "
        f"with other images {metrics['pope_shuffled/mean/accuracy']:.1f}, "
        f"blind {metrics['pope_blind/mean/accuracy']:.1f}"
    )
    return metrics


def margin_metrics(
    config: EvaluateConfig, run: "Run", questions: Sequence["Question"], images: Mapping[str, "Picture"]
) -> dict[str, float]:
    """POPE by the margin between yes and no, in percent; the margins themselves go to pope/margins.jsonl."""
    from mllm.model import load
    from mllm.pope.margins import margins, score_margins

    vlm = load(config.mllm, device=None)
    try:
        values = margins(vlm, questions, lambda name: images[name].open(), batch_size=config.batch_size)
    except InputError as error:  # a tokenizer that begins yes and no alike; generated answers tell all the same
        run.note(pope_margin=f"no margins: {error}")
        return {}
    lines = (json_line({**q._asdict(), "margin": float(v)}) for q, v in zip(questions, values))
    (run.path / "pope").mkdir(exist_ok=True)
    write_whole(run.path / "pope" / "margins.jsonl", "".join(lines))
    return {
        f"pope_margin/{split}/{name}": 100 * value
        for split, row in score_margins(questions, values, seed=config.seed).items()
        for name, value in row.items()
        if name != "n"
    }


def keep_examples(config: EvaluateConfig, run: "Run", images: Mapping[str, "Picture"], encoder: Encoder | None) -> None:
    """Write examples.jsonl: questions of each split with both answers, and their images beside it.

    With a dual encoder each row also has `heat`, the patches that speak for the object asked about.
    """
    answers = [answer for _, answer in read_jsonl(run.path / "pope" / "answers.jsonl")]
    shuffled = {(a["split"], a["image"], a["text"]): a["answer"] for a in answers if a["pass"] == "shuffled"}
    kept: list[dict] = []
    for split in ("random", "popular", "adversarial"):
        asked = [a for a in answers if a["pass"] == "model" and a["split"] == split]
        kept += asked[:: max(1, -(-len(asked) // (config.examples // 3)))]  # spread over the images
    places = {a["image"]: images[a["image"]] for a in kept}
    folder = run.path / "examples"
    folder.mkdir(exist_ok=True)
    files = {name: f"examples/{number:03d}.png" for number, name in enumerate(sorted(places))}
    queries = [query_of(a["text"]) for a in kept]
    heat: dict[int, GRID] = {}
    names = list(files)
    for start in range(0, len(names), 64):  # a few images in memory at a time
        opened = {name: places[name].open() for name in names[start : start + 64]}
        asked = [i for i, a in enumerate(kept) if encoder and a["image"] in opened and queries[i]]
        if encoder and asked:
            shown = [opened[kept[i]["image"]] for i in asked]
            heat |= zip(asked, heat_maps(encoder, shown, [queries[i] for i in asked]))
        for name, picture in opened.items():
            picture.thumbnail((256, 256))
            picture.save(run.path / files[name])
    rows = [
        {
            "split": a["split"],
            "question_id": a["question_id"],
            "question": a["text"],
            "label": a["label"],
            "answer": a["answer"],
            "answer_shuffled": shuffled.get((a["split"], a["image"], a["text"])),
            "image": files[a["image"]],
            "query": queries[i],
            "heat": heat.get(i),
        }
        for i, a in enumerate(kept)
    ]
    write_whole(run.path / "examples.jsonl", "".join(map(json_line, rows)))


if __name__ == "__main__":
    with exit_on_input_error():
        main()
