"""Pretraining as a user starts it: one big batch whatever the hardware, the same weights whenever it is killed,
every pair read once, and what happens when data, numbers or the disk are bad.
"""

import io
import json
import os
import random
import resource
import socket
import tarfile
import time
from pathlib import Path

import pytest
import torch
from launch import QUICKSTART, ROOT, TORCHRUN, kill, run, run_ranks, start_ranks
from safetensors.torch import load_file
from shards import write_shard

import diffclip
from diffclip.base.errors import InputError, exit_on_input_error
from diffclip.base.images import DECODING
from diffclip.data.pairs import PairTable
from stages import pretrain, pretraining
from stages.run import Run
from stages.settings import PretrainConfig


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    """Two shards of unequal length, 64 pairs."""
    folder = tmp_path_factory.mktemp("shards")
    write_shard(folder / "0.tar", 50, 1)
    write_shard(folder / "1.tar", 14, 2)
    return str(folder / "*.tar")


def command(data: str, out: Path, *further: str, model: str = "DiffCLIP-tiny") -> list[str]:
    return [
        "stages.pretrain",
        f"--config={QUICKSTART / 'pretrain.yaml'}",
        f"--model={model}",
        f"--train_data={data}",
        f"--output_dir={out}",
        "--caption_member=txt",
        "--global_batch_size=16",
        "--logging_steps=1",
        *further,
    ]


def in_process(module: str, *arguments: str) -> None:
    """`python -m stages.pretrain ARGUMENTS` in this process, on the CPU."""
    pretrain.main([*arguments, "--use_cpu=True"])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "open_clip_model.safetensors")


# ---- the same gradients on any number of devices


@pytest.fixture(scope="module")
def updates(shards, tmp_path_factory):
    """Run one step under a launcher and return each parameter's update.

    With epsilon 1, AdamW's first update is -lr g / (|g| + 1): so updates agree as closely as gradients do.
    """
    folder = tmp_path_factory.mktemp("one_step")
    start_weights = {}

    def one_step(name: str, launch, *further: str) -> dict[str, torch.Tensor]:
        out = folder / name
        options = ["--learning_rate=1", "--warmup_epochs=0", "--epochs=1", "--global_batch_size=64", "--weight_decay=0"]
        launch(*command(shards, out, *options, '--trainer={"adam_epsilon": 1.0}', *further))
        assert json.loads((out / "run.json").read_text())["state"] == "finished"
        if not start_weights:
            from transformers import set_seed

            set_seed(0)
            start_weights.update(diffclip.build("DiffCLIP-tiny").state_dict())
        return {k: v - start_weights[k] for k, v in weights(out).items() if v.is_floating_point()}

    return one_step


@pytest.fixture(scope="module")
def big_batch(updates):
    differences = updates("big", in_process)
    assert sum(float(v.norm()) > 0 for v in differences.values()) > 60
    return differences


def torchrun(*arguments: str) -> None:
    run(*TORCHRUN, "2", "-m", *arguments)


def two_ranks(*arguments: str) -> None:
    run_ranks(2, *arguments)


def zero(stage: int, launch=run_ranks):
    config = ROOT / "stages" / "configs" / "deepspeed" / f"zero{stage}.json"
    return lambda *arguments: launch(2, *arguments, "--use_cpu=True", f"--deepspeed={config}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, launch, further",
    [
        ("chunks", in_process, ["--micro_batch_size=24"]),  # 24, 24, 16
        ("2-ranks", torchrun, []),
        ("2-ranks-chunks", two_ranks, ["--micro_batch_size=10"]),  # 10, 10, 10, 2
        ("zero-1", zero(1), []),
        ("zero-2-chunks", zero(2), ["--micro_batch_size=8"]),
    ],
)
def test_devices_and_chunks_give_the_gradients_of_one_big_batch(updates, big_batch, name, launch, further):
    differences = updates(name, launch, *further)
    whole = torch.cat([v.flatten() for v in big_batch.values()]).norm()
    assert differences.keys() == big_batch.keys()
    for key, expected in big_batch.items():
        # a tensor whose true gradient is zero (key biases) has rounding noise only, measured against the whole
        assert float((differences[key] - expected).norm()) <= 1e-5 * float(expected.norm()) + 1e-7 * float(whole), key


