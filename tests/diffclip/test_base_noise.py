"""What no user can act upon is dropped; everything else that the same libraries say is heard."""

import io
import logging
import warnings

import pytest
from transformers.utils import logging as transformers_logging

from diffclip.base.noise import drop_noise

drop_noise()


def said(logger: str, *arguments: object) -> str:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger(logger).addHandler(handler)
    try:
        logging.getLogger(logger).warning(*arguments)
    finally:
        logging.getLogger(logger).removeHandler(handler)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("logger", "noise"),
    [
        ("DeepSpeed", "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it."),
        ("DeepSpeed", "Unable to find hostfile, will proceed with training with local resources only."),
        (
            "accelerate.accelerator",
            "[RANK 0] Gradient accumulation steps mismatch: GradientAccumulationPlugin has 1",
        ),
        ("transformers.generation.utils", "Both `max_new_tokens` (=5) and `max_length`(=20) seem to have been set."),
        (
            "transformers.trainer",
            "There were missing keys in the checkpoint model loaded: ['lm_head.weight'].",
        ),
        ("transformers.trainer_utils", "mtime may not be reliable on this filesystem, falling back to numerical order"),
    ],
    ids=["accelerator", "hostfile", "accumulation", "max_length", "tied weights", "mtime"],
)
def test_a_library_is_quiet_of_that_alone(logger, noise):
    assert said(logger, noise) == ""
    assert said(logger, "the loss scale is %d", 1) == "the loss scale is 1\n"
    assert "projector" in said(logger, "There were missing keys in the checkpoint model loaded: ['projector.weight'].")
    assert said("another", noise) == noise + "\n"


def test_warnings_of_what_libraries_do_are_dropped():
    names = ("all_gather_into_tensor", "reduce_scatter_tensor")
    with warnings.catch_warnings(record=True) as heard:
        drop_noise.__wrapped__()  # the filters that the module's call set are pytest's to put aside
        warnings.warn("find_unused_parameters=True was specified in DDP constructor, but", stacklevel=1)
        for name in names:
            warnings.warn(f"`torch.distributed.{name}` is deprecated. Please use", FutureWarning, stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert [str(one.message) for one in heard] == ["another"]


def test_bars_of_weights_are_not_drawn_and_those_of_downloads_are(capsys):
    from huggingface_hub.utils import are_progress_bars_disabled

    transformers_logging.enable_progress_bar()  # which other tests of this process may have put off
    drop_noise.__wrapped__()
    assert [*transformers_logging.tqdm([1, 2], desc="Loading weights")] == [1, 2]
    assert capsys.readouterr().err == "" and not are_progress_bars_disabled()
