"""Training on streamed shards: from a store with a request a shard, resumed in mid-epoch, refused if data changed."""

import json
import os
from unittest import mock

import pytest
import torch
from launch import QUICKSTART, call, run_ranks
from safetensors.torch import load_file
from shards import write_shard
from stores import moto, s3, upload  # noqa: F401 - fixtures

from diffclip.base import objects
from diffclip.base.errors import InputError
from stages import pretrain
from stages.pretraining import ContrastiveTrainer

PAIRS = (30, 12, 25, 9, 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for i, pairs in enumerate(PAIRS):
        write_shard(folder / f"{i:05d}.tar", pairs, i)
        (folder / f"{i:05d}_stats.json").write_text(json.dumps({"successes": pairs}))
    return folder


def command(data, out, *further: str) -> list[str]:
    return [
        f"--config={QUICKSTART / 'pretrain.yaml'}",
        "--model=CLIP-tiny",
        f"--train_data={data}",
        f"--output_dir={out}",
        "--caption_member=txt",
        "--global_batch_size=16",
        "--lanes=4",
        "--window=2",
        "--epochs=2",
        "--logging_steps=1",
        *further,
    ]


def losses(out) -> dict[int, float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.slow
def test_training_from_a_store_is_that_from_files_with_one_request_a_shard(s3, folder, tmp_path):  # noqa: F811
    upload(s3, folder, "d")
    val = f"--val_pairs={folder}/00002.tar"
    pretrain.main(command(f"{folder}/*.tar", tmp_path / "files", "--order=stream", "--use_cpu=True", "--epochs=1", val))
    s3.requests.clear()
    cache = f"--shard_cache={tmp_path / 'cache'}"
    more = ["--num_workers=1", "--epochs=1", cache, val]
    run_ranks(2, "stages.pretrain", *command("s3://bucket/d/*.tar", tmp_path / "s3", *more))
    assert {path: n for path, n in s3.objects().items() if path.endswith(".tar")} == {
        f"/bucket/d/{i:05d}.tar": 1 for i in range(len(PAIRS))
    }
    one, two = losses(tmp_path / "files"), losses(tmp_path / "s3")
    assert len(one) == 6 and one == pytest.approx(two, rel=1e-5)
    scores = [json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("files", "s3")]
    recalls = [{name: value for name, value in score.items() if name.startswith("val/")} for score in scores]
    assert recalls[0] and recalls[0] == recalls[1]  # of which rank 1 encodes nothing
    record = json.loads((tmp_path / "s3" / "run.json").read_text())
    assert record["inputs"]["train_data[0]"]["path"] == "s3://bucket/d/*.tar" and record["pairs"] == sum(PAIRS)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_goes_missing_ends_the_run_with_its_address(s3, folder, tmp_path, workers):  # noqa: F811
    upload(s3, folder, "d")
    s3.client.delete_object(Bucket="bucket", Key="d/00002.tar")
    sized = {f"{i:05d}.tar": {"samples": n, "bytes": None} for i, n in enumerate(PAIRS)}
    (tmp_path / "shards.json").write_text(json.dumps({"format": 1, "shards": sized}))
    every = [  # as when it goes after the listing
        objects.Object(f"s3://bucket/d/{path.name}", path.stat().st_size) for path in sorted(folder.glob("*.tar"))
    ]
    with mock.patch.object(objects, "matching", lambda pattern: every), pytest.raises(InputError) as caught:
        more = [f"--manifest={tmp_path / 'shards.json'}", f"--shard_cache={tmp_path / 'c'}", f"--num_workers={workers}"]
        pretrain.main(command("s3://bucket/d/{00000..00004}.tar", tmp_path / "run", "--use_cpu=True", *more))
    assert str(caught.value) == "s3://bucket/d/00002.tar: no such object; check the address"


class Stop(Exception):
    pass


@pytest.mark.slow
def test_a_run_stopped_in_mid_epoch_goes_on_to_the_same_weights_and_notices_other_data(folder, tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    for path in folder.iterdir():
        os.link(path, data / path.name)
    arguments = ["--order=stream", "--use_cpu=True", "--save_steps=4"]
    pretrain.main(command(f"{data}/*.tar", tmp_path / "whole", *arguments))
    loss, steps = ContrastiveTrainer.compute_loss, []

    def stopping(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if self.state.global_step == 9:
            raise Stop
        return loss(self, *args, **kwargs)

    monkeypatch.setattr(ContrastiveTrainer, "compute_loss", stopping)
    with pytest.raises(Stop):
        pretrain.main(command(f"{data}/*.tar", tmp_path / "run", *arguments))
    monkeypatch.setattr(ContrastiveTrainer, "compute_loss", loss)
    (data / "00002.tar").unlink()
    write_shard(data / "00002.tar", 25, 99)
    with open(data / "00002.tar", "ab") as f:
        f.write(bytes(10240))  # as many pairs, other bytes
    with pytest.raises(InputError, match=r"train_data .*--data_changed accept"):
        pretrain.main(command(f"{data}/*.tar", tmp_path / "run", *arguments))
    (data / "00002.tar").unlink()
    os.link(folder / "00002.tar", data / "00002.tar")
    pretrain.main(command(f"{data}/*.tar", tmp_path / "run", *arguments))
    name = "open_clip_model.safetensors"
    whole, resumed = load_file(tmp_path / "whole" / name), load_file(tmp_path / "run" / name)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_what_cannot_be_streamed_is_one_sentence(folder, tmp_path, capsys):
    (tmp_path / "x.csv").write_text("image,caption\n")
    with pytest.raises(InputError, match=r"x\.csv: only \.tar shards are streamed; set `order` to shuffle"):
        pretrain.main(command(tmp_path / "x.csv", tmp_path / "run", "--order=stream"))
    with pytest.raises(InputError, match="setting `split`: shards that are streamed are of one split"):
        pretrain.main(command(f"{folder}/*.tar", tmp_path / "run", "--order=stream", "--split=train"))
    assert not (tmp_path / "run").exists()


def test_sizes_are_written_by_the_command(folder, tmp_path, capsys):
    call("stages.fetch", "index", f"{folder}/*.tar", "--output", str(tmp_path / "sizes.json"))
    assert "wrote " in capsys.readouterr().out
    sizes = json.loads((tmp_path / "sizes.json").read_text())["shards"]
    assert [entry["samples"] for entry in sizes.values()] == list(PAIRS)
    with pytest.raises(InputError, match="index needs one pattern"):
        call("stages.fetch", "index")
