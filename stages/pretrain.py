"""Stage 1: contrastive pretraining of CLIP and DiffCLIP on image-text pairs.

    python -m stages.pretrain --config stages/configs/quickstart/pretrain.yaml --model DiffCLIP-tiny \
        --train_data 'data/scenes/pretrain/*.tar' --output_dir runs/diffclip
    torchrun --nproc_per_node 8 -m stages.pretrain --config stages/configs/paper/pretrain_cc3m_diffclip.yaml ...
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from diffclip.base.errors import InputError, exit_on_input_error
from diffclip.base.files import read_jsonl
from stages.config import parse, require
from stages.run import Run, end_with_pipeline
from stages.training import TrainingConfig

if TYPE_CHECKING:
    from diffclip.data.pairs import PairTable


@dataclass
class PretrainConfig(TrainingConfig):
    """Settings of pretraining; the defaults are the paper's (section 4, after SLIP)."""

    model: str = field(default="DiffCLIP-B-16", metadata={"help": "a name of diffclip.variants.MODELS"})
    init: Literal["matched", "official"] = field(
        default="matched", metadata={"help": "initialise both arms alike, or each as its official code does"}
    )
    train_data: list[str] = field(
        default_factory=list,
        metadata={"help": "webdataset shards (globs, braces, URLs), .csv, .tsv, .parquet, hf:owner/name"},
    )
    train_weights: list[float] = field(
        default_factory=list, metadata={"help": "times an epoch sees each source of train_data; empty = once"}
    )
    max_bad_share: float = field(
        default=0.01, metadata={"help": "stop when more of the samples than this cannot be read", "decides": False}
    )
    caption_member: Literal["txt", "json"] = field(
        default="txt", metadata={"help": "where shards keep captions; json draws one of `captions` each time"}
    )
    val_data: str = field(
        default="",
        metadata={"help": "folder with val/ or test/ of class folders, classified zero-shot after each epoch"},
    )
    val_pairs: list[str] = field(
        default_factory=list, metadata={"help": "held-out pairs, forms as train_data: R@1/5/10 after each epoch"}
    )
    epochs: int = field(default=40, metadata={"help": "passes over the data"})
    warmup_epochs: float = field(default=1.0, metadata={"help": "epochs of linear warm-up"})
    start_learning_rate: float = field(default=1e-6, metadata={"help": "at the first step"})
    end_learning_rate: float = field(default=1e-5, metadata={"help": "towards the last step"})
    weight_decay: float = field(default=0.5, metadata={"help": "decoupled (AdamW), on matrices and tables only"})
    min_crop: float = field(default=0.5, metadata={"help": "smallest share of the area in RandomResizedCrop"})
    micro_batch_size: int = field(
        default=0,
        metadata={
            "help": "pairs encoded at once per device; the exact gradient of the whole batch; 0 = all",
            "decides": False,
        },
    )
    gather_with_grad: bool = field(default=True, metadata={"help": "exact gradient over ranks; SLIP: false"})


def main(argv: list[str] | None = None) -> None:
    end_with_pipeline()
    config = parse(PretrainConfig, __doc__, argv)
    if config.dry_run:
        return dry_run(config)
    require(config, "output_dir", "train_data")
    pretrain(config)


