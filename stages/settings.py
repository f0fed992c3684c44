"""The settings of every stage: one dataclass = one YAML file = one command line. No file is read or written here.

Metadata of a field: "help"; "group", the heading it stands under in `--help`; "range" of a number; "names" that a text
may be one of; "decides", False where a paused run may go on with another value, since it changes neither which sample
is learnt when nor by what rule; "flag", the name on the command line and in YAML files where it is not the field's own.
"""

# ruff: noqa: RUF009 - `option` makes a field

from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal

from diffclip import variants
from diffclip.base.commands import Range, near
from diffclip.base.errors import InputError
from diffclip.variants import MODELS, SIZES, TOWERS, VARIANTS, lambda_init_of

NEW_MODEL = "DiffCLIP-B-16"  # what is pretrained where nothing is said
PARTS = ("vision_tower", "projector", "language_model")  # of the multimodal model

POSITIVE = Range(above=0)
NOT_NEGATIVE = Range(least=0)
AT_LEAST_1 = Range(least=1)
SHARE = Range(least=0, most=1)
SEED = Range(least=0, most=2**32 - 1)  # numpy's

# Keys of TrainingArguments that a named setting decides, where the stage has it: `trainer` may not overrule that.
DECIDED = {
    "ddp_timeout": ("ddp_timeout",),
    "deepspeed": ("deepspeed",),
    "end_learning_rate": ("lr_scheduler_kwargs", "lr_scheduler_type"),
    "epochs": ("max_steps", "num_train_epochs"),
    "global_batch_size": (
        "accelerator_config",
        "auto_find_batch_size",
        "gradient_accumulation_steps",
        "per_device_train_batch_size",
    ),
    "learning_rate": ("learning_rate",),
    "logging_steps": ("logging_steps", "logging_strategy"),
    "max_grad_norm": ("max_grad_norm",),
    "num_workers": ("dataloader_num_workers",),
    "order": ("train_sampling_strategy",),
    "output_dir": ("output_dir",),
    "precision": ("bf16", "fp16"),
    "report_to": ("report_to",),
    "save_steps": ("save_steps", "save_strategy"),
    "save_total_limit": ("save_total_limit",),
    "seed": ("data_seed", "seed"),
    "torch_compile": ("torch_compile",),
    "use_cpu": ("use_cpu",),
    "warmup_epochs": ("warmup_steps",),
    "warmup_ratio": ("warmup_steps",),
    "weight_decay": ("weight_decay",),
}
# Settings that decide the result, and that a paused run can take over: they shape no weights and no order of samples.
MAY_CHANGE = (
    *("learning_rate", "vision_tower_learning_rate", "projector_learning_rate"),
    *("language_model_learning_rate", "start_learning_rate", "end_learning_rate"),
    *("warmup_epochs", "warmup_ratio", "epochs", "weight_decay"),
    *("max_grad_norm", "gather_with_grad", "min_crop", "max_length"),
    *("cudnn_attention", "val_data", "val_pairs", "trainer"),
)
INEXACT = ("ignore_data_skip", "save_only_model", "resume_from_checkpoint")  # a resumed run would be another one


def option(default: Any, group: str, text: str, allowed: Range | Iterable[str] | None = None, **more: object) -> Any:
    """A field with its default, its heading and line in `--help`, and the numbers or names that it may have."""
    kind = "range" if isinstance(allowed, Range) else "names"
    metadata = {"group": group, "help": text, **({kind: allowed} if allowed is not None else {}), **more}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


LEARNING_RATE = ("optimisation", "peak learning rate", POSITIVE)
LEARNS = ("model", f"parts that learn: {', '.join(PARTS)}", PARTS)
TEMPLATE = ("model", "prompt format; auto: the language model's own")
Attention = Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"]
OF_LANGUAGE_MODEL = "attention of the language model, as transformers names it; auto: what that takes by itself"
DATA_CHANGED = ("refuse", "run", "what a paused run does where its input files have changed")


