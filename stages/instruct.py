"""Stage 3: instruct. Projector and language model learn from conversations about images; the tower stays frozen
(the paper: the COCO subset of LLaVA-665K, `--image_prefix coco/`).

    deepspeed --num_gpus 8 --module diffclip instruct --config paper/instruct \
        --model runs/align --data llava_v1_5_mix665k.json --image_root images --output_dir runs/instruct
"""

from pathlib import Path

from diffclip.base.errors import exit_on_input_error
from diffclip.base.imports import importing
from diffclip.base.paths import folder_of, matching
from stages.config import parse, require
from stages.run import Run
from stages.settings import InstructConfig


def main(argv: list[str] | None = None) -> None:
    """Train projector and language model of an aligned model, write `output_dir`."""
    config = parse(InstructConfig, __doc__, argv)
    if config.dry_run:
        require(config, "model")
        from stages.dry_run import estimate_instruction

        return estimate_instruction(config)
    require(config, "output_dir", "model", "data")
    data = matching(config.data)
    config.image_root = config.image_root or folder_of(data)
    inputs: dict[str, str | Path | list[str]] = {"model": config.model, "data": data, "image_root": config.image_root}
    with Run("instruct", config, inputs) as run:
        if not run.finished:
            with importing():
                from stages.conversations import train_aligned

            train_aligned(config, run)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
