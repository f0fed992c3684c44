"""The order of streamed shards: a permutation an epoch, the same however it is read, in little memory."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from shards import write_shard
from torch.utils.data import DataLoader, SequentialSampler

from diffclip.base.errors import InputError
from diffclip.data.layout import Layout
from diffclip.data.pairs import PairTable
from diffclip.data.shard_sizes import SizedShard, sized_shards, write_manifest
from diffclip.data.stream import Stream
from diffclip.data.streamed import StreamedTable
from diffclip.data.training_pairs import TrainingPairs

SLOW = pytest.mark.slow


def drawn(seed: int) -> Stream:
    """A stream of random shape."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 30, rng.integers(1, 40)).tolist()
    sizes[0] = 40
    lanes, window = int(rng.integers(1, 9)), int(rng.integers(1, 6))
    return Stream(sizes, global_batch_size=int(rng.integers(1, 24)), epochs=3, seed=seed, lanes=lanes, window=window)


@pytest.mark.parametrize("seed", range(15))
def test_an_epoch_is_a_permutation_of_all_samples_cut_to_whole_batches(seed):
    stream = drawn(seed)
    total = sum(stream.sizes)
    assert stream.in_epoch == total and stream.per_epoch == total // stream.batch * stream.batch
    epochs = [[stream.row(k) for k in range(e * stream.per_epoch, (e + 1) * stream.per_epoch)] for e in range(3)]
    for order in epochs:
        assert len(set(order)) == len(order) == stream.per_epoch and set(order) <= set(range(total))
    if stream.per_epoch > 20:
        assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_an_item_depends_on_seed_and_place_alone(seed):
    forwards, jumping = drawn(seed), drawn(seed)
    order = [forwards.row(k) for k in range(3 * forwards.per_epoch)]
    places = np.random.default_rng(seed).permutation(len(order)).tolist()
    assert all(jumping.row(k) == order[k] for k in places)


@pytest.mark.parametrize("seed", range(6))
def test_what_is_read_was_announced_and_little_of_it_is_held(seed):
    stream = drawn(seed)
    asked: dict[int, list[int]] = {}
    for k in range(3 * stream.per_epoch):
        lane, shards = stream.soon(k)
        asked[lane] = shards
        assert int(np.searchsorted(stream.firsts, stream.row(k), side="right")) - 1 in shards
        assert len(shards) <= 2 * stream.window and len(stream._windows) <= stream.lanes and len(stream._epochs) <= 2
        assert len(stream._held) <= stream.lanes
    assert sum(map(len, stream._windows.values())) <= stream.lanes * stream.window * max(stream.sizes)


