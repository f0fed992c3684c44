"""A paragraph for the methods section of a paper, from what the runs say of themselves; nothing is guessed."""

from collections.abc import Callable, Iterable

from stages.report.cells import DASH, distinct, number
from stages.report.data import Arms, RunDir, is_number
from stages.report.setup import budget, language_model, protocol, stand_in, versions

DOES = {
    "pretrain": "Dual encoders were pretrained contrastively",
    "align": "A projector from each vision tower to {language} was trained",
    "instruct": "{learns} learnt from conversations",
}


def methods(arms: Arms) -> str:
    """What was trained and evaluated, how, on what, and what the intervals are."""
    sizes = {
        model: distinct(number(r.record["parameters"]) for r in runs if is_number(r.record.get("parameters")))
        for model in arms.models
        if (runs := arms.latest("pretrain", model))
    }
    named = [f"{model} ({size} parameters)" if size != DASH else model for model, size in sizes.items()]
    sentences = [f"We compared {', '.join(named or arms.models)}."]
    for stage, text in DOES.items():
        runs = [r for model in arms.models for r in arms.latest(stage, model)]
        if not runs:
            continue
        learns = " and ".join(part.replace("_", " ") for part in runs[-1].learns).capitalize() or "The model"
        language = "a stand-in language model" if stand_in(arms) else _all(runs, lambda r: language_model(arms, r))
        told = text.format(language=language or "a language model", learns=learns)
        facts = [_all(runs, budget), _all(runs, _optimiser)]
        sentences.append(f"{told} ({'; '.join(filter(None, facts))})." if any(facts) else f"{told}.")
    evaluated = [r for model in arms.models for r in arms.latest("evaluate", model)]
    if how := _all(evaluated, protocol):
        sentences.append(f"The dual encoders were evaluated with {how}.")
    if any(key.startswith("pope/") for key in arms.metric_names()):
        sentences.append(
            "POPE was answered greedily through lmms-eval, answers were matched to labels by image and question, and "
            "each model was also asked with the images shuffled among the questions and compared with the best rule "
            "that sees no image."
        )
    seeds = sorted({seed for model in arms.models for seed in arms.seeds(model)}, key=lambda s: (len(s), s))
    if len(arms.models) > 1:
        sentences.append(
            f"Differences are means over {len(seeds)} paired seeds with 95 % intervals of Student's t."
            if len(seeds) > 1
            else f"All numbers are of one seed ({', '.join(seeds)}); 95 % intervals are a paired bootstrap over test "
            "items (over images for POPE), and say nothing of other seeds."
        )
    where = [_all(arms.runs, lambda r: str(r.record.get("hardware") or "")), _all(arms.runs, versions)]
    if any(where):
        sentences.append(f"Everything ran on {'; '.join(filter(None, where))}, with DiffCLIP Stack.")
    return " ".join(sentences)


def _all(runs: Iterable[RunDir], fact: Callable[[RunDir], str]) -> str:
    """The different values of a fact, "" if there are none."""
    found = distinct(map(fact, runs))
    return "" if found == DASH else found


def _optimiser(run: RunDir) -> str:
    """ "AdamW, learning rate 0.001, weight decay 0.1, bf16", as far as the settings say so."""
    named = {"learning_rate": "learning rate", "weight_decay": "weight decay"}
    parts = [f"{text} {run.config[key]:g}" for key, text in named.items() if is_number(run.config.get(key))]
    precision = str(run.config.get("precision") or "")
    return ", ".join(["AdamW", *parts, *([precision] if precision else [])]) if parts else ""


def jumps(arms: Arms, stage: str) -> str:
    """Why the training loss of a stage jumps where its data stand in an order; "" where they do not."""
    for run in arms.runs:
        trainer = run.config.get("trainer")
        sampling = trainer.get("train_sampling_strategy") if isinstance(trainer, dict) else ""
        if run.stage == stage and (run.config.get("order") == "file" or sampling == "sequential"):
            return " The data are read in their own order, a curriculum: the loss jumps where another task begins."
        if run.stage == stage and run.config.get("order") == "length":
            return " Batches hold rows of like length, the longest first, so that neighbouring losses differ."
    return ""
