"""Tars of random images and captions."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = ["red", "green", "blue", "dark", "light", "small", "large", "round", "square", "soft"]


def jpeg(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_shard(path: Path, pairs: int, seed: int = 0, replace: dict[int, bytes] | None = None) -> None:
    """A tar of random images and captions; `replace` puts other bytes in the place of some images."""
    rng = np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for i in range(pairs):
            picture, caption = jpeg(rng), " ".join(rng.choice(WORDS, 4))
            for suffix, content in (("jpg", (replace or {}).get(i, picture)), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{path.stem}_{i:04d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
