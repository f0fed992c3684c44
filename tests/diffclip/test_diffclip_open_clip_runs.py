"""After `import diffclip`, open_clip makes our models from their directories, and its own as before."""

import importlib
import logging
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from diffclip import checkpoints, models, open_clip_runs, variants
from diffclip.base.after_import import after_import
from diffclip.base.backbones import open_clip
from diffclip.base.errors import InputError

NATIVE = {  # a model of open_clip's own, made differential
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 48, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 12, "width": 32, "heads": 2, "layers": 1},
        "custom_text": True,
    },
    "preprocess_cfg": variants.named("CLIP-tiny")["preprocess_cfg"],
    "diffclip": {"variant": "custom", "attention": {"vision": {"kind": "v1", "lambda_init": 0.6, "schedule_base": 0}}},
}


@pytest.fixture(scope="module", params=["DiffCLIP-tiny", "DiffCLIP-V2-tiny", NATIVE], ids=["v1", "v2", "native"])
def run(request, tmp_path_factory):
    torch.manual_seed(0)
    model, folder = models.build(request.param).eval(), tmp_path_factory.mktemp("run")
    checkpoints.save(model, folder)
    return model, folder


@pytest.mark.slow
def test_create_model_gives_the_run(run):
    """The same features, the run's transform, open_clip's dictionary of outputs, in training mode as open_clip does."""
    model, folder = run
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}", output_dict=True)
    assert theirs.training
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8))
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["a red star", "two dogs"])
    _, ours, tokenizer = checkpoints.load(folder)
    torch.testing.assert_close(transform(image), ours(image), atol=1e-6, rtol=0)
    assert torch.equal(tokens, tokenizer(["a red star", "two dogs"]))
    with torch.no_grad():
        out = theirs.eval()(transform(image)[None], tokens)
        assert torch.equal(out["image_features"], model.encode_image(transform(image)[None], normalize=True))
        assert torch.equal(out["text_features"], model.encode_text(tokens, normalize=True))


@pytest.mark.slow
def test_what_open_clip_can_be_asked_for_is_done_or_refused(run):
    _, folder = run
    name = f"local-dir:{folder}"
    half = open_clip.create_model(name, precision="bf16", force_preprocess_cfg={"mean": (0.5, 0.5, 0.5)})
    assert half.encode_image(torch.randn(1, 3, 48, 48, dtype=torch.bfloat16)).dtype == torch.bfloat16
    preprocess = half.visual.preprocess_cfg
    assert preprocess["mean"] == (0.5, 0.5, 0.5) and tuple(preprocess["size"]) == (48, 48)
    torch.manual_seed(1)
    fresh = open_clip.create_model(name, load_weights=False)
    drawn, read = (dict(model.named_parameters()) for model in (fresh, half))
    assert not any(torch.equal(drawn[name].bfloat16(), read[name]) for name in read if "attn.q_proj.weight" in name)
    with pytest.raises(InputError, match="built as it was trained, without force_image_size, init_logit_bias"):
        open_clip.create_model(name, force_image_size=96, init_logit_bias=-10)


def test_other_names_stay_open_clips(tmp_path):
    with pytest.raises(FileNotFoundError, match="not found"):
        open_clip.create_model(f"local-dir:{tmp_path}/absent")
    with pytest.raises(RuntimeError, match="not found in built-ins"):
        open_clip.create_model("DiffCLIP-tiny")


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_whichever_is_imported_first(first, tmp_path, monkeypatch):
    """With a package that is built as open_clip is, since that one is loaded already."""
    (tmp_path / "clip_like").mkdir()
    (tmp_path / "clip_like" / "__init__.py").write_text("from .factory import create_model\n")
    (tmp_path / "clip_like" / "factory.py").write_text("def create_model(name): return 'theirs'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    if first == "theirs":
        importlib.import_module("clip_like")

    def teach(factory):
        open_clip_runs.replace(factory, "clip_like", lambda name: "ours")

    after_import({"clip_like.factory": teach})
    package = importlib.import_module("clip_like")
    assert package.create_model("x") == package.factory.create_model("x") == "ours"
    monkeypatch.delitem(sys.modules, "clip_like")
    monkeypatch.delitem(sys.modules, "clip_like.factory")


@pytest.mark.slow
def test_open_clips_trainer_trains_a_differential_run(tmp_path, monkeypatch):
    from open_clip_train.main import main

    torch.manual_seed(0)
    checkpoints.save(models.build("DiffCLIP-tiny"), tmp_path / "run")
    rows = ["filepath\ttitle"]
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        rows.append(f"{tmp_path}/{i}.png\tpicture {i}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    handlers, level = logging.root.handlers[:], logging.root.level
    words = f"--model local-dir:{tmp_path}/run --dataset-type csv --train-data {tmp_path}/pairs.csv --batch-size 4"
    words += f" --epochs 1 --warmup 0 --lr 1e-3 --precision fp32 --workers 0 --logs {tmp_path} --name made"
    try:
        main(words.split())
    finally:
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
    after = torch.load(tmp_path / "made" / "checkpoints" / "epoch_1.pt", weights_only=True)["state_dict"]
    before = checkpoints.load(tmp_path / "run")[0].state_dict()
    assert after.keys() == before.keys()
    name = "visual.trunk.blocks.0.attn.lambda_q1"
    assert not torch.equal(after[name], before[name])
