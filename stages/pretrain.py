"""Stage 1: contrastive pretraining of CLIP and DiffCLIP on image-text pairs.

    diffclip pretrain --config quickstart/pretrain --model DiffCLIP-tiny \
        --train_data 'data/scenes/pretrain/*.tar' --output_dir runs/diffclip
    torchrun --nproc_per_node 8 -m diffclip pretrain --config paper/pretrain_cc3m \
        --model DiffCLIP-B-16 ...
"""

from diffclip.base.errors import exit_on_input_error
from diffclip.data.sources import expand
from stages.config import parse, require
from stages.run import Run
from stages.settings import PretrainConfig


def main(argv: list[str] | None = None) -> None:
    """Train `model` and write a directory that `diffclip.load` and `AutoModel` read."""
    config = parse(PretrainConfig, __doc__, argv)
    if config.dry_run:
        from stages.dry_run import estimate_pretraining

        return estimate_pretraining(config)
    require(config, "output_dir", "train_data")
    inputs = {"train_data": expand(config.train_data), "val_pairs": expand(config.val_pairs)}
    run = Run("pretrain", config, {**inputs, "val_data": config.val_data})
    if not run.finished:
        from stages.pretraining import train_dual_encoder

        train_dual_encoder(config, run)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
