"""The evaluation stage with CLIPs that are not ours, and what it leaves where a later part fails."""

import json
import shutil

import pytest
import torch
from launch import run_ranks
from PIL import Image
from safetensors.torch import save_file

from diffclip.base.errors import InputError
from diffclip.scenes.__main__ import main as export_scenes
from stages import evaluate

TEXT = {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VISION = {
    "ViT": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "ResNet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Drawings for zero-shot and for the maps."""
    folder = tmp_path_factory.mktemp("evaluate") / "scenes"
    export_scenes(["export", str(folder), "--only", "segmentation", "--segmentation", "6"])
    for colour in ("red", "blue"):
        for number in range(3):
            path = folder / "classification" / "colours" / "test" / colour / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 32), colour).save(path)
    return folder


def write_model(kind, folder):
    import open_clip

    torch.manual_seed(0)
    if kind == "transformers":
        from transformers import CLIPConfig, CLIPModel

        text = {"max_position_embeddings": 32, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
        vision = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_attention_heads": 2}
        vision |= {"num_hidden_layers": 2, "intermediate_size": 64}
        config = CLIPConfig(text_config={**text, "num_hidden_layers": 1}, vision_config=vision, projection_dim=16)
        CLIPModel(config).save_pretrained(folder)
        return
    folder.mkdir()
    config = {"embed_dim": 16, "vision_cfg": VISION[kind], "text_cfg": TEXT}
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))


def arguments(tmp_path, data, **settings):
    settings = {"output_dir": tmp_path / "out", "clip": tmp_path / "model", "data_root": data, **settings}
    return [f"--{name}={value}" for name, value in settings.items()]


@pytest.mark.parametrize("kind", ["ViT", "transformers"])
def test_maps_and_scores_of_other_clips(tmp_path, data, kind):
    write_model(kind, tmp_path / "model")
    evaluate.main(arguments(tmp_path, data))
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert 0 <= metrics["zero_shot/colours/top1"] <= 100 and metrics["localisation/objects"] > 0
    rows = [json.loads(line) for line in (tmp_path / "out/attention.jsonl").read_text().splitlines()]
    assert rows and all(max(map(max, row["heat"])) == 255 and len(row["heat"]) == 4 for row in rows)
    assert (tmp_path / "out" / rows[0]["image"]).is_file()


def test_a_model_without_maps_gives_its_scores_and_the_reason(tmp_path, data):
    write_model("ResNet", tmp_path / "model")
    evaluate.main(arguments(tmp_path, data))
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["state"] == "finished" and "its ModifiedResNet is no vision transformer" in record["attention"]
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert "zero_shot/colours/top1" in metrics and "localisation/pointing" not in metrics


