"""What an evaluation measures, part by part: the CLIP benchmarks and the attention of a dual encoder, POPE of the
multimodal model built on it, examples of its answers for the report, CHAIR of its captions, and any other task of
lmms-eval.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch

import diffclip
from diffclip.base.devices import group, pick_device
from diffclip.base.errors import InputError
from diffclip.base.files import json_line, read_json, write_json, write_whole
from diffclip.base.schema import (
    ANSWERS,
    CHAIR,
    CLIP_BENCHMARKS,
    EXAMPLES,
    IMAGES,
    MARGINS,
    METRICS,
    POPE,
    POPE_SPLITS,
    TASKS,
    Example,
)
from diffclip.benchmarks.evaluate import evaluate_clip
from diffclip.benchmarks.mask_scores import read_masks
from diffclip.benchmarks.protocol import Settings
from mllm.data.images import ImagePlace
from mllm.lmms_tasks import evaluate_task
from mllm.model import load
from mllm.pope.captions import PROMPT, score_captions, write_captions
from mllm.pope.chair import read_truth, verdict
from mllm.pope.images import images_of
from mllm.pope.lmms import evaluate_with_lmms
from mllm.pope.margins import margins, score_margins
from mllm.pope.questions import Answer, Question, read_answers, read_labelled, version
from stages import overlays
from stages.overlays import Encoder
from stages.provenance import upstream_model
from stages.run import Run
from stages.settings import EvaluateConfig


def evaluate_models(config: EvaluateConfig, run: Run) -> None:
    """Run every part that the settings name.

    metrics.json grows with each. One that fails keeps no other from running; the same command then takes up the stored
    features and answers, and runs what is left. Of several ranks all encode the images of the CLIP benchmarks; rank 0
    does the rest, and lmms-eval has processes of its own.

    Raises:
        InputError: a part failed, after all others.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)  # relevance maps need gradients (stages.training.training_arguments)
    run.note(model=upstream_model(config.clip or config.mllm))
    metrics: dict[str, float] = {}
    failed: list[str] = []

    def add(scores: Mapping[str, float]) -> None:
        metrics.update(scores)
        write_json(run.path / METRICS, metrics)

    def attempt(part: str, work: Callable[[], None]) -> None:
        try:
            work()
        except InputError as error:
            failed.append(f"{part}: {error}")
            run.log(f"evaluate: no scores of {failed[-1]}")

    with group():
        encoder = load_encoder(config.clip) if config.clip else None
        if encoder:
            attempt("the CLIP benchmarks", lambda: clip_metrics(config, run, encoder, add))
    if not run.is_main:
        return
    missing = overlays.why_no_maps(encoder) if encoder else "no dual encoder"
    if encoder:
        if missing:
            run.note(attention=missing)
            run.log(f"evaluate: {missing}")
        else:
            attempt("attention", lambda: add(attention_metrics(config, run, encoder)))
    if config.mllm and config.pope:
        attempt("POPE", lambda: pope(config, run, add, encoder if not missing else None))
    if config.chair:
        attempt("CHAIR", lambda: add(chair_metrics(config, run)))
    if config.tasks:
        attempt("lmms-eval", lambda: run_tasks(config, run, add))
    if failed:
        more = f" (and {len(failed) - 1} more parts)" if len(failed) > 1 else ""
        raise InputError(
            f"{failed[0]}{more}; {len(metrics)} other scores are in {run.path / METRICS}, and the same command takes "
            "up what is there"
        )
    run.finish(metrics)


def pope(config: EvaluateConfig, run: Run, add: Callable[[Mapping[str, float]], None], encoder: Encoder | None) -> None:
    """POPE by margins and by answers, and examples of it for the report."""
    questions, images = pope_questions(config, run)
    add(margin_metrics(config, run, questions, images))
    add(pope_metrics(config, run, questions, images))
    write_examples(config, run, images, encoder)


def load_encoder(path: str) -> Encoder:
    """A dual encoder, on the GPU if there is one."""
    model, transform, tokenizer = diffclip.load(path)
    return Encoder(model.to(pick_device()), transform, tokenizer)


