"""The command `diffclip`: one door to everything, `diffclip VERB …`.

Also `python -m diffclip VERB …`, `torchrun -m diffclip pretrain …` and `deepspeed --module diffclip align …`.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from diffclip.base.commands import closest
from diffclip.base.errors import InputError, exit_on_input_error
from diffclip.base.lines import print_line
from diffclip.base.orphans import end_with_parents


class Verb(NamedTuple):
    """A command: where it stands in the help, what it does, and the module whose `main` does it.

    `command` is the module and, where one module has several commands, the words that choose this one.
    """

    group: str
    summary: str
    command: str


VERBS = {
    "pretrain": Verb("stages", "train CLIP or DiffCLIP on image-text pairs", "stages.pretrain"),
    "language": Verb("stages", "train a small stand-in language model on text", "stages.language"),
    "align": Verb("stages", "train the projector from the vision tower to a language model", "stages.align"),
    "instruct": Verb("stages", "train projector and language model on conversations", "stages.instruct"),
    "evaluate": Verb("stages", "CLIP benchmarks, POPE, tasks of lmms-eval, attention maps", "stages.evaluate"),
    "report": Verb("stages", "one page of tables and figures from evaluated runs", "stages.report.__main__"),
    "pipeline": Verb("stages", "all of these for several variants, on rendered scenes", "stages.pipeline"),
    "benchmark": Verb(
        "models", "score and compare dual encoders on the CLIP benchmarks", "diffclip.benchmarks.__main__"
    ),
    "maps": Verb("models", "draw which patches speak for a text", "diffclip.maps"),
    "localise": Verb("models", "score attention maps against masks of objects", "diffclip.benchmarks.localisation"),
    "convert": Verb("models", "write weights in another layout", "diffclip.convert"),
    "stats": Verb("multimodal", "say what a LLaVA file holds", "mllm.data.__main__ stats"),
    "chat": Verb("multimodal", "ask a trained model about images", "mllm.chat"),
    "app": Verb("multimodal", "a page in the browser to chat about images with one run or two", "mllm.app"),
    "pope": Verb("multimodal", "check, score, compare and diagnose POPE answers; CHAIR", "mllm.pope.__main__"),
    "verify": Verb("tools", "say whether run directories hold what was written into them", "stages.verify"),
    "data": Verb("tools", "fetch the paper's data sets, or pairs from a list of addresses", "stages.fetch"),
    "check": Verb("tools", "find the pairs or conversations that cannot be trained on", "stages.check"),
    "scenes": Verb("tools", "draw the built-in scenes in the formats of real data", "diffclip.scenes.__main__"),
    "publish": Verb("tools", "write a model card and send a run to the Hub", "stages.publish"),
    "config": Verb("tools", "list, show or copy the shipped configurations", "stages.shipped"),
    "env": Verb("tools", "print versions and devices for a bug report", "stages.provenance"),
}


def usage() -> str:
    """The verbs in their groups, one line each."""
    lines = ["usage: diffclip VERB ...      (diffclip VERB --help lists what a verb takes)"]
    group = ""
    for name, verb in VERBS.items():
        if verb.group != group:
            group = verb.group
            lines += ["", f"{group}:"]
        lines.append(f"  {name:<11}{verb.summary}")
    lines += ["", "example:", "  diffclip pipeline --config quickstart/pipeline --output_dir runs/quickstart"]
    return "\n".join(lines)


def call(argv: Sequence[str]) -> int | None:
    """Run the verb that a command line begins with; its exit code, if it gives one.

    Raises:
        InputError: there is no such verb, or the command says what is wrong with its input.
    """
    first = next((i for i, word in enumerate(argv) if not word.startswith("--local")), 0)  # deepspeed's --local_rank=0
    name, *rest = [*argv[first : first + 1], *argv[:first], *argv[first + 1 :]] or ["--help"]
    if name in ("-h", "--help", "help"):
        print_line(usage(), keep="\n")
        return None
    if name not in VERBS:
        close = closest(name, VERBS)
        hint = f"did you mean `diffclip {close}`?" if close else "`diffclip --help` lists the verbs"
        raise InputError(f"no verb {name}: {hint}")
    module, *words = VERBS[name].command.split()
    return importlib.import_module(module).main([*words, *rest])


def main(argv: list[str] | None = None) -> int | None:
    """Entry point of the console command, which bad input ends with one sentence and exit code 2."""
    end_with_parents()
    with exit_on_input_error():
        return call(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
