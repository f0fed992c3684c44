"""Stage 4: evaluate. The CLIP benchmarks for a pretrained dual encoder and POPE and other tasks, through lmms-eval, for
the multimodal model built on it; either half may be left out.

    diffclip evaluate --clip runs/diffclip --data_root data/scenes --mllm runs/instruct \
        --pope data/pope --image_root data/pope/images --output_dir runs/evaluate
"""

from pathlib import Path

from diffclip.base.errors import InputError, exit_on_input_error
from stages.config import parse, require
from stages.run import Run
from stages.settings import EvaluateConfig


def main(argv: list[str] | None = None) -> None:
    """Run what the settings name and write metrics.json (percent), examples.jsonl and attention.jsonl."""
    config = parse(EvaluateConfig, __doc__, argv)
    require(config, "output_dir")
    if not (config.clip or config.mllm):
        raise InputError("nothing to evaluate: give --clip RUN and --data_root, or --mllm RUN and --pope or --tasks")
    if config.tasks and not config.mllm:
        raise InputError("--tasks are questions to a multimodal model: name it with --mllm RUN")
    require(config, *(["clip_data"] if config.clip else []), *(["pope"] if config.mllm and not config.tasks else []))
    names = ("clip", "clip_data", "mllm", "pope", "pope_labels", "image_root", "task_path")
    inputs = {name: getattr(config, name) for name in names}
    if config.clip and not Path(config.clip).exists():
        from diffclip.sources import weights_of

        inputs["clip"] = str(weights_of(config.clip))  # of a Hub id or a name of open_clip's: where its copy lies
    with Run("evaluate", config, inputs) as run:
        if not run.finished:
            from stages.evaluation import evaluate_models

            evaluate_models(config, run)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
