"""Contrastive pretraining from settings to a model on disk: data, the model that a run starts from, and what is said
about the data on the way. The training itself is `stages.contrastive`.
"""

from transformers import (
    set_seed,
)

import diffclip
from diffclip.adaptation import let_learn, with_vector_scale
from diffclip.architectures import with_image_size
from diffclip.base.cache import cache_dir
from diffclip.base.errors import InputError
from diffclip.base.images import DECODING
from diffclip.base.schema import BAD_SAMPLES
from diffclip.checkpoints import Loaded, unloaded
from diffclip.data.check import unreadable
from diffclip.data.columns import ROWLESS
from diffclip.data.pairs import PairTable
from diffclip.data.shards import EMPTY
from diffclip.data.streamed import StreamedTable, cache_of, check_room
from diffclip.data.training_pairs import TrainingPairs, name_bad_samples
from diffclip.models import DualEncoder
from diffclip.variants import lambda_init_of
from stages.callbacks import Watch
from stages.contrastive import ContrastiveTrainer
from stages.provenance import upstream_model
from stages.run import Run
from stages.settings import NEW_MODEL, PretrainConfig
from stages.streaming import Shards, lanes_here, layout_of, layout_settings
from stages.training import (
    check_trainer,
    log_bad_samples,
    per_device_batch,
    train,
    training_arguments,
)


def train_dual_encoder(config: PretrainConfig, run: Run, shards: Shards) -> None:
    """Train the model that the settings name, on `shards` where they are streamed, and write it to
    `config.output_dir`.
    """
    check_trainer(config)
    table, val_pairs = train_table(config, shards), val_table(config)

    set_seed(config.seed)
    title, (model, transform, tokenizer) = run_title(config), starting_model(config, run.record["decoding"])
    learning = let_learn(model, config.learns)
    pairs = TrainingPairs(
        table,
        diffclip.transforms(model.model_config, train=True, crop_scale=(config.min_crop, 1.0), normalized=False),
        tokenizer,
        global_batch_size=config.global_batch_size,
        epochs=config.epochs,
        seed=config.seed,
        weights=config.train_weights,
        bad_samples=run.path / BAD_SAMPLES,
        lanes=config.lanes,
        window=config.window,
    )
    report_problems(table, config, run)
    if val_pairs is not None:
        log_notices("val_pairs", val_pairs, run)
        if val_pairs.problems:
            key, reason = val_pairs.problems[0]
            run.log(f"pretrain: val_pairs: {len(val_pairs.problems):,} samples lack a part, e.g. {key} ({reason})")
        if run.is_main and run.resume_from is None:
            refuse_unreadable("val_pairs", val_pairs)
    batch = per_device_batch(config)
    steps = len(pairs) // config.global_batch_size
    parameters = sum(p.numel() for p in model.parameters())
    locked = parameters - sum(p.numel() for p in model.parameters() if p.requires_grad)
    origin = f"from {config.init_from}" if config.init_from else f"{config.init} init"
    run.log(
        f"pretrain: {title} ({origin}), {parameters:,} parameters, {f'{parameters - locked:,}' if locked else 'all'} "
        f"learn; {len(table):,} pairs x {config.epochs} epochs = {steps:,} steps of {config.global_batch_size}"
    )
    if stream := pairs.stream:
        run.log(f"pretrain: streams {len(stream.sizes):,} shards in {stream.lanes} lanes of windows of {stream.window}")
    run.note(model=title, parameters=parameters, pairs=len(table), steps=steps)

    trainer = ContrastiveTrainer(
        model=model,
        args=training_arguments(
            config,
            steps,
            batch,
            adam_beta1=0.9,
            adam_beta2=0.98,
            adam_epsilon=1e-8,
            max_grad_norm=0.0,
            ddp_find_unused_parameters=False,  # a pair goes through all that learns
        ),
        train_dataset=pairs,
        config=config,
        run=run,
        inputs=(transform, tokenizer),
        learning=learning,
        val_pairs=val_pairs,
        callbacks=[Watch(run, config.global_batch_size)],
    )
    metrics = train(trainer, run)
    if run.is_main:
        diffclip.save(model, config.output_dir)  # before anything else that can fail
    metrics |= trainer.validate()
    log_bad_samples(run)
    run.finish(metrics)


