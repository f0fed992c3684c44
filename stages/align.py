"""Stage 2: align. The pretrained vision tower and the language model stay frozen, the projector between them learns
to speak the language model's tokens, on image-caption pairs (the paper: LAION-CC-SBU 558K).

    deepspeed --num_gpus 8 --module stages.align --config stages/configs/paper/align.yaml \
        --vision_tower runs/diffclip --data blip_laion_cc_sbu_558k.json --image_root images --output_dir runs/align
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from diffclip.base.errors import InputError, exit_on_input_error
from stages.config import parse, require
from stages.mllm_training import ConversationConfig
from stages.run import Run, end_with_pipeline, upstream_model

if TYPE_CHECKING:
    from mllm.data.examples import ConversationDataset


@dataclass
class AlignConfig(ConversationConfig):
    """Settings of the alignment stage; defaults from the paper's section 4."""

    vision_tower: str = field(
        default="", metadata={"help": "a pretraining run, any CLIP / SigLIP model, or open_clip:NAME@WEIGHTS"}
    )
    language_model: str = field(
        default="Qwen/Qwen2.5-0.5B-Instruct",
        metadata={"help": "directory or Hub id of a causal language model"},
    )
    projector: Literal["linear", "mlp"] = field(
        default="linear", metadata={"help": "one linear layer (the paper), or LLaVA-1.5's two"}
    )
    class_token: bool = field(
        default=False, metadata={"help": "show the language model the tower's class token too; the paper does not"}
    )
    vision_feature_layer: int = field(
        default=-2, metadata={"help": "which of the tower's hidden states is projected; the paper: the last but one"}
    )
    image_mode: Literal["crop", "squash", "pad"] = field(
        default="crop", metadata={"help": "how images become square: the middle, all of it squashed, or with bars"}
    )
    projector_init: Literal["default", "whitened"] = field(
        default="default",
        metadata={"help": "what the projector starts from: torch's default, or the statistics of the tower's features"},
    )
    template: Literal["plain", "vicuna", "chatml"] = field(default="plain", metadata={"help": "prompt format"})
    learns: list[str] = field(
        default_factory=lambda: ["projector"],
        metadata={"help": "parts that learn: vision_tower, projector, language_model"},
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "peak learning rate"})


def main(argv: list[str] | None = None) -> None:
    end_with_pipeline()
    config = parse(AlignConfig, __doc__, argv)
    if config.dry_run:
        require(config, "vision_tower", "language_model")
        from mllm.assemble import assembled_config
        from stages.mllm_training import dry_run

        return dry_run(
            config,
            assembled_config(config.vision_tower, config.language_model, config.projector, config.class_token),
        )
    require(config, "output_dir", "vision_tower", "language_model", "data", "image_root")
    align(config)


def align(config: AlignConfig) -> None:
    """Assemble the multimodal model, train its projector, write `config.output_dir`."""
    from pathlib import Path

    from stages.mllm_training import data_inputs

    inputs = data_inputs(config)
    for part in ("vision_tower", "language_model"):
        if Path(getattr(config, part)).exists():  # otherwise a Hub id, or open_clip's name
            inputs[part] = getattr(config, part)
    run = Run("align", config, inputs)
    if run.finished:
        return

    import torch

    from mllm.assemble import assemble
    from mllm.projector import whiten_projector
    from stages.mllm_training import train_on_conversations

    run.note(model=upstream_model(config.vision_tower))
    vlm = assemble(
        config.vision_tower,
        config.language_model,
        projector=config.projector,
        template="vicuna",
        vision_feature_layer=config.vision_feature_layer,
        class_token=config.class_token,
        image_mode=config.image_mode,
        seed=config.seed,
    )

    def start(dataset: "ConversationDataset") -> None:
        if config.projector_init == "whitened":
            spread = range(0, len(dataset), max(1, len(dataset) // 128))[:128]
            pixels = [
                example["pixel_values"] for example in map(dataset.__getitem__, spread) if "pixel_values" in example
            ]
            if not pixels:
                raise InputError(
                    f"{', '.join(config.data)}: none of {len(spread)} rows looked at has an image, which "
                    "`projector_init: whitened` needs; give images or set `projector_init: default`"
                )
            whiten_projector(vlm.model, torch.cat(pixels), config.seed)

    train_on_conversations(vlm, config, run, start=start)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
