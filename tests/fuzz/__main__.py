"""Look for input that ends in a traceback, hangs, takes too much memory or writes outside of the output folder.

python tests/fuzz --cases 10000 --seed 7          # each fault with the command that repeats it
python tests/fuzz --seed 7 --case 123             # that one, whose files stay
python tests/fuzz --cases 500 --only POPE         # one kind: a target of cases.py, "settings" or "swapped"
"""

import argparse
import gc
import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # Python itself puts this folder there
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

PART = 250  # cases that a process is given at a time


def main() -> int:
    parser = argparse.ArgumentParser("python tests/fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--only", default="", help="this kind alone")
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    parser.add_argument("--valid", type=Path, help="folder of the samples, made if it is not there (else a new one)")
    options = parser.parse_args()
    for name in ("DIFFCLIP_CACHE", "HF_DATASETS_CACHE", "HF_HOME", "MPLCONFIGDIR"):  # before any import of libraries
        os.environ[name] = tempfile.mkdtemp(prefix="diffclip-fuzz-")
    import children
    import samples

    children.stages.report.figures.DPI = 30  # a hundredth of the pixels, which are most of a report's time
    valid = options.valid or Path(tempfile.mkdtemp(prefix="diffclip-fuzz-"))
    if not (valid / "data").is_dir():
        samples.make(valid)
    if options.case is None:
        children.check_samples(valid)
    numbers = range(options.cases) if options.case is None else [options.case]
    parts = [(valid, numbers[i : i + PART], options.seed, options.only) for i in range(0, len(numbers), PART)]
    ended, kinds, seconds = Counter[str](), Counter[str](), Counter[str]()
    gc.freeze()  # else the first collection of each process copies every page
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        every = pool.imap(children.run_part, parts) if options.case is None else [children.run(*parts[0], keep=True)]
        for found in chain.from_iterable(every):
            if isinstance(found, children.Ended):
                ended[found.how] += 1
                seconds[found.name] += found.seconds
                continue
            kinds[kind := children.kind_of(found)] += 1
            if kinds[kind] == 1:
                print(f"\n=== {found.name}: {found.told}\n{found.what}\n{found.repeat}", flush=True)
    print(f"\n{len(numbers):,} cases: {dict(ended)}, {sum(kinds.values())} faults")
    print("seconds of a CPU:", ", ".join(f"{name} {value:.1f}" for name, value in seconds.most_common(8)))
    for kind, count in kinds.most_common():
        print(f"{count:5} {kind}")
    return 1 if kinds else 0


if __name__ == "__main__":
    sys.exit(main())
