"""Disturbs every stage at random moments and tells what held; see tests/faults/harness.py.

python -m benchmarks.faults --each 20 --json faults.json
"""

import argparse
import dataclasses
import importlib
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

from diffclip.base.console import print_table

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / part) for part in ("", "faults")]
harness = importlib.import_module("harness")

STAGES = (*harness.TRAININGS, "evaluate", "report")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=20, help="trials for each stage and number of ranks")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--ranks", nargs="+", type=int, default=[0, 2], help="0: no launcher")
    parser.add_argument("--faults", nargs="+", help="only these, e.g. 'full disk'")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="every trial, written here")
    options = parser.parse_args()
    done = []
    with tempfile.TemporaryDirectory() as folder:
        world = harness.World(Path(folder))
        for trial in harness.trials(world, options.stages, options.ranks, options.each, options.seed, options.faults):
            done.append(trial)
            print(f"{trial.stage} {trial.ranks} {trial.fault} at {trial.at:.1f} s: {trial.wrong or 'held'}", flush=True)
            if options.json:
                Path(options.json).write_text(json.dumps([dataclasses.asdict(each) for each in done], indent=1))
    tried = Counter((t.stage, t.ranks or 1) for t in done)
    held = Counter((t.stage, t.ranks or 1) for t in done if not t.wrong)
    rows = [[stage, str(ranks), str(n), str(held[stage, ranks])] for (stage, ranks), n in tried.items()]
    print_table(["stage", "ranks", "faults", "held"], rows)


if __name__ == "__main__":
    main()