# ---- exact resume


RESUME = ["--epochs=4", "--save_steps=3", "--warmup_epochs=0.5"]  # 16 steps, an epoch is 4


def wait_for(condition, processes, what: str) -> None:
    deadline = time.time() + 120
    while not condition():
        assert all(process.is_alive() for process in processes) and time.time() < deadline, f"ended before {what}"
        time.sleep(0.005)


def steps_logged(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 2])
def test_killed_at_any_step_it_ends_in_the_weights_of_an_undisturbed_run(shards, tmp_path, ranks):
    out = tmp_path / "killed"
    disturbed = command(shards, out, *RESUME)
    run_ranks(ranks, *command(shards, tmp_path / "calm", *RESUME))

    with start_ranks(ranks, *disturbed, folder=tmp_path) as processes:  # in the middle of an epoch
        at = random.randint(4, 7)
        wait_for(lambda: steps_logged(out) >= at, processes, f"step {at}")
        kill(*processes)
    first = steps_logged(out)  # of whose checkpoint the next one must not be the half

    with start_ranks(ranks, *disturbed, folder=tmp_path) as processes:  # in the middle of writing a checkpoint
        half = lambda: [p for p in out.glob("checkpoint-*") if not (p / "complete").exists()]  # noqa: E731
        wait_for(lambda: steps_logged(out) > first and half(), processes, "it wrote a checkpoint")
        kill(*processes)
    (out / "checkpoint-99").mkdir(exist_ok=True)  # whatever the timing above: newer than any, and unreadable
    (out / "checkpoint-99" / "model.safetensors").write_bytes(b"half")

    assert "resumes at step" in run_ranks(ranks, *disturbed).stdout
    calm, killed = weights(tmp_path / "calm"), weights(out)
    assert calm.keys() == killed.keys() and all(torch.equal(calm[k], killed[k]) for k in calm)
    if not ranks:
        assert "is finished, nothing to do" in run_ranks(0, *disturbed).stdout
        with pytest.raises(InputError, match=r"learning_rate 0\.001 -> 0\.1"):
            pretrain.main([*disturbed[1:], "--learning_rate=0.1"])


