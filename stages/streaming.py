"""Pretraining data that is streamed: which shards the settings name, and what a resumed run knows them by."""

import hashlib
import json
import os
from typing import Any

from diffclip.base.errors import InputError
from diffclip.base.ranks import from_main, rank, world
from diffclip.data.layout import Layout
from diffclip.data.shard_sizes import SizedShard, in_object_store, sized_shards
from stages.settings import PretrainConfig

Shards = list[list[SizedShard]]  # by source


def streams(config: PretrainConfig) -> bool:
    """Whether the settings ask for the streaming order, as data in an object store does where they say nothing."""
    return config.order == "stream" or (config.order == "auto" and in_object_store(config.train_data))


def shards_of(config: PretrainConfig) -> Shards:
    """The shards of each source, listed by rank 0 for all; [] where the run does not stream."""
    if not streams(config):
        return []
    if config.split:
        raise InputError("setting `split`: shards that are streamed are of one split; name those of it in train_data")
    layout = layout_of(config)
    told: list[Any] = from_main(lambda: sized_shards(config.train_data, layout, config.manifest))
    return [[SizedShard(*shard) for shard in source] for source in told]


def layout_of(config: PretrainConfig) -> Layout:
    """How pairs lie in their files, from the settings of the same names."""
    return Layout(**layout_settings(config))


def layout_settings(config: PretrainConfig) -> dict[str, Any]:
    """The fields of `diffclip.data.layout.Layout` that training and validation have from settings of the same name."""
    fields = ("image_member", "caption_member", "image_column", "caption_column", "separator", "encoding", "image_root")
    return {name: getattr(config, name) for name in fields}


def digests_of(shards: Shards) -> dict[str, str]:
    """By role of run.json's inputs, 12 hex digits that change with the names, numbers of samples, bytes and versions of
    a source's shards, of which none is read.
    """
    facts = [[(os.path.basename(s.url.partition("?")[0]), *s[1:]) for s in source] for source in shards]
    digests = [hashlib.sha256(json.dumps(fact).encode()).hexdigest()[:12] for fact in facts]
    return {f"train_data[{i}]": digest for i, digest in enumerate(digests)}


def lanes_here(lanes: int) -> int:
    """How many of the lanes the ranks of this node read at most: each has a fixed part of every batch."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    first = (rank() - int(os.environ.get("LOCAL_RANK", 0))) * lanes // world()
    last = -(-(rank() - int(os.environ.get("LOCAL_RANK", 0)) + here) * lanes // world())
    return min(lanes, last - first)