@dataclass
class TrainingConfig:
    """Settings that every training stage has."""

    output_dir: str = option("", "run", "the run directory to write", decides=False)
    seed: int = option(0, "run", "decides weights, data order and augmentation", SEED)
    global_batch_size: int = option(4096, "optimisation", "samples per optimiser step, over all devices", AT_LEAST_1)
    learning_rate: float = option(5e-4, *LEARNING_RATE)
    weight_decay: float = option(0.0, "optimisation", "decoupled (AdamW)", NOT_NEGATIVE)
    precision: Literal["fp32", "bf16"] = option("fp32", "optimisation", "bf16 = mixed precision")
    num_workers: int = option(
        8, "run", "data loading processes per device; 0 = in the main one", NOT_NEGATIVE, decides=False
    )
    logging_steps: int = option(50, "run", "steps between log lines", AT_LEAST_1, decides=False)
    save_steps: int = option(500, "run", "steps between resume checkpoints", AT_LEAST_1, decides=False)
    save_total_limit: int = option(2, "run", "resume checkpoints kept; at least 2", Range(least=2), decides=False)
    report_to: list[str] = option(["tensorboard"], "run", "tensorboard, wandb, or none", decides=False)
    deepspeed: str = option("", "run", "DeepSpeed JSON, e.g. stages/configs/deepspeed/zero2.json")
    cudnn_attention: bool = option(
        False, "run", "allow cuDNN's attention; 9.24 gives NaN gradients on H100 and H200 at some lengths"
    )
    torch_compile: bool = option(
        False, "run", "compile the model for its device, which takes minutes at the start", decides=False
    )
    recompute: Literal["auto", "always", "never"] = option(
        "auto",
        "run",
        "compute differential attention once more in the backward pass, to save memory; auto: where memory is short",
        decides=False,
    )
    use_cpu: bool = option(False, "run", "run on the CPU even where there is a GPU", decides=False)
    dry_run: bool = option(False, "dry run", "print sizes, memory, hours and cost; train nothing", decides=False)
    hardware: str = option("a100-80gb:8", "dry run", "device and how many of them", decides=False)
    samples: int = option(0, "dry run", "size of the data, where it is not at hand", NOT_NEGATIVE, decides=False)
    ddp_timeout: int = option(
        600,
        "run",
        "seconds that a rank waits for the others while training; starting and saving have 10 minutes more",
        AT_LEAST_1,
        decides=False,
    )
    trainer: dict = option({}, "optimisation", "any other TrainingArguments, as JSON")
    resume_with: list[str] = option(
        [], "run", "settings that a paused run takes over from here on, though they decide its result", decides=False
    )
    data_changed: Literal["refuse", "accept"] = option(*DATA_CHANGED, decides=False)


