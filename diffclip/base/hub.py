"""The Hub: local copies of its datasets, and what asking it may end in."""

import glob
import os

import huggingface_hub  # which imports its parts when they are asked for

from diffclip.base.errors import InputError


def hub_errors() -> tuple[type[Exception], ...]:
    """What a call of huggingface_hub raises for a wrong name or no access; that of its HTTP client is no OSError."""
    errors = huggingface_hub.errors
    kinds = [kind for kind in errors.HfHubHTTPError.__mro__ if issubclass(kind, Exception)]
    of_client = [kind for kind in kinds if kind.__module__ != "builtins"]
    return (ConnectionError, errors.LocalEntryNotFoundError, errors.HFValidationError, *of_client)


def dataset_copy(name: str) -> str:
    """The local copy of `hf:owner/name`, a dataset of the Hub, or of a file or folder in it, `hf:owner/name/PATH`; of a
    PATH with globs, the glob of its local copies.

    InputError if it is not in reach, or has no such file.
    """
    owner, _, rest = name.removeprefix("hf:").strip("/").partition("/")
    dataset, _, path = rest.partition("/")
    try:
        patterns = [path, f"{path}/*"] if path else None
        folder = huggingface_hub.snapshot_download(f"{owner}/{dataset}", repo_type="dataset", allow_patterns=patterns)
    except hub_errors() as error:
        raise InputError(
            f"{name}: no dataset of the Hub in reach ({type(error).__name__}): check its name, hf:owner/name, the "
            "network and, of a private one, HF_TOKEN"
        ) from None
    place = os.path.join(folder, path) if path else folder
    if not os.path.exists(place) and not glob.has_magic(path):
        raise InputError(f"{name}: the dataset {owner}/{dataset} has no {path}; look at its files on the Hub")
    return place
