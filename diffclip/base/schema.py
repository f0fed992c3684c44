"""What lies in a run directory: the names of its files and their keys, for those who write them and those who read.

The dictionaries are types only: a file that an older version wrote, or that somebody has edited, may lack any key.
"""

from types import UnionType
from typing import Any, Literal, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

# --- every stage ---
RECORD = "run.json"  # RunRecord
CONFIG = "config.yaml"  # the resolved settings
LOG = "log.txt"  # what the console showed
METRICS = "metrics.json"  # {score: number}, percent where it is a share
LOGS = "logs"  # a file for each rank, where there are several: its warnings and errors
CURVE = "metrics.jsonl"  # a line per logged step: "step", "samples_per_second", "loss", …
CHECKPOINTS = "checkpoint-*"  # folders of resume state
COMPLETE = "complete"  # marker in a checkpoint that is written to its end: {"run": id, "files": Digests}
WRITING = ".writing-"  # and a rank: in a checkpoint, until its part is on the disk
MANIFEST = "inputs.json.gz"  # what the folders of data held: {setting: {file: digest}}
MODEL_CARD = "README.md"

BAD_SAMPLES = "bad_samples.jsonl"  # {"key", "reason"} of each sample left out

# --- pretrain ---
NON_FINITE = "non_finite.jsonl"  # NonFinite
BEST = "best"  # folder: the model of the best epoch, with a metrics.json of its own

# --- evaluate ---
CLIP_BENCHMARKS = "clip_benchmarks.json"  # scores, "about" (what they were made with), "skipped" ({score: why})
CLIP_OUTCOMES = "clip_outcomes.safetensors"  # {score: one number per item, whose mean times 100 is the score}
LOCALISATION = "localisation.json"  # Localisation
ATTENTION = "attention.jsonl"  # AttentionMap
EXAMPLES = "examples.jsonl"  # Example
POPE = "pope"  # folder of the next two, and of what lmms-eval writes
ANSWERS = "answers.jsonl"  # PopeAnswer
MARGINS = "margins.jsonl"  # fields of mllm.pope.questions.Question, and "margin": of yes over no
CHAIR = "chair"  # folder of captions and their scores
TASKS = "tasks"  # folder of what lmms-eval writes of other tasks, a folder each
IMAGES = "images"  # folder in POPE: the images that a parquet file holds

STAGES = ("language", "pretrain", "align", "instruct", "evaluate")
POPE_SPLITS = ("random", "popular", "adversarial")
POPE_PASSES = ("model", "shuffled", "grey", "no_image")  # the model, and its controls

State = Literal["running", "finished", "stopped"]  # killed: stays "running"; stopped: told to end early


class Input(TypedDict):
    """A file or folder that a run has read."""

    path: str
    digest: str


class RunRecord(TypedDict, total=False):
    """run.json."""

    stage: str
    state: State
    seed: int
    decoding: int  # version of the rules by which images become pixels, see diffclip.base.images
    command: str
    started: str
    wall_seconds: float
    id: str  # drawn at the first start; checkpoints carry it
    settings: dict[str, Any]  # as in config.yaml
    taken_over: list[str]  # what decides the result and was changed in mid-run, since the user said so
    files: dict[str, list]  # of a finished run: diffclip.base.sealed.Digests of its result
    ranks: int
    hosts: dict[str, str] | list[str]  # where there are several ranks: what each computes on; once their names alone
    job: str  # Slurm's
    inputs: dict[str, Input]  # by setting, "data[1]" for the second file of `data`
    deepspeed: Input
    versions: dict[str, str]
    git: str
    hardware: str
    energy_kwh: float  # not measured by the stages; shown where somebody has added it
    model: str  # e.g. "DiffCLIP-tiny"
    steps: int
    parameters: int | dict[str, int]  # of all, or by part
    # language
    stand_in: bool
    tokens: int
    # pretrain
    pairs: int
    bad_samples: int  # also of align and instruct
    # align, instruct
    conversations: int
    rows: str  # a hash of which rows of the data are learnt
    learns: list[str]
    before: dict[str, str]  # fingerprints by part
    after: dict[str, str]
    # evaluate
    attention: str  # why there are no attention maps
    pope: str  # which version of POPE
    pope_margin: str  # why there are no margins


class NonFinite(TypedDict):
    """A line of non_finite.jsonl: one rank's share of the batch whose loss was not finite."""

    step: int
    rank: int
    loss: str
    culprits: list[str]  # keys of samples whose features are not finite
    keys: list[str]  # keys of all samples


class Localisation(TypedDict):
    """localisation.json: one entry per object in each list."""

    pictures: list[str]  # file names
    objects: list[str]
    scores: dict[str, list[float | None]]  # None where the crop leaves the object out


class AttentionMap(TypedDict):
    """A line of attention.jsonl."""

    image: str  # a file in the run directory
    file: str  # the name it came under
    query: str
    heat: list[list[int]]  # (rows, columns) of patches, 0 to 255


class Example(TypedDict):
    """A line of examples.jsonl: a question of POPE with its image."""

    split: str
    question_id: str
    question: str
    label: str
    answer: str | None  # None where the program gave none
    answer_shuffled: str | None  # to the same question about another image
    image: str  # a file in the run directory
    query: str
    heat: list[list[int]] | None


# A line of pope/answers.jsonl: fields of mllm.pope.questions.Question, "pass" (of POPE_PASSES) and "answer".
PopeAnswer = dict[str, Any]


def misfit(record: dict, kind: type) -> str:
    """The first key of a record, as JSON has it, whose value is not of the kind that a TypedDict says, or ""."""
    kinds = get_type_hints(kind)
    return next((key for key in record if key in kinds and not _fits(record[key], kinds[key])), "")


def _fits(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if is_typeddict(kind):
        return isinstance(value, dict) and value.keys() >= kind.__required_keys__ and not misfit(value, kind)
    if origin in (Literal, UnionType):
        return value in parts if origin is Literal else any(_fits(value, part) for part in parts)
    if origin in (dict, list):
        inner = value.values() if isinstance(value, dict) else value
        return isinstance(value, origin) and all(_fits(each, parts[-1]) for each in inner)
    return kind is Any or isinstance(value, (int, float) if kind is float else kind)
