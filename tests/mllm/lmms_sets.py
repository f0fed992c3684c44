"""Small sets of our own in the layouts of the Hub's, for the task files that lmms-eval ships.

`datasets` looks for a folder of a set's name before it asks the Hub: a test runs in the folder these are written to.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

Rows = list[dict[str, Any]]


def write(folder: Path, name: str, split: str, rows: Rows, config: str = "") -> None:
    """One split of a set, its images as `datasets` keeps them; `config` is a configuration's name."""
    place = folder / name / (config or "data")
    place.mkdir(parents=True, exist_ok=True)
    columns = {key: [_encoded(row[key]) for row in rows] for key in rows[0]}
    table = datasets.Dataset.from_dict(columns)
    for key in rows[0]:
        first = rows[0][key]
        if isinstance(first, Image.Image):
            table = table.cast_column(key, datasets.Image())
        elif isinstance(first, list) and isinstance(first[0], Image.Image):
            table = table.cast_column(key, datasets.List(datasets.Image()))
    table.to_parquet(place / f"{split}-00000-of-00001.parquet")
    if config:
        readme = folder / name / "README.md"
        head = readme.read_text().removesuffix("---\n") if readme.is_file() else "---\nconfigs:\n"
        data = f"  data_files:\n  - split: {split}\n    path: {config}/{split}-*\n"
        readme.write_text(f"{head}- config_name: {config}\n{data}---\n")


