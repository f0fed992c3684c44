"""Each layout of pairs is read alike by training, `val_pairs`, retrieval sets and `diffclip check`."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets as hub
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from diffclip.benchmarks import datasets
from diffclip.data import check
from diffclip.data.pairs import PairTable
from stages import pretraining
from stages.settings import PretrainConfig

hub.disable_progress_bars()
SPLITS = {"train": 1, "val": 2, "test": 3}  # and the shade of its image


def shade(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def said(value: int) -> list[str]:
    return [f"a {value}, so", f"b {value}"]


def images(folder: Path, pattern: str = "{1}.png") -> None:
    for split, value in SPLITS.items():
        path = folder / pattern.format(split, value)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(shade(value))


def tar(path: Path, *values: int, member: str = "txt") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for value in values:
            text = json.dumps({"captions": said(value)}) if member == "json" else "\n".join(said(value))
            for name, content in ((f"{value}.png", shade(value)), (f"{value}.{member}", text.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))


def parquet(path: Path, *values: int, **more: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {"image": [shade(value) for value in values], "caption": [said(value) for value in values], **more}
    pyarrow.parquet.write_table(pyarrow.table(rows), path)


# ---- layouts that tell splits


def shards_by_name(folder: Path) -> None:
    for split, value in SPLITS.items():
        tar(folder / f"cc3m-{split}-0000.tar", value)


def shards_by_folder(folder: Path) -> None:
    for split, value in SPLITS.items():
        tar(folder / split / "0.tar", value)


def files_by_folder(folder: Path) -> None:
    images(folder, "{0}/{1}.png")
    for split, value in SPLITS.items():
        (folder / split / f"{value}.txt").write_text("\n".join(said(value)))


def metadata_by_folder(folder: Path) -> None:
    images(folder, "{0}/{1}.png")
    for split, value in SPLITS.items():
        rows = "".join(json.dumps({"file_name": f"{value}.png", "text": text}) + "\n" for text in said(value))
        (folder / split / "metadata.jsonl").write_text(rows)


def tables_by_folder(folder: Path) -> None:
    images(folder, "{0}/{1}.png")
    for split, value in SPLITS.items():
        rows = "".join(f"{value}.png\t{text}\n" for text in said(value))
        (folder / split / "captions.tsv").write_text(f"image\tcaption\n{rows}")


def parquet_of_the_hub(folder: Path) -> None:
    for split, value in SPLITS.items():
        name = "validation" if split == "val" else split
        parquet(folder / "data" / f"{name}-00000-of-00001.parquet", value)


def parquet_with_a_row_a_caption(folder: Path) -> None:
    rows = [(split, value, text) for split, value in SPLITS.items() for text in said(value)]
    splits, values, captions = map(list, zip(*rows))
    for part in (slice(0, 3), slice(3, None)):  # one image is in both files
        columns = {"caption": captions[part], "split": splits[part]}
        parquet(folder / f"part-{part.start}.parquet", *values[part], **columns)


def parquet_with_a_split_column(folder: Path) -> None:
    parquet(folder / "x.parquet", *SPLITS.values(), split=["train", "validation", "test"])


def coco_as_unpacked(folder: Path) -> None:
    images(folder, "{0}2017/{1}.png")
    (folder / "annotations").mkdir()
    for split, value in SPLITS.items():
        captions = [{"image_id": 7, "caption": text} for text in said(value)]
        whole = {"images": [{"id": 7, "file_name": f"{value}.png"}], "annotations": captions}
        (folder / "annotations" / f"captions_{split}2017.json").write_text(json.dumps(whole))
        (folder / "annotations" / f"instances_{split}2017.json").write_text('{"images": [], "annotations": [{}]}')


def karpathy(folder: Path) -> None:
    images(folder, "coco/{0}2014/{1}.png")
    rows = [
        {
            "filepath": f"{split}2014",
            "filename": f"{value}.png",
            "split": split,
            "sentences": [{"raw": text} for text in said(value)],
        }
        for split, value in SPLITS.items()
    ]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": rows}))


def blips_lists(folder: Path) -> None:
    images(folder, "flickr30k-images/{1}.png")
    for split, value in SPLITS.items():
        rows = [{"image": f"/export/share/flickr30k-images/{value}.png", "caption": said(value)}]
        (folder / f"flickr30k_{split}.json").write_text(json.dumps(rows))


def lists_in_cells(folder: Path) -> None:
    images(folder, "images/{1}.png")
    lists = {split: json.dumps(said(value)).replace('"', '""') for split, value in SPLITS.items()}
    rows = [f'"{lists[split]}",{split},{value}.png' for split, value in SPLITS.items()]
    (folder / "flickr_annotations.csv").write_text("\n".join(["raw,split,filename", *rows]))


def flickr8k(folder: Path) -> None:
    images(folder, "Flicker8k_Dataset/{1}.png")
    lines = [f"{value}.png#{i}\t{text}\n" for value in SPLITS.values() for i, text in enumerate(said(value))]
    (folder / "Flickr8k.token.txt").write_text("".join(lines))
    for split, value in (("train", 1), ("dev", 2), ("test", 3)):
        (folder / f"Flickr_8k.{split}Images.txt").write_text(f"{value}.png\n")


# ---- layouts without splits


def shards(folder: Path) -> None:
    tar(folder / "0.tar", 1, 2)
    tar(folder / "1.tar", 3)


def shards_in_folders(folder: Path) -> None:
    tar(folder / "a" / "0.tar", 1, 2)
    tar(folder / "b" / "0.tar", 3)


def files(folder: Path) -> None:
    images(folder)
    for value in SPLITS.values():
        (folder / f"{value}.txt").write_text("\r\n".join(said(value)))


def a_token_file(folder: Path) -> None:
    images(folder)
    lines = [f"{value}.png#{i}\t{text}\n" for value in SPLITS.values() for i, text in enumerate(said(value))]
    (folder / "results_20130124.token").write_text("".join(lines))


def captions_txt(folder: Path) -> None:
    images(folder, "Images/{1}.png")
    rows = [f'{value}.png,"{text}"\n' for value in SPLITS.values() for text in said(value)]
    (folder / "captions.txt").write_text("image,caption\n" + "".join(rows))
    (folder / "readme.txt").write_text("an image, a caption\n")


def results_csv(folder: Path) -> None:
    images(folder, "flickr30k_images/{1}.png")
    rows = [f"{value}.png| {i}| {text}\n" for value in SPLITS.values() for i, text in enumerate(said(value))]
    (folder / "results.csv").write_text("image_name| comment_number| comment\n" + "".join(rows))


def numbered_columns(folder: Path) -> None:
    images(folder)
    rows = [f"{value}.png;{';'.join(said(value))}\n" for value in SPLITS.values()]
    (folder / "x.csv").write_text("image;caption_0;caption_1\n" + "".join(rows))


def a_mapping(folder: Path) -> None:
    images(folder, "images/{1}.png")
    (folder / "captions.json").write_text(json.dumps({f"{value}.png": said(value) for value in SPLITS.values()}))


def columns_of_json(folder: Path) -> None:
    images(folder)
    columns = {"image": [f"{v}.png" for v in SPLITS.values()], "caption": [said(v) for v in SPLITS.values()]}
    (folder / "rows.json").write_text(json.dumps(columns))


def packed_lines(folder: Path) -> None:
    images(folder)
    rows = [json.dumps({"image": f"{v}.png", "text": text}) + "\n" for v in SPLITS.values() for text in said(v)]
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress("".join(rows).encode()))


def excels_table(folder: Path) -> None:
    images(folder)
    rows = [f"{value}.png;{text}\r\n" for value in SPLITS.values() for text in said(value)]
    (folder / "x.csv").write_bytes(("sep=;\r\nimage;caption\r\n" + "".join(rows) + ";\r\n").encode("utf-16"))


def img2datasets_parquet(folder: Path) -> None:
    status = ["success", "success", "success", "failed_to_download"]
    rows = {"jpg": [*map(shade, SPLITS.values()), None], "caption": [*map(said, SPLITS.values()), ["c"]]}
    pyarrow.parquet.write_table(pyarrow.table({**rows, "status": status}), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text("{}")


def a_saved_dataset(folder: Path) -> None:
    rows = {"image": [*map(shade, SPLITS.values())], "caption": [*map(said, SPLITS.values())]}
    hub.Dataset.from_dict(rows).save_to_disk(str(folder))


def an_arrow_file(folder: Path) -> None:
    a_saved_dataset(folder)
    for name in ("dataset_info.json", "state.json"):
        (folder / name).unlink()


TELL_SPLITS = (
    *(shards_by_name, shards_by_folder, files_by_folder, metadata_by_folder, tables_by_folder, parquet_of_the_hub),
    *(parquet_with_a_row_a_caption, parquet_with_a_split_column, coco_as_unpacked, karpathy, blips_lists),
    *(lists_in_cells, flickr8k),
)
TELL_NONE = (
    *(shards, shards_in_folders, files, a_token_file, captions_txt, results_csv, numbered_columns, a_mapping),
    *(columns_of_json, packed_lines, excels_table, img2datasets_parquet, a_saved_dataset, an_arrow_file),
)


def pairs_of(table: PairTable | None) -> dict[int, list[str]]:
    """The shade of each image, and its captions."""
    assert table is not None and table.problems == []
    return {
        table[rows[0]][0].getpixel((0, 0))[0]: [text.strip() for row in rows for text in table[row][1]]
        for rows in table.images()
    }


@pytest.mark.slow
@pytest.mark.parametrize("layout", [*TELL_SPLITS, *TELL_NONE], ids=lambda layout: layout.__name__)
def test_every_reader_reads_every_layout_with_the_split_that_it_is_for(
    tmp_path: Path, capsys: pytest.CaptureFixture, layout: Callable[[Path], None]
) -> None:
    source = tmp_path / "retrieval" / "set"
    source.mkdir(parents=True)
    layout(source)
    read = {}
    config = PretrainConfig(train_data=[str(source)], val_pairs=[str(source)])
    read["train"], read["val"] = pairs_of(pretraining.train_table(config)), pairs_of(pretraining.val_table(config))
    found = datasets.read(tmp_path, datasets.suite_from_folder(tmp_path)).retrieval["set"]
    shades = [found.images[i][0].getpixel((0, 0))[0] for i in range(len(found.images))]
    read["test"] = {value: [] for value in shades}
    for caption, owner in zip(found.captions, found.owner):
        read["test"][shades[owner]].append(caption)
    told = layout in TELL_SPLITS
    for split, value in SPLITS.items():
        assert read[split] == {v: said(v) for v in ([value] if told else SPLITS.values())}, split
    assert check.main([str(source), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["captions"] == (2 if told else 6)
    for split, value in SPLITS.items() if told else ():
        assert pairs_of(PairTable([str(source)], split=split)) == {value: said(value)}
        suite = {"retrieval": {"x": {"path": "retrieval/set", "split": split}}}
        assert datasets.read(tmp_path, suite).retrieval["x"].captions == said(value)


def test_shards_with_json_are_read_by_the_same_setting_everywhere(tmp_path: Path) -> None:
    tar(tmp_path / "0.tar", 1, 2, 3, member="json")
    config = PretrainConfig(train_data=[str(tmp_path)], caption_member=["json"])
    assert pairs_of(pretraining.train_table(config)) == {value: said(value) for value in (1, 2, 3)}
    suite = {"retrieval": {"x": {"path": "", "caption_member": "json"}}}
    assert datasets.read(tmp_path, suite).retrieval["x"].captions == [*said(1), *said(2), *said(3)]
    assert check.main([str(tmp_path), "--caption_member", "json"]) == 0