def test_a_clip_of_the_hub_by_its_id(tmp_path, data, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("one", "two"):
        copy = tmp_path / "hub" / f"models--some--{name}"
        (copy / "snapshots").mkdir(parents=True)
        (copy / "refs").mkdir()
        (copy / "refs" / "main").write_text("0" * 40)
        write_model("ResNet" if name == "one" else "ViT", copy / "snapshots" / ("0" * 40))

    def run(clip):
        evaluate.main(arguments(tmp_path, data, clip=clip, few_shot_episodes=10))
        return json.loads((tmp_path / "out/run.json").read_text())

    assert (run("some/one")["state"], run("some/one")["model"]) == ("finished", "one")
    with pytest.raises(InputError, match="made with other settings or inputs: clip"):  # not taken for the same model
        run("some/two")
    with pytest.raises(InputError, match="some/three: no such file or directory, nor a Hub repository in reach"):
        run("some/three")


def test_scores_outlive_a_later_failure(tmp_path, data):
    write_model("ViT", tmp_path / "model")
    (tmp_path / "mllm").mkdir()
    (tmp_path / "pope.json").write_text("[]")
    with pytest.raises(InputError):
        evaluate.main(arguments(tmp_path, data, mllm=tmp_path / "mllm", pope=tmp_path / "pope.json"))
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert "zero_shot/colours/top1" in metrics and "localisation/pointing" in metrics
    assert json.loads((tmp_path / "out/run.json").read_text())["state"] == "running"


def test_a_part_that_fails_first_keeps_no_later_one_from_its_scores(tmp_path, data):
    write_model("ViT", tmp_path / "model")
    shutil.copytree(data, tmp_path / "data")
    for label in ("one", "two"):
        broken = tmp_path / "data" / "classification" / "a" / "test" / label
        broken.mkdir(parents=True)
        (broken / "x.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"^the CLIP benchmarks: zero_shot a: .*other scores are in .*metrics\.json"):
        evaluate.main(arguments(tmp_path, tmp_path / "data"))
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert "zero_shot/colours/top1" in metrics and "localisation/pointing" in metrics
    assert json.loads((tmp_path / "out/run.json").read_text())["state"] == "running"
    shutil.rmtree(tmp_path / "data" / "classification" / "a")
    with pytest.raises(InputError, match=r"clip_data \(.*--data_changed accept$"):
        evaluate.main(arguments(tmp_path, tmp_path / "data"))
    evaluate.main([*arguments(tmp_path, tmp_path / "data"), "--data_changed", "accept"])
    assert json.loads((tmp_path / "out/run.json").read_text())["state"] == "finished"


def test_a_set_that_fails_leaves_the_scores_before_it(tmp_path, data):
    """A broken image of the second protocol: the first one's scores are on disk, with the reason."""
    import diffclip
    from diffclip.benchmarks.evaluate import evaluate_clip
    from diffclip.benchmarks.protocol import Settings

    write_model("ViT", tmp_path / "model")
    (tmp_path / "data" / "retrieval").mkdir(parents=True)
    (tmp_path / "data" / "classification").symlink_to(data / "classification")
    (tmp_path / "data" / "retrieval" / "x.json").write_text('{"a.png": ["a thing"]}')
    (tmp_path / "data" / "retrieval" / "a.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"a\.png cannot be read"):
        evaluate_clip(*diffclip.load(tmp_path / "model"), tmp_path / "data", tmp_path / "scores", Settings(quiet=True))
    stored = json.loads((tmp_path / "scores/clip_benchmarks.json").read_text())
    assert "zero_shot/colours/top1" in stored["metrics"] and "a.png cannot be read" in stored["failed"]


def test_a_set_that_fails_first_keeps_no_other_from_its_scores(tmp_path, data):
    import diffclip
    from diffclip.benchmarks.evaluate import evaluate_clip
    from diffclip.benchmarks.protocol import Settings

    write_model("ViT", tmp_path / "model")
    sets = tmp_path / "data" / "classification"
    shutil.copytree(data / "classification", sets)
    for label in ("one", "two"):
        (sets / "a" / "test" / label).mkdir(parents=True)
        (sets / "a" / "test" / label / "x.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"zero_shot a: .*x\.png cannot be read.*other scores are in .*json") as error:
        evaluate_clip(*diffclip.load(tmp_path / "model"), tmp_path / "data", tmp_path / "scores", Settings(quiet=True))
    stored = json.loads((tmp_path / "scores/clip_benchmarks.json").read_text())
    assert "zero_shot/colours/top1" in stored["metrics"] and not any("/a/" in name for name in stored["metrics"])
    assert str(len(stored["metrics"])) in str(error.value)


def test_precision_of_the_dual_encoder_is_a_setting(tmp_path, data):
    write_model("transformers", tmp_path / "model")
    evaluate.main(arguments(tmp_path, data, precision="bf16"))
    about = json.loads((tmp_path / "out" / "clip_benchmarks.json").read_text())["about"]
    assert about["precision"] == "bfloat16"


@pytest.mark.slow
def test_two_ranks_give_the_scores_of_one_and_rank_0_alone_writes_them(tmp_path, data):
    write_model("transformers", tmp_path / "model")
    torch.set_num_threads(1)  # as the ranks have
    evaluate.main(arguments(tmp_path, data))
    told = run_ranks(2, "diffclip", "evaluate", *arguments(tmp_path, data, output_dir=tmp_path / "two"))
    assert told.stdout.count("evaluate: finished") == 1
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("out", "two"))
    assert one == two and "zero_shot/colours/top1" in two
    assert json.loads((tmp_path / "two/run.json").read_text())["ranks"] == 2
