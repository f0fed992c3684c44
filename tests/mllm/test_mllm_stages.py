"""The two multimodal stages under DeepSpeed: LoRA, ZeRO-2 and 3, a rank killed under its launcher, exact resume."""

import json
import os
import runpy
import shutil
import sys
import time
from unittest import mock

import psutil
import pytest
import torch
from launch import ROOT, call, kill, run_ranks, start, start_ranks
from peft import PeftModel
from safetensors.torch import load_file

from diffclip.base.errors import InputError
from diffclip.base.ranks import free_port
from diffclip.base.schema import COMPLETE
from diffclip.base.sealed import seal
from mllm.assemble import assemble
from mllm.model import load
from stages import align, background, instruct
from stages.callbacks import Watch
from stages.run import NOT_FINISHED

STEPS = 6
SETTINGS = [
    f"--config={ROOT / 'stages/configs/paper/instruct.yaml'}",
    "--image_prefix=",
    "--use_cpu=true",
    "--precision=fp32",
    "--global_batch_size=8",
    "--micro_batch_size=2",
    "--learning_rate=1e-3",
    "--num_workers=0",
    "--logging_steps=1",
    "--save_steps=2",
    "--report_to=none",
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tower_dir, language_dir, picture):
    """An assembled model and 48 conversations of unlike length, every third of them text alone."""
    folder = tmp_path_factory.mktemp("inputs")
    assemble(tower_dir, language_dir, seed=3).save(folder / "model")
    (folder / "images").mkdir()
    rows = []
    for n in range(8 * STEPS):
        words = " ".join(["small blue circle"] * (1 + n % 7))
        row = {"id": str(n), "conversations": [{"from": "human", "value": f"Is there a {words}?"}]}
        if n % 3:
            picture(n).save(folder / "images" / f"{n}.png")
            row |= {"image": f"{n}.png"}
            row["conversations"][0]["value"] = "<image>\n" + row["conversations"][0]["value"]
        row["conversations"].append({"from": "gpt", "value": "Yes" if n % 2 else "No"})
        rows.append(row)
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def command(inputs, out, zero, *more):
    places = [f"--model={inputs / 'model'}", f"--data={inputs / 'rows.json'}", f"--image_root={inputs / 'images'}"]
    zero_file = ROOT / f"stages/configs/deepspeed/zero{zero}.json"
    return ["stages.instruct", *SETTINGS, *places, f"--deepspeed={zero_file}", f"--output_dir={out}", *more]


def weights(out):
    return load_file(out / "model.safetensors")


def losses(out):
    """By step; a step that a killed run had begun, and that was done again, counts once."""
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [*{row["step"]: row["loss"] for row in rows}.values()]


@pytest.fixture(scope="module")
def calm(inputs, tmp_path_factory):
    """Undisturbed runs: LoRA with ZeRO-2 on one rank, and with ZeRO-3 on two."""
    out = tmp_path_factory.mktemp("calm")
    run_ranks(1, *command(inputs, out / "one", 2, "--lora_rank=4"))
    run_ranks(2, *command(inputs, out / "two", 3, "--lora_rank=4"))
    return out


