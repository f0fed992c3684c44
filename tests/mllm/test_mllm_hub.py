"""Conversations of the Hub's datasets, and no network: one sentence, from whatever asks the Hub."""

import json

import huggingface_hub
import pyarrow.parquet
import pytest

from diffclip.base.errors import InputError
from diffclip.base.hub import dataset_copy
from diffclip.sources import locate
from mllm.data.rows import load_rows
from stages import check, publish

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """What huggingface_hub keeps of the dataset me/rows, once fetched: two splits in parquet, and a JSON file."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "datasets--me--rows"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(COMMIT)
    (folder / "snapshots" / COMMIT / "data").mkdir(parents=True)
    turns = [{"role": "user", "content": "Is it red?"}, {"role": "assistant", "content": "Yes"}]
    for split, count in (("train", 3), ("test", 2)):
        table = pyarrow.Table.from_pylist([{"messages": turns, "id": f"{split}-{n}"} for n in range(count)])
        pyarrow.parquet.write_table(table, folder / "snapshots" / COMMIT / f"data/{split}-00000-of-00001.parquet")
    llava = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A mug"}]
    (folder / "snapshots" / COMMIT / "pairs.csv").write_text("image,caption\nno.jpg,a mug\n")
    (folder / "snapshots" / COMMIT / "llava.json").write_text(json.dumps([{"id": "1", "conversations": llava}]))
    (folder / "blobs").mkdir()
    for number, file in enumerate([*(folder / "snapshots" / COMMIT).rglob("*.*")]):
        if file.is_file():  # huggingface_hub keeps contents by their digests, and links to them
            (folder / "blobs" / str(number)).write_bytes(file.read_bytes())
            file.unlink()
            file.symlink_to(folder / "blobs" / str(number))
    return folder / "snapshots" / COMMIT


def names(path: str, split: str = "") -> list[str]:
    rows = load_rows([path], "/", split=split)
    return [row.key.split("(id ")[1].rstrip(")") for row in (rows[i] for i in range(len(rows)))]


def test_a_dataset_of_the_hub_is_read_by_its_name(dataset):
    assert names("hf:me/rows") == ["train-0", "train-1", "train-2"]
    assert names("hf:me/rows/", "test") == ["test-0", "test-1"]
    assert names("hf:me/rows/llava.json") == ["1"] == names(str(dataset / "llava.json"))
    assert load_rows(["hf:me/rows/llava.json"], "/")[0].key.endswith("llava.json: row 0 (id 1)")
    with pytest.raises(InputError, match=r"pairs\.csv: column image: there is no no\.jpg"):
        names("hf:me/rows/pairs.csv")
    assert names("hf:me/rows/data/te*.parquet") == ["test-0", "test-1"]
    with pytest.raises(InputError, match=r"the dataset me/rows has no other\.json"):
        dataset_copy("hf:me/rows/other.json")


def test_check_reads_them_too(dataset, capsys):
    assert check.main(["hf:me/rows", "--conversations", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 3


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """An online machine that reaches nothing: where the Hub should be nobody listens."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for place in ("constants.ENDPOINT", "hf_api.constants.ENDPOINT", "file_download.constants.ENDPOINT"):
        monkeypatch.setattr(f"huggingface_hub.{place}", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between its retries


@pytest.mark.parametrize("name", ["hf:me/rows", "hf:rows", "hf:", "hf:me/ro ws", "hf:me/rows/llava.json"])
def test_a_dataset_out_of_reach_is_one_sentence(no_network, name):
    with pytest.raises(InputError, match=r"no dataset of the Hub in reach .* hf:owner/name"):
        load_rows([name], "/")


def test_models_out_of_reach_and_uploads_are_one_sentence(no_network, tmp_path):
    with pytest.raises(InputError, match="nor a Hub repository in reach"):
        locate("me/model")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="the Hub did not take it"):
        publish.upload(tmp_path, "me/model", private=False)
