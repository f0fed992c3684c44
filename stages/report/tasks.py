"""Tasks of lmms-eval: their scores with intervals and, of yes/no questions, POPE's controls beside them."""

import re

from stages.report.cells import DASH, Table, distinct, number, percent
from stages.report.data import Arms, is_number, mean_sd

PASSES = {
    "shuffled": "images of other questions (control)",
    "grey": "images grey (control)",
    "no_image": "no image (control)",
    "blind": "blind rule (control)",
    "always_yes": "always yes (control)",
}
SCORES = {"accuracy": "accuracy", "f1": "F1", "yes_rate": "yes rate", "invalid_rate": "invalid rate"}
KEY = r"(tasks|tasks_yes_no)/.+"  # of all that stands here


def names(arms: Arms, group: str) -> dict[str, list[str]]:
    """{task: the rest of its keys}; a task's name may hold slashes no more than a metric's may."""
    found: dict[str, list[str]] = {}
    for key in arms.metric_names():
        if match := re.fullmatch(rf"{group}/([^/]+)/(.+)", key):
            found.setdefault(match[1], []).append(match[2])
    return found


def value(arms: Arms, model: str, key: str) -> str:
    """The number as lmms-eval gives it, whatever its unit; with its interval, or its deviation over seeds."""
    values = [v for v in arms.written(model, key).values() if is_number(v)]
    if not values:
        return DASH
    mean, sd = mean_sd(values)
    ends = [list(arms.written(model, f"{key}_{end}").values()) for end in ("low", "high")]
    if sd is not None:
        return f"{mean:.4g} ± {sd:.2g}"
    if all(len(end) == 1 and is_number(end[0]) for end in ends):
        return f"{mean:.4g} [{ends[0][0]:.4g}, {ends[1][0]:.4g}]"
    return f"{mean:.4g}"


def task_scores(arms: Arms) -> Table:
    """Every number that lmms-eval gave for its tasks."""
    table = Table(["", *arms.models], name="tasks", title="Tasks of lmms-eval")
    for task, metrics in names(arms, "tasks").items():
        table.rows.append([task])
        for metric in metrics:
            key = f"tasks/{task}/{metric}"
            if metric in ("questions", "images"):
                cells = [distinct(map(number, arms.written(model, key).values())) for model in arms.models]
            elif metric.endswith(("_low", "_high")):
                continue
            else:
                cells = [value(arms, model, key) for model in arms.models]
            table.rows.append([metric, *(cell or DASH for cell in cells)])
    table.caption = (
        "As lmms-eval gives them, in the task's own unit. In brackets the 95 % interval over images, by the "
        "bootstrap of a mean over questions, by the jackknife else; some scores have none."
    )
    return table


def yes_no(arms: Arms) -> Table:
    """The yes/no questions of each task by POPE's scores, with what they are worth."""
    table = Table(["", *arms.models], name="tasks-yes-no", title="Their yes/no questions, with controls")
    for task in names(arms, "tasks_yes_no"):
        table.rows.append([task])
        rows = [(label, f"model/{score}") for score, label in SCORES.items()]
        rows += [(label, f"{who}/accuracy") for who, label in PASSES.items()]
        for label, key in rows:
            table.rows.append([label, *(_percent(arms, model, f"tasks_yes_no/{task}/{key}") for model in arms.models)])
        counts = [arms.written(model, f"tasks_yes_no/{task}/model/questions").values() for model in arms.models]
        table.rows.append(["questions", *(distinct(map(number, count)) or DASH for count in counts)])
    table.caption = (
        "Percentages, by the first word of each answer; one that is neither yes nor no is wrong. The controls are "
        "POPE's: a model that looks at the images is better than all of them."
    )
    return table


def _percent(arms: Arms, model: str, key: str) -> str:
    values = list(arms.scores(model, key).values())
    ends = [list(arms.scores(model, f"{key}_{end}").values()) for end in ("low", "high")]
    text = percent(values) if values else DASH
    return f"{text} [{percent(ends[0])}, {percent(ends[1])}]" if all(len(end) == 1 for end in ends) else text


def verdict(arms: Arms, model: str, task: str) -> tuple[bool | None, str] | None:
    """(whether it beats every control, the sentence that says so) of a model's yes/no questions of a task."""
    accuracy = arms.scores(model, f"tasks_yes_no/{task}/model/accuracy")
    controls = {label: arms.scores(model, f"tasks_yes_no/{task}/{who}/accuracy") for who, label in PASSES.items()}
    if not accuracy or not all(controls.values()):
        return None
    ours = mean_sd(list(accuracy.values()))[0]
    label, best = max(((label, mean_sd(list(v.values()))[0]) for label, v in controls.items()), key=lambda row: row[1])
    lows = arms.scores(model, f"tasks_yes_no/{task}/model/accuracy_low")
    low = mean_sd(list(lows.values()))[0] if lows else ours
    if low > best:
        return True, f"{task}, {model}: accuracy {ours:.1f} against {best:.1f} of the best control, {label}."
    return False, f"{task}, {model}: accuracy {ours:.1f} is not shown to be above {best:.1f} of {label}."