@pytest.mark.slow
def test_two_ranks_with_zero_3_learn_what_one_with_zero_2_learns(calm, inputs):
    one, two, before = weights(calm / "one"), weights(calm / "two"), weights(inputs / "model")
    assert losses(calm / "two") == pytest.approx(
        losses(calm / "one"), rel=1e-4
    )  # tokens weigh alike, wherever they lie
    assert one.keys() == two.keys() == before.keys()
    changed = {key for key in one if not torch.equal(one[key], before[key])}
    assert all("proj" in key for key in changed) and any("multi_modal_projector" in key for key in changed)
    for key in changed:
        assert (one[key] - two[key]).norm() <= 0.02 * (one[key] - before[key]).norm() + 1e-6, key
    record = json.loads((calm / "two/run.json").read_text())
    assert record["before"]["vision_tower"] == record["after"]["vision_tower"]
    assert record["before"]["language_model"] != record["after"]["language_model"]
    trained, ids = load(calm / "two").model, torch.arange(5, 25)[None]  # checks the fingerprints
    adapted = PeftModel.from_pretrained(load(inputs / "model").model, calm / "two/adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, trained(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    projector = adapted.get_base_model().model.multi_modal_projector.state_dict()
    saved = {name.split("modules_to_save.default.")[-1]: weight for name, weight in projector.items()}
    assert torch.equal(saved["weight"], trained.model.multi_modal_projector.weight)


@pytest.mark.slow
def test_offloading_to_the_host_learns_the_same(calm, inputs, tmp_path):
    out = tmp_path / "offload"
    run_ranks(1, *command(inputs, out, "3_offload", "--lora_rank=4"))
    assert losses(out) == pytest.approx(losses(calm / "one"), rel=1e-4)


@pytest.mark.slow
def test_bfloat16_under_deepspeed_keeps_what_is_frozen_and_learns_alike(inputs, tmp_path):
    """The paper's precision: DeepSpeed rounds the weights, and what stays frozen is proven to be just that."""
    options = ["--learns=projector", "--template=chatml"]
    call(*command(inputs, tmp_path / "exact", 2, *options, "--deepspeed="))
    run_ranks(2, *command(inputs, tmp_path / "half", 3, *options, "--precision=bf16"))
    record = json.loads((tmp_path / "half" / "run.json").read_text())
    same = {part: record["after"][part] == value for part, value in record["before"].items()}
    assert same == {"vision_tower": True, "projector": False, "language_model": True}
    before, after = weights(inputs / "model"), weights(tmp_path / "half")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    for name, tensor in before.items():
        if "projector" not in name:
            assert torch.equal(tensor.bfloat16(), after[name]), name
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "exact"), rel=0.03)
    model, processor = load(tmp_path / "half")  # is asked in the template of its training, not the one of its model
    assert model.config.conversation_template == "chatml" != load(inputs / "model")[0].config.conversation_template
    asked = processor.apply_chat_template([{"role": "user", "content": "Hm?"}], add_generation_prompt=True)
    assert asked.endswith("<|im_end|>\n<|im_start|>assistant\n")


class Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.slow
def test_a_killed_rank_ends_the_launcher_and_the_command_goes_on_to_the_same_weights(calm, inputs, tmp_path):
    out = tmp_path / "killed"
    arguments = command(inputs, out, 3, "--lora_rank=4")
    launcher = ["deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port()), "--module"]
    process = start(*launcher, *arguments)
    deadline = time.time() + 300
    while not (out / "checkpoint-2/complete").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "--local_rank=1" in p.cmdline()]
    ranks[0].kill()
    process.communicate(timeout=120)  # the launcher ends by itself, and the other rank with it
    assert json.loads((out / "run.json").read_text())["state"] != "finished"
    newest = max(path.parent for path in out.glob("checkpoint-*/complete"))
    share = next(newest.glob("global_step*/*optim_states.pt"))
    honest = {file: file.read_bytes() for file in (share, newest / COMPLETE)}
    torch.save({"optimizer_state_dict": Planted(tmp_path / "marker")}, share)
    sealed = json.loads(honest[newest / COMPLETE])
    (newest / COMPLETE).write_text(json.dumps(sealed | {"files": seal(newest, sealed["files"])}))  # as a stranger would
    refused = run_ranks(2, *arguments, check=False)
    assert refused.returncode == 2 and f"{share}: is not safe to read" in refused.stderr
    assert not (tmp_path / "marker").exists()
    for file, content in honest.items():
        file.write_bytes(content)
    assert "resumes at step" in run_ranks(2, *arguments).stdout
    found, wanted = weights(out), weights(calm / "two")
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_training_of_warm_up_alone_is_refused(inputs, tmp_path):
    arguments = command(inputs, tmp_path / "run", 2, "--deepspeed=", "--global_batch_size=48", "--micro_batch_size=48")
    with pytest.raises(InputError, match=r"48 conversations .* make 1 steps, all of them warm-up: set warmup_ratio 0"):
        call(*arguments)


