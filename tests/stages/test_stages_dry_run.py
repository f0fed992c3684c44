"""What a run would take: arithmetic against a closed form, memory against a real step, the paper's figure."""

import pytest
import torch
from launch import ROOT
from open_clip import ClipLoss

import diffclip
from benchmarks.attention import peak_megabytes
from diffclip.base.errors import InputError
from stages import align, instruct, pretrain
from stages.costs import HARDWARE, UTILISATION, Counted, count_pair, estimate, parse_hardware

PAPER = ROOT / "stages" / "configs" / "paper"


def forward_flops(name: str) -> float:
    """Multiplications and additions of a pair's forward pass: projections, MLP, attention, patches, heads."""
    config = diffclip.MODELS[name]["model_cfg"]
    vision, text, out = config["vision_cfg"], config["text_cfg"], config["embed_dim"]

    def blocks(layers: int, tokens: int, width: int) -> float:
        return layers * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)

    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    image = blocks(vision["layers"], patches + 1, vision["width"])
    image += 2 * patches * 3 * vision["patch_size"] ** 2 * vision["width"] + 2 * vision["width"] * out
    words = blocks(text["layers"], text["context_length"], text["width"]) + 2 * text["width"] * out
    return image + words


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CLIP-tiny", "DiffCLIP-tiny", "CLIP-S-16"])
def test_arithmetic_is_the_closed_form(name):
    model = diffclip.build(name)
    parts, counted = count_pair(model, bf16=False)
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters())
    expected = forward_flops(name)
    if name.startswith("Diff"):  # the fused form multiplies each map with values twice as wide, and twice
        assert 1.0 <= counted.forward_flops / expected < 1.1
    else:
        assert counted.forward_flops == pytest.approx(expected, rel=1e-3)
    assert 2.9 < counted.flops / counted.forward_flops < 3.1  # backward is twice forward


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CLIP-tiny", "DiffCLIP-tiny"])
def test_activations_are_what_a_real_step_keeps(name):
    model = diffclip.build(name)
    for module in model.modules():
        if hasattr(module, "attn_implementation"):
            module.attn_implementation = "fused"
    text = torch.ones(64, model.context_length, dtype=torch.long)
    text[:, -1] = model.vocab_size - 1

    def step(samples: int) -> None:
        image, words, scale = model(torch.randn(samples, 3, 48, 48), text[:samples])
        ClipLoss()(image, words, scale).backward()
        model.zero_grad(set_to_none=True)

    measured = (peak_megabytes(lambda: step(64), "cpu") - peak_megabytes(lambda: step(32), "cpu")) * 1e6 / 32
    assert count_pair(diffclip.build(name), bf16=False)[1].activation_bytes == pytest.approx(measured, rel=0.25)


def test_zero_and_chunks_share_and_repeat():
    hardware = HARDWARE["a100-80gb"]
    common = {"samples": 1000, "batch": 16, "bf16": True, "hardware": hardware, "devices": 4}
    plain, chunked = (estimate(Counted(3e9, 1e9, 1e6), 100, chunked=c, zero_stage=0, **common) for c in (False, True))
    assert plain.flops == 3e12 and chunked.flops == 4e12 and plain.activations == 16e6
    shared = [estimate(Counted(3e9, 1e9, 1e6), 100, chunked=False, zero_stage=z, **common) for z in range(4)]
    assert [e.optimizer for e in shared] == [800, 300, 300, 300]  # with DeepSpeed a float32 copy is the optimiser's
    assert [e.gradients for e in shared] == [400, 300, 150, 150]
    assert [e.weights for e in shared] == [600, 200, 200, 50]
    assert [e.buckets for e in shared] == [0, 2e9, 2e9, 1e9]  # of 500 million numbers, two where they overlap
    beside = estimate(Counted(3e9, 1e9, 1e6), 100, frozen=1000, chunked=False, zero_stage=2, **common)
    assert (beside.weights, beside.gradients, beside.optimizer) == (2200, 150, 300)
    assert shared[0].device_days == pytest.approx(3e12 / (0.16 * 312e12) / 86400)