def clip_metrics(
    config: EvaluateConfig, run: Run, encoder: Encoder, add: Callable[[Mapping[str, float]], None]
) -> None:
    """Zero-shot, shifts, retrieval, linear probe, few-shot and MMVP-VLM on what `clip_data` holds, in percent."""
    settings = Settings(
        seed=config.seed,
        episodes=config.few_shot_episodes,
        probe=config.linear_probe,
        batch_size=config.batch_size,
        precision={"fp32": "float32", "bf16": "bfloat16"}.get(config.precision, config.precision),
    )
    try:
        metrics = evaluate_clip(*encoder, config.clip_data, run.path, settings)
    except InputError:
        if run.is_main and (run.path / CLIP_BENCHMARKS).is_file():
            add(read_json(run.path / CLIP_BENCHMARKS)["metrics"])  # of the sets that could be scored
        raise
    if not run.is_main:
        return
    add(metrics)
    run.log(f"evaluate: {len(metrics)} scores of {config.clip} on {config.clip_data}")


def attention_metrics(config: EvaluateConfig, run: Run, encoder: Encoder) -> dict[str, float]:
    """Attention maps for the report, and their scores against the masks of `clip_data`/segmentation, if there are."""
    folder = Path(config.clip_data) / "segmentation"
    if not (folder / "instances.json").is_file():
        run.note(attention=f"no attention maps: {folder}/instances.json is not there")
        return {}
    try:
        items = list(islice(read_masks(folder / "instances.json", folder / "images"), config.masked_objects))
    except ImportError:
        run.note(attention="no attention maps: pycocotools is not installed (pip install 'diffclip-stack[eval]')")
        return {}
    maps = overlays.keep_attention(encoder, overlays.queries_from_masks(items), run.path)
    metrics = overlays.localisation(encoder, items, run.path)
    run.log(f"evaluate: {maps} attention maps kept, {len(items)} objects compared with their masks")
    return metrics


def pope_questions(config: EvaluateConfig, run: Run) -> tuple[list[Question], dict[str, ImagePlace]]:
    """POPE's questions with labels, and their images."""
    questions = read_labelled(config.pope, config.pope_labels or None)
    run.note(pope=version(questions))
    return questions, images_of(questions, config.pope, config.image_root, run.path / POPE / IMAGES)