@dataclass
class PretrainConfig(TrainingConfig):
    """Settings of pretraining; the defaults are the paper's (section 4, after SLIP)."""

    model: str = option(
        "",
        "model",
        f"one of {', '.join(VARIANTS)} with -{', -'.join(SIZES)}; {NEW_MODEL} where nothing is said",
        ("", *MODELS),
    )
    init_from: str = option(
        "",
        "model",
        "a dual encoder to start from instead: a run, any file, directory or Hub id that diffclip.load reads",
    )
    attention: Literal["keep", "v1", "v2", "dex"] = option(
        "keep", "model", "what the attention of `init_from` becomes; v2 and dex start as the model that they replace"
    )
    towers: list[str] = option([*TOWERS], "model", "which towers `attention` changes", TOWERS)
    lambda_init: str = option("", "model", "of `attention`: a number, or schedule; empty = the kind's own")
    anneal_epochs: float = option(0.5, "optimisation", "epochs in which dex's lambda comes in", NOT_NEGATIVE)
    image_size: int = option(0, "model", "pixels, if not those of `init_from`; positions are resampled", NOT_NEGATIVE)
    learns: list[str] = option(
        [*TOWERS, "logit_scale"],
        "model",
        "what learns: towers, the temperature, and new, which is what `attention` adds",
        variants.PARTS,
    )
    layer_decay: float = option(
        1.0, "optimisation", "each layer's learning rate is that of the one above times this", Range(above=0, most=1)
    )
    init: Literal["matched", "official"] = option(
        "matched", "model", "initialise both arms alike, or each as its official code does"
    )
    train_data: list[str] = option(
        [],
        "data",
        "webdataset shards (globs, braces, URLs, s3:// gs:// az:// hf://datasets/), .csv, .tsv, .json, .jsonl, "
        ".parquet, folders, hf:owner/name",
    )
    order: Literal["auto", "shuffle", "stream"] = option(
        "auto",
        "data",
        "shuffle: all pairs at random; stream: shards at random, pairs within windows of shards; auto: shuffle, and "
        "stream for object stores",
    )
    lanes: int = option(16, "data", "of order stream: rows of shards that are read side by side", AT_LEAST_1)
    window: int = option(4, "data", "of order stream: shards of a lane whose pairs are shuffled together", AT_LEAST_1)
    manifest: str = option(
        "", "data", "sizes of streamed shards, of `diffclip data index`, if not beside them", decides=False
    )
    shard_cache: str = option(
        "", "data", "folder on the node for shards of object stores; empty: in the cache", decides=False
    )
    shard_cache_gb: float = option(50.0, "data", "what they may take of its disk", POSITIVE, decides=False)
    train_weights: list[float] = option(
        [], "data", "times an epoch sees each source of train_data; empty = once", NOT_NEGATIVE
    )
    max_bad_share: float = option(
        0.01, "data", "stop when more of the samples than this cannot be read", SHARE, decides=False
    )
    caption_member: list[str] = option(
        ["txt"], "data", "where shards and folders keep captions; json draws one of `captions` each time"
    )
    image_member: list[str] = option([], "data", "what their images end in; empty: jpg, jpeg, png, webp")
    image_column: str = option("", "data", "of tables; empty: told from the names")
    caption_column: list[str] = option(
        [], "data", "of tables, and key of a json; one caption of all is drawn each time"
    )
    separator: str = option("", "data", "of .csv and .tsv: , ; | or tab; empty: told from the header")
    encoding: str = option("utf-8", "data", "of .csv, .tsv and .txt")
    image_root: str = option("", "data", "folder that paths in tables start from; empty: beside the table")
    split: str = option("", "data", "of train_data, where a source holds several; empty: train")
    val_split: str = option("", "data", "the same of val_pairs; empty: val, or else test")
    val_data: str = option(
        "", "data", "folder with val/ or test/ of class folders, classified zero-shot after each epoch"
    )
    val_pairs: list[str] = option([], "data", "held-out pairs, forms as train_data: R@1/5/10 after each epoch")
    epochs: int = option(40, "optimisation", "passes over the data", AT_LEAST_1)
    warmup_epochs: float = option(1.0, "optimisation", "epochs of linear warm-up", NOT_NEGATIVE)
    start_learning_rate: float = option(1e-6, "optimisation", "at the first step", NOT_NEGATIVE)
    end_learning_rate: float = option(1e-5, "optimisation", "towards the last step", NOT_NEGATIVE)
    weight_decay: float = option(0.5, "optimisation", "decoupled (AdamW), on matrices and tables only", NOT_NEGATIVE)
    min_crop: float = option(0.5, "data", "smallest share of the area in RandomResizedCrop", Range(above=0, most=1))
    micro_batch_size: int = option(
        0,
        "optimisation",
        "pairs encoded at once per device; the exact gradient of the whole batch; 0 = all",
        NOT_NEGATIVE,
        decides=False,
    )
    gather_with_grad: bool = option(True, "optimisation", "exact gradient over ranks; SLIP: false")


@dataclass
class LanguageConfig(TrainingConfig):
    """Settings of the stand-in language model."""

    text: str = option("", "data", 'JSONL file of {"text": …}')
    conversations: list[str] = option([], "data", "LLaVA JSON files whose text is read too, images left out")
    vocabulary_from: list[str] = option(
        [], "data", "LLaVA JSON files whose words the tokenizer knows, but are not learnt"
    )
    vocabulary: int = option(
        1024, "model", "tokens of the BPE vocabulary, bytes and special ones included", Range(least=260)
    )
    hidden_size: int = option(128, "model", "width", AT_LEAST_1)
    layers: int = option(3, "model", "decoder layers", AT_LEAST_1)
    heads: int = option(4, "model", "attention heads", AT_LEAST_1)
    max_tokens: int = option(256, "data", "longer texts are cut", AT_LEAST_1)
    max_positions: int = option(1024, "model", "longest sequence the model will see", AT_LEAST_1)
    packing: bool = option(
        False, "data", "texts of a step stand behind each other in one row, without padding", decides=False
    )
    attn_implementation: Attention = option("auto", "run", OF_LANGUAGE_MODEL, decides=False)
    epochs: float = option(1.0, "optimisation", "passes over the text", POSITIVE)
    global_batch_size: int = option(64, "optimisation", "texts per step", AT_LEAST_1)
    learning_rate: float = option(1e-3, *LEARNING_RATE)


