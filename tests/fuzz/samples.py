"""Valid small files of every kind that the commands read: what the fuzzer then spoils. Made once per run of it."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image

from diffclip import checkpoints, models, variants
from diffclip.base.schema import COMPLETE
from mllm.pope import questions
from stages.cli import call
from stages.run import Run

COUNTS = {"pairs": 8, "retrieval": 4, "class_train": 24, "class_val": 24, "class_test": 24, "align": 8, "texts": 16}
COUNTS |= {"conversations": 8, "rounds": 1, "pope": 3, "mmvp": 2, "segmentation": 3, "size": 32}
TRAINING = ["--use_cpu=True", "--num_workers=0", "--logging_steps=1", "--report_to=none", "--precision=fp32"]
SMALL = [*TRAINING, "--epochs=1", "--save_steps=1", "--global_batch_size=4"]


def make(folder: Path) -> None:
    """Write them below `folder`: data/ (the scenes), pairs/ and rows/ (their layouts), models/ and runs/."""
    with contextlib.redirect_stdout(io.StringIO()):
        call(["scenes", "export", str(folder / "data"), *(f"--{key}={value}" for key, value in COUNTS.items())])
        _pairs(folder / "pairs")
        _rows(folder / "rows")
        _tables(folder / "tables")
        _models(folder)
    answers = [{"pass": "model", **q._asdict(), "answer": "Yes"} for q in questions.read(folder / "data/pope")]
    images = sorted((folder / "data/segmentation/images").iterdir())
    captions = [{"image": path.name, "caption": "a red circle and a blue square"} for path in images]
    asked = [{"image": f"{i}.jpg", "question": "Is it red?"} for i in range(2)]
    for name, rows in (("answers", answers), ("captions", captions), ("questions", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8))


def _jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    _image(seed).save(buffer, "JPEG")
    return buffer.getvalue()


def _pairs(folder: Path) -> None:
    """The same eight pairs in each layout that `diffclip.data.pairs` reads."""
    rows = [{"image": f"images/{i}.jpg", "caption": f"a small red square {i}"} for i in range(8)]
    (folder / "images").mkdir(parents=True)
    for i, row in enumerate(rows):
        (folder / row["image"]).write_bytes(_jpeg(i))
        (folder / f"images/{i}.txt").write_text(row["caption"])
    (folder / "pairs.json").write_text(json.dumps(rows))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, mark in (("pairs.csv", ","), ("pairs.tsv", "\t"), ("results.csv", "| ")):
        lines = [mark.join(("image", "caption")), *(mark.join(row.values()) for row in rows)]
        (folder / name).write_text("\n".join(lines) + "\n")
    (folder / "results.token").write_text("".join(f"{row['image']}#0\t{row['caption']}\n" for row in rows))
    table = [{"image": {"bytes": _jpeg(i), "path": None}, "caption": row["caption"]} for i, row in enumerate(rows)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), folder / "pairs.parquet")
    datasets.Dataset.from_list(table).save_to_disk(str(folder / "saved"))


def _rows(folder: Path) -> None:
    """Conversations in the layouts that `mllm.data` reads."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(8):
        (folder / f"images/{i}.jpg").write_bytes(_jpeg(i))
        turns = [{"from": "human", "value": "<image>\nIs it red?"}, {"from": "gpt", "value": "Yes" if i % 2 else "No"}]
        rows.append({"id": str(i), "image": f"{i}.jpg", "conversations": turns})
    roles = {"human": "user", "gpt": "assistant"}
    messages = [
        {
            "images": [row["image"]],
            "messages": [{"role": roles[t["from"]], "content": t["value"]} for t in row["conversations"]],
        }
        for row in rows
    ]
    (folder / "llava.json").write_text(json.dumps(rows))
    (folder / "llava.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "messages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in messages))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "llava.parquet")