def _encoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_encoded(one) for one in value]
    if not isinstance(value, Image.Image):
        return value
    value.save(buffer := io.BytesIO(), "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def mme(folder: Path, picture: Callable[[int], Image.Image]) -> Rows:
    """Two questions about each of four pictures, one true and one not."""
    rows = []
    for i in range(4):
        for thing, answer in (("red square", "Yes"), ("small blue circle", "No")):
            question = f"Is there a {thing} in the image? Please answer yes or no."
            category = "existence" if i < 2 else "code_reasoning"
            rows.append({"question_id": f"{i}.png", "image": picture(i), "question": question, "answer": answer,
                         "category": category})  # fmt: skip
    write(folder, "lmms-lab-encoder/MME", "test", rows)
    return rows


def mmbench(folder: Path, picture: Callable[[int], Image.Image]) -> Rows:
    rows = [
        {"index": i, "question": "What is in the image?", "hint": "nan", "answer": "AB"[i % 2], "A": "a red square",
         "B": "a green star", "C": "nan", "D": "nan", "category": "object_localization", "image": picture(i),
         "source": "ours", "L2-category": "perception", "comment": "nan", "split": "dev"}
        for i in range(4)
    ]  # fmt: skip
    write(folder, "lmms-lab-encoder/MMBench", "dev", rows, "en")
    return rows


def gqa(folder: Path, picture: Callable[[int], Image.Image]) -> Rows:
    rows = [
        {"id": str(i), "imageId": f"n{i % 2}", "question": ["Where is the star?", "What is red?"][i // 2],
         "answer": ["left", "right", "square", "circle"][i], "fullAnswer": "", "isBalanced": True}
        for i in range(4)
    ]  # fmt: skip
    images = [{"id": f"n{i}", "image": picture(i)} for i in range(2)]
    write(folder, "lmms-lab-encoder/GQA", "testdev", rows, "testdev_balanced_instructions")
    write(folder, "lmms-lab-encoder/GQA", "testdev", images, "testdev_balanced_images")
    return [{**row, "image": images[i % 2]["image"]} for i, row in enumerate(rows)]


def hallusion_bench(folder: Path, picture: Callable[[int], Image.Image]) -> Rows:
    rows = [
        {"category": ["VD", "VS"][i // 2], "subcategory": "figure", "visual_input": "1", "set_id": "0",
         "figure_id": str(i % 2), "sample_note": "", "question_id": "0", "question": "Is the star green?",
         "gt_answer_details": "The star is green.", "gt_answer": str(i % 2), "filename": f"{i}.png",
         "image": picture(i)}
        for i in range(4)
    ]  # fmt: skip
    write(folder, "lmms-lab-encoder/HallusionBench", "image", rows)
    return rows


def mmvp(folder: Path, picture: Callable[[int], Image.Image]) -> Rows:
    rows = [
        {"Index": i + 1, "Question": "Where is the circle?", "Options": "(a) left (b) right",
         "Correct Answer": f"({'ab'[i % 2]})", "image": picture(i)}
        for i in range(4)
    ]  # fmt: skip
    write(folder, "lmms-lab-eval/MMVP", "train", rows)
    return rows


def naturalbench(folder: Path, picture: Callable[[int], Image.Image], groups: int = 1900) -> Rows:
    """Groups of two questions about two pictures, as many as the task counts on; few of them differ."""
    images = [picture(i) for i in range(4)]
    rows = []
    for group in range(groups):
        for k in range(4):
            question, answer = ["Is there a star?", "Is there a square?"][k // 2], ["Yes", "No", "No", "Yes"][k]
            rows.append({"Index": 4 * group + k, "Question": question, "Answer": answer, "Question_Type": "yes_no",
                         "Source": "ours", "Image": images[2 * (group % 2) + k % 2]})  # fmt: skip
    write(folder, "BaiqiL/NaturalBench-lmms-eval", "test", rows)
    return rows


def seedbench(folder: Path, picture: Callable[[int], Image.Image]) -> Rows:
    rows = [
        {"question": "What is it?", "choice_a": "red", "choice_b": "a small blue circle", "choice_c": "no",
         "choice_d": "the green star", "answer": "ABCD"[i], "data_type": "image", "question_id": str(i),
         "question_type_id": 1, "segment": [0, 0], "data_id": str(i), "image": [picture(i)]}
        for i in range(4)
    ]  # fmt: skip
    write(folder, "lmms-lab-encoder/SEED-Bench", "test", rows)
    return rows


HELD = (["dog"], ["cat", "person"], ["dining table"], ["bench", "dog"])  # what the images of captions hold


def coco_cap_chair(folder: Path, picture: Callable[[int], Image.Image]) -> Rows:
    rows = [{"question_id": str(i), "image": picture(i), "gt_object": held} for i, held in enumerate(HELD)]
    write(folder, "tsunghanwu/mscoco_chair", "test", rows)
    return rows


def amber_g(folder: Path, picture: Callable[[int], Image.Image]) -> Rows:
    """Images to describe; AMBER's lists of words lie in `folder`/amber/metadata, as AMBER_BASE_DIR has them."""
    rows = [
        {
            "question_id": i,
            "image": picture(i),
            "task_type": "generative",
            "truth": [h.split()[-1] for h in held],
            "hallu": ["tree"],
        }
        for i, held in enumerate(HELD)
    ]
    write(folder, "Kyunnilee/amber_g", "train", rows)
    counts = ("chair", "safe_cover", "hallu_cover", "non_hallu")
    files = {
        "relation.json": json.dumps({name: [] for name in ("dog", "cat", "person", "table", "bench", "tree")}),
        "safe_words.txt": "photo\n",
        "annotations.json": "[]",
        "metrics.txt": "".join(f"{name}_score=0\n{name}_num=0\n" for name in counts),
    }
    (folder / "amber" / "metadata").mkdir(parents=True)
    for name, text in files.items():
        (folder / "amber" / "metadata" / name).write_text(text)
    return rows


def nltk_data(folder: Path, nouns: dict[str, str]) -> None:
    """What nltk needs to split, tag and lemmatize sentences of these words alone: {noun in singular: plural}.

    The published models (punkt_tab, averaged_perceptron_tagger_eng, wordnet) are on no package registry.
    """
    punkt = folder / "tokenizers" / "punkt_tab" / "english"
    tagger, wordnet = folder / "taggers" / "averaged_perceptron_tagger_eng", folder / "corpora" / "wordnet"
    for place in (punkt, tagger, wordnet):
        place.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (punkt / name).touch()
    tags = {**dict.fromkeys(nouns, "NN"), **dict.fromkeys(nouns.values(), "NNS")}
    for name, content in (("weights", {}), ("tagdict", tags), ("classes", ["NN", "NNS"])):
        (tagger / f"averaged_perceptron_tagger_eng.{name}.json").write_text(json.dumps(content))
    for name in ("lexnames", "cntlist.rev", "index.sense"):
        (wordnet / name).touch()
    for kind in ("adj", "adv", "noun", "verb"):
        for name in (f"index.{kind}", f"data.{kind}", f"{kind}.exc"):
            (wordnet / name).touch()
    (wordnet / "index.noun").write_text("".join(f"{noun} n 1 0 1 0 {i:08d}\n" for i, noun in enumerate(sorted(nouns))))