@dataclass
class ConversationConfig(TrainingConfig):
    """Settings of the two multimodal stages."""

    data: list[str] = option(
        [], "data", "conversations: JSON, JSONL (also .gz), parquet, folders that `datasets` saved; globs of these"
    )
    split: str = option("", "data", "of data, where a source holds several; empty: train")
    max_bad_share: float = option(
        0.01, "data", "stop when more of the rows than this cannot be learnt from", SHARE, decides=False
    )
    image_root: str = option("", "data", "folder that the rows' image paths start from; empty: that of `data`")
    image_prefix: str = option("", "data", "keep only rows whose image path starts with this")
    template: Literal["plain", "vicuna", "chatml", "auto"] = option("vicuna", *TEMPLATE)
    epochs: float = option(1.0, "optimisation", "passes over the data", POSITIVE)
    global_batch_size: int = option(192, "optimisation", "conversations per optimiser step", AT_LEAST_1)
    micro_batch_size: int = option(
        0, "optimisation", "conversations per device and pass; 0 = no limit", NOT_NEGATIVE, decides=False
    )
    warmup_ratio: float = option(0.03, "optimisation", "share of the steps spent warming up", Range(least=0, below=1))
    learns: list[str] = option([], *LEARNS)
    vision_tower_learning_rate: float = option(
        0.0, "optimisation", "peak learning rate of the tower; 0 = learning_rate", NOT_NEGATIVE
    )
    projector_learning_rate: float = option(
        0.0, "optimisation", "peak learning rate of the projector; 0 = learning_rate", NOT_NEGATIVE
    )
    language_model_learning_rate: float = option(
        0.0, "optimisation", "peak learning rate of the language model; 0 = learning_rate", NOT_NEGATIVE
    )
    lora_rank: int = option(0, "LoRA", "the language model learns by LoRA of this rank; 0 = all of it", NOT_NEGATIVE)
    lora_alpha: float = option(0.0, "LoRA", "scale of LoRA's output times its rank; 0 = 2 x lora_rank", NOT_NEGATIVE)
    lora_dropout: float = option(0.0, "LoRA", "dropout before LoRA's matrices", Range(least=0, below=1))
    lora_bits: Literal[4, 16] = option(16, "LoRA", "4 = QLoRA: frozen weights in NF4 (GPU)")
    order: Literal["length", "random", "file"] = option(
        "length", "data", "batches of like length, the longest first; any at random; or as the file has them"
    )
    packing: bool = option(
        False, "data", "examples of a pass stand behind each other in one row, without padding", decides=False
    )
    attn_implementation: Attention = option(
        "auto", "run", f"{OF_LANGUAGE_MODEL}, and with packing each example by itself", decides=False
    )
    tokens: int = option(0, "dry run", "text tokens of a conversation, in the mean", NOT_NEGATIVE, decides=False)
    max_length: int = option(2048, "data", "longer conversations are cut, image tokens counted", AT_LEAST_1)
    max_grad_norm: float = option(1.0, "optimisation", "gradient clipping, also under DeepSpeed", NOT_NEGATIVE)


@dataclass
class AlignConfig(ConversationConfig):
    """Settings of the alignment stage; defaults from the paper's section 4."""

    vision_tower: str = option("", "model", "a pretraining run, any CLIP / SigLIP model, or open_clip:NAME@WEIGHTS")
    language_model: str = option(
        "Qwen/Qwen2.5-0.5B-Instruct", "model", "directory or Hub id of a causal language model"
    )
    projector: Literal["linear", "mlp"] = option("linear", "model", "one linear layer (the paper), or LLaVA-1.5's two")
    class_token: bool = option(
        False, "model", "show the language model the tower's class token too; the paper does not"
    )
    vision_feature_layer: int = option(
        -2, "model", "which of the tower's hidden states is projected; the paper: the last but one", Range()
    )
    image_mode: Literal["crop", "squash", "pad"] = option(
        "crop", "data", "how images become square: the middle, all of it squashed, or with bars"
    )
    projector_init: Literal["default", "whitened"] = option(
        "default", "model", "what the projector starts from: torch's default, or the statistics of the tower's features"
    )
    template: Literal["plain", "vicuna", "chatml", "auto"] = option("plain", *TEMPLATE)
    learns: list[str] = option(["projector"], *LEARNS)
    learning_rate: float = option(1e-3, *LEARNING_RATE)