def _tables(folder: Path) -> None:
    """POPE and a labelled set as parquet, answers, a list of addresses."""
    folder.mkdir()
    pope = [
        {
            "question_id": str(i),
            "question": f"Is there a {'dog' if i % 2 else 'cat'} in the image?",
            "answer": "yes" if i % 2 else "no",
            "image_source": f"COCO_{i // 2}",
            "category": ("random", "popular", "adversarial")[i % 3],
            "image": {"bytes": _jpeg(i // 2), "path": None},
        }
        for i in range(6)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(pope), folder / "pope.parquet")
    labelled = [{"image": {"bytes": _jpeg(i), "path": None}, "label": i % 2} for i in range(4)]
    for split in ("train", "test"):
        file = folder / f"classification/colours/{split}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(labelled), file)
    (file.parent / "classnames.json").write_text(json.dumps(["red", "blue"]))
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"url": "https://example.org/a.jpg", "caption": "a"}]), folder / "urls.parquet"
    )
    (folder / "urls.tsv").write_text("url\tcaption\nhttps://example.org/a.jpg\ta\n")


def _models(folder: Path) -> None:
    """A dual encoder in our layout and the official one, and a run of each stage, two steps long."""
    torch.manual_seed(0)
    config = variants.named("DiffCLIP-tiny")
    vision, text = config["model_cfg"]["vision_cfg"], config["model_cfg"]["text_cfg"]
    vision |= {"layers": 1, "width": 8, "head_width": 4, "image_size": 48, "patch_size": 16}
    text |= {"layers": 1, "width": 8, "heads": 2, "context_length": 12}
    (folder / "models").mkdir()
    checkpoints.save(models.build(config), folder / "models/clip")
    call(["convert", str(folder / "models/clip"), str(folder / "models/official.pt")])
    runs, data = folder / "runs", folder / "data"
    pretraining = ["pretrain", "--init_from", str(folder / "models/clip"), "--train_data", str(data / "pretrain/*.tar")]
    pretraining += ["--caption_member=json", *SMALL]
    call([*pretraining, "--output_dir", str(runs / "pretrain")])
    _stopped(runs / "stopped", pretraining)
    call(
        [
            *("language", "--text", str(data / "llava/text.jsonl"), "--output_dir", str(runs / "language"), *SMALL),
            *("--vocabulary=300", "--hidden_size=16", "--layers=1", "--heads=2", "--max_positions=512"),
        ]
    )
    conversations = ["--data", str(folder / "rows/llava.json"), "--image_root", str(folder / "rows/images")]
    towers = ["--vision_tower", str(runs / "pretrain"), "--language_model", str(runs / "language")]
    call(
        [
            *("align", *towers, *conversations, "--output_dir", str(runs / "align"), "--template=vicuna"),
            *("--max_length=256", "--vision_feature_layer=-1", *SMALL),
        ]
    )
    call(
        [
            *("instruct", "--model", str(runs / "align"), *conversations, "--output_dir", str(runs / "instruct")),
            *("--max_length=256", "--lora_rank=2", *SMALL),
        ]
    )
    shutil.copytree(runs / "instruct", folder / "models/mllm", ignore=shutil.ignore_patterns("checkpoint-*", "*.log"))
    call(
        [
            *(
                "evaluate",
                "--clip",
                str(runs / "pretrain"),
                "--data_root",
                str(folder / "tables"),
                "--few_shot_episodes=2",
            ),
            *("--linear_probe=fast", "--output_dir", str(runs / "evaluate")),
        ]
    )


def _stopped(run: Path, pretraining: list[str]) -> None:
    """A run that is to go on from its first step of two; its checkpoint has no digests, so that all of it is read."""
    with contextlib.suppress(SystemExit), mock.patch.object(Run, "finish", lambda run, _: run.stop(1, 2)):
        call([*pretraining, "--output_dir", str(run)])
    shutil.rmtree(run / "checkpoint-2")
    (run / "checkpoint-1" / COMPLETE).write_text("")
    (run / "checkpoint-1" / "global_step1").mkdir()  # as DeepSpeed's, and another rank's
    for name in ("rng_state_1.pth", "global_step1/mp_rank_00_model_states.pt"):
        shutil.copy(run / "checkpoint-1" / "rng_state.pth", run / "checkpoint-1" / name)
