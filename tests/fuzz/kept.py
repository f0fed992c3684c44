"""What our commands keep in the cache folder, read as they read it, before a file there is spoilt and after.

No answer may change: what is not as it was written counts as not there.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, LlavaProcessor

from diffclip.attention import fastest
from diffclip.base.files import write_whole
from diffclip.data import training_pairs
from diffclip.data.pairs import PairTable
from diffclip.weights import from_pretrained
from mllm.data import judge
from mllm.data.rows import load_rows
from stages import manifest, provenance

Q = torch.ones(1, 1, 4, 4)


def of_rows(folder: Path) -> Any:
    """Rows, verdicts on their images, lengths: of eight one has lost its image, one's is broken, one is long."""
    rows_json, images = folder / "rows/llava.json", folder / "rows/images"
    if (images / "3.jpg").exists():
        (images / "3.jpg").unlink()
        write_whole(images / "4.jpg", "broken")
        write_whole(rows_json, rows_json.read_text().replace("it red", "it" + " red" * 30, 1))
    processor = _processor(folder / "models/mllm")
    rows = load_rows([rows_json], images, max_bad_share=0.5)
    lengths = judge.token_lengths(rows, processor.tokenizer, 4, "vicuna")
    judged = judge.judged(rows, processor, template="vicuna", max_length=int(lengths.min()))
    return [*rows], rows.problems, [*judged], judged.problems, lengths.tolist()


def of_files(folder: Path) -> Any:
    """Places of pairs in a tar, their order, digests of a file and of a folder, and the fastest of two attentions."""
    training_pairs.SHARED_FROM = provenance.SHORT_FILE = 0
    fastest._known.clear()
    table = PairTable([str(folder / "data/pretrain/*.tar")], caption_member=("json",))
    stream = training_pairs.TrainingPairs(table, None, None, global_batch_size=2, epochs=2, seed=0)  # type: ignore
    pairs = [table.encoded(int(row)) for row in stream.order(1)]
    digests = provenance.digest(folder / "rows/llava.json"), manifest.folder_manifest(folder / "rows")
    return pairs, table.problems, digests, fastest.fastest("kind", ("none", "sum"), _mix, (Q, Q, Q), None, False)


def _mix(form: str, *inputs: Any) -> torch.Tensor:
    if form == "none":
        raise RuntimeError("no kernel for this device")
    return sum(x.sum() for x in inputs[:3])


@lru_cache
def _processor(model: Path) -> LlavaProcessor:
    return from_pretrained(AutoProcessor, str(model))