def dry_run(config: PretrainConfig) -> None:
    """Print what the run would take on `config.hardware`."""
    from diffclip.data.pairs import PairTable
    from stages.dry_run import count_pair, estimate, parse_hardware, say
    from stages.training import zero_stage

    name, hardware, devices = parse_hardware(config.hardware)
    if not (config.samples or config.train_data):
        raise InputError("a dry run needs --train_data, or the number of pairs as --samples (CC3M 2900000)")
    pairs = config.samples or len(PairTable(config.train_data, config.caption_member))
    steps = pairs // config.global_batch_size * config.epochs
    share = -(-config.global_batch_size // devices)
    batch = min(config.micro_batch_size or share, share)
    parts, counted = count_pair(config.model, config.precision == "bf16")
    found = estimate(
        counted,
        sum(parts.values()),
        samples=steps * config.global_batch_size,
        batch=batch,
        chunked=batch < share,
        bf16=config.precision == "bf16",
        zero_stage=zero_stage(config),
        hardware=hardware,
        devices=devices,
    )
    title = f"{config.model}: {pairs:,} pairs x {config.epochs} epochs in batches of {config.global_batch_size}"
    say(title, parts, steps, batch, found, name, devices)


def pretrain(config: PretrainConfig) -> None:
    """Train `config.model` and write a directory that `diffclip.load` and `AutoModel` read."""
    from diffclip.data.pairs import PairTable, expand

    inputs = {f"train_data[{i}]": path for i, path in enumerate(expand(config.train_data))}
    inputs |= {f"val_pairs[{i}]": path for i, path in enumerate(expand(config.val_pairs))}
    run = Run("pretrain", config, inputs | ({"val_data": config.val_data} if config.val_data else {}))
    if run.finished:
        return

    from transformers import set_seed

    import diffclip
    from diffclip.data.training_pairs import TrainingPairs
    from stages.callbacks import Watch
    from stages.contrastive import ContrastiveTrainer
    from stages.training import per_device_batch, train, training_arguments

    table = PairTable(config.train_data, config.caption_member)
    val_pairs = PairTable(config.val_pairs, config.caption_member) if config.val_pairs else None

    set_seed(config.seed)
    model = diffclip.build(config.model, init=config.init)
    pairs = TrainingPairs(
        table,
        diffclip.transforms(model.model_config, train=True, crop_scale=(config.min_crop, 1.0), normalized=False),
        diffclip.tokenizer(model.model_config),
        global_batch_size=config.global_batch_size,
        epochs=config.epochs,
        seed=config.seed,
        weights=config.train_weights,
        bad_samples=run.path / "bad_samples.jsonl",
    )
    report_problems(table, config, run)
    if val_pairs is not None:
        say_notices("val_pairs", val_pairs, run)
        if val_pairs.problems:
            key, reason = val_pairs.problems[0]
            run.say(f"pretrain: val_pairs: {len(val_pairs.problems):,} samples lack a part, e.g. {key} ({reason})")
    batch = per_device_batch(config)
    steps = len(pairs) // config.global_batch_size
    parameters = sum(p.numel() for p in model.parameters())
    run.say(
        f"pretrain: {config.model} ({config.init} init), {parameters:,} parameters, all learn; "
        f"{len(table):,} pairs x {config.epochs} epochs = {steps:,} steps of {config.global_batch_size}"
    )
    run.note(model=config.model, parameters=parameters, pairs=len(table), steps=steps)

    trainer = ContrastiveTrainer(
        model=model,
        args=training_arguments(
            config, steps, batch, adam_beta1=0.9, adam_beta2=0.98, adam_epsilon=1e-8, max_grad_norm=0.0
        ),
        train_dataset=pairs,
        config=config,
        steps_per_epoch=pairs.per_epoch // config.global_batch_size,
        run=run,
        val_pairs=val_pairs,
        callbacks=[Watch(run, config.global_batch_size)],
    )
    metrics = train(trainer, run)
    if run.is_main:
        diffclip.save(model, config.output_dir)  # before anything else that can fail
    metrics |= trainer.validate()
    say_bad_samples(run)
    run.finish(metrics)


def report_problems(table: "PairTable", config: PretrainConfig, run: Run) -> None:
    """Name the samples that lack a part and the shards that end early or hold nothing; InputError if too many lack one.

    An empty shard is named, but is no sample that is lost.
    """
    from diffclip.data.shards import EMPTY
    from diffclip.data.training_pairs import name_bad_samples

    say_notices("train_data", table, run)
    if not table.problems:
        return
    if run.is_main and run.resume_from is None:
        name_bad_samples(run.path / "bad_samples.jsonl", table.problems)
    lost = [(key, reason) for key, reason in table.problems if reason != EMPTY]
    if len(lost) > config.max_bad_share * (len(table) + len(lost)):
        key, reason = lost[0]
        raise InputError(
            f"{len(lost)} of {len(table) + len(lost)} samples lack a part, e.g. {key} ({reason}), "
            f"more than max_bad_share {config.max_bad_share:g}: mend the data or raise it"
        )


def say_notices(setting: str, table: "PairTable", run: Run) -> None:
    """One line on what was read in one way of several, if anything."""
    if table.notices:
        key, reason = table.notices[0]
        more = f" (and {len(table.notices) - 1:,} more such notices)" if len(table.notices) > 1 else ""
        run.say(f"pretrain: {setting}: {key}: {reason}{more}")


def say_bad_samples(run: Run) -> None:
    """One line, and a note in run.json, on what was skipped and why, if anything."""
    path = run.path / "bad_samples.jsonl"
    if run.is_main and path.is_file():
        lines = (line for _, line in read_jsonl(path, damaged="skip"))
        bad = {str(line.get("key")) for line in lines if isinstance(line, dict)}
        run.say(f"pretrain: {len(bad):,} bad samples skipped, named in {path}")
        run.note(bad_samples=len(bad))


if __name__ == "__main__":
    with exit_on_input_error():
        main()
