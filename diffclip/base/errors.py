"""One exception for what a user can mend, and the way command lines report it: one sentence, exit code 2."""

import errno
import os
import select
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from diffclip.base.lines import guard_terminal, print_line
from diffclip.base.noise import drop_noise

# States of a machine in which any write or opening fails, with what to do; a traceback would say nothing more.
SURROUNDINGS = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room within the quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "choose a folder that can be written into",
    errno.EMFILE: "raise the limit on open files (ulimit -n 4096)",
    errno.ENFILE: "end other programs: the system has no more open files to give",
    errno.ENOMEM: "free memory, or ask for less of it",
}
# In what gloo, the ranks' store and NCCL raise on a rank that waits for one which is gone.
GONE = ("closed by peer", "reset by peer", "Connection was likely closed", "Broken pipe", "remote process exit")


class InputError(Exception):
    """Bad input: the message is one sentence that names the file, key or line, and the remedy."""


def where() -> str:
    """ "rank 3 on n2", for messages of one of several processes; "" of one alone."""
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1
    return f"rank {os.environ.get('RANK', 0)} on {socket.gethostname()}" if several else ""


def on_rank() -> str:
    """`where` as the beginning of a message."""
    return f"{place}: " if (place := where()) else ""


def first_line(error: Exception) -> str:
    """What an error of a library says, without the lines below it; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def in_one_line(error: Exception, most: int | None = 300) -> str:
    """What an error of a library says, lines joined, cut to `most` characters; its kind where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def _lacking(error: Exception) -> int:
    """Which of `SURROUNDINGS` an error is about, 0 for none; libraries in other languages have it in their words."""
    if isinstance(error, OSError):
        return error.errno if error.errno in SURROUNDINGS else 0
    text = str(error) if isinstance(error, RuntimeError) or "Safetensor" in type(error).__name__ else ""
    return next((number for number in SURROUNDINGS if os.strerror(number) in text), 0)


def other_rank_gone(error: Exception) -> bool:
    """Whether a collective or the ranks' store lost another rank, which has ended or a network fault hides."""
    text = str(error)
    of_ranks = type(error).__module__ == "torch.distributed" or (isinstance(error, RuntimeError) and "/gloo/" in text)
    return bool(where()) and of_ranks and any(word in text for word in GONE)


def _told(error: Exception) -> str | None:
    """The sentence that says more about an error than its traceback would, None where there is none."""
    if isinstance(error, InputError):
        return str(error)
    if other_rank_gone(error):
        told = f"another rank has ended or cannot be reached ({in_one_line(error, None)})"
        return f"{told}: mend what it says, which is nothing if it was killed, and start the same command again"
    if lacking := _lacking(error):
        named = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        return f"{named}{os.strerror(lacking)}: {SURROUNDINGS[lacking]} and start the same command again"
    return None


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Print an `InputError`, that the disk is full and the like, or that another rank is gone, as one line on stderr
    and exit with code 2; anything else keeps its traceback.

    Ctrl-C is one word, and ends the process as it ends others. Where the reader of our output has gone, as `head` does,
    end quietly with code 1.
    """
    guard_terminal()
    drop_noise()
    try:
        try:
            yield
        except Exception as error:
            if (told := _told(error)) is not None:
                print_line(f"error: {on_rank()}{told}", error=True)
                sys.exit(2)
            if on_rank() and hasattr(error, "add_note"):  # Python 3.10 has none
                error.add_note(f"{on_rank()}this rank has failed")
            raise
        except KeyboardInterrupt:  # raised on, since a shell's loop ends where Ctrl-C has ended its command
            sys.excepthook = lambda *_: print_line("interrupted", error=True)
            raise
        finally:
            if not isinstance(sys.exc_info()[1], Exception):
                sys.stdout.flush()  # at exit it would be too late to end quietly
    except BrokenPipeError:
        pipes = select.poll()
        for stream in (1, 2):
            pipes.register(stream, 0)  # 0: errors alone, which is what a pipe without a reader has
        if not (broken := pipes.poll(0)):
            raise  # another pipe of the process
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream, _ in broken:
            os.dup2(nowhere, stream)  # for what Python still has to write
        sys.exit(1)
