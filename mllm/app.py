"""A page in the browser to talk with a multimodal run about images, which shows where in them each answer looks.

diffclip app RUN                          # http://127.0.0.1:7860, for this machine alone
diffclip app RUN RUN                      # two runs answer beside each other
diffclip app RUN --host 0.0.0.0 --password WORD   # for all who reach this machine and know the word
"""

import importlib.util
import os
import signal
import sys
import tempfile
from pathlib import Path

from diffclip.base.commands import Parser, number
from diffclip.base.errors import InputError, exit_on_input_error
from diffclip.base.imports import importing
from diffclip.base.lines import Plain
from mllm.chat import add_model_options, generation_of


def main(argv: list[str] | None = None) -> None:
    parser = Parser("diffclip app", description=__doc__)
    add_model_options(parser)
    parser.add_argument("other", nargs="?", metavar="RUN", help="another run, which answers beside the first")
    parser.add_argument("--examples", type=Path, help="folder of images to choose from (built-in scenes)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=number(int, 1, 65535), default=7860, help="(7860)")
    parser.add_argument(
        "--password",
        default=os.environ.get("DIFFCLIP_APP_PASSWORD", ""),
        help="ask visitors for this word ($DIFFCLIP_APP_PASSWORD, which others on this machine do not see)",
    )
    parser.add_argument("--open", action="store_true", help="let all who reach --host in, without a password")
    options = parser.parse_args(argv)
    if importlib.util.find_spec("gradio") is None:
        raise InputError("the app needs gradio: pip install 'diffclip-stack[app]'")
    from mllm import page_guard  # not at the top, as all that needs what gradio brings

    if not (page_guard.is_loopback(options.host) or options.password or options.open):
        raise InputError(
            f"--host {options.host} shows the page to all who reach this machine: give --password WORD, or --open if "
            "nobody is to be asked for one"
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # as Ctrl-C does, so that uploads are removed
    with tempfile.TemporaryDirectory(prefix="diffclip-app-") as folder:
        # read when gradio is imported: it calls nobody, and uploads lie in a folder of this process's own
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
        with importing():
            from mllm import about, model, page

        examples = page.examples_of(options.examples, Path(folder))
        runs = [run for run in (options.run, options.other) if run]
        models = [
            page.Shown(
                about.name_of(run),
                about.trained_on(run),
                model.load(run, options.dtype, options.device, quiet=True),
            )
            for run in runs
        ]
        served = page.serve(
            *(models, options.host, options.port, generation_of(options), Path(folder)),
            examples=examples,
            password=options.password,
        )
        sys.stdout, sys.stderr = Plain(sys.stdout), Plain(sys.stderr)  # gradio prints what visitors send
        try:
            served.block_thread()
        finally:  # else a request that is being answered writes into the folder while it is removed
            served.close(verbose=False)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
