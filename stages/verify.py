"""Whether run directories hold what was written into them: the record, every file of the result, every checkpoint, and
weights that are numbers.

diffclip verify runs/diffclip runs/instruct
diffclip verify runs/instruct --accept     # takes the files as they are from now on
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from diffclip.base import lock, schema
from diffclip.base.commands import Parser
from diffclip.base.console import print_table
from diffclip.base.errors import InputError, exit_on_input_error, first_line
from diffclip.base.files import read_json, write_json
from diffclip.base.lines import print_line
from diffclip.base.ranges import check_header
from diffclip.base.sealed import all_damage, seal
from stages.ledger import read_record
from stages.run import results


def main(argv: list[str] | None = None) -> int:
    """Print what each directory is and what is wrong with it; 2 if anything is."""
    parser = Parser("diffclip verify", description=__doc__)
    parser.add_argument("runs", nargs="+", help="run directories of any stage")
    parser.add_argument("--accept", action="store_true", help="write down what the files of finished runs hold now")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    options = parser.parse_args(argv)
    found = {}
    for run in map(Path, options.runs):
        record = read_record(run)
        if record is None:
            raise InputError(f"{run}: is no run directory (it has no {schema.RECORD})")
        if options.accept and record["state"] == "finished":
            lock.hold(run)
            write_json(run / schema.RECORD, record | {"files": seal(run, results(run))})
            lock.release(run)
            record = read_record(run) or {}
        found[str(run)] = {"stage": record.get("stage"), "state": record["state"], "faults": list(faults(run, record))}
    show(found, options.json)
    return 2 if any(entry["faults"] for entry in found.values()) else 0


def faults(run: Path, record: dict) -> Iterator[str]:
    """Everything that is wrong with a run directory, a sentence each."""
    sealed = record.get("files")
    if isinstance(sealed, dict):
        yield from all_damage(run, sealed)
    elif record["state"] == "finished":
        unsealed = f"{schema.RECORD} does not say what the files of the result hold"
        yield f"{unsealed}: of an older version, or changed; `--accept` writes it down"
    for checkpoint in sorted(run.glob(schema.CHECKPOINTS)):
        marker = checkpoint / schema.COMPLETE
        if not marker.is_file():
            yield f"{checkpoint.name} was not written to its end; it will be removed"
        elif marker.stat().st_size:
            try:
                content = read_json(marker)
                yield from (f"{checkpoint.name}: {fault}" for fault in all_damage(checkpoint, content["files"]))
                if content["run"] != record.get("id"):
                    yield f"{checkpoint.name} is another run's"
            except (InputError, KeyError, TypeError, AttributeError):
                yield f"{checkpoint.name}: {schema.COMPLETE} is damaged"
    for file in sorted(run.glob("*.safetensors")):
        if name := _not_finite(file):
            yield f"{file.name}: {name}"


def show(found: dict[str, dict], as_json: bool) -> None:
    """A line for each run and each fault, or all of it as JSON."""
    if as_json:
        print_line(json.dumps(found, indent=1), keep="\n")
        return
    rows = [
        [run, str(entry["stage"]), entry["state"], str(len(entry["faults"]) or "none")] for run, entry in found.items()
    ]
    notes = [f"{run}: {fault}" for run, entry in found.items() for fault in entry["faults"]]
    print_table(["run", "stage", "state", "faults"], rows, notes=notes)


def _not_finite(file: Path) -> str:
    """What is wrong with the weights in a file, or ""."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        check_header(file)
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no dictionary
                tensor = weights.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    return f"{name} holds what is no finite number"
    except (SafetensorError, OSError, InputError) as error:
        return f"cannot be read ({first_line(error)})"
    return ""


if __name__ == "__main__":
    with exit_on_input_error():
        sys.exit(main())
