"""Decoding and augmenting of image-text shards on one core: ours, ours as it was with PIL alone, and open_clip's.

    OMP_NUM_THREADS=1 python -m benchmarks.data [--images 'shards/*.tar'] [--count 2000] [--rounds 3]

Without shards of your own it renders photo-like JPEGs (640 x 480, noise over large shapes, 85 KB). All pipelines give
batches of 64 at 224 px with SLIP's augmentation, in turns, in the process that measures (no workers), the same files in
the page cache.
"""

import copy
import io
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

import diffclip
from benchmarks.rows import Row
from diffclip.base.backbones import PreprocessCfg, image_transform_v2, open_clip
from diffclip.base.commands import Parser
from diffclip.base.errors import exit_on_input_error
from diffclip.data.pairs import PairTable
from diffclip.data.sources import expand
from diffclip.data.training_pairs import TrainingPairs
from stages.contrastive import collate_cut

BATCH = 64
SCALE = (0.5, 1.0)  # share of the area that a crop keeps
NOISE = 7  # of 255 levels: 85 KB at quality 90


def render(folder: Path, shards: int = 4, per_shard: int = 100, size: int = 640) -> str:
    """Write tars of JPEGs that cost about what photos cost to decode, 0.28 bytes a pixel; returns their pattern."""
    rng = np.random.default_rng(0)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(per_shard):
                coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
                pixels = np.asarray(coarse.resize((size, size * 3 // 4), Image.Resampling.BICUBIC), dtype=np.int16)
                noisy = (pixels + rng.normal(0, NOISE, pixels.shape)).clip(0, 255).astype(np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
                for suffix, content in (("jpg", buffer.getvalue()), ("txt", b"an image of coarse coloured noise")):
                    info = tarfile.TarInfo(f"{shard:05d}{i:04d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return str(folder / f"{{00000..{shards - 1:05d}}}.tar")


def ours(pattern: str, config: dict) -> Iterator[dict[str, torch.Tensor]]:
    pairs = TrainingPairs(
        PairTable([pattern]),
        diffclip.transforms(config, train=True, normalized=False),
        diffclip.tokenizer(config),
        global_batch_size=BATCH,
        epochs=100,
        seed=0,
    )
    for batch in DataLoader(pairs, BATCH, collate_fn=collate_cut):
        yield {**batch, "image": diffclip.normalize(config, batch["image"])}


class ByPIL(Dataset):
    """The same pairs decoded and cropped by PIL."""

    def __init__(self, pattern: str, config: dict) -> None:
        self.table, self.tokenizer = PairTable([pattern]), diffclip.tokenizer(config)
        crop = T.RandomResizedCrop(
            224, scale=SCALE, interpolation=T.InterpolationMode(config["preprocess_cfg"]["interpolation"])
        )
        self.transform = T.Compose([crop, T.PILToTensor()])

    def __len__(self) -> int:
        return 100 * len(self.table)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image, captions = self.table[index % len(self.table)]
        return {"image": self.transform(image), "text": self.tokenizer(captions[:1])[0]}


def by_pil(pattern: str, config: dict) -> Iterator[dict[str, torch.Tensor]]:
    for batch in DataLoader(ByPIL(pattern, config), BATCH, shuffle=True):
        yield {**batch, "image": diffclip.normalize(config, batch["image"])}


def open_clips(pattern: str, config: dict) -> Iterator[list[torch.Tensor]]:
    from open_clip_train.data import get_wds_dataset

    settings = SimpleNamespace(
        train_data="::".join(expand([pattern])) if "*" in pattern else pattern,
        train_num_samples=100_000,
        train_data_upsampling_factors=None,
        dataset_resampled=True,
        batch_size=BATCH,
        workers=0,
        world_size=1,
        seed=0,
    )
    transform = image_transform_v2(
        PreprocessCfg(**config["preprocess_cfg"]), is_train=True, aug_cfg=open_clip.AugmentationCfg(scale=SCALE)
    )
    loader = get_wds_dataset(settings, transform, True, tokenizer=diffclip.tokenizer(config))
    return iter(loader.dataloader)


PIPELINES: dict[str, Callable] = {"diffclip": ours, "PIL": by_pil, "open_clip": open_clips}


def images_per_second(batches: Iterable, count: int) -> float:
    """Of processor time, which neighbours on the machine stretch less than the clock's."""
    start, seen = time.process_time(), 0
    for batch in batches:
        seen += len(batch["image"] if isinstance(batch, dict) else batch[0])
        if seen >= count:
            return seen / (time.process_time() - start)
    raise RuntimeError("the pipeline ended early")


def measure(pattern: str, config: dict, count: int, rounds: int) -> dict[str, list[float]]:
    """Images a second of each pipeline, in turns."""
    pipelines = {name: batches(pattern, config) for name, batches in PIPELINES.items()}
    for batches in pipelines.values():  # open_clip's shuffle buffer fills, and images come into the page cache
        images_per_second(batches, BATCH)
    rates: dict[str, list[float]] = {name: [] for name in pipelines}
    for _ in range(rounds):
        for name, batches in pipelines.items():
            rates[name].append(images_per_second(batches, count))
    return rates


def rows() -> list[Row]:
    """Decoding and cropping on one core."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        pattern = render(Path(folder), 2, 64)
        rates = measure(pattern, diffclip.MODELS["DiffCLIP-B-16"], 4 * BATCH, 3)
    middle = {name: median(each) for name, each in rates.items()}
    work = "decoding and cropping 640 x 480"
    return [Row(work, name, middle[name], middle["diffclip"], "images/s") for name in [*PIPELINES][1:]]


def main() -> None:
    parser = Parser("python -m benchmarks.data", description=__doc__)
    parser.add_argument("--images", "--pictures", default="", help="pattern of tars with .jpg and .txt (rendered ones)")
    parser.add_argument("--count", type=int, default=1500, help="images per measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each, in turns")
    parser.add_argument(
        "--interpolation", default="bilinear", choices=("bilinear", "bicubic"), help="SLIP's, open_clip's"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = copy.deepcopy(diffclip.MODELS["DiffCLIP-B-16"])
    config["preprocess_cfg"]["interpolation"] = options.interpolation
    with tempfile.TemporaryDirectory() as folder:
        pattern = options.images or render(Path(folder))
        rates = measure(pattern, config, options.count, options.rounds)
    for name, measured in rates.items():
        print(f"{name:10s} {median(measured):7.1f} images/s on one core ({', '.join(f'{r:.1f}' for r in measured)})")
    for name in [*PIPELINES][1:]:
        print(f"diffclip / {name}: {median(a / b for a, b in zip(rates['diffclip'], rates[name])):.2f}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