@pytest.mark.slow
def test_disk_full_while_saving_leaves_the_last_checkpoint_and_says_so(shards, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = command(shards, out, *RESUME)
    with start_ranks(0, *arguments, folder=tmp_path) as (process,):
        wait_for(lambda: (out / "checkpoint-3" / "complete").exists(), [process], "the first checkpoint")
        # a limit on file size ends a write as a full disk does
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
        process.join(120)
        assert process.exitcode == 2
    message = (tmp_path / "stderr").read_text().strip().splitlines()[-1]
    assert message.startswith("error: ") and "could not be written" in message and "goes on from" in message
    in_process(*arguments)
    assert "resumes at step 3" in capsys.readouterr().out
    assert json.loads((out / "run.json").read_text())["state"] == "finished"


# ---- data


def collect_keys(arguments: list[str]) -> None:
    """Pretrain with ARGUMENTS[1:], and write the keys of the pairs that this rank sees into the folder ARGUMENTS[0]."""
    keys: list[str] = []
    step = pretraining.ContrastiveTrainer.compute_loss

    def watched(self, model, inputs, *rest, **named):
        pairs = self.train_dataset
        keys.extend(pairs.table.key(pairs.row(int(k))) for k in inputs["item"])
        return step(self, model, inputs, *rest, **named)

    pretraining.ContrastiveTrainer.compute_loss = watched
    pretrain.main(arguments[1:])
    Path(arguments[0], "keys" + os.environ["RANK"]).write_text(json.dumps(keys))


@pytest.mark.slow
def test_two_ranks_with_two_workers_see_every_pair_once_an_epoch(shards, tmp_path):
    arguments = command(shards, tmp_path / "run", "--epochs=2", "--num_workers=2")[1:]
    run_ranks(2, collect_keys, str(tmp_path), *arguments)
    shares = [json.loads((tmp_path / f"keys{rank}").read_text()) for rank in (0, 1)]
    assert [len(share) for share in shares] == [64, 64]
    for epoch in range(2):
        seen = [key for share in shares for key in share[epoch * 32 : epoch * 32 + 32]]
        assert len(set(seen)) == 64
    assert shares[0][:32] != shares[0][32:]


def holds_the_others_up(arguments: list[str]) -> None:
    """Pretrain with ARGUMENTS; rank 1 is slow over its data, and at its fifth batch does not come back."""
    batches = pretraining.ContrastiveTrainer.get_batch_samples
    asked = []

    def slow(self, *rest, **named):
        asked.append(1)
        time.sleep(0 if os.environ["RANK"] == "0" else 0.3 if len(asked) < 5 else 100)
        return batches(self, *rest, **named)

    pretraining.ContrastiveTrainer.get_batch_samples = slow
    with exit_on_input_error():
        pretrain.main(arguments)


@pytest.mark.slow
def test_the_slowest_rank_is_named_and_one_that_hangs_ends_the_others_with_a_sentence(shards, tmp_path):
    out = tmp_path / "run"
    options = ["--epochs=2", "--num_workers=0", "--ddp_timeout=3", "--save_steps=500"]
    ended = run_ranks(2, holds_the_others_up, *command(shards, out, *options)[1:], check=False)
    assert ended.returncode == 2 and "did not answer within 3 s" in ended.stderr, ended.stderr[-3000:]
    assert f"error: rank 0 on {socket.gethostname()}: the other ranks" in ended.stderr
    assert "did not answer" in (out / "logs" / "rank-0.txt").read_text()
    curve = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(curve) == 4
    for line in curve[1:]:
        assert line["ranks/slowest_rank"] == 1 and line["ranks/slowest"] > line["ranks/fastest"] + 0.2
    assert [*json.loads((out / "run.json").read_text())["hosts"]] == [socket.gethostname()]


@pytest.mark.slow
def test_bad_images_are_skipped_and_named_until_they_are_too_many(tmp_path, capsys):
    write_shard(tmp_path / "x.tar", 64, replace={5: b"", 9: b"no image"})
    out = tmp_path / "run"
    with pytest.raises(InputError, match=r"could not be read, more than max_bad_share 0\.01") as refused:
        in_process(*command(str(tmp_path / "x.tar"), out))
    assert len(str(refused.value)) < 500
    in_process(*command(str(tmp_path / "x.tar"), tmp_path / "allowed", "--max_bad_share=0.1"))
    assert "2 bad samples skipped" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "allowed" / "bad_samples.jsonl").read_text().splitlines()]
    assert {line["key"].rsplit("/", 1)[1] for line in lines} == {"x_0005", "x_0009"} and all(
        line["reason"] for line in lines
    )


def test_odd_names_and_damaged_lines_of_bad_samples_end_no_training(tmp_path, monkeypatch):
    """In this process; a kill left half a line, another program bytes that are no text."""
    out, folder = tmp_path / "run", tmp_path / "odd \u2028"
    folder.mkdir()
    report = pretraining.report_problems

    def damaged(*arguments):
        report(*arguments)
        with open(out / "bad_samples.jsonl", "ab") as f:
            f.write(b'\xff\xfe\n3\n["key"]\n{"key": "old", "reason": "r"}\n{"key": "ha')

    monkeypatch.setattr(pretraining, "report_problems", damaged)
    write_shard(folder / "x.tar", 32)
    with tarfile.open(folder / "x.tar", "a", format=tarfile.GNU_FORMAT) as tar:
        odd = b"caf\xe9\xe2\x80\xa8"
        for name, content in ((odd + b".jpg", b"no image"), (odd + b".txt", b"red"), (b"l\xff.txt", b"x")):
            info = tarfile.TarInfo(os.fsdecode(name))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    in_process(*command(str(folder / "x.tar"), out, "--max_bad_share=0.5", "--epochs=1", "--global_batch_size=33"))
    record = json.loads((out / "run.json").read_text())
    assert record["state"] == "finished" and record["bad_samples"] == 3  # the old one, and two of this run
    named = [line for line in (out / "bad_samples.jsonl").read_bytes().split(b"\n") if b"caf" in line]
    assert {json.loads(line)["key"].rsplit("/", 1)[1] for line in named} == {"caf\\xe9\u2028"}
    assert weights(out)


