"""Training itself, on a model of six numbers: one device, stopping and going on, diverging, and strangers' pickles."""

import json
import os
import pickle
import shutil
import time
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from launch import QUICKSTART, run_ranks
from safetensors.torch import load_file
from shards import write_shard
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState

from diffclip.attention import DifferentialAttention, base
from diffclip.base.errors import InputError
from diffclip.base.files import read_jsonl
from diffclip.base.schema import COMPLETE
from stages import language, pretrain
from stages.callbacks import Watch
from stages.checkpoint_files import check_checkpoint, check_state
from stages.run import NOT_FINISHED, Run
from stages.settings import AlignConfig, InstructConfig, LanguageConfig, PretrainConfig, TrainingConfig, check
from stages.training import (
    KeepWhatFits,
    check_shared_memory,
    on_one_device,
    per_device_batch,
    train,
    training_arguments,
)

STEPS = 12


@dataclass
class Config(TrainingConfig):
    epochs: int = 1


def settings_of(out, **settings):
    small = {"global_batch_size": 8, "learning_rate": 0.1, "num_workers": 0, "logging_steps": 1, "save_steps": 4}
    return Config(output_dir=str(out), **{**small, "report_to": ["none"], "use_cpu": True, **settings})


class Line(nn.Module):
    def __init__(self, dropout=0.3):
        super().__init__()
        self.layer = nn.Linear(5, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, y):
        return {"loss": (self.layer(self.dropout(x)).squeeze(1) - y).square().mean()}


