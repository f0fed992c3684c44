"""A command whose reader goes before the end, as `head` does, ends without a word."""

import os
import subprocess
import sys

import pytest
from launch import ROOT, environment

BUFFERED = environment() | {"PYTHONUNBUFFERED": ""}  # as output into a pipe is by default


def run_without_reader(*body: str, streams: tuple[str, ...] = ("stdout",)) -> subprocess.CompletedProcess:
    """Run lines in `exit_on_input_error`, with `streams` into a pipe that nobody reads any more."""
    program = "import sys; from diffclip.base.errors import *\nwith exit_on_input_error():"
    reader, writer = os.pipe()
    os.close(reader)
    outputs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | dict.fromkeys(streams, writer)
    try:
        command = [sys.executable, "-c", "\n    ".join([program, *body])]
        return subprocess.run(command, cwd=ROOT, env=BUFFERED, text=True, timeout=60, **outputs)
    finally:
        os.close(writer)


@pytest.mark.parametrize("lines", [1, 100_000])  # noticed at the end, and in the midst
@pytest.mark.parametrize("end", ["pass", "sys.exit()"])  # --help ends like the second
def test_a_reader_that_has_gone_is_no_error(lines, end):
    ended = run_without_reader(f"for _ in range({lines}): print('a line of some length')", end)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_nor_is_one_of_messages():
    assert run_without_reader("raise InputError('x')", streams=("stdout", "stderr")).returncode == 1


def test_control_c_is_one_word():
    """Also where these tests run in the background, whose processes are started with Ctrl-C ignored."""
    heed = "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    ended = run_without_reader(heed, "os.kill(os.getpid(), signal.SIGINT)", streams=())
    assert (ended.returncode, ended.stderr) == (-2, "interrupted\n")


def test_what_went_wrong_before_is_still_told():
    assert "ZeroDivisionError" in run_without_reader("print(1)", "1 / 0").stderr
    refused = run_without_reader("raise InputError('no such thing')")
    assert (refused.returncode, refused.stderr) == (2, "error: no such thing\n")


def limited(limit: str, body: str) -> subprocess.CompletedProcess:
    program = f"import resource, errno; resource.setrlimit(resource.{limit})\nfrom diffclip.base.errors import *\n"
    program += f"with exit_on_input_error():\n    {body}"
    return subprocess.run([sys.executable, "-c", program], env=BUFFERED, cwd=ROOT, text=True, capture_output=True)


def test_what_the_machine_lacks_is_one_sentence(tmp_path):
    written = limited("RLIMIT_FSIZE, (1, 1)", f"open({str(tmp_path / 'x')!r}, 'wb', buffering=0).write(b'12'), 1 / 0")
    assert written.returncode == 1  # the first byte was written: no error yet
    open_files = limited("RLIMIT_NOFILE, (16, 16)", "files = [open('/dev/null') for _ in range(32)]")
    assert open_files.returncode == 2
    assert open_files.stderr.startswith("error: /dev/null: Too many open files: raise the limit on open files (ulimit")
    full = limited("RLIMIT_CORE, (0, 0)", "raise OSError(errno.ENOSPC, 'No space left on device', '/data/x')")
    told = "error: /data/x: No space left on device: make room on the disk and start the same command again\n"
    assert (full.returncode, full.stderr) == (2, told)
    weights = limited("RLIMIT_CORE, (0, 0)", "raise RuntimeError('unable to open </x>: Too many open files (24)')")
    assert weights.returncode == 2 and weights.stderr.startswith("error: Too many open files: raise the limit")
    other = limited("RLIMIT_CORE, (0, 0)", "raise OSError(errno.EIO, 'Input/output error')")
    assert other.returncode == 1 and "Traceback" in other.stderr


def test_another_broken_pipe_keeps_its_traceback():
    ended = run_without_reader("raise BrokenPipeError('a worker has died')", streams=())
    assert "a worker has died" in ended.stderr


@pytest.mark.parametrize("arguments", ["config list", "--help", "config --help"])
def test_the_console_command_into_a_pipe(arguments):
    command = f"{sys.executable} -m diffclip {arguments} | true; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], cwd=ROOT, env=BUFFERED, text=True, capture_output=True)
    assert (ended.stdout, ended.stderr) == ("1\n", "")
