"""`diffclip check`: pairs go to `diffclip.data.check`, conversations to `mllm.data`, by what their files are."""

import itertools
import os
import sys

from diffclip.base.errors import InputError
from diffclip.data.tables import column_names, kind_of

TURNS = ("conversations", "conversation", "messages", "texts", "question", "answer", "prompt", "completion")


def main(argv: list[str] | None = None) -> int:
    """Check the sources that a command line begins with; --pairs says that they are pairs.

    `diffclip check --help` is about conversations, `diffclip check --pairs --help` about pairs.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    sources = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    if "--pairs" in argv or (sources and not holds_turns(sources[0])):
        from diffclip.data import check

        return check.main(argv)
    from mllm.data import __main__ as conversations

    return conversations.main(["check", *argv])


def holds_turns(source: str) -> bool:
    """Whether a file holds conversations: by its columns, or else, what cannot be read, by its kind."""
    if not os.path.exists(source):
        return kind_of(source) in (".json", ".jsonl") and "*" not in source
    try:
        names = {name.lower() for name in column_names(source)}
    except InputError:  # the one that reads it says what is wrong with it
        return kind_of(source) in (".json", ".jsonl")
    return not names.isdisjoint(TURNS)
