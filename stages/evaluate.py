"""Stage 4: evaluate. The CLIP benchmarks for a pretrained dual encoder and POPE, through lmms-eval, for the
multimodal model built on it; either half may be left out.

    python -m stages.evaluate --clip runs/diffclip --clip_data data/scenes --mllm runs/instruct \
        --pope data/pope --image_root data/pope/images --output_dir runs/evaluate
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffclip.errors import InputError
from stages.config import parse, require

if TYPE_CHECKING:
    from stages.run import Run


@dataclass
class EvaluateConfig:
    """Settings of evaluation."""

    output_dir: str = field(default="", metadata={"help": "the run directory to write"})
    seed: int = field(default=0, metadata={"help": "of few-shot episodes and image shuffling"})
    clip: str = field(default="", metadata={"help": "a pretraining run, or any checkpoint diffclip.load reads"})
    clip_data: str = field(
        default="",
        metadata={"help": "folder with classification/, shifts/, retrieval/, mmvp/ (what is there is run)"},
    )
    few_shot_episodes: int = field(default=5000, metadata={"help": "5-way 5-shot episodes"})
    mllm: str = field(default="", metadata={"help": "an instruction run"})
    pope: str = field(default="", metadata={"help": "folder of POPE files (…random…, …popular…, …adversarial….json)"})
    image_root: str = field(default="", metadata={"help": "folder of POPE's pictures"})
    batch_size: int = field(default=64, metadata={"help": "pictures, or questions, at a time"})
    examples: int = field(default=60, metadata={"help": "answers kept with their pictures for the report"})


def main(argv: list[str] | None = None) -> None:
    config = parse(EvaluateConfig, __doc__, argv)
    require(config, "output_dir")
    if not (config.clip or config.mllm):
        raise InputError("nothing to evaluate: give --clip RUN and --clip_data, or --mllm RUN, --pope and --image_root")
    require(config, *(["clip_data"] if config.clip else []), *(["pope", "image_root"] if config.mllm else []))
    evaluate(config)


def evaluate(config: EvaluateConfig) -> None:
    """Run what the settings name and write metrics.json (percent) and examples.jsonl."""
    from stages.callbacks import end_with_pipeline
    from stages.run import Run, upstream_model

    end_with_pipeline()
    named = ("clip", "clip_data", "mllm", "pope", "image_root")
    run = Run("evaluate", config, {name: getattr(config, name) for name in named if getattr(config, name)})
    if run.finished:
        return
    run.note(model=upstream_model(config.clip or config.mllm))
    metrics: dict[str, float] = {}
    if config.clip:
        metrics |= clip_metrics(config, run)
    if config.mllm:
        metrics |= pope_metrics(config, run)
    run.finish(metrics)


def clip_metrics(config: EvaluateConfig, run: "Run") -> dict[str, float]:
    """Zero-shot, shifts, retrieval, linear probe, few-shot and MMVP-VLM on what `clip_data` holds, in percent."""
    import torch

    import diffclip
    from diffclip.benchmarks import evaluate_clip

    model, preprocess, tokenizer = diffclip.load(config.clip)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    metrics = evaluate_clip(
        model,
        preprocess,
        tokenizer,
        config.clip_data,
        run.path,
        seed=config.seed,
        episodes=config.few_shot_episodes,
        batch_size=config.batch_size,
    )
    run.say(f"evaluate: {len(metrics)} scores of {config.clip} on {config.clip_data}")
    return metrics