@dataclass
class InstructConfig(ConversationConfig):
    """Settings of the instruction stage; defaults from the paper's section 4."""

    model: str = option("", "model", "an alignment run")
    learns: list[str] = option(["projector", "language_model"], *LEARNS)
    learning_rate: float = option(2e-5, *LEARNING_RATE)


@dataclass
class EvaluateConfig:
    """Settings of evaluation."""

    output_dir: str = option("", "run", "the run directory to write")
    seed: int = option(0, "run", "of few-shot episodes and image shuffling", SEED)
    clip: str = option("", "model", "a pretraining run, or any checkpoint diffclip.load reads")
    clip_data: str = option(
        "",
        "data",
        "folder of classification/, shifts/, retrieval/, mmvp/, segmentation/, as far as there",
        flag="data_root",
    )
    few_shot_episodes: int = option(5000, "data", "5-way 5-shot episodes", AT_LEAST_1)
    linear_probe: Literal["exact", "fast"] = option(
        "exact", "run", "exact, the official solver, or fast, within some tenths of a point of it"
    )
    precision: Literal["fp32", "tf32", "bf16"] = option(
        "fp32", "run", "of the dual encoder on `clip_data`; tf32: products of a GPU; bf16 = autocast"
    )
    mllm: str = option("", "model", "an instruction run")
    pope: str = option("", "data", "POPE: the official folder, LLaVA's file, or the Hub's parquet")
    pope_labels: str = option("", "data", "the official folder, where `pope` is LLaVA's file")
    image_root: str = option("", "data", "folder of POPE's images (parquet has them inside)")
    tasks: list[str] = option([], "data", "tasks of lmms-eval, e.g. mme,gqa: names as in lmms-eval --tasks")
    chair: str = option("", "data", "COCO's instances_*.json: captions of its images are scored by CHAIR")
    chair_captions: str = option("", "data", "COCO's captions_*.json of these images: what they name is there, too")
    chair_synonyms: str = option("", "data", "lines `object, synonym, ...`; by default the annotations' own names")
    chair_images: str = option("", "data", "folder of these images; by default that of POPE's")
    chair_limit: int = option(500, "data", "the first so many of these images; 0: all", NOT_NEGATIVE)
    task_path: str = option("", "data", "folder of task files of your own, for `tasks`")
    task_limit: int = option(0, "data", "questions of each of `tasks`; 0: all", NOT_NEGATIVE)
    data_changed: Literal["refuse", "accept"] = option(*DATA_CHANGED, decides=False)
    batch_size: int = option(64, "run", "images, or questions, at a time", AT_LEAST_1, decides=False)
    processes: int = option(0, "run", "of lmms-eval, sharing the questions; 0: one a GPU", NOT_NEGATIVE, decides=False)
    examples: int = option(240, "data", "answers kept with their images for the report", NOT_NEGATIVE)
    masked_objects: int = option(
        2000, "data", "objects of segmentation/ (COCO format) that attention is scored on", AT_LEAST_1
    )


@dataclass
class PipelineConfig:
    """Settings of the chain; each stage's own settings are in the YAML file named for it."""

    output_dir: str = option("runs/quickstart", "run", "everything is written below")
    variants: list[str] = option(["CLIP", "DiffCLIP"], "model", f"of {', '.join(VARIANTS)}", VARIANTS)
    size: str = option("tiny", "model", "model size, the last part of the model's name", SIZES)
    seeds: list[int] = option(
        [0],
        "run",
        "seeds of the scenes and of every stage; three or more for a report that can tell",
        SEED,
        aliases=("seed",),
    )
    ranks: int = option(1, "run", "processes of the multimodal stages under deepspeed", AT_LEAST_1)
    jobs: int = option(
        0,
        "run",
        "variants at a time, and on a CPU the language model beside the first; 0: one a core where align and instruct "
        "use the CPU, else one",
        NOT_NEGATIVE,
    )
    fast: bool = option(False, "run", "one model in a simpler world, in minutes, as the shipped fast/pipeline has it")
    scenes: dict = option({}, "data", "options of diffclip.scenes export, as JSON")
    pretrain: str = option("", "stages", "YAML of stages.pretrain")
    language: str = option("", "stages", "YAML of stages.language")
    align: str = option("", "stages", "YAML of stages.align")
    instruct: str = option("", "stages", "YAML of stages.instruct")
    evaluate: str = option("", "stages", "YAML of stages.evaluate")


