"""`diffclip check`: pairs go to `diffclip.data.check`, conversations to `mllm.data`, by what their files are."""

import itertools
import os
import sys

from diffclip.base.errors import InputError

TURNS = ("conversations", "conversation", "messages", "texts", "question", "answer", "prompt", "completion")


def main(argv: list[str] | None = None) -> int:
    """Check sources, which are told from the words before the first flag, or else from the paths that are there.

    `diffclip check --help` is about conversations, `diffclip check --pairs --help` about pairs.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    sources = [*itertools.takewhile(lambda word: not word.startswith("-"), argv)] or [*filter(os.path.exists, argv)]
    kinds = {holds_turns(source) for source in sources}
    if "--pairs" in argv or (False in kinds and True not in kinds and "--conversations" not in argv):
        from diffclip.data import check

        return check.main(argv)
    from mllm.data import __main__ as conversations

    return conversations.main(["check", *argv])


def holds_turns(source: str) -> bool | None:
    """Whether a source holds conversations, by its columns; None of JSON that cannot be read."""
    from diffclip.data.tables import column_names, kind_of  # not at the top: --help needs no `datasets`

    unknown = None if kind_of(source) in (".json", ".jsonl") and "*" not in source else False
    if not os.path.exists(source):
        return unknown
    try:
        names = {name.lower() for name in column_names(source)}
    except InputError:  # the one that reads it says what is wrong with it
        return unknown
    return not names.isdisjoint(TURNS)
