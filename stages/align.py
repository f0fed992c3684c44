"""Stage 2: align. The pretrained vision tower and the language model stay frozen, the projector between them learns
to speak the language model's tokens, on image-caption pairs (the paper: LAION-CC-SBU 558K).

    deepspeed --num_gpus 8 --module diffclip align --config paper/align \
        --vision_tower runs/diffclip --data blip_laion_cc_sbu_558k.json --image_root images --output_dir runs/align
"""

from pathlib import Path

from diffclip.base.errors import exit_on_input_error
from diffclip.base.imports import importing
from diffclip.base.paths import folder_of, matching
from stages.config import parse, require
from stages.run import Run
from stages.settings import AlignConfig


def main(argv: list[str] | None = None) -> None:
    """Assemble the multimodal model, train its projector, write `output_dir`."""
    config = parse(AlignConfig, __doc__, argv)
    if config.dry_run:
        require(config, "vision_tower", "language_model")
        from stages.dry_run import estimate_alignment

        return estimate_alignment(config)
    require(config, "output_dir", "vision_tower", "language_model", "data")
    data = matching(config.data)
    config.image_root = config.image_root or folder_of(data)
    inputs: dict[str, str | Path | list[str]] = {"data": data, "image_root": config.image_root}
    for part in ("vision_tower", "language_model"):
        if Path(getattr(config, part)).exists():  # otherwise a Hub id, or open_clip's name
            inputs[part] = getattr(config, part)
    with Run("align", config, inputs) as run:
        if not run.finished:
            with importing():
                from stages.conversations import train_assembled

            train_assembled(config, run)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
