"""Stage 4: evaluate. The CLIP benchmarks for a pretrained dual encoder; for the multimodal model built on it POPE and
other tasks, through lmms-eval, and CHAIR of its captions. Either half may be left out.

    diffclip evaluate --clip runs/diffclip --data_root data/scenes --mllm runs/instruct \
        --pope data/pope --image_root data/pope/images --output_dir runs/evaluate
"""

from functools import partial
from pathlib import Path

from diffclip.base.errors import InputError, exit_on_input_error
from diffclip.base.imports import importing
from stages.config import parse, require
from stages.run import Run
from stages.settings import EvaluateConfig


def main(argv: list[str] | None = None) -> None:
    """Run what the settings name and write metrics.json (percent), examples.jsonl and attention.jsonl."""
    config = parse(EvaluateConfig, __doc__, argv)
    require(config, "output_dir")
    if not (config.clip or config.mllm):
        raise InputError(
            "nothing to evaluate: give --clip RUN and --data_root, or --mllm RUN and --pope, --chair or --tasks"
        )
    for setting in ("tasks", "chair"):
        if getattr(config, setting) and not config.mllm:
            raise InputError(f"--{setting} asks a multimodal model: name it with --mllm RUN")
    of_chair = ("chair_captions", "chair_synonyms", "chair_images")
    if not config.chair and (given := next(filter(partial(getattr, config), of_chair), "")):
        raise InputError(f"--{given} says how captions are scored by CHAIR: give --chair, COCO's instances, too")
    require(config, *(["clip_data"] if config.clip else []))
    require(config, *(["pope"] if config.mllm and not (config.tasks or config.chair) else []))
    require(config, *(["chair_images"] if config.chair and not config.image_root else []))
    names = ("clip", "clip_data", "mllm", "pope", "pope_labels", "image_root", "task_path", "chair", *of_chair)
    inputs = {name: getattr(config, name) for name in names}
    if config.clip and not Path(config.clip).exists():
        from diffclip.sources import weights_of

        inputs["clip"] = str(weights_of(config.clip))  # of a Hub id or a name of open_clip's: where its copy lies
    with Run("evaluate", config, inputs) as run:
        if not run.finished:
            with importing():
                from stages.evaluation import evaluate_models

            evaluate_models(config, run)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
