"""Model cards state what the run directories say; the Hub is reached through one call, tested up to it."""

import io
import json

import pytest
from huggingface_hub import ModelCard

from diffclip.base.errors import InputError
from diffclip.base.lines import printable
from stages import publish


@pytest.fixture
def finished(tmp_path):
    folder = tmp_path / "home/secret/runs/instruct"
    folder.mkdir(parents=True)
    record = {
        "stage": "instruct",
        "state": "finished",
        "seed": 7,
        "model": "DiffCLIP-B-16",
        "inputs": {"data[0]": {"path": "/home/secret/data/llava/rows.json", "digest": "abc123"}},
        "parameters": {"vision_tower": 1234, "projector": 56},
        "learns": ["projector"],
        "after": {"projector": "beef"},
        "versions": {"torch": "2.14"},
        "hardware": "2 CPU cores",
        "wall_seconds": 61.2,
    }
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "config.yaml").write_text("learning_rate: 2.0e-05\ndata: [/home/secret/data/llava/rows.json]\n")
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate/metrics.json").write_text(json.dumps({"pope/mean/accuracy": 91.64, "wall": 3}))
    return folder


def test_card_states_data_recipe_and_scores(finished, tmp_path):
    text = publish.model_card(finished, [tmp_path / "evaluate"], "me/my-model")
    read = ModelCard(text)
    assert read.data.pipeline_tag == "image-text-to-text" and "llava" in read.data.tags
    for fact in ("rows.json", "abc123", "learning_rate: 2.0e-05", "projector: 56 parameters, learnt", "beef"):
        assert fact in text
    assert r"vision\_tower: 1,234 parameters, frozen" in text and "| pope/mean/accuracy | 91.6 |" in text
    assert "pip install diffclip-stack" in text
    assert "# my-model" in text and 'load("me/my-model")' in text and "/home/secret" not in text
    assert "has not been evaluated" in publish.model_card(finished, [], "me/my-model")


def test_an_unfinished_run_is_refused(finished):
    record = json.loads((finished / "run.json").read_text())
    (finished / "run.json").write_text(json.dumps(record | {"state": "running"}))
    with pytest.raises(InputError, match="is no finished run of pretrain, align, instruct"):
        publish.model_card(finished, [], "")


def test_without_the_hub_the_card_stays_and_one_sentence_says_why(finished):
    with pytest.raises(InputError, match="the Hub did not take it") as refused:
        publish.main([str(finished), "--repo=me/my-model"])
    assert (finished / "README.md").is_file() and len(str(refused.value).splitlines()) == 1


def test_what_is_sent_leaves_out_checkpoints_and_logs(finished, monkeypatch):
    import huggingface_hub

    calls = []
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda repo, **options: calls.append((repo, options)))
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **options: calls.append(options) or "address")
    assert publish.upload(finished, "me/my-model", private=True) == "address"
    assert calls[0] == ("me/my-model", {"private": True, "exist_ok": True})
    kept = huggingface_hub.utils.filter_repo_objects(
        ["model.safetensors", "README.md", "checkpoint-3/optimizer.pt", "log.txt", "metrics.jsonl", "adapter/a.json"],
        ignore_patterns=calls[1]["ignore_patterns"],
    )
    assert list(kept) == ["model.safetensors", "README.md", "adapter/a.json"]


HOSTILE = "x\x1b[2J`|</td>\n\n<script>alert(1)</script>\n- [a](javascript:b) ```\n---\nlicense: mit"


