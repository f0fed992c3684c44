"""What a protocol is given and what it gives: settings, data, one model's evaluation, and the protocol itself."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from diffclip.base.errors import InputError
from diffclip.benchmarks import PROTOCOLS
from diffclip.benchmarks.captioned import Captioned
from diffclip.benchmarks.features import Encoder
from diffclip.benchmarks.images import Images


@dataclass(frozen=True)
class Settings:
    """How models are evaluated.

    Args:
        templates: "imagenet7", "imagenet80" or a file for all sets; None takes each set's own templates.json, and
            imagenet7 where there is none.
        probe: "exact" for the official linear-probe solver, "fast" for the minimum that it stops short of where
            the penalty is weak: scores differ by some tenths of a point (see `linear_probe.linear_probe`).
        probe_features: linear probe and few-shot on features "before" the projection (the protocol) or "after" it.
        way, shot: classes of a few-shot episode, and images of each to learn from.
        seed: draws the few-shot episodes; nothing else here is random.
    """

    protocols: tuple[str, ...] = tuple(PROTOCOLS)
    templates: str | None = None
    probe: str = "exact"
    probe_features: str = "before"
    episodes: int = 5000
    way: int = 5
    shot: int = 5
    seed: int = 0
    precision: str = "float32"
    batch_size: int = 128
    workers: int | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.probe_features not in ("before", "after"):
            raise InputError(f"probe_features {self.probe_features!r} is neither before nor after")


class Classification(NamedTuple):
    """A labelled set: label c means classnames[c]; `splits` holds test and, if there are, train and val."""

    classnames: list[str]
    labels: dict[str, int]  # of each class folder
    templates: list[str] | None  # its own prompts, with {c}
    metric: str  # of the linear probe
    splits: dict[str, Images]
    notes: list[str]  # what a reader of the scores should know, in sentences


class Shift(NamedTuple):
    """Other images of (some of) the classes of a classification set, with that set's labels."""

    of: str
    images: Images


class Data(NamedTuple):
    """A suite after reading: every file is listed, none decoded."""

    classification: dict[str, Classification]
    shifts: dict[str, Shift]
    retrieval: dict[str, Captioned]  # the name is "" for a single set without one
    own: dict[str, Any]  # the parts that their protocols read themselves, each a single set

    def sets(self, part: str) -> Mapping[str, Any]:
        """The sets of a part by name, "" for one without."""
        return {"": self.own[part]} if part in self.own else self._asdict().get(part, {})


@dataclass
class Evaluation:
    """One model on one suite, and its results: a score that has outcomes is 100 times their mean."""

    encoder: Encoder
    data: Data
    settings: Settings
    templates: list[str] | None = None  # for all sets
    metrics: dict[str, float] = field(default_factory=dict)  # percent
    outcomes: dict[str, Tensor] = field(default_factory=dict)  # one number per item
    skipped: dict[str, str] = field(default_factory=dict)  # score or set -> why it is not there
    classifiers: dict[str, Tensor] = field(default_factory=dict)  # (classes, width) of classification sets

    def add(self, prefix: str, metrics: Mapping[str, float], outcomes: Mapping[str, Tensor]) -> None:
        """Keep the scores and outcomes of one set."""
        self.metrics |= {f"{prefix}/{key}": value for key, value in metrics.items()}
        self.outcomes |= {f"{prefix}/{key}": value for key, value in outcomes.items()}

    def probe_rows(self, name: str, labelled: Classification, split: str) -> tuple[Tensor, Tensor]:
        """Features (N, width) of a split as the probes take them, and labels (N,)."""
        features = self.encoder.images(labelled.splits[split], f"{name} {split}")
        return getattr(features, self.settings.probe_features), features.labels


class Protocol(NamedTuple):
    """A protocol, which its module has as `PROTOCOL`."""

    images: Callable[[str, Any], dict[str, Images]]  # (name, set) -> what it encodes, under its progress bars' names
    score: Callable[[Evaluation, str, Any], None]  # adds the scores of the set called so, or why it is skipped
    finish: Callable[[Evaluation], None] | None = None  # after all sets, if there are any: averages
    read: Callable[[Path], Any] | None = None  # the folder of a part of its own -> a set, or InputError


def load(name: str) -> Protocol:
    """The protocol of a name in `PROTOCOLS`."""
    return importlib.import_module(f"diffclip.benchmarks.{name}").PROTOCOL
