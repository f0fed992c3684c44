"""Contrastive pretraining from settings to a model on disk, and what is reported about the data on the way."""

from transformers import set_seed

import diffclip
from diffclip.base.errors import InputError
from diffclip.base.files import read_jsonl
from diffclip.base.schema import BAD_SAMPLES
from diffclip.data.pairs import PairTable
from diffclip.data.shards import EMPTY
from diffclip.data.training_pairs import TrainingPairs, name_bad_samples
from stages.callbacks import Watch
from stages.contrastive import ContrastiveTrainer
from stages.run import Run
from stages.settings import PretrainConfig
from stages.training import check_trainer, per_device_batch, train, training_arguments


def train_dual_encoder(config: PretrainConfig, run: Run) -> None:
    """Train `config.model` and write it to `config.output_dir`."""
    check_trainer(config)
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
        bad_samples=run.path / BAD_SAMPLES,
    )
    report_problems(table, config, run)
    if val_pairs is not None:
        log_notices("val_pairs", val_pairs, run)
        if val_pairs.problems:
            key, reason = val_pairs.problems[0]
            run.log(f"pretrain: val_pairs: {len(val_pairs.problems):,} samples lack a part, e.g. {key} ({reason})")
    batch = per_device_batch(config)
    steps = len(pairs) // config.global_batch_size
    parameters = sum(p.numel() for p in model.parameters())
    run.log(
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
    log_bad_samples(run)
    run.finish(metrics)


def report_problems(table: PairTable, config: PretrainConfig, run: Run) -> None:
    """Name the samples that lack a part and the shards that end early or hold nothing; InputError if too many lack one.

    An empty shard is named, but is no sample that is lost.
    """
    log_notices("train_data", table, run)
    if not table.problems:
        return
    if run.is_main and run.resume_from is None:
        name_bad_samples(run.path / BAD_SAMPLES, table.problems)
    lost = [(key, reason) for key, reason in table.problems if reason != EMPTY]
    if len(lost) > config.max_bad_share * (len(table) + len(lost)):
        key, reason = lost[0]
        raise InputError(
            f"{len(lost)} of {len(table) + len(lost)} samples lack a part, e.g. {key} ({reason}), "
            f"more than max_bad_share {config.max_bad_share:g}: mend the data or raise it"
        )


def log_notices(setting: str, table: PairTable, run: Run) -> None:
    """One line on what was read in one way of several, if anything."""
    if table.notices:
        key, reason = table.notices[0]
        more = f" (and {len(table.notices) - 1:,} more such notices)" if len(table.notices) > 1 else ""
        run.log(f"pretrain: {setting}: {key}: {reason}{more}")


def log_bad_samples(run: Run) -> None:
    """One line, and a note in run.json, on what was skipped and why, if anything."""
    path = run.path / BAD_SAMPLES
    if run.is_main and path.is_file():
        lines = (line for _, line in read_jsonl(path, damaged="skip"))
        bad = {str(line.get("key")) for line in lines if isinstance(line, dict)}
        run.log(f"pretrain: {len(bad):,} bad samples skipped, named in {path}")
        run.note(bad_samples=len(bad))
