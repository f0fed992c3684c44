"""What libraries say and show that no user of ours can act upon: dropped; all else that they say stays."""

import functools
import logging
import re
import warnings
from types import ModuleType

from diffclip.base.after_import import after_import

LOGGED = {  # logger -> what its messages say, behind "[RANK 0]" in some
    "DeepSpeed": ("Setting accelerator to CPU", "Unable to find hostfile"),
    "accelerate.accelerator": ("Gradient accumulation steps mismatch",),  # the setting of ours that both are given
    "transformers.generation.utils": (r"Both `max_new_tokens` .* and `max_length`",),  # the former counts
    "transformers.trainer": (
        r"missing keys in the checkpoint model loaded: \['lm_head\.weight'\]",
    ),  # it is the embedding
    "transformers.trainer_utils": ("mtime may not be reliable",),  # checkpoints go by their number
}
WARNED = (
    "find_unused_parameters=True was specified",  # rows without images leave the projector unused, now and then
    r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated",  # by DeepSpeed
)


def _is_news(record: logging.LogRecord) -> bool:
    return not any(re.search(said, str(record.msg)) for said in LOGGED[record.name])


def _without_bars(transformers_logging: ModuleType) -> None:
    """Bars of loading and writing weights; those of downloads are the Hub's."""
    transformers_logging.set_tqdm_hook(lambda bar, args, kwargs: transformers_logging.EmptyTqdm(*args, **kwargs))


@functools.cache
def drop_noise() -> None:
    """From now on none of it is shown, whenever the libraries are imported."""
    for name in LOGGED:
        logging.getLogger(name).addFilter(_is_news)
    for start in WARNED:
        warnings.filterwarnings("ignore", start)
    after_import({"transformers.utils.logging": _without_bars})
