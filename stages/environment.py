"""What a bug report needs: versions, devices, the environment variables that decide something, and the commit.

diffclip env
"""

import importlib
import os
import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from diffclip.base.commands import Parser
from diffclip.base.errors import exit_on_input_error
from stages.run import git_state

PACKAGES = [
    "diffclip-stack",
    "torch",
    "torchvision",
    "numpy",
    "transformers",
    "accelerate",
    "deepspeed",
    "peft",
    "open_clip_torch",
    "timm",
    "datasets",
    "webdataset",
    "lmms-eval",
    "clip-benchmark",
    "bitsandbytes",
    "gradio",
]
VARIABLES = re.compile(r"(DIFFCLIP|OMP|GOMP|MKL|NCCL|CUDA|HF_HUB_OFFLINE|TOKENIZERS|MALLOC)\w*|WORLD_SIZE")


def environment() -> Iterator[tuple[str, str]]:
    """(name, value) of everything that is reported; the user's folder is written `~`."""
    yield "python", platform.python_version()
    yield "system", f"{platform.platform()}, {len(os.sched_getaffinity(0))} cores"
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "not installed"
    yield "commit", git_state() or "not a checkout"
    torch = importlib.import_module("torch")  # here alone, since it takes seconds
    yield "CUDA", f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}" if torch.version.cuda else "none"
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        yield f"GPU {i}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
    yield "OpenMP threads", str(torch.get_num_threads())
    home = str(Path.home())
    for name in sorted(filter(VARIABLES.fullmatch, os.environ)):
        yield name, os.environ[name].replace(home, "~")


def main(argv: list[str] | None = None) -> None:
    Parser("diffclip env", description=__doc__).parse_args(argv)
    for name, value in environment():
        print(f"{name:<20} {value}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
