"""The CLIP benchmarks over one feature cache, one module a protocol; docs/add_benchmark.md says how to add one.

Percent everywhere: every score is in [0, 100], so that it compares with the published tables as it stands.
"""

from typing import NamedTuple


class Entry(NamedTuple):
    """What is known of a protocol without its module, `diffclip.benchmarks.<name>`, which imports torch."""

    part: str  # of a suite: classification, shifts, retrieval, or one that the module reads itself
    tables: dict[str, str]  # heading in the report -> pattern of the metrics' names; its groups name the row


# In the order of the results; neighbours that score the same part go through its sets together.
PROTOCOLS = {
    "zero_shot": Entry("classification", {"Zero-shot classification, top-1": r"zero_shot/(.+)/top1"}),
    "shift": Entry("shifts", {"Distribution shifts, zero-shot top-1": r"shift/(?:average|(.+)/top1)"}),
    "retrieval": Entry(
        "retrieval",
        {
            "Retrieval, text to image": r"retrieval/(?:(.+)/)?text_to_image/(R@\d+)",
            "Retrieval, image to text": r"retrieval/(?:(.+)/)?image_to_text/(R@\d+)",
        },
    ),
    "linear_probe": Entry("classification", {"Linear probe, accuracy": r"linear_probe/(.+)/accuracy"}),
    "few_shot": Entry("classification", {"Few-shot, accuracy": r"few_shot/(.+)/accuracy"}),
    "mmvp": Entry("mmvp", {"MMVP-VLM, pairs right": r"mmvp/(.+)"}),
}

# The paper's sets that torchvision has, and what its class finds below its root, by which the layout is recognised.
TORCHVISION = {
    "food101": "food-101",
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "sun397": "SUN397",
    "aircraft": "fgvc-aircraft-2013b",
    "dtd": "dtd/dtd",
    "pets": "oxford-iiit-pet",
    "caltech101": "caltech101/101_ObjectCategories",
    "flowers": "flowers-102",
}