def with_slow_disk(arguments):
    """A stage whose checkpoints are written in the background, as a large model's are, and slowly."""
    background.FROM, save, sys.argv = 0, torch.save, arguments
    with mock.patch("torch.save", lambda *content: (time.sleep(0.3), save(*content))):
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "before", "after"), [(2, 2, 1), (3, 1, 2)])
def test_another_number_of_ranks_goes_on_with_the_same_losses(zero, before, after, calm, inputs, tmp_path):
    """The first checkpoint is written in the background, and counts once all of it is there."""
    out = tmp_path / "run"
    arguments = command(inputs, out, zero, "--lora_rank=4")
    with start_ranks(before, with_slow_disk, *arguments, folder=tmp_path) as processes:
        deadline, marks = time.time() + 120, set()
        while not (out / "checkpoint-2" / COMPLETE).exists():
            assert time.time() < deadline and all(process.is_alive() for process in processes)
            marks |= {mark.name for mark in out.glob("checkpoint-2/.writing-*")}
            time.sleep(0.01)
        assert marks == {f".writing-{rank}" for rank in range(before)}
        kill(*processes)
    told = run_ranks(after, *arguments).stdout
    assert f"is of {before} ranks, and now there are {after}: it is put together" in told and "resumes at" in told
    assert losses(out) == pytest.approx(losses(calm / "one"), rel=1e-5)


@pytest.mark.slow
def test_align_with_two_layers_and_a_rate_of_its_own_for_each_part(inputs, tower_dir, language_dir, tmp_path):
    out = tmp_path / "align"
    places = [f"--vision_tower={tower_dir}", f"--language_model={language_dir}", f"--data={inputs / 'rows.json'}"]
    parts = ["--learns", "vision_tower", "projector", "--vision_tower_learning_rate=1e-5", "--projector=mlp"]
    options = [*SETTINGS[1:], "--template=vicuna", f"--image_root={inputs / 'images'}", f"--output_dir={out}"]
    call("stages.align", *places, *parts, *options)
    record = json.loads((out / "run.json").read_text())
    changed = {name for name in record["before"] if record["before"][name] != record["after"][name]}
    assert changed == {"vision_tower", "projector"} == set(record["learns"])
    model, _ = load(out)
    assert type(model.model.multi_modal_projector).__name__ == "LlavaMultiModalProjector"
    tower, before = model.model.vision_tower.state_dict(), load_file(tower_dir / "model.safetensors")
    steps = max(float((tower[k] - before[k]).abs().max()) for k in before if k in tower)
    assert 0 < steps < 1.1e-5 * STEPS  # Adam moves by at most its rate


def test_lora_without_a_learning_language_model_is_refused(inputs, tmp_path):
    with pytest.raises(InputError, match="add language_model to `learns`"):
        call(*command(inputs, tmp_path / "x", 2, "--lora_rank=4", "--learns", "projector", "--deepspeed="))


def in_this_process(inputs, out, *more):
    """Arguments of instruct without DeepSpeed."""
    return [*command(inputs, out, 2, "--learns", "projector", "language_model")[1:], "--deepspeed=", *more]


@pytest.mark.slow
@pytest.mark.parametrize("further", [[], ["--lora_rank=4"]])
def test_a_run_told_to_stop_goes_on_in_other_passes_with_data_elsewhere(inputs, tmp_path, monkeypatch, capsys, further):
    further = ["--order=random", *further]
    instruct.main(in_this_process(inputs, tmp_path / "calm", *further))
    out = tmp_path / "run"

    def tell(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "on_step_begin", tell)
        with pytest.raises(SystemExit) as ended:
            instruct.main(in_this_process(inputs, out, *further))
    assert ended.value.code == NOT_FINISHED and "stopped at step 2 of 6" in capsys.readouterr().out
    shutil.copytree(inputs, tmp_path / "scratch")
    instruct.main(in_this_process(tmp_path / "scratch", out, *further, "--micro_batch_size=4", "--save_steps=5"))
    said = capsys.readouterr().out
    assert "micro_batch_size 2 -> 4" in said and str(tmp_path / "scratch" / "rows.json") in said
    assert "resumes at step 2 of 6" in said
    found, wanted, before = weights(out), weights(tmp_path / "calm"), weights(inputs / "model")
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-5, atol=1e-5)
    assert any((wanted[key] - before[key]).abs().max() > 1e-3 for key in wanted)  # a step moves by as much