def pope_metrics(
    config: EvaluateConfig, run: Run, questions: Sequence[Question], images: Mapping[str, ImagePlace]
) -> dict[str, float]:
    """POPE of the multimodal model and its controls in percent, by generated answers."""
    scores = evaluate_with_lmms(
        config.mllm,
        questions,
        images,
        run.path / POPE,
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
    run.log(
        f"evaluate: POPE accuracy {metrics['pope/mean/accuracy']:.1f} (yes rate {metrics['pope/mean/yes_rate']:.1f}), "
        f"with other images {metrics['pope_shuffled/mean/accuracy']:.1f}, "
        f"blind {metrics['pope_blind/mean/accuracy']:.1f}"
    )
    return metrics


def chair_metrics(config: EvaluateConfig, run: Run) -> dict[str, float]:
    """CHAIR of the multimodal model's captions and its controls in percent, and mentions a caption."""
    truth, words = read_truth(config.chair, config.chair_captions or None, config.chair_synonyms or None)
    folder, root = run.path / CHAIR, Path(config.chair_images or config.image_root)
    folder.mkdir(exist_ok=True)
    names = list(truth)[: config.chair_limit or None]
    captions, elsewhere = write_captions(config.mllm, names, root, folder, batch_size=config.batch_size)
    scores = score_captions(captions, elsewhere, truth, words, folder, {"prompt": PROMPT}, config.seed)
    run.log(f"evaluate: the captions {verdict(scores, len(captions))[1]}")
    metrics: dict[str, float] = {f"{CHAIR}/images": len(captions)}
    for who, row in scores.items():
        metrics |= {f"{CHAIR}/{who}/{name}": (1 if name == "mentions" else 100) * v for name, v in row.items()}
    return metrics


def run_tasks(config: EvaluateConfig, run: Run, add: Callable[[Mapping[str, float]], None]) -> None:
    """Scores of lmms-eval's tasks, each added when it is there; those that failed are named when all have been tried.

    Raises:
        InputError: tasks failed.
    """
    failed: dict[str, str] = {}
    tasks = list(dict.fromkeys(name.strip() for names in config.tasks for name in names.split(",") if name.strip()))
    for task in tasks:
        folder = run.path / TASKS / re.sub(r"[^\w.-]", "_", task)
        try:
            scores = evaluate_task(
                config.mllm,
                task,
                folder.resolve(),
                seed=config.seed,
                batch_size=config.batch_size,
                processes=config.processes or max(1, torch.cuda.device_count()),
                include=Path(config.task_path).resolve() if config.task_path else None,
                limit=config.task_limit,
            )
        except (InputError, OSError, ValueError, KeyError) as error:
            failed[task] = f"{task}: {error}"
            run.log(f"evaluate: task {failed[task]}")
            continue
        add(scores)
        run.log(f"evaluate: {len(scores)} scores of task {task}")
    if failed:
        raise InputError(
            f"{len(failed)} of {len(tasks)} tasks failed, all other scores are in {run.path / METRICS}; mend this "
            f"and start the same command again, which keeps the answers: {'; '.join(failed.values())}"
        )


def margin_metrics(
    config: EvaluateConfig, run: Run, questions: Sequence[Question], images: Mapping[str, ImagePlace]
) -> dict[str, float]:
    """POPE by the margin between yes and no, in percent; the margins themselves go to pope/margins.jsonl."""
    vlm = load(config.mllm, device=None)
    try:
        values = margins(vlm, questions, lambda name: images[name].open(), batch_size=config.batch_size)
    except InputError as error:  # a tokenizer that begins yes and no alike; generated answers tell all the same
        run.note(pope_margin=f"no margins: {error}")
        return {}
    lines = (json_line({**q._asdict(), "margin": float(v)}) for q, v in zip(questions, values))
    (run.path / POPE).mkdir(exist_ok=True)
    write_whole(run.path / POPE / MARGINS, "".join(lines))
    return {
        f"pope_margin/{split}/{name}": 100 * value
        for split, row in score_margins(questions, values, seed=config.seed).items()
        for name, value in row.items()
        if name != "n"
    }


def write_examples(config: EvaluateConfig, run: Run, images: Mapping[str, ImagePlace], encoder: Encoder | None) -> None:
    """Write examples.jsonl: questions of each split with both answers, and their images beside it.

    With a dual encoder each row also has `heat`, the patches that speak for the object asked about.
    """
    answers = read_answers(run.path / POPE / ANSWERS)
    shuffled = {a.key: a.text for a in read_answers(run.path / POPE / ANSWERS, passed="shuffled")}
    chosen: list[Answer] = []
    for split in POPE_SPLITS:
        of_split = [a for a in answers if a.question.split == split]
        if config.examples:
            chosen += of_split[:: max(1, -(-len(of_split) // max(1, config.examples // 3)))]  # spread over the images
    names = sorted({a.question.image for a in chosen})
    files = {name: f"examples/{number:03d}.png" for number, name in enumerate(names)}
    (run.path / "examples").mkdir(exist_ok=True)
    queries = [overlays.query_of(a.question.text) for a in chosen]
    heat: dict[int, overlays.GRID] = {}
    for start in range(0, len(names), 64):  # a few images in memory at a time
        opened = {name: images[name].open() for name in names[start : start + 64]}
        with_query = [i for i, a in enumerate(chosen) if encoder and a.question.image in opened and queries[i]]
        if encoder and with_query:
            seen = [opened[chosen[i].question.image] for i in with_query]
            heat |= zip(with_query, overlays.heat_maps(encoder, seen, [queries[i] for i in with_query]))
        for name, image in opened.items():
            image.thumbnail((256, 256))
            image.save(run.path / files[name])
    rows = [
        Example(
            split=a.question.split,
            question_id=a.question.question_id,
            question=a.question.text,
            label=a.question.label,
            answer=a.text,
            answer_shuffled=shuffled.get(a.key),
            image=files[a.question.image],
            query=queries[i],
            heat=heat.get(i),
        )
        for i, a in enumerate(chosen)
    ]
    write_whole(run.path / EXAMPLES, "".join(map(json_line, rows)))