def test_each_lane_has_its_own_part_of_every_batch_and_its_own_shards():
    stream = Stream([10] * 64, global_batch_size=32, epochs=1, seed=0, lanes=8, window=2)
    shards = [{stream.row(k) // 10 for k in range(stream.per_epoch) if k % 32 // 4 == lane} for lane in range(8)]
    assert all(len(each) == 8 for each in shards) and len(set.union(*shards)) == 64


def test_pairs_of_a_window_are_mixed_and_windows_end_at_different_times():
    stream = Stream([50] * 80, global_batch_size=16, epochs=1, seed=0, lanes=4, window=4)
    one = [stream.row(k) // 50 for k in range(stream.per_epoch) if k % 16 // 4 == 3][:200]  # the first window of lane 3
    assert sorted(Counter(one).values()) == [50] * 4 and len({*one[:20]}) == 4
    ends = [next(k for k in range(stream.per_epoch) if stream.place(k)[1:3] == (lane, 1)) for lane in range(4)]
    assert np.diff(ends).min() > 100


def test_weights_take_whole_shards_and_as_many_samples_in_each_epoch():
    stream = Stream(
        [10, 20, 30, 7, 7, 7], global_batch_size=1, epochs=4, seed=3, ranges=[(0, 3), (3, 6)], weights=[0.5, 2]
    )
    assert stream.per_epoch == 30 + 42
    for epoch in range(4):
        rows = Counter(stream.row(epoch * 72 + k) for k in range(72))
        assert all(rows[row] == 2 for row in range(60, 81)) and sum(rows[row] for row in range(60)) == 30
        assert max(rows[row] for row in range(60)) == 1
        touched = Counter(np.searchsorted([10, 30, 60], row, side="right") for row in rows if row < 60)
        assert sum(count < size for size, count in zip((10, 20, 30), (touched[i] for i in range(3))) if count) <= 1


# ---- read by ranks and workers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nine shards of unequal length, 90 pairs, with a manifest."""
    folder = tmp_path_factory.mktemp("stream")
    for i, pairs in enumerate([3, 20, 8, 1, 14, 9, 9, 11, 15]):
        write_shard(folder / f"{i:05d}.tar", pairs, i)
    write_manifest(f"{folder}/*.tar")
    return folder


def pairs_of(folder, **settings) -> TrainingPairs:
    settings = {"global_batch_size": 16, "epochs": 2, "seed": 1, "lanes": 4, "window": 2} | settings
    table = StreamedTable(sized_shards([f"{folder}/*.tar"], Layout()), Layout())
    return TrainingPairs(table, lambda image: torch.zeros(1), lambda texts: torch.zeros(len(texts), 1), **settings)


def items(pairs: TrainingPairs, ranks: int, workers: int, skip: int = 0) -> list[list[int]]:
    """The rows of each global batch as Trainer's loaders on so many ranks give them, `skip` batches left out."""
    steps: list[list[int]] = []
    for rank in range(ranks):
        size = pairs.stream.batch // ranks
        loader = DataLoader(pairs, size, sampler=SequentialSampler(pairs), num_workers=workers, drop_last=True)
        sharded = prepare_data_loader(loader, num_processes=ranks, process_index=rank, put_on_device=False)
        for step, batch in enumerate(skip_first_batches(sharded, skip) if skip else sharded):
            steps += [[]] * (step >= len(steps))
            steps[step] = steps[step] + [pairs.row(int(k)) for k in batch["item"]]
    return steps


@pytest.mark.parametrize(
    "ranks, workers, skip", [(2, 0, 0), (4, 0, 7), pytest.param(1, 2, 0, marks=SLOW), pytest.param(2, 2, 3, marks=SLOW)]
)
def test_ranks_workers_and_a_resume_see_the_same_batches(folder, ranks, workers, skip):
    pairs = pairs_of(folder)
    whole = items(pairs, 1, 0)
    assert len(whole) == 10 and items(pairs_of(folder), ranks, workers, skip) == whole[skip:]


def test_the_pairs_are_those_of_a_table_and_few_shards_are_open(folder):
    full, pairs = PairTable([str(folder)]), pairs_of(folder)
    pairs.table.keep = 3
    assert len(pairs.table) == len(full) == 90 and pairs.table.ranges == full.ranges
    for row in np.random.default_rng(0).permutation(90).tolist():
        assert pairs.table.encoded(row) == full.encoded(row) and pairs.table.key(row) == full.key(row)
        assert len(pairs.table._open) <= 3


def test_a_bad_pair_is_replaced_from_its_window_and_what_shards_lack_is_named(tmp_path):
    for i in range(4):
        write_shard(tmp_path / f"{i}.tar", 8, i, {3: b"broken"} if i == 1 else None)
    (tmp_path / "sizes.json").write_text(json.dumps({"0.tar": 8, "1.tar": 8, "2.tar": 10, "3.tar": 8}))
    pairs = pairs_of(tmp_path, global_batch_size=1, lanes=1, epochs=1, bad_samples=tmp_path / "bad.jsonl")
    pairs.transform = lambda image: torch.zeros(1)
    assert sum(pairs[k]["bad"] for k in range(34)) >= 3
    lines = map(json.loads, (tmp_path / "bad.jsonl").read_text().splitlines())
    told = {(line["key"].rpartition("/")[2], line["reason"]) for line in lines}
    assert {key for key, _ in told} == {"1_0003", "#8", "#9"}
    assert any("2.tar holds 8 pairs, and 10 by its manifest" in reason for _, reason in told)
    window = {pairs.stream.place(k).window: set(pairs.stream.others(k).tolist()) for k in range(34)}
    for k in range(34):
        assert pairs._replacement(k, 1) in window[pairs.stream.place(k).window]


def test_sizes_come_from_the_manifest_from_img2dataset_from_webdataset_or_from_headers(folder, tmp_path):
    for i in range(3):
        write_shard(tmp_path / f"{i:05d}.tar", 2 + i, i)

    def sizes():
        return [shard.samples for shard in sized_shards([str(tmp_path)], Layout())[0]]

    assert sizes() == [2, 3, 4]
    (tmp_path / "sizes.json").write_text(json.dumps({f"{i:05d}.tar": 20 + i for i in range(3)}))
    assert sizes() == [20, 21, 22]
    for i in range(3):
        (tmp_path / f"{i:05d}_stats.json").write_text(json.dumps({"count": 99, "successes": 10 + i}))
    assert sizes() == [10, 11, 12]
    (tmp_path / "00001_stats.json").unlink()
    with pytest.raises(InputError, match=r"00001_stats\.json: is missing .* `diffclip data index`"):
        sizes()
    (tmp_path / "00000_stats.json").unlink()
    (tmp_path / "sizes.json").unlink()
    assert write_manifest(f"{tmp_path}/*.tar") == f"{tmp_path}/shards.json" and sizes() == [2, 3, 4]
    elsewhere = str(tmp_path / "other.json")
    write_manifest(f"{tmp_path}/*.tar", elsewhere)
    assert [s.samples for s in sized_shards([str(tmp_path)], Layout(), elsewhere)[0]] == [2, 3, 4]
    write_shard(tmp_path / "00002.tar", 40, 9)
    with pytest.raises(InputError, match=r"00002\.tar: has .* bytes, and .*shards\.json was made; count .*again"):
        sizes()
    (tmp_path / "shards.json").write_text("[]")
    with pytest.raises(InputError, match=r"shards\.json: is no manifest"):
        sizes()


ENTRY = '{"format": 1, "shards": {"0.tar": {"samples": %s, "bytes": %s}}}'
WRONG = {
    "shards.json": [ENTRY % (-1, 5), ENTRY % ('"2"', 5), ENTRY % (2, '"5"'), ENTRY % ("true", 5), '{"format": 1}'],
    "sizes.json": ["[]", '{"0.tar": "2"}', '{"0.tar": -2}', '{"0.tar": null}', "3"],
    "0_stats.json": ["[]", '{"successes": -1}', '{"successes": "2"}', '{"successes": false}', "null"],
}


@pytest.mark.parametrize("name, text", [(name, text) for name, texts in WRONG.items() for text in texts])
def test_sizes_that_are_no_counts_are_refused_and_counting_again_mends_it(tmp_path, name, text):
    write_shard(tmp_path / "0.tar", 3)
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=rf"{name}: .* by `diffclip data index`"):
        sized_shards([str(tmp_path)], Layout())
    write_manifest(f"{tmp_path}/*.tar")
    assert [shard.samples for shard in sized_shards([str(tmp_path)], Layout())[0]] == [3]


@pytest.mark.parametrize("name", ["a.csv", "a.tar.gz"])
def test_what_cannot_be_streamed_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_text("image,caption\n")
    with pytest.raises(InputError, match=rf"{name}: only \.tar shards are streamed"):
        sized_shards([str(tmp_path / name)], Layout())


def test_a_shard_that_holds_more_than_its_manifest_says_ends_the_run_by_name(folder):
    shard = SizedShard(str(folder / "00001.tar"), 19, None)
    with pytest.raises(InputError, match=r"00001\.tar: holds 20 pairs, and 19 by its manifest"):
        StreamedTable([[shard]], Layout()).encoded(0)
