"""Free captions by CHAIR: objects that they name and their images lack, beside the controls."""

from diffclip.base.schema import CHAIR
from mllm.pope import chair
from stages.report.cells import DASH, Table, distinct, number, percent, score
from stages.report.data import Arms, is_number, mean_sd

SCORES = {"chair_i": "CHAIR_i", "chair_s": "CHAIR_s", "recall": "recall"}
PASSES = {
    "model": "its captions",
    "shuffled": "captions of other images (control)",
    "grey": "a grey image's caption (control)",
    "no_image": "no image's caption (control)",
    "blind": "blind rule (control)",
}
KEY = rf"{CHAIR}/.+"  # of all that stands here


def there(arms: Arms) -> bool:
    """Whether any captions were scored."""
    return any(arms.written(model, f"{CHAIR}/model/chair_i") for model in arms.models)


def chair_scores(arms: Arms) -> Table:
    """CHAIR of each model's captions and of their controls."""
    table = Table(["", *SCORES.values(), "objects a caption"], name="chair", title="CHAIR with its controls")
    for model in arms.models:
        table.rows.append([model])
        for who, label in PASSES.items():
            if who == "model" or arms.written(model, f"{CHAIR}/{who}/chair_i"):
                cells = [score(arms, table, model, f"{CHAIR}/{who}/{name}") for name in SCORES]
                table.rows.append([label, *cells, _mentions(arms, model, who)])
            if who == "model" and any(ends := [_interval(arms, model, name) for name in SCORES]):
                table.rows.append(["95 % interval", *(end or DASH for end in ends), ""])
        images = distinct(map(number, arms.written(model, f"{CHAIR}/images").values()))
        table.rows.append(["images", images, "", "", ""])
    table.caption = (
        "Percentages, lower is better, but for recall. CHAIR_i: mentions of objects that the image lacks, of all; "
        "CHAIR_s: captions with such a mention; recall: objects there that the caption names. The intervals resample "
        "images. The blind rule names as many objects as the caption, those most common in other images."
    )
    return table


def _mentions(arms: Arms, model: str, who: str) -> str:
    values = [v for v in arms.written(model, f"{CHAIR}/{who}/mentions").values() if is_number(v)]
    return f"{mean_sd(values)[0]:.2f}" if values else DASH


def _interval(arms: Arms, model: str, name: str) -> str:
    """Of a model with one seed; with several, the ± says more."""
    ends = [list(arms.scores(model, f"{CHAIR}/model/{name}_{end}").values()) for end in ("low", "high")]
    return f"[{percent(ends[0])}, {percent(ends[1])}]" if all(len(end) == 1 for end in ends) else ""


def verdict(arms: Arms, model: str) -> tuple[bool | None, str] | None:
    """(whether captions are of their images, None if that cannot be told; the sentence that says so), of all seeds."""
    scores: dict[str, dict[str, float]] = {}
    for who in PASSES:
        for name, unit in {"chair_i": 100, "chair_i_high": 100, "mentions": 1}.items():
            if values := list(arms.scores(model, f"{CHAIR}/{who}/{name}").values()):
                scores.setdefault(who, {})[name] = mean_sd(values)[0] / unit
    images = [v for v in arms.written(model, f"{CHAIR}/images").values() if is_number(v)]
    if not images or not {"model", "shuffled", "blind"} <= set(scores) or "mentions" not in scores["model"]:
        return None
    seen, told = chair.verdict(scores, min(images))
    return seen, f"The captions of {model} {told}."