class Tell(TrainerCallback):
    """Tells the training to stop at a step, as transformers' callbacks do."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step + 1 == self.step


class Preempt(TrainerCallback):
    """What the SIGTERM handler of `enable_jit_checkpoint` does, without its three seconds of waiting."""

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.jit.is_checkpoint_requested = state.global_step + 1 == self.step


def start(out, *callbacks, micro=8, dropout=0.3, **settings):
    """(trainer, run) of `out`; train(trainer, run) goes on from its newest checkpoint."""
    config = settings_of(out, **settings)
    run = Run("line", config, {})
    torch.manual_seed(0)
    x = torch.randn(STEPS * 8, 5)
    rows = [{"x": a, "y": a.sum()} for a in x]
    torch.manual_seed(1)
    trainer = Trainer(
        model=Line(dropout),
        args=training_arguments(config, STEPS, (micro, 8 // micro)),
        train_dataset=rows,
        callbacks=[*callbacks, Watch(run, 8)],
    )
    return trainer, run


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """Weights of an undisturbed run."""
    trainer, run = start(tmp_path_factory.mktemp("calm") / "run")
    train(trainer, run)
    return weights(trainer)


# ---- one process, one device


def test_without_a_launcher_a_process_keeps_to_one_device(tmp_path, capsys):
    def prepared(arguments):
        trainer = Trainer(model=Line(), args=arguments)
        return trainer.args.train_batch_size, trainer._wrap_model(trainer.model)

    arguments = training_arguments(settings_of(tmp_path), STEPS, (8, 1))
    assert capsys.readouterr().out == "" and arguments.n_gpu <= 1
    arguments._n_gpu = 2  # as on a machine with two
    size, model = prepared(arguments)
    assert size == 16 and isinstance(model, nn.DataParallel)  # what this is about
    capsys.readouterr()
    arguments = on_one_device(arguments, arguments.n_gpu)
    said = capsys.readouterr().out
    size, model = prepared(arguments)
    assert size == 8 and isinstance(model, Line)
    assert "2 GPUs" in said and "torchrun --nproc_per_node 2" in said and len(said.splitlines()) == 1


def test_a_batch_that_passes_do_not_make_up_says_which_pass_would(tmp_path):
    config = settings_of(tmp_path, global_batch_size=16)
    assert per_device_batch(config, 8) == (8, 2) and per_device_batch(config, 192) == (16, 1)
    with pytest.raises(InputError, match="micro_batch_size 12: set micro_batch_size 8"):
        per_device_batch(config, 12)


@pytest.mark.parametrize("wanted", [False, True])
def test_cudnn_attention_is_off_in_training_unless_asked_for(tmp_path, wanted):
    torch.backends.cuda.enable_cudnn_sdp(not wanted)
    training_arguments(settings_of(tmp_path, cudnn_attention=wanted), STEPS, (8, 1))
    assert torch.backends.cuda.cudnn_sdp_enabled() == wanted
    assert TrainingConfig().cudnn_attention is False


@pytest.mark.parametrize(
    "peak, form, kept",
    [(50, "fused", True), (62, "fused", False), (50, "eager", False)],
    ids=["room", "little room", "maps written out"],
)
def test_attention_is_no_longer_recomputed_where_a_step_has_shown_room(peak, form, kept, tmp_path, monkeypatch):
    """At rest 20 of 100 GB: 20 + 1.5 * 30 = 65, and 20 + 1.5 * 42 = 83 of at most 80."""
    gigabytes = {"memory_allocated": 20, "max_memory_allocated": peak, "mem_get_info": (0, 100 * 10**9)}
    for name, value in gigabytes.items():
        found = value if isinstance(value, tuple) else value * 10**9
        monkeypatch.setattr(torch.cuda, name, lambda device, found=found: found)
    monkeypatch.setattr(KeepWhatFits, "FREE_SHARE", 0.8)
    monkeypatch.setattr(base, "RECOMPUTE", True)
    model = nn.Sequential(DifferentialAttention(8, 2))
    model[0].seen_form = form
    run = SimpleNamespace(stage="pretrain", log=print)
    fits, state = KeepWhatFits(run), TrainerState()
    for state.global_step in (7, 8):  # of a run that was resumed at step 6
        assert base.RECOMPUTE
        fits.on_step_end(SimpleNamespace(device="cuda"), state, None, model=model)
    assert base.RECOMPUTE is not kept


def test_batches_that_do_not_fit_into_shared_memory_are_refused_with_what_fits(tmp_path, monkeypatch):
    trainer, _ = start(tmp_path / "run", num_workers=3)
    check_shared_memory(trainer)
    one = 2 * 8 * 6 * 4  # what a worker holds ready: two batches of eight rows of six floats

    def free(number):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, number))

    for enough, fits in ((3 * one, None), (3 * one - 1, 2), (one, 1), (one - 1, 0)):
        free(enough)
        if fits is None:
            check_shared_memory(trainer)
            continue
        with pytest.raises(InputError, match=f"--shm-size=1g .*lower `num_workers` to {fits}$"):
            check_shared_memory(trainer)
    check_shared_memory(trainer, folder=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "told, ranks, kind, words",
    [
        ("Connection closed by peer", 2, RuntimeError, "closed by peer"),
        ("Connection closed by peer", 1, InputError, "could not be written"),  # one rank has none to lose
        ("PytorchStreamWriter failed", 2, InputError, "could not be written"),
    ],
)
def test_a_lost_rank_is_no_full_disk(told, ranks, kind, words, tmp_path, monkeypatch):
    class Lose(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            (run.path / "checkpoint-1").mkdir()  # half written
            monkeypatch.setenv("WORLD_SIZE", str(ranks))
            raise RuntimeError(f"[/third_party/gloo/gloo/transport/tcp/pair.cc:561] {told}")

    trainer, run = start(tmp_path / "run", Lose(), save_steps=100)
    with pytest.raises(Exception, match=words) as error:
        train(trainer, run)
    assert error.type is kind


@pytest.mark.slow
def test_a_loading_process_that_the_system_ends_is_named(tmp_path):
    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                for child in {*psutil.Process().children()} - others:
                    child.kill()
                time.sleep(0.5)

    others = {*psutil.Process().children()}
    trainer, run = start(tmp_path / "run", Kill(), num_workers=1, save_steps=100)
    with pytest.raises(InputError, match=r"killed by signal.*lower `num_workers`.*goes on from the start") as error:
        train(trainer, run)
    assert "could not be written" not in str(error.value)


# ---- what `trainer` may say


@pytest.mark.parametrize(
    "key, setting",
    [("max_steps", "epochs"), ("learning_rate", "learning_rate"), ("per_device_train_batch_size", "global_batch_size")],
)
def test_trainer_may_not_overrule_a_named_setting(key, setting):
    with pytest.raises(InputError, match=f"{key} is what the setting `{setting}` decides"):
        check(Config(trainer={key: 3}))


@pytest.mark.parametrize("key", ["ignore_data_skip", "save_only_model"])
def test_trainer_may_not_make_a_resumed_run_another_one(key):
    with pytest.raises(InputError, match=f"with {key} a resumed run would not be the undisturbed one"):
        check(Config(trainer={key: True}))
    check(Config(trainer={key: False}))


def test_trainer_takes_what_no_setting_of_the_stage_decides(tmp_path):
    config = settings_of(tmp_path, trainer={"max_grad_norm": 0.5, "adam_beta2": 0.98})
    arguments = training_arguments(config, STEPS, (8, 1), max_grad_norm=1.0)
    assert arguments.max_grad_norm == 0.5 and arguments.adam_beta2 == 0.98
    for wrong in ({"optim": "sgdd"}, {"adam_beta3": 1}):
        with pytest.raises(InputError, match="setting `trainer`"):
            training_arguments(settings_of(tmp_path, trainer=wrong), STEPS, (8, 1))
    with pytest.raises(InputError, match="expected a mapping"):
        check(Config(trainer=["adam_beta2"]))


# ---- stopping and going on


@pytest.mark.parametrize(
    "config, own",
    [
        (LanguageConfig, {"packing", "attn_implementation"}),
        (PretrainConfig, {"micro_batch_size", "max_bad_share", "shard_cache", "shard_cache_gb", "manifest"}),
        (AlignConfig, {"micro_batch_size", "max_bad_share", "tokens", "packing", "attn_implementation"}),
        (InstructConfig, {"micro_batch_size", "max_bad_share", "tokens", "packing", "attn_implementation"}),
    ],
)
def test_settings_that_decide_nothing(config, own):
    common = (
        "output_dir num_workers logging_steps save_steps save_total_limit report_to use_cpu dry_run hardware samples"
        " resume_with data_changed torch_compile recompute ddp_timeout"
    )
    assert {f.name for f in fields(config) if not f.metadata.get("decides", True)} == {*common.split(), *own}


@pytest.mark.slow
@pytest.mark.parametrize("how", [Tell, Preempt])
def test_told_to_stop_it_is_not_finished_and_goes_on_to_the_same_weights(tmp_path, calm, how, capsys):
    out = tmp_path / "run"
    callback, settings = how(6), {"trainer": {"enable_jit_checkpoint": True}} if how is Preempt else {}
    trainer, run = start(out, callback, **settings)
    if how is Preempt:
        trainer.jit = next(c for c in trainer.callback_handler.callbacks if hasattr(c, "jit_manager")).jit_manager
        callback.trainer = trainer
    with pytest.raises(SystemExit) as ended:
        train(trainer, run)
    assert ended.value.code == NOT_FINISHED == 3
    record = json.loads((out / "run.json").read_text())
    assert record["state"] == "stopped" and (out / "checkpoint-6" / COMPLETE).is_file()
    said = capsys.readouterr().out
    assert "stopped at step 6 of 12, not finished" in said and "checkpoint-6" in said
    trainer, run = start(out, **settings)
    assert not run.finished
    train(trainer, run)
    run.finish({})
    assert torch.equal(weights(trainer), calm) and not list(out.glob("checkpoint-*"))
    assert json.loads((out / "run.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_a_paused_run_goes_on_with_other_intervals_workers_and_passes(tmp_path, capsys):
    trainer, run = start(tmp_path / "calm", dropout=0.0)  # every pass draws a mask of its own
    train(trainer, run)
    calm, out = weights(trainer), tmp_path / "run"
    with pytest.raises(SystemExit):
        train(*start(out, Tell(6), dropout=0.0))
    changed = {"save_steps": 5, "logging_steps": 3, "num_workers": 1, "save_total_limit": 3}
    trainer, run = start(out, micro=2, dropout=0.0, **changed)
    said = capsys.readouterr().out
    assert all(words in said for words in ("save_steps 4 -> 5", "logging_steps 1 -> 3", "num_workers 0 -> 1"))
    train(trainer, run)
    torch.testing.assert_close(weights(trainer), calm, rtol=1e-5, atol=1e-6)
    assert {p.name for p in out.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-10", "checkpoint-12"}
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6, 9, 12]


# ---- diverging


@pytest.mark.slow
@pytest.mark.parametrize("bad_step, good", [(6, "checkpoint-4"), (2, "none")])
def test_weights_that_are_not_finite_end_the_run_and_are_not_saved(tmp_path, bad_step, good):
    out = tmp_path / "run"

    class Poison(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step + 1 == bad_step:
                model.layer.bias.data.fill_(float("nan"))

    trainer, run = start(out, Poison(), logging_steps=1000)
    with pytest.raises(InputError, match=f"not finite at step .*the last good checkpoint is .*{good}"):
        train(trainer, run)
    assert json.loads((out / "run.json").read_text())["state"] != "finished"
    for checkpoint in out.glob("checkpoint-*"):
        assert torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"][0]["exp_avg"].isfinite().all()
    again, run = start(out)  # nothing that is taken up again is broken
    train(again, run)
    assert weights(again).isfinite().all()


def test_an_error_while_a_checkpoint_is_sealed_is_no_full_disk(tmp_path, monkeypatch):
    """A CUDA error in the step after a checkpoint, say, whose files are still being hashed."""

    class Breaks(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise RuntimeError("no kernel image")

    seal = Run._seal
    monkeypatch.setattr(Run, "_seal", lambda self, folder: (time.sleep(1), seal(self, folder)))
    trainer, run = start(tmp_path / "run", Breaks(), save_steps=5)
    with pytest.raises(RuntimeError, match="no kernel image"):
        train(trainer, run)
    assert (tmp_path / "run/checkpoint-5" / COMPLETE).is_file()


def text_file(folder):
    """96 short conversations as text."""
    lines = [
        {"text": f"USER: {'Is it red? ' * (1 + n % 7)} ASSISTANT: {'Yes' if n % 2 else 'No'}<|im_end|>"}
        for n in range(96)
    ]
    (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "text.jsonl"


SMALL = ["--use_cpu=true", "--num_workers=0", "--report_to=none", "--global_batch_size=16"]
LANGUAGE = [*SMALL, "--vocabulary=300", "--hidden_size=16", "--layers=1", "--heads=2"]


def test_a_diverged_language_model_is_not_finished(tmp_path):
    out = tmp_path / "run"
    arguments = [*LANGUAGE, f"--text={text_file(tmp_path)}", f"--output_dir={out}", "--epochs=0.5"]
    with pytest.raises(InputError, match="weights are not finite at step 3"):
        language.main([*arguments, "--learning_rate=1e38"])
    assert json.loads((out / "run.json").read_text())["state"] != "finished"
    assert not (out / "model.safetensors").exists()


def test_packed_texts_are_learnt_as_padded_ones(tmp_path):
    """Each text sees itself alone, and logits that carry no loss are missing: the same gradients, to rounding."""
    arguments = [*LANGUAGE, f"--text={text_file(tmp_path)}", "--layers=2", "--logging_steps=1", "--epochs=2"]
    for packing in ("false", "true"):
        language.main([*arguments, f"--packing={packing}", f"--output_dir={tmp_path / packing}"])
    padded, packed = (load_file(tmp_path / name / "model.safetensors") for name in ("false", "true"))
    assert padded.keys() == packed.keys()
    assert all(torch.allclose(padded[name], packed[name], atol=2e-5) for name in padded)
    losses = [
        [row["loss"] for _, row in read_jsonl(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for name in ("false", "true")
    ]
    assert len(losses[0]) > 3 and losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][0] > losses[0][-1]


@pytest.mark.parametrize(
    "reporter, said",
    [
        ("wanbd", "no wanbd: did you mean wandb"),
        ("swanlab", "pip install swanlab"),
    ],
)
def test_a_reporter_that_is_not_there_is_named_before_training(tmp_path, reporter, said):
    with pytest.raises(InputError, match=said):
        training_arguments(settings_of(tmp_path, report_to=[reporter]), STEPS, (8, 1))


@pytest.mark.slow
def test_what_a_reporter_refuses_is_no_traceback_and_its_remedy_works(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))  # no netrc, no settings
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    arguments = [*LANGUAGE, f"--text={text_file(tmp_path)}", f"--output_dir={tmp_path / 'run'}"]
    with pytest.raises(
        InputError, match=r"`report_to`: wandb does not take it \(.*wandb login.* --report_to tensorboard"
    ):
        language.main([*arguments, "--report_to=wandb"])
    language.main([*arguments, "--report_to=tensorboard"])
    assert json.loads((tmp_path / "run/run.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_deepspeed_in_a_process_without_a_launcher_is_a_training_of_one(tmp_path):
    """`diffclip language --deepspeed FILE`, typed as it stands, learns what it learns under the launcher."""
    arguments = [*LANGUAGE, f"--text={text_file(tmp_path)}", "--deepspeed=stages/configs/deepspeed/zero2.json"]
    for ranks in (0, 1):
        run_ranks(ranks, "stages.language", *arguments, f"--output_dir={tmp_path / str(ranks)}")
    alone, launched = (load_file(tmp_path / name / "model.safetensors") for name in "01")
    assert alone.keys() == launched.keys() and all(torch.equal(alone[name], launched[name]) for name in alone)


def test_texts_that_hold_nothing_to_learn_are_left_out_or_refused(tmp_path):
    """A batch of them would have no loss, which reads as a diverged training."""
    lines = text_file(tmp_path).read_text().splitlines()[:32]
    lines[5:5] = [json.dumps({"text": "USER: " + "Is it red? " * 30 + "ASSISTANT: No<|im_end|>"})] * 16
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    arguments = [*LANGUAGE, f"--text={tmp_path / 'text.jsonl'}", "--max_tokens=70"]
    language.main([*arguments, f"--output_dir={tmp_path / 'run'}"])
    log = (tmp_path / "run/log.txt").read_text()
    assert "leaves 16 of 48 texts out, since no answer begins in their first 70 tokens, text 5 the first" in log
    with pytest.raises(InputError, match=r"nothing to learn from 48 texts, .* first 3 tokens, .*raise max_tokens"):
        language.main([*arguments, "--max_tokens=3", f"--output_dir={tmp_path / 'none'}"])


def test_a_diverged_tower_is_neither_finished_nor_the_best(tmp_path):
    out = tmp_path / "run"
    write_shard(tmp_path / "x.tar", 32)
    arguments = [f"--config={QUICKSTART / 'pretrain.yaml'}", "--model=CLIP-tiny", f"--train_data={tmp_path / 'x.tar'}"]
    arguments += [*SMALL, f"--val_pairs={tmp_path / 'x.tar'}", "--epochs=2", "--warmup_epochs=0", "--weight_decay=0"]
    with pytest.raises(InputError, match=r"not finite|loss is nan"):
        pretrain.main([*arguments, f"--output_dir={out}", "--caption_member=txt", "--learning_rate=1e38"])
    assert json.loads((out / "run.json").read_text())["state"] != "finished"
    assert not (out / "open_clip_model.safetensors").exists()
    for best in out.glob("best/*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(best).values())


# ---- a stranger's checkpoint


class Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was told to stop at step 6."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(SystemExit):
        train(*start(out, Tell(6)))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "pytorch_model.bin"])
def test_a_planted_object_in_a_checkpoint_does_not_run(stopped, tmp_path, name):
    out, marker = tmp_path / "run", tmp_path / "marker"
    shutil.copytree(stopped, out)
    trainer, run = start(out)
    torch.save({"state": Planted(marker)}, out / "checkpoint-6" / name)
    run.seal_checkpoint(6)  # as a stranger would
    run.sealed()
    with pytest.raises(InputError, match=rf"checkpoint-6/{name}: is not safe to read \(it would call posix.mkdir\)"):
        train(trainer, run)
    assert not marker.exists()
    shutil.rmtree(out / "checkpoint-6")  # as the message says
    trainer, run = start(out)
    train(trainer, run)
    run.finish({})


def test_arguments_of_a_stranger_are_not_read(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    trainer, run = start(tmp_path / "run")
    torch.save(Planted(tmp_path / "marker"), tmp_path / "run" / "checkpoint-6" / "training_args.bin")
    run.seal_checkpoint(6)
    run.sealed()
    train(trainer, run)
    assert not (tmp_path / "marker").exists()


def deepspeed_checkpoint(folder: Path, extra: object = None) -> Path:
    """The files of one in small, with the types that DeepSpeed's ZeRO stages put into them."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    (folder / "global_step6").mkdir(parents=True)
    (folder / "latest").write_text("global_step6")
    state = {
        "zero_stage": ZeroStageEnum.gradients,
        "loss_scaler": LossScaler(1.0),
        "param_slice_mappings": [{"bias": fragment_address(numel=3, start=0)}],
        "fp32": torch.zeros(3),
        "extra": extra,
    }
    torch.save({"optimizer_state_dict": state}, folder / "global_step6/zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return folder


def test_a_deepspeed_checkpoint_is_read_before_deepspeed_unpickles_it(tmp_path):
    check_checkpoint(deepspeed_checkpoint(tmp_path / "honest"))
    marker = tmp_path / "marker"
    with pytest.raises(InputError, match=r"optim_states\.pt: is not safe to read \(it would call posix.mkdir\)"):
        check_checkpoint(deepspeed_checkpoint(tmp_path / "planted", Planted(marker)))
    bare = deepspeed_checkpoint(tmp_path / "bare")
    (bare / "global_step6/mp_rank_00_model_states.pt").write_bytes(pickle.dumps(Planted(marker)))
    with pytest.raises(InputError, match=r"model_states\.pt: is not safe to read"):
        check_checkpoint(bare)
    away = deepspeed_checkpoint(tmp_path / "away")
    (away / "latest").write_text("../planted/global_step6")
    with pytest.raises(InputError, match="latest: names no folder of its checkpoint"):
        check_checkpoint(away)
    assert not marker.exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"global_step": "x"}', '{"epoch": NaN}', '{"log_history": 3}', '{"x": 1}']
)
def test_a_state_that_trainer_would_not_have_written_is_named(tmp_path, text):
    state = tmp_path / "trainer_state.json"
    with pytest.raises(InputError, match=rf"{state}: is missing; delete {tmp_path} to go on from"):
        check_state(tmp_path)
    TrainerState(log_history=[{"loss": 1.0}]).save_to_json(str(state))
    check_state(tmp_path)
    state.write_text(text)
    with pytest.raises(InputError, match=f"{state}: "):
        check_state(tmp_path)
