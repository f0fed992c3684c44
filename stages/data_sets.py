"""The data sets that stage 0 fetches: from where, how much is to arrive, and what reads it."""

from typing import NamedTuple


class Hub(NamedTuple):
    """Files of a Hugging Face dataset repository that match one of `files`; archives are unpacked."""

    repo: str
    files: tuple[str, ...]

    def __str__(self) -> str:
        return f"hf.co/datasets/{self.repo}: {', '.join(self.files)}"


class Web(NamedTuple):
    """One file; archives are unpacked."""

    url: str
    folder: str = ""  # inside the set's folder
    digest: str = ""  # as `diffclip.base.download.download` takes it

    def __str__(self) -> str:
        return self.url


class Images(NamedTuple):
    """The images that JSON-lines files already fetched name under "image", one by one."""

    named_in: str
    url: str

    def __str__(self) -> str:
        return f"{self.url}: those named in {self.named_in}"


class DataSet(NamedTuple):
    """Where a set comes from, and how to count what arrived."""

    sources: tuple[Hub | Web | Images, ...]
    counted: tuple[str, str]  # (unit, pattern of files): pairs or images in tars, or files
    expected: int  # when the set was published
    size: str
    then: str  # what reads it


POPE = "https://raw.githubusercontent.com/AoiDragon/POPE/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco/"
POPE_SHA256 = {  # at that commit
    "random": "c16b65d2df6d70bb0814c8a4375833d39cdb09928fd936d3fc546491efa37f35",
    "popular": "5b16653023bf4f64d57eb0d168259de6627f5cde7538b85ebed3cc33034aa6cc",
    "adversarial": "1d8f0906a9b50c05640f6f23abfac97523be2a1bed28f7eadc63b811699b2d26",
}
COCO = "http://images.cocodataset.org/"


def _shards(name: str, pairs: int, size: str) -> DataSet:
    files = f"{name}-train-*.tar"
    source = Hub(f"pixparse/{name}-wds", (files,))
    return DataSet((source,), ("pairs", files), pairs, size, f"diffclip pretrain --train_data 'DIR/{files}'")


def _clip_benchmark(name: str, images: int, size: str, train: bool = False) -> DataSet:
    source = Hub(f"clip-benchmark/wds_{name}", ("test/*", *(["train/*"] if train else []), "*.txt"))
    then = "diffclip benchmark --model RUN --data_root OUT --suite paper --output_dir results"
    return DataSet((source,), ("pictures", "test/*.tar"), images, size, then)


SETS = {
    "cc3m": _shards("cc3m", 3_318_333, "280 GB"),
    "cc12m": _shards("cc12m", 12_423_374, "1 TB"),
    "llava-pretrain": DataSet(
        (
            Hub("liuhaotian/LLaVA-Pretrain", ("blip_laion_cc_sbu_558k.json",)),
            Hub("liuhaotian/LLaVA-Pretrain", ("images.zip",)),
        ),
        ("files", "*/*.jpg"),
        558_128,
        "27 GB",
        "diffclip align --data DIR/blip_laion_cc_sbu_558k.json --image_root DIR",
    ),
    "llava-coco": DataSet(
        (
            Hub("liuhaotian/LLaVA-Instruct-150K", ("llava_v1_5_mix665k.json",)),
            Web(f"{COCO}zips/train2017.zip", "coco", "md5:cced6f7f71b7629ddf16f17bbcfab6b2"),
        ),
        ("files", "coco/train2017/*.jpg"),
        118_287,
        "20 GB",
        "diffclip instruct --data DIR/llava_v1_5_mix665k.json --image_prefix coco/ --image_root DIR",
    ),
    "pope": DataSet(
        (
            *(Web(f"{POPE}coco_pope_{split}.json", "", f"sha256:{sha}") for split, sha in POPE_SHA256.items()),
            Images("coco_pope_*.json", f"{COCO}val2014/"),
        ),
        ("files", "images/*.jpg"),
        500,
        "80 MB",
        "diffclip evaluate --pope DIR --image_root DIR/images",
    ),
    "imagenet": _clip_benchmark("imagenet1k", 50_000, "7 GB"),
    "imagenet-v2": _clip_benchmark("imagenetv2", 10_000, "1.2 GB"),
    "imagenet-a": _clip_benchmark("imagenet-a", 7_500, "0.7 GB"),
    "imagenet-r": _clip_benchmark("imagenet-r", 30_000, "2.2 GB"),
    "imagenet-sketch": _clip_benchmark("imagenet_sketch", 50_889, "7.6 GB"),
    "flickr8k": _clip_benchmark("flickr8k", 1_000, "0.2 GB"),
    "flickr30k": _clip_benchmark("flickr30k", 1_000, "0.2 GB"),
    "coco": _clip_benchmark("mscoco_captions", 5_000, "0.9 GB"),
    "food101": _clip_benchmark("food101", 25_250, "5 GB", train=True),
    "cifar10": _clip_benchmark("vtab-cifar10", 10_000, "0.2 GB", train=True),
    "cifar100": _clip_benchmark("vtab-cifar100", 10_000, "0.2 GB", train=True),
    "sun397": _clip_benchmark("sun397", 21_750, "20 GB", train=True),
    "aircraft": _clip_benchmark("fgvc_aircraft", 3_333, "3 GB", train=True),
    "dtd": _clip_benchmark("vtab-dtd", 1_880, "0.6 GB", train=True),
    "pets": _clip_benchmark("vtab-pets", 3_669, "0.8 GB", train=True),
    "caltech101": _clip_benchmark("vtab-caltech101", 6_084, "0.7 GB", train=True),
    "flowers": _clip_benchmark("vtab-flowers", 6_149, "0.4 GB", train=True),
    "mmvp": DataSet(
        (Hub("MMVP/MMVP_VLM", ("*",)),),
        ("files", "MLLM_VLM Images/*/*.jpg"),
        270,
        "50 MB",
        "the mmvp/ folder of benchmarks",
    ),
}
