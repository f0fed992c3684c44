"""One exception for what a user can mend, and the way command lines report it: one sentence, exit code 2."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(Exception):
    """Bad input: the message is one sentence that names the file, key or line, and the remedy."""


def first_line(error: Exception) -> str:
    """What an error of a library says, without the lines below it; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Print an `InputError` as one line on stderr and exit with code 2; anything else keeps its traceback."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