@pytest.mark.parametrize("name, hours", [("CLIP-B-32", 4600), ("CLIP-B-16", 10700), ("CLIP-L-14", 50800)])
def test_open_clips_published_hours_are_met_within_a_factor(name, hours):
    """32 epochs of LAION-400M on A100s (docs/PRETRAINED.md of open_clip), by the closed form."""
    forward = forward_flops(name)
    found = estimate(
        Counted(3 * forward, forward, 0),
        0,
        samples=12_800_000_000,
        batch=1,
        chunked=False,
        bf16=True,
        zero_stage=0,
        hardware=HARDWARE["a100-40gb"],
        devices=1,
        utilisation=UTILISATION[name.split("-", 1)[1]][0],
    )
    assert hours / 1.5 < found.hours < hours * 1.5


def test_hardware_is_checked():
    assert parse_hardware("h100-80gb:16")[1:] == (HARDWARE["h100-80gb"], 16)
    for text in ("a100", "a100-80gb:x", "a100-80gb:0"):
        with pytest.raises(InputError, match="is unknown: use NAME or NAME:DEVICES"):
            parse_hardware(text)


@pytest.mark.slow
def test_the_papers_run_is_within_a_factor_and_nothing_is_written(tmp_path, capsys):
    arguments = [f"--config={PAPER / 'pretrain_cc12m.yaml'}", "--model=DiffCLIP-B-16", "--dry-run"]
    pretrain.main([*arguments, "--samples=10900000", "--hardware=a100-80gb:8", f"--output_dir={tmp_path / 'run'}"])
    table = capsys.readouterr().out
    days = float(table.split(" device-days")[0].split()[-1])
    assert 10 / 1.5 < days < 10 * 1.5  # the paper: 10 A100-days
    assert (
        "16% of the device's peak" in table
        and "cores for it" in table
        and "memory per device" in table
        and not (tmp_path / "run").exists()
    )
    with pytest.raises(InputError, match="hardware 'abacus:2' is unknown"):
        pretrain.main(["--dry-run", "--samples=1000000", "--hardware=abacus:2"])


@pytest.mark.parametrize("stage", [align, instruct])
def test_multimodal_dry_run_counts_what_learns(stage, tmp_path, capsys):
    """A model small enough to count by hand: the projector's and the language model's parameters, AdamW's two each."""
    from transformers import CLIPVisionConfig, Qwen2Config, Qwen2ForCausalLM

    from mllm.assemble import assembled_config

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = Qwen2Config(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    vision.save_pretrained(tmp_path / "tower")
    text.save_pretrained(tmp_path / "language")
    with torch.device("meta"):
        language = sum(p.numel() for p in Qwen2ForCausalLM(text).parameters())
    projector = 32 * 16 + 16
    places = [f"--vision_tower={tmp_path / 'tower'}", f"--language_model={tmp_path / 'language'}"]
    if stage is instruct:
        assembled_config(tmp_path / "tower", tmp_path / "language").save_pretrained(tmp_path / "aligned")
        places = [f"--model={tmp_path / 'aligned'}"]
    config = PAPER / f"{'instruct' if stage is instruct else 'align'}.yaml"
    options = ["--dry_run=true", "--samples=558128", "--tokens=25", "--hardware=a100-80gb:8"]
    stage.main([f"--config={config}", *places, *options])
    table = capsys.readouterr().out
    learning = projector + (language if stage is instruct else 0)
    assert f"{learning:,} parameters learn" in table and f"{language:,} parameters" in table
    assert "2,906" in table  # 558,128 // 192
    with pytest.raises(InputError, match="--samples and --tokens"):
        stage.main([f"--config={config}", *places, "--dry_run=true"])
