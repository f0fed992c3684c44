"""Stage 1: contrastive pretraining of CLIP and DiffCLIP on image-text pairs.

    python -m stages.pretrain --config stages/configs/quickstart/pretrain.yaml --model DiffCLIP-tiny \
        --train_data 'data/scenes/pretrain/*.tar' --output_dir runs/diffclip
    torchrun --nproc_per_node 8 -m stages.pretrain --config stages/configs/paper/pretrain_cc3m.yaml \
        --model DiffCLIP-B-16 ...
"""

from diffclip.base.errors import exit_on_input_error
from stages.config import parse, require
from stages.pipeline import end_with_pipeline
from stages.run import Run
from stages.settings import PretrainConfig


def main(argv: list[str] | None = None) -> None:
    end_with_pipeline()
    config = parse(PretrainConfig, __doc__, argv)
    if config.dry_run:
        from stages.dry_run import estimate_pretraining

        return estimate_pretraining(config)
    require(config, "output_dir", "train_data")
    pretrain(config)


def pretrain(config: PretrainConfig) -> None:
    """Train `config.model` and write a directory that `diffclip.load` and `AutoModel` read."""
    from diffclip.data.sources import expand

    inputs = {f"train_data[{i}]": path for i, path in enumerate(expand(config.train_data))}
    inputs |= {f"val_pairs[{i}]": path for i, path in enumerate(expand(config.val_pairs))}
    run = Run("pretrain", config, inputs | ({"val_data": config.val_data} if config.val_data else {}))
    if not run.finished:
        from stages.pretraining import train_dual_encoder

        train_dual_encoder(config, run)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