def train_table(config: PretrainConfig, shards: Shards | None = None) -> PairTable | StreamedTable:
    """The pairs to train on, read as the settings say."""
    if shards:
        return streamed_table(config, shards)
    return PairTable(config.train_data, **layout_settings(config), split=config.split)


def streamed_table(config: PretrainConfig, shards: Shards) -> StreamedTable:
    """The table of a run's shards; InputError where the node's cache cannot hold the windows that it reads."""
    cache = cache_of(config.shard_cache, config.shard_cache_gb, cache_dir() / "shards")
    every = [shard for source in shards for shard in source]
    if any(shard.remote for shard in every):
        check_room(cache, every, lanes_here(config.lanes), config.window)
    return StreamedTable(shards, layout_of(config), cache, keep=config.lanes * (config.window + 1))


def val_table(config: PretrainConfig) -> PairTable | None:
    """The held-out pairs, if there are any."""
    if not config.val_pairs:
        return None
    return PairTable(config.val_pairs, **layout_settings(config), split=config.val_split, prefer=("val", "test"))


def run_title(config: PretrainConfig) -> str:
    """What a run's model is called."""
    return f"{upstream_model(config.init_from)}+{config.attention}" if config.init_from else config.model or NEW_MODEL


def starting_model(config: PretrainConfig, decoding: int = DECODING) -> Loaded:
    """The model that a run starts from, its transform for evaluation and its tokenizer."""
    if not config.init_from:
        model = diffclip.build(run_title(config), init=config.init)
        model.model_config["diffclip"]["decoding"] = decoding
        return model, diffclip.transforms(model.model_config, train=False), diffclip.tokenizer(model.model_config)
    loaded, transform, tokenizer = diffclip.load(config.init_from)
    model = adapted(loaded, config)
    model.model_config["diffclip"]["decoding"] = decoding
    if config.image_size:
        transform = diffclip.transforms(model.model_config, train=False)
    return model, transform, tokenizer


def adapted(model: DualEncoder, config: PretrainConfig) -> DualEncoder:
    """The model that `init_from` names, changed as the settings say."""
    if config.image_size and config.image_size != model.model_config["preprocess_cfg"]["size"]:
        model = with_image_size(model, config.image_size)
    if config.attention != "keep":
        diffclip.differentiate(model, config.towers, lambda_init_of(config.lambda_init), kind=config.attention)
    return with_vector_scale(model)


def planned_model(config: PretrainConfig) -> DualEncoder:
    """The model of a run, of open_clip's names with random weights: for a dry run."""
    if not config.init_from:
        return diffclip.build(run_title(config))
    return adapted(unloaded(config.init_from), config)


def report_problems(table: PairTable | StreamedTable, config: PretrainConfig, run: Run) -> None:
    """Name the samples that lack a part and the shards that end early or hold nothing; InputError if too many lack one.

    An empty shard is named, but is no sample that is lost.
    """
    log_notices("train_data", table, run)
    if not table.problems:
        return
    if run.is_main and run.resume_from is None:
        name_bad_samples(run.path / BAD_SAMPLES, table.problems)
    lost = [(key, reason) for key, reason in table.problems if reason not in (EMPTY, ROWLESS)]
    if len(lost) > config.max_bad_share * (len(table) + len(lost)):
        key, reason = lost[0]
        raise InputError(
            f"{len(lost)} of {len(table) + len(lost)} samples lack a part, e.g. {key} ({reason}), "
            f"more than max_bad_share {config.max_bad_share:g}: mend the data or raise it"
        )


def refuse_unreadable(setting: str, table: PairTable) -> None:
    """InputError, before the first step, if a pair of held-out data cannot be read: each epoch would end at it."""
    if bad := list(unreadable(table)):
        key, reason = bad[0]
        raise InputError(
            f"{setting}: {len(bad):,} of {len(table):,} pairs cannot be read, e.g. {key} ({reason}): leave them out; "
            "`diffclip check` names them all"
        )


def log_notices(setting: str, table: PairTable | StreamedTable, run: Run) -> None:
    """One line on what was read in one way of several, if anything."""
    if table.notices:
        key, reason = table.notices[0]
        more = f" (and {len(table.notices) - 1:,} more such notices)" if len(table.notices) > 1 else ""
        run.log(f"pretrain: {setting}: {key}: {reason}{more}")
