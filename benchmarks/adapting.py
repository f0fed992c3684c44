"""Does it help to make a trained CLIP differential? CLIP-tiny, trained on real pairs, is trained on as it is and with
each kind of differential attention; held-out retrieval before, on the way and after.

    python -m benchmarks.adapting --data ../shared/data --out runs/adapting

Each arm's learning rate is chosen on pairs that are neither trained on nor reported, from seed 0's model. An epoch is a
quarter of the pairs, so that a validation comes after each. Whatever is finished is not done again.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import diffclip
from diffclip.base.console import print_table
from diffclip.base.files import read_jsonl, write_json
from diffclip.base.statistics import over_seeds
from diffclip.benchmarks.features import Encoder
from diffclip.data.pairs import PairTable
from stages import pretrain
from stages.contrastive import retrieval_of_pairs

ARMS = {"CLIP": "keep", "V1": "v1", "V2": "v2", "Dex": "dex"}
RATES = (5e-5, 2e-4, 5e-4, 1e-3)
BASE_EPOCHS, MORE_EPOCHS, QUARTERS = 6, 2, 4
SETTINGS = [
    "--global_batch_size=64",
    "--weight_decay=0.1",
    "--end_learning_rate=1e-5",
    "--min_crop=0.8",
    "--num_workers=0",
]
SETTINGS += ["--logging_steps=50", "--save_steps=500", "--use_cpu=true", "--report_to=none", "--caption_member=txt"]


def places(data: Path) -> dict[str, Any]:
    """Pairs to train on, to choose the learning rate on, and to report."""
    fashion, flickr = data / "fashion", data / "flickr8k"
    train = [fashion / "parquet_train/train-00000-of-00001.parquet"]
    return {
        "train": [*train, *(flickr / f"train/0000{i}.tar" for i in range(2))],
        "choice": [fashion / "wds_train/00001.tar"],
        "fashion": [fashion / "retrieval_dev/dev.parquet"],
        "flickr8k": sorted((flickr / "retrieval_dev").rglob("*.tar")),
    }


def train(out: Path, where: dict[str, Any], val: str, seed: int, *more: str) -> Path:
    """A run of `diffclip pretrain`, if it is not there; its directory."""
    pairs = ["--train_data", *map(str, where["train"]), "--val_pairs", *map(str, where[val])]
    pretrain.main([*pairs, *SETTINGS, f"--seed={seed}", f"--output_dir={out}", *more])
    return out


def adapt(
    out: Path, where: dict[str, Any], val: str, seed: int, start: Path, arm: str, rate: float, epochs: int
) -> Path:
    """An arm: a quarter of the pairs is an epoch."""
    more = [f"--init_from={start}", f"--attention={ARMS[arm]}", f"--learning_rate={rate}", f"--epochs={epochs}"]
    quarter = ["--train_weights", *["0.25"] * len(where["train"])]
    return train(out, where, val, seed, *more, *quarter, "--warmup_epochs=0.4", "--anneal_epochs=2")


def recall(row: dict[str, float], k: int = 10) -> float:
    """R@k in percent, the mean of both ways."""
    return sum(row[f"val/{way}/R@{k}"] for way in ("text_to_image", "image_to_text")) / 2


def validations(run: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(run / "metrics.jsonl") if "val/text_to_image/R@1" in row]


def held_out(run: Path, pairs: PairTable) -> dict[str, float]:
    """R@k of a run's final model on other pairs."""
    scores = retrieval_of_pairs(Encoder(*diffclip.load(run), quiet=True), pairs)
    return {f"val/{name}": value for name, value in scores.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds fashion/ and flickr8k/")
    parser.add_argument("--out", type=Path, default=Path("runs/adapting"), help="folder of the runs and the results")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    where, out = places(options.data), options.out
    first = ["--model=CLIP-tiny", "--learning_rate=1e-3", "--warmup_epochs=0.5", f"--epochs={BASE_EPOCHS}"]
    seeds = range(options.seeds)
    base = {seed: train(out / f"base-{seed}", where, "fashion", seed, *first) for seed in seeds}
    chosen = {}
    for arm in ARMS:
        tried = {
            rate: adapt(out / f"choice-{arm}-{rate:g}", where, "choice", 99, base[0], arm, rate, 2) for rate in RATES
        }
        chosen[arm] = max(tried, key=lambda rate: recall(validations(tried[rate])[-1]))
    runs = {
        (arm, seed): adapt(
            out / f"{arm}-{seed}", where, "fashion", seed, base[seed], arm, chosen[arm], MORE_EPOCHS * QUARTERS
        )
        for seed in seeds
        for arm in ARMS
    }
    report(out, runs, base, chosen, PairTable(list(map(str, where["flickr8k"])), "json"))


def report(
    out: Path, runs: dict[tuple[str, int], Path], base: dict[int, Path], chosen: dict[str, float], flickr: PairTable
) -> None:
    """Print the table, and write results.json and curves.svg."""
    curves = {arm: [[recall(row) for row in validations(runs[arm, seed])] for seed in base] for arm in ARMS}
    others = {key: recall(held_out(run, flickr)) for key, run in runs.items()}
    before = {seed: recall(held_out(run, flickr)) for seed, run in base.items()}
    rows = []
    for arm in ARMS:
        last = [curve[-1] for curve in curves[arm]]
        row = [arm, f"{chosen[arm]:g}", *(mean([curve[at] for curve in curves[arm]]) for at in (0, 1, 4, 8))]
        row += [difference([curve[-1] for curve in curves["CLIP"]], last) if arm != "CLIP" else ""]
        row += [mean([others[arm, seed] for seed in base])]
        row += [difference([others["CLIP", s] for s in base], [others[arm, s] for s in base]) if arm != "CLIP" else ""]
        rows.append(tuple(row))
    heads = ("arm", "rate", "before", "1/4 epoch", "1", "2", "minus CLIP", "flickr8k", "minus CLIP")
    print_table(heads, rows, notes=[f"R@10, mean of both ways, %. flickr8k before: {mean(list(before.values()))}"])
    flat = {f"{arm}-{seed}": value for (arm, seed), value in others.items()}
    write_json(out / "results.json", {"fashion": curves, "flickr8k": flat, "before": before, "rates": chosen})
    canvas = Figure(figsize=(6, 3.4), layout="constrained")
    axes = canvas.subplots()
    for arm in ARMS:
        for seed, curve in enumerate(curves[arm]):
            steps = [i / QUARTERS for i in range(len(curve))]
            axes.plot(steps, curve, color=f"C{list(ARMS).index(arm)}", lw=1.2, label=arm if not seed else None)
    axes.set(xlabel="epochs since the model was changed", ylabel="R@10 (%), 1,000 held-out products", ylim=(0, None))
    axes.legend(frameon=False)
    canvas.savefig(out / "curves.svg")


def mean(values: list[float]) -> str:
    spread = torch.tensor(values).std().item() if len(values) > 1 else 0.0
    return f"{sum(values) / len(values):.1f} ± {spread:.1f}"


def difference(reference: list[float], values: list[float]) -> str:
    middle, low, high, _ = over_seeds([b - a for a, b in zip(reference, values)])
    return f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]"


if __name__ == "__main__":
    main()
