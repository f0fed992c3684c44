"""`torch_compile` as a setting: one graph and few of them, the weights of an eager run, clean names, exact resuming."""

import pytest
import torch
from clips import shallow
from launch import QUICKSTART
from safetensors.torch import load_file
from shards import write_shard
from torch._dynamo.utils import counters
from transformers import set_seed

import diffclip
from diffclip import variants
from diffclip.base.errors import InputError
from diffclip.data.training_pairs import cut_texts
from stages import pretrain
from stages.settings import TrainingConfig, check

# aot_eager records both passes as inductor does, and compiles nothing
COMPILED = ["--torch_compile=true", '--trainer={"torch_compile_backend": "aot_eager"}']


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Start a run of three layers on 24 pairs in a folder, six steps; returns the folder."""
    root = tmp_path_factory.mktemp("compile")
    write_shard(root / "0.tar", 24, 1)

    def start(name, *further):
        out = root / name
        options = [f"--train_data={root / '0.tar'}", f"--output_dir={out}", "--caption_member=txt", "--use_cpu=true"]
        options += ["--global_batch_size=8", "--epochs=2", "--logging_steps=1", "--save_steps=3", "--num_workers=0"]
        pretrain.main([f"--config={QUICKSTART / 'pretrain.yaml'}", "--model=DiffCLIP-tiny", *options, *further])
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(variants.MODELS, "DiffCLIP-tiny", shallow("DiffCLIP-tiny"))
        yield start


def weights(folder):
    return load_file(folder / "open_clip_model.safetensors")


@pytest.fixture(scope="module")
def compiled(trained):
    """An undisturbed compiled run, and how often its graph broke or was recorded anew."""
    torch._dynamo.reset()
    counters.clear()
    folder = trained("compiled", *COMPILED)
    return folder, dict(counters["graph_break"]), counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_a_compiled_run_is_one_unbroken_graph_with_the_weights_of_an_eager_one(trained, compiled):
    folder, breaks, graphs = compiled
    assert not breaks and graphs <= 2  # the second is for texts of any length
    found, eager = weights(folder), weights(trained("eager"))
    assert found.keys() == eager.keys() and not any("_orig_mod" in name for name in found)
    for name, value in eager.items():
        if not name.endswith("k_proj.bias"):  # has no gradient but rounding, which AdamW makes steps of
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.slow
def test_a_compiled_run_resumes_exactly_and_its_checkpoints_have_clean_names(trained, compiled, monkeypatch):
    from stages import contrastive  # not at the top: they take seconds, and most tests here need none

    def lost(self, args, state, *rest, **kwargs):
        if state.global_step == 4:
            raise RuntimeError("the power is gone")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power"):
        patch.setattr(contrastive.AfterStep, "on_step_begin", lost)
        trained("cut", *COMPILED)
    cut = compiled[0].parent / "cut"
    names = {name for file in cut.glob("checkpoint-3/*.safetensors") for name in load_file(file)}
    assert names and not any("_orig_mod" in name for name in names)
    torch._dynamo.reset()
    resumed = weights(trained("cut", *COMPILED))
    assert "resumes at step 3" in (cut / "log.txt").read_text()
    for name, value in weights(compiled[0]).items():
        assert torch.equal(resumed[name], value), name


@pytest.mark.parametrize("longest", [1, 7, 8, 9, 32])
def test_texts_are_cut_to_a_multiple_of_eight_and_mean_the_same(longest):
    set_seed(0)
    model = diffclip.build("DiffCLIP-tiny").eval()
    context = variants.MODELS["DiffCLIP-tiny"]["model_cfg"]["text_cfg"]["context_length"]
    longest = min(longest, context)
    text = torch.zeros(3, context, dtype=torch.long)
    for row, end in enumerate((longest, max(1, longest - 3), 1)):
        text[row, : end - 1], text[row, end - 1] = 5, model.vocab_size - 1
    cut = cut_texts(text)
    assert cut.shape[1] == min(context, -(-longest // 8) * 8)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(cut), model.encode_text(text), rtol=1e-5, atol=1e-6)


def test_how_to_compile_without_compiling_is_refused_by_name():
    with pytest.raises(InputError, match="torch_compile_backend says how to compile; set `torch_compile`"):
        check(TrainingConfig(trainer={"torch_compile_backend": "eager"}))
    with pytest.raises(InputError, match="torch_compile is what the setting `torch_compile` decides"):
        check(TrainingConfig(trainer={"torch_compile": True}))