def check(config: Any) -> None:
    """Raise InputError, which names the setting, unless every value of the dataclass is one that it may have."""
    for setting in fields(config):
        check_value(setting, getattr(config, setting.name))
    if isinstance(config, TrainingConfig):
        _check_trainer(config)
    if isinstance(config, PretrainConfig):
        _check_start(config)
    if isinstance(config, LanguageConfig):
        width = config.hidden_size // config.heads
        if width % 2 or not width:  # rotary embeddings turn pairs
            raise InputError(
                f"setting `hidden_size` {config.hidden_size}: each of the {config.heads} heads would be {width} wide; "
                "give an even multiple of `heads`"
            )


def _check_start(config: PretrainConfig) -> None:
    """Refuse settings of `init_from` without it, and those of a new model beside it."""
    if config.init_from and config.model:
        raise InputError("settings `model` and `init_from`: a run starts from the one or from the other; leave one out")
    if config.init_from and config.init != "matched":
        raise InputError("setting `init`: draws the weights of a new model, and `init_from` has its own; leave it out")
    for name, unset in (("attention", "keep"), ("lambda_init", ""), ("image_size", 0)):
        if not config.init_from and getattr(config, name) != unset:
            raise InputError(f"setting `{name}`: changes a model that is there; name it with `init_from`")
    if config.attention == "keep" and config.lambda_init:
        raise InputError("setting `lambda_init`: belongs to a new attention; set `attention` to v1, v2 or dex")
    if config.lambda_init and lambda_init_of(config.lambda_init) is None:
        raise InputError(f"setting `lambda_init`: must be a number or schedule: got {config.lambda_init!r}")
    if not config.learns:
        raise InputError(f"setting `learns`: names nothing; choose among {', '.join(variants.PARTS)}")


def check_value(setting: Field, value: Any) -> None:
    """Raise InputError unless a setting may have that value; of a list, each of its values."""
    allowed, names = setting.metadata.get("range"), setting.metadata.get("names")
    label = f"setting `{setting.metadata.get('flag', setting.name)}`"
    for each in value if isinstance(value, list) else [value]:
        if allowed and each is not None:
            allowed.check(each, label)
        if names and each not in names:
            raise InputError(f"{label}: there is no {each}{near(str(each), names)}")


def _check_trainer(config: TrainingConfig) -> None:
    """Refuse what `resume_with` and `trainer` may not say; `stages.training.check_trainer` compares types."""
    may = [name for name in MAY_CHANGE if hasattr(config, name)]
    for name in config.resume_with:
        if name not in may:
            known = {setting.name for setting in fields(config)}
            reason = (
                "decides which weights or samples there are, from the first step on" if name in known else "is none"
            )
            raise InputError(f"setting `resume_with`: {name} {reason}; a paused run can take over {', '.join(may)}")
    trainer = config.trainer
    if not isinstance(trainer, dict):
        raise InputError(f"setting `trainer`: expected a mapping such as {{adam_beta2: 0.98}}, found {trainer!r}")
    for setting, keys in DECIDED.items():
        for key in keys:
            if key in trainer and hasattr(config, setting):
                raise InputError(f"setting `trainer`: {key} is what the setting `{setting}` decides: set that instead")
    if not config.torch_compile and (how := next((key for key in trainer if key.startswith("torch_compile_")), None)):
        raise InputError(f"setting `trainer`: {how} says how to compile; set `torch_compile` to true too")
    if trainer.get("label_smoothing_factor") and not (isinstance(config, LanguageConfig) and not config.packing):
        why = "set `packing` false" if isinstance(config, LanguageConfig) else "leave it out"
        raise InputError(f"setting `trainer`: label_smoothing_factor is not for a loss that the model computes; {why}")
    if trainer.get("neftune_noise_alpha") and getattr(config, "packing", False):
        why = "is less noise the longer a row is, and packing makes one row of many examples; set `packing` false"
        raise InputError(f"setting `trainer`: neftune_noise_alpha {why}")
    if inexact := next(filter(trainer.get, INEXACT), None):
        raise InputError(
            f"setting `trainer`: with {inexact} a resumed run would not be the undisturbed one; leave it out, the same "
            "command resumes by itself"
        )
