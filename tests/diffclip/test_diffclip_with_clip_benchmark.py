"""The installed clip-benchmark evaluates our models, and agrees with our own scores on the same shards."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import run_ranks
from PIL import Image

import diffclip
from diffclip.benchmarks.evaluate import evaluate_clip
from diffclip.benchmarks.protocol import Settings
from diffclip.benchmarks.with_clip_benchmark import defaults, main

NAMES = ["noise", "sky", "grass", "stone", "sand", "water"]


@pytest.fixture
def shards(tmp_path):
    """Sixty random images in clip-benchmark's layout."""
    folder, rng = tmp_path / "data" / "classification" / "mine", np.random.default_rng(0)
    (folder / "test").mkdir(parents=True)
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for number in range(60):
            buffer = io.BytesIO()
            coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            coarse.resize((48, 48)).save(buffer, "PNG")
            for suffix, content in (("png", buffer.getvalue()), ("cls", str(number % len(NAMES)).encode())):
                info = tarfile.TarInfo(f"s{number:07d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    (folder / "test" / "nshards.txt").write_text("1")
    (folder / "classnames.txt").write_text("\n".join(NAMES))
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of {c}.\n{c} in an image.")
    return folder


@pytest.mark.slow
def test_clip_benchmarks_command_gives_our_scores(shards, tmp_path):
    torch.manual_seed(0)
    diffclip.save(diffclip.build("DiffCLIP-tiny"), tmp_path / "model")
    command = ["diffclip.benchmarks.with_clip_benchmark", "eval", "--model", "diffclip"]
    command += ["--pretrained", str(tmp_path / "model"), "--dataset", "wds/mine", "--dataset_root", str(shards)]
    command += ["--task", "zeroshot_classification", "--no_amp", "--num_workers", "0"]
    command += ["--output", str(tmp_path / "scores.json")]
    run_ranks(0, *command)
    theirs = json.loads((tmp_path / "scores.json").read_text())["metrics"]
    model = diffclip.load(str(tmp_path / "model"))
    ours = evaluate_clip(*model, tmp_path / "data", tmp_path / "out", Settings(quiet=True))
    for name, key in (("top1", "acc1"), ("top5", "acc5"), ("mean_per_class", "mean_per_class_recall")):
        assert ours[f"zero_shot/mine/{name}"] == pytest.approx(100 * theirs[key], abs=1e-6)
    assert 0 < theirs["acc1"] < 1  # a random model: neither perfect nor at zero, so that agreement means something


@pytest.mark.parametrize("path", ["runs/diff clip/pretrain", "/tmp/a", "hammh0a/DiffCLIP_ViTB16_CC12M", "{x}"])
def test_without_an_output_the_scores_have_a_file_name_of_their_own(path):
    added = defaults(["eval", "--pretrained", path, "--dataset", "wds/mine"])
    name = added[added.index("--output") + 1].format(dataset="mine", task="zeroshot_classification")
    assert "/" not in name and name.startswith("mine_") and name.endswith("_zeroshot_classification.json")
    assert added[:4] == ["--model_type", "diffclip", "--model", "diffclip"]
    assert defaults(["eval", "--output=x.json", "--model", "ViT-B-32", "--model_type", "open_clip"]) == []
    assert defaults(["build", "x.json"]) == []


def test_a_shard_cannot_run_its_authors_code(shards, tmp_path):
    import pickle

    from clip_benchmark.datasets.builder import build_wds_dataset
    from webdataset import autodecode

    from diffclip.benchmarks.with_clip_benchmark import only_plain_decoders

    planted = tmp_path / "planted"

    class Plant:
        def __reduce__(self):
            return Path.touch, (planted,)

    image = io.BytesIO()
    Image.new("RGB", (48, 48)).save(image, "PNG")
    members = {"png": image.getvalue(), "cls": b"0"} | dict.fromkeys(("pyd", "pickle", "pth"), pickle.dumps(Plant()))
    with tarfile.open(shards / "test" / "0.tar", "a") as tar:
        for suffix, content in members.items():
            info = tarfile.TarInfo(f"s0000060.{suffix}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    before = dict(autodecode.decoders)
    try:
        only_plain_decoders()
        read = list(build_wds_dataset("mine", lambda image: image.size, "test", str(shards)))
    finally:
        autodecode.decoders.update(before)
    assert len(read) == 61 and read[60] == ((48, 48), 0)
    assert not planted.exists()
    with pytest.raises(Exception):  # noqa: B017 - torch refuses the .pth; the others have run by then
        list(build_wds_dataset("mine", lambda image: image.size, "test", str(shards)))
    assert planted.exists()  # the marker is a real one: webdataset's own table runs it


def test_its_data_sets_show_what_ours_do(tmp_path):
    """webdataset's shards and torchvision's folders: turned, over white, 16 bits scaled, and no other formats."""
    from clip_benchmark.datasets.builder import build_wds_dataset
    from torchvision.datasets import ImageFolder

    from diffclip.base.images import as_decoder, decode

    exif = Image.Exif()
    exif[274] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    images = [Image.fromarray(pixels), Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)]
    contents = []
    for image in images:
        image.save(buffer := io.BytesIO(), "PNG", exif=exif)
        contents.append(buffer.getvalue())
    (tmp_path / "test").mkdir()
    (tmp_path / "folder" / "class").mkdir(parents=True)
    (tmp_path / "test" / "nshards.txt").write_text("1")
    with tarfile.open(tmp_path / "test" / "0.tar", "w") as tar:
        for number, content in enumerate(contents):
            (tmp_path / "folder" / "class" / f"{number}.png").write_bytes(content)
            for suffix, data in (("png", content), ("cls", b"0")):
                info = tarfile.TarInfo(f"s{number}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    wanted = [decode(content).tobytes() for content in contents]
    opened = Image.open
    with as_decoder():
        shards = build_wds_dataset("mine", lambda image: (image.size, image.tobytes()), "test", str(tmp_path))
        assert [image for image, _ in shards] == [((20, 30), pixels) for pixels in wanted]
        assert [image.tobytes() for image, _ in ImageFolder(tmp_path / "folder")] == wanted
        assert [decode(content).tobytes() for content in contents] == wanted  # ours is the same within
        with pytest.raises(OSError):
            Image.open(io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n"))
    assert Image.open is opened


def test_ghostscript_is_out_of_reach(monkeypatch):
    from PIL import EpsImagePlugin
    from webdataset import autodecode

    from diffclip.benchmarks.with_clip_benchmark import only_plain_decoders

    monkeypatch.setattr(autodecode, "decoders", dict(autodecode.decoders))  # put back for the tests that follow
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")  # as where it is installed
    only_plain_decoders()
    assert not EpsImagePlugin.has_ghostscript()


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_its_help_says_what_is_ours(arguments, capsys):
    main(arguments)
    assert "with_clip_benchmark eval --model diffclip" in capsys.readouterr().out
