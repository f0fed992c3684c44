"""Stage 3: instruct. Projector and language model learn from conversations about images; the tower stays frozen
(the paper: the COCO subset of LLaVA-665K, `--image_prefix coco/`).

    deepspeed --num_gpus 8 --module stages.instruct --config stages/configs/paper/instruct.yaml \
        --model runs/align --data llava_v1_5_mix665k.json --image_root images --output_dir runs/instruct
"""

from dataclasses import dataclass, field

from diffclip.base.errors import exit_on_input_error
from stages.config import parse, require
from stages.mllm_training import ConversationConfig
from stages.run import Run, end_with_pipeline, upstream_model


@dataclass
class InstructConfig(ConversationConfig):
    """Settings of the instruction stage; defaults from the paper's section 4."""

    model: str = field(default="", metadata={"help": "an alignment run"})
    learns: list[str] = field(
        default_factory=lambda: ["projector", "language_model"],
        metadata={"help": "parts that learn: vision_tower, projector, language_model"},
    )
    learning_rate: float = field(default=2e-5, metadata={"help": "peak learning rate"})


def main(argv: list[str] | None = None) -> None:
    end_with_pipeline()
    config = parse(InstructConfig, __doc__, argv)
    if config.dry_run:
        require(config, "model")
        from mllm.assemble import run_config
        from stages.mllm_training import dry_run

        return dry_run(config, run_config(config.model))
    require(config, "output_dir", "model", "data", "image_root")
    instruct(config)


def instruct(config: InstructConfig) -> None:
    """Train projector and language model of an aligned model, write `config.output_dir`."""
    from stages.mllm_training import data_inputs, train_on_conversations

    run = Run("instruct", config, {"model": config.model, **data_inputs(config)})
    if run.finished:
        return

    import torch

    from mllm.model import load

    run.note(model=upstream_model(config.model))
    train_on_conversations(load(config.model, dtype=torch.float32), config, run)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