@pytest.mark.slow
def test_a_start_that_fails_leaves_its_directory_to_the_mended_command(inputs, tmp_path):
    rows = json.loads((inputs / "rows.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps([{**rows[0], "conversations": []}, *rows[1:]]))
    out = tmp_path / "run"
    with pytest.raises(InputError, match="row 0"):
        instruct.main(in_this_process(inputs, out, f"--data={tmp_path / 'rows.json'}"))
    instruct.main(in_this_process(inputs, out, "--learning_rate=1e-4"))
    assert json.loads((out / "run.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_rows_that_cannot_be_learnt_from_are_named_and_change_nothing_else(inputs, tmp_path, monkeypatch, capsys):
    """The weights are those of the good rows alone; a paused run goes on with the same rows, or not at all."""
    images = tmp_path / "images"
    shutil.copytree(inputs / "images", images)
    whole = (images / "1.png").read_bytes()
    (images / "broken.png").write_bytes(bytes(20) + whole[20:])
    good = json.loads((inputs / "rows.json").read_text())
    late, broken = ({**good[1], "id": name, "image": f"{name}.png"} for name in ("late", "broken"))
    long = {
        "id": "long",
        "conversations": [{"from": "human", "value": "Is there a red square? " * 200}, good[0]["conversations"][1]],
    }
    rows = [{"id": "tool", "conversations": [{"from": "tool", "value": "x"}]}, *good[:9], late, *good[9:], broken, long]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    mixed = [f"--data={tmp_path / 'rows.json'}", f"--image_root={images}"]
    instruct.main(in_this_process(inputs, tmp_path / "calm"))
    out = tmp_path / "run"
    with pytest.raises(
        InputError, match=r"row 0 \(id tool\).*4 of 52 rows have problems, more than max_bad_share 0.01"
    ):
        instruct.main(in_this_process(inputs, out, *mixed))
    named = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    found = {line["key"].rpartition("id ")[2]: line["reason"] for line in named}
    assert found.keys() == {"tool)", "late)", "broken)", "long)"} and len(named) == 4
    assert "by `tool`" in found["tool)"] and "late.png is not under" in found["late)"]
    assert "broken.png cannot be read as an image" in found["broken)"]
    assert "more than the 512 positions of the language model; set max_length 512" in found["long)"]

    def tell(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2

    options = in_this_process(inputs, out, *mixed, "--max_bad_share=0.1")
    with monkeypatch.context() as patch:
        patch.setattr(Watch, "on_step_begin", tell)
        with pytest.raises(SystemExit):
            instruct.main(options)
    (images / "broken.png").write_bytes(whole)
    for _ in range(2):  # being refused once changes nothing
        with pytest.raises(InputError, match=r"image_root \(broken\.png changed\).*--data_changed accept"):
            instruct.main(options)
    (out / "inputs.json.gz").unlink()  # as of an older version, which did not look at each file
    with pytest.raises(InputError, match="began with 48 rows that can be learnt from, and now there are 49"):
        instruct.main(options)
    (out / "inputs.json.gz").unlink()
    (images / "broken.png").write_bytes(bytes(20) + whole[20:])
    instruct.main(options)
    assert "resumes at step 2 of 6" in (said := capsys.readouterr().out) and "4 bad samples skipped" in said
    record = json.loads((out / "run.json").read_text())
    assert (record["conversations"], record["bad_samples"]) == (48, 4)
    assert len((out / "bad_samples.jsonl").read_text().splitlines()) == 4
    got, wanted = weights(out), weights(tmp_path / "calm")
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [align, instruct])
def test_a_diverged_model_is_not_finished(inputs, tower_dir, language_dir, tmp_path, stage):
    arguments = in_this_process(inputs, tmp_path / "run", "--learning_rate=1e38", "--logging_steps=1000")
    if stage is align:
        parts = [f"--vision_tower={tower_dir}", f"--language_model={language_dir}", "--template=vicuna"]
        arguments = [*(a for a in arguments if not a.startswith(("--config", "--model"))), *parts]
    with pytest.raises(InputError, match="weights are not finite at step"):
        stage.main(arguments)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] != "finished"
    assert not (tmp_path / "run" / "model.safetensors").exists()