def test_an_empty_shard_is_named_and_no_lost_sample(tmp_path):
    write_shard(tmp_path / "0.tar", 8)
    write_shard(tmp_path / "1.tar", 0)
    config = PretrainConfig(output_dir=str(tmp_path / "run"))
    run = Run("pretrain", config, {})
    pretraining.report_problems(PairTable([str(tmp_path / "*.tar")]), config, run)
    pretraining.log_bad_samples(run)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["bad_samples"] == 1
    with tarfile.open(tmp_path / "0.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("lost.txt"))
    with pytest.raises(InputError, match=r"1 of 9 samples lack a part, e\.g\. .*0\.tar/lost \(no image\)"):
        pretraining.report_problems(PairTable([str(tmp_path / "*.tar")]), config, run)


def test_the_model_is_saved_before_what_can_fail(shards, tmp_path, monkeypatch):
    def fails(self):
        raise RuntimeError("validation failed")

    monkeypatch.setattr(pretraining.ContrastiveTrainer, "validate", fails)
    with pytest.raises(RuntimeError, match="validation failed"):
        in_process(*command(shards, tmp_path / "run", "--epochs=1", "--global_batch_size=64"))
    assert weights(tmp_path / "run")
    for file, keys in (("open_clip_config.json", ["diffclip"]), ("preprocessor_config.json", []), ("run.json", [])):
        record = json.loads((tmp_path / "run" / file).read_text())
        assert (record[keys[0]] if keys else record)["decoding"] == DECODING, file  # by which rules images were seen


def test_a_loss_that_is_not_finite_stops_with_step_and_samples(shards, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(InputError, match=r"at step 2 .*non_finite\.jsonl.*checkpoint-1"):
        in_process(*command(shards, out, "--learning_rate=1e30", "--warmup_epochs=0", "--save_steps=1"))
    record = json.loads((out / "non_finite.jsonl").read_text())
    assert record["step"] == 2 and len(record["keys"]) == 16 and all(".tar/" in key for key in record["keys"])


@pytest.mark.slow
def test_log_shows_lambdas_validation_and_data_wait_and_best_is_kept(shards, tmp_path, capsys):
    out = tmp_path / "run"
    in_process(*command(shards, out, "--epochs=3", f"--val_pairs={shards}"))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    records, validations = [r for r in lines if "loss" in r], [r for r in lines if "val/text_to_image/R@1" in r]
    assert [r["step"] for r in records] == list(range(1, 13)) and [r["step"] for r in validations] == [4, 8, 12]
    model = diffclip.load(str(out / "best"))[0]
    layers = len(model.visual.trunk.blocks) + len(model.transformer.resblocks)
    for record in records:
        lambdas = [value for name, value in record.items() if name.startswith("lambda/")]
        assert len(lambdas) == layers and all(0.5 < value < 1.1 for value in lambdas)
        assert record["grad_norm"] > 0 and 0 <= record["data_wait"] <= 1 and record["samples_per_second"] > 0
    assert (
        capsys.readouterr().out.count("val/text_to_image/R@5") == 2
    )  # after the first two epochs; the third is in metrics.json
    final = json.loads((out / "metrics.json").read_text())
    best = json.loads((out / "best" / "metrics.json").read_text())
    assert final["val/text_to_image/R@1"] == validations[-1]["val/text_to_image/R@1"]
    scores = [(v["val/text_to_image/R@1"] + v["val/image_to_text/R@1"]) / 2 for v in validations]
    assert best["score"] == max(scores) and best["step"] == validations[scores.index(max(scores))]["step"]