def test_a_card_says_nothing_of_the_machine_and_obeys_no_name(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home/secret"))
    record = json.loads((finished / "run.json").read_text())
    inputs = ("/home/secret", "~", "../secret/a.tar", f"/home/secret/{HOSTILE}", "file:///home/secret/b.json", "hf:a/b")
    record |= {
        "command": "diffclip instruct --data /home/secret/x",
        "model": HOSTILE,
        "inputs": {f"data[{i}] {HOSTILE}": {"path": path, "digest": "d"} for i, path in enumerate(inputs)},
        "hosts": {"secret-host": "secret GPU"},
    }
    (finished / "run.json").write_text(json.dumps(record))
    settings = {"data": ["~/secret/rows.json", "https://me:secret@example.org/a.tar"], "trainer": {"a": "x=/secret/b"}}
    (finished / "config.yaml").write_text(json.dumps(settings | {"model": "org/name", HOSTILE: HOSTILE}))
    scores = {f"pope/{HOSTILE}": 1.0, "pope_shuffled/mean/accuracy": 50.0, "pope/mean/accuracy": 91.6}
    (tmp_path / "evaluate/metrics.json").write_text(json.dumps(scores))
    text = publish.model_card(finished, [tmp_path / "evaluate"], "", "apache-2.0", HOSTILE)
    assert "secret" not in text and "diffclip instruct" not in text
    assert "org/name" in text and "hf:a/b" in text and "https://example.org/a.tar" in text
    assert ModelCard(text).data.license == "apache-2.0" and printable(text, keep="\n") == text
    outside = "".join(text.split("```")[::2])
    assert len(text.split("```")) == 5 and "<script" not in outside and "\n- [a]" not in text
    assert text.index("Controls of POPE") > text.index("| pope/mean/accuracy | 91.6 |")
    assert text.index(r"| pope\_shuffled/mean/accuracy | 50.0 |") > text.index("Controls of POPE")


def test_what_is_sent_tells_nothing_of_the_machine(finished, monkeypatch):
    import huggingface_hub

    (finished / "adapter").mkdir()
    origins = {"text_config": {"_name_or_path": "/home/secret/language", "a": "/ /"}, "b": ["org/name"]}
    (finished / "config.json").write_text(json.dumps(origins))
    (finished / "adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/name"}))
    sent, folders = {}, []
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *_, **__: None)
    monkeypatch.setattr(
        huggingface_hub,
        "upload_file",
        lambda path_or_fileobj, path_in_repo, **_: sent.update({path_in_repo: path_or_fileobj}),
    )
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **options: folders.append(options))
    publish.upload(finished, "me/my-model", private=False)
    assert json.loads(sent.pop("config.json"))["text_config"] == {"_name_or_path": "language", "a": "/ /"} and not sent
    names = [str(file.relative_to(finished)) for file in finished.rglob("*") if file.is_file()]
    kept = huggingface_hub.utils.filter_repo_objects(names, ignore_patterns=folders[0]["ignore_patterns"])
    assert list(kept) == ["adapter/adapter_config.json"]


def test_a_dry_run_shows_the_card_and_writes_nothing(finished, capsys):
    (finished / "model.safetensors").write_text("")
    publish.main([str(finished), "--repo=me/my-model", "--dry_run", "--data_license=CC BY 4.0"])
    said = capsys.readouterr().out
    assert "# my-model" in said and "## Limits" in said and "Licence of the data: CC BY 4.0." in said
    assert said.endswith("would be sent to me/my-model:\n  README.md\n  model.safetensors\n")
    assert not (finished / "README.md").exists()


def test_an_evaluation_goes_with_the_run_of_its_model(finished):
    record = json.loads((finished / "run.json").read_text())
    (finished / "run.json").write_text(json.dumps(record | {"stage": "evaluate"}))
    with pytest.raises(InputError, match="give its model's run, and it by --evaluate"):
        publish.model_card(finished, [], "")


@pytest.mark.slow
def test_pretraining_and_language_runs_get_their_cards(tmp_path):
    """Their records count one number of parameters, as the stages write them."""
    import tarfile

    from PIL import Image

    from stages import language, pretrain

    with tarfile.open(tmp_path / "pairs.tar", "w") as tar:
        for number in range(16):
            buffer = io.BytesIO()
            Image.new("RGB", (48, 48), (number * 16, 0, 0)).save(buffer, "PNG")
            for suffix, content in (("png", buffer.getvalue()), ("txt", f"shade {number}".encode())):
                info = tarfile.TarInfo(f"{number:03d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    common = ["--global_batch_size=8", "--epochs=1", "--report_to=none"]
    pairs = [
        f"--train_data={tmp_path / 'pairs.tar'}",
        "--caption_member=txt",
        "--model=DiffCLIP-tiny",
        "--num_workers=0",
    ]
    pretrain.main([*pairs, f"--output_dir={tmp_path / 'pretrain'}", *common])
    lines = [json.dumps({"text": f"a shade of red, number {n}"}) for n in range(16)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    small = ["--hidden_size=32", "--layers=1", "--heads=2", "--vocabulary=300"]
    language.main([f"--text={tmp_path / 'text.jsonl'}", f"--output_dir={tmp_path / 'language'}", *small, *common])

    publish.main([str(tmp_path / "pretrain")])
    text = (tmp_path / "pretrain/README.md").read_text()
    assert ModelCard(text).data.pipeline_tag == "zero-shot-image-classification"
    assert "whole model: 7,781,441 parameters, learnt" in text and "Vision model: DiffCLIP-tiny." in text
    publish.main([str(tmp_path / "language")])
    text = (tmp_path / "language/README.md").read_text()
    assert ModelCard(text).data.pipeline_tag == "text-generation" and "AutoModelForCausalLM" in text
    assert "Vision model" not in text and "text.jsonl" in text and "trust_remote_code" not in text
