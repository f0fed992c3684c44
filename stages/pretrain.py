"""Stage 1: contrastive pretraining of CLIP and DiffCLIP on image-text pairs, from nothing or from any CLIP.

    diffclip pretrain --config quickstart/pretrain --model DiffCLIP-tiny \
        --train_data 'data/scenes/pretrain/*.tar' --output_dir runs/diffclip
    torchrun --nproc_per_node 8 -m diffclip pretrain --config paper/pretrain_cc3m \
        --model DiffCLIP-B-16 ...
    diffclip pretrain --init_from open_clip:ViT-B-32@laion2b_s34b_b79k --attention v2 \
        --train_data 'pairs/*.tar' --learning_rate 1e-5 --epochs 1 --output_dir runs/adapted
    torchrun --nproc_per_node 8 -m diffclip pretrain --config paper/pretrain_cc12m \
        --model DiffCLIP-B-16 --train_data 's3://bucket/cc12m/{00000..01242}.tar' ...
"""

from pathlib import Path

from diffclip.base.errors import exit_on_input_error
from diffclip.base.imports import importing
from diffclip.base.ranks import join_slurm
from diffclip.data.sources import expand
from stages.config import parse, require
from stages.run import Run
from stages.settings import PretrainConfig
from stages.streaming import digests_of, shards_of


def main(argv: list[str] | None = None) -> None:
    """Train `model` and write a directory that `diffclip.load` and `AutoModel` read."""
    config = parse(PretrainConfig, __doc__, argv)
    if config.dry_run:
        from stages.dry_run import estimate_pretraining

        return estimate_pretraining(config)
    require(config, "output_dir", "train_data")
    join_slurm()
    shards = shards_of(config)
    inputs: dict[str, str | Path | list[str]] = {
        "train_data": config.train_data if shards else expand(config.train_data),
        "val_pairs": expand(config.val_pairs),
        "val_data": config.val_data,
    }
    if config.init_from:
        from diffclip.sources import weights_of

        inputs["init_from"] = weights_of(config.init_from)
    with Run("pretrain", config, inputs, digests_of(shards)) as run:
        if not run.finished:
            with importing():
                from stages.pretraining import train_dual_encoder

            train_dual_encoder(config, run, shards)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
