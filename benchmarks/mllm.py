"""What the multimodal stages do to save time, each beside the usual way in one run, at sizes scaled to a CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.mllm [--steps 5] [--rows 2000]

- logits: a training step with logits for supervised positions only, beside one with logits for all of them
- batches: useful tokens a second in batches of like length, beside random ones
- packing: a step of these batches with the examples in one row, attention by example, beside padding them; and the same
  row with sdpa's mask, which the stages refuse
- labels: text tokenised once and labels read off its spans, beside tokenising every turn again to find the answers
- tower: the vision tower stopped at the layer that is read, beside all of its blocks
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

import diffclip
from benchmarks.rows import Row
from diffclip.base.commands import Parser
from diffclip.base.errors import exit_on_input_error
from mllm.conversation import IGNORE, IMAGE, encode, render
from mllm.data.examples import pack, pad_batch, training_order
from mllm.llava import DiffCLIPLlavaConfig, DiffCLIPLlavaForConditionalGeneration
from mllm.packed import BY_EXAMPLE
from mllm.weights import freeze

WORDS = [
    "is",
    "there",
    "a",
    "small",
    "red",
    "large",
    "blue",
    "circle",
    "star",
    "left",
    "of",
    "the",
    "picture",
    "yes",
    "no",
]


def side_by_side(ways: dict[str, Callable[[], object]], steps: int) -> dict[str, float]:
    """Median seconds of each way; they take turns, so that a busy moment meets them all."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for step in range(steps + 1):
        for name, do in ways.items():
            start = time.perf_counter()
            do()
            if step:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def say(what: str, seconds: dict[str, float], per: float = 1.0, unit: str = "ms", scale: float = 1e3) -> list[Row]:
    (ours, a), (usual, b) = seconds.items()
    print(
        f"{what:8s} {ours} {a / per * scale:.1f} {unit}, {usual} {b / per * scale:.1f} {unit}: {b / a:.2f}x", flush=True
    )
    return [Row(f"{what}: {ours}", usual, b, a, "s")]


def small_model(vocabulary: int) -> DiffCLIPLlavaForConditionalGeneration:
    """DiffCLIP-tiny's tower, a linear projector, a Qwen2 of six layers of width 256."""
    tower = diffclip.DiffCLIPVisionModel(
        diffclip.DiffCLIPVisionConfig(
            hidden_size=192,
            num_hidden_layers=12,
            num_attention_heads=4,
            image_size=96,
            patch_size=16,
            lambda_init=[0.8] * 12,
            stop_early=True,
        )
    )
    text = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    config = DiffCLIPLlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=vocabulary - 1,
        image_seq_length=36,
        vision_feature_select_strategy="default",
    )
    model = DiffCLIPLlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.language_model = Qwen2ForCausalLM(text).model
    model.tie_weights()
    freeze(model, {"projector", "language_model"})
    return model.train()


def batch(lengths: list[int], vocabulary: int, supervised: float) -> dict[str, torch.Tensor]:
    """Random conversations with one image each, padded to the longest."""
    longest = max(lengths)
    ids = torch.randint(0, vocabulary - 1, (len(lengths), longest))
    ids[:, :36] = vocabulary - 1
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    learnt = mask & (torch.arange(longest) >= torch.tensor([int(n * (1 - supervised)) for n in lengths])[:, None])
    pixels = torch.randn(len(lengths), 3, 96, 96)
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "labels": ids.masked_fill(~learnt, IGNORE),
        "pixel_values": pixels,
    }


def logits(steps: int, vocabulary: int = 32_000) -> list[Row]:
    model = small_model(vocabulary)
    inputs = batch([160] * 8, vocabulary, supervised=0.13)
    labels = inputs["labels"]

    def ours() -> None:
        model(**inputs).loss.backward()

    def full() -> None:
        outputs = model.model(**{k: v for k, v in inputs.items() if k != "labels"})
        scores = model.lm_head(outputs.last_hidden_state).float()  # (batch, tokens, vocabulary)
        torch.nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()

    return say("logits", side_by_side({"supervised only": ours, "all": full}, steps))


class Lengths(list):
    """Stands for a dataset in `training_order`."""

    @property
    def lengths(self) -> "Lengths":
        return self


def mixture() -> Lengths:
    """Lengths as on a mixture of captions, questions and long answers."""
    rng = np.random.default_rng(0)
    return Lengths(int(n) for n in np.clip(36 + rng.lognormal(4.2, 0.8, 4096), 50, 600))


def batches(steps: int, vocabulary: int = 4_000, size: int = 16) -> list[Row]:
    model, lengths = small_model(vocabulary), mixture()
    useful, padded, seconds = {}, {}, {}
    for kind in ("length", "random"):
        order = training_order(lengths, kind, size, len(lengths) // size, seed=0)
        chosen = np.asarray(lengths)[order].reshape(-1, size)
        picked = chosen[np.linspace(1, len(chosen) - 1, 4 * steps).astype(int)]
        useful[kind], padded[kind] = picked.sum(), picked.max(axis=1).sum() * size
        model(**batch(picked[0].tolist(), vocabulary, 0.13)).loss.backward()
        start = time.perf_counter()
        for row in picked:
            model(**batch(row.tolist(), vocabulary, 0.13)).loss.backward()
        seconds[kind] = (time.perf_counter() - start) / useful[kind]
        print(f"         {kind}: {padded[kind] / useful[kind]:.3f} tokens computed for each useful one")
    ratio = seconds["random"] / seconds["length"]
    print(
        f"batches  {1 / seconds['length']:.0f} and {1 / seconds['random']:.0f} useful tokens/s: {ratio:.2f}x",
        flush=True,
    )
    rates = [1 / seconds[kind] for kind in ("random", "length")]
    return [Row("batches of like length", "random ones", *rates, "useful tokens/s")]


def packing(steps: int, vocabulary: int = 4_000, size: int = 16) -> list[Row]:
    """How many times longer padding takes, median over batches: processor time, which other work stretches less."""
    model, lengths, found = small_model(vocabulary), mixture(), []
    for kind in ("length", "random"):
        order = training_order(lengths, kind, size, len(lengths) // size, seed=0)
        chosen = np.asarray(lengths)[order].reshape(-1, size)
        seconds: dict[str, list[float]] = {"padded": [], BY_EXAMPLE: [], "sdpa": []}
        for picked in chosen[np.linspace(1, len(chosen) - 1, 2 * steps).astype(int)]:
            drawn = batch(picked.tolist(), vocabulary, 0.13)
            ids, labels = ([row[:n] for row, n in zip(drawn[name], picked)] for name in ("input_ids", "labels"))
            images = {"pixel_values": drawn["pixel_values"]}
            padded, row = pad_batch(ids, labels, 0) | images, pack(ids, labels, 0) | images
            for way, inputs in (("padded", padded), (BY_EXAMPLE, row), ("sdpa", row)):
                model.model.language_model.set_attn_implementation("sdpa" if way == "padded" else way)
                start = time.process_time()
                model(**inputs).loss.backward()
                seconds[way].append(time.process_time() - start)
        ratios = {way: statistics.median(np.divide(seconds["padded"], each)) for way, each in seconds.items()}
        print(f"packing  {kind}: {', '.join(f'{way} {ratio:.2f}x' for way, ratio in ratios.items())}", flush=True)
        usual = statistics.median(seconds["padded"])
        found.append(Row(f"packing, {kind} batches", "padding", usual, usual / ratios[BY_EXAMPLE], "s"))
    return found


def retokenised(
    conversation: list[dict[str, str]], tokenizer: Qwen2Tokenizer, image_tokens: int
) -> dict[str, list[int]]:
    """The usual builder: tokenise the whole, then each turn with and without its answer to find where answers lie."""
    segments = render(conversation, "vicuna")
    ids = tokenizer("".join(s.text for s in segments))["input_ids"]
    labels, position = list(ids), 0
    for question, reply in zip(segments[0::2], segments[1::2]):
        turn = len(tokenizer(question.text + reply.text)["input_ids"])
        asked = len(tokenizer(question.text)["input_ids"])
        labels[position : position + asked] = [IGNORE] * asked
        position += turn
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    repeat = [(i, label) for i, label in zip(ids, labels) for _ in range(image_tokens if i == image else 1)]
    return {"input_ids": [i for i, _ in repeat], "labels": [IGNORE if i == image else label for i, label in repeat]}


def labels(rows: int, steps: int) -> list[Row]:
    """Conversations of one to ten turns, as in LLaVA-665K."""
    tokenizer = Qwen2Tokenizer(vocab={}, merges=[]).train_new_from_iterator(
        [" ".join(WORDS)] * 4, 600, show_progress=False
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", IMAGE]})
    rng = np.random.default_rng(0)
    conversations = []
    for _ in range(rows):
        turns = []
        for n in range(2 * int(rng.integers(1, 11))):
            text = " ".join(rng.choice(WORDS, int(rng.integers(3, 20))))
            turns.append({"from": ("human", "gpt")[n % 2], "value": text if n else f"{IMAGE}\n{text}"})
        conversations.append(turns)
    ways = {
        "by spans": lambda: [encode(render(c, "vicuna"), tokenizer, 196) for c in conversations],
        "re-tokenising": lambda: [retokenised(c, tokenizer, 196) for c in conversations],
    }
    return say("labels", side_by_side(ways, steps), rows, "us a row", 1e6)


def tower(steps: int) -> list[Row]:
    model = small_model(4_000).model.vision_tower.eval()
    pixels = torch.randn(32, 3, 96, 96)

    @torch.no_grad()
    def run(early: bool) -> None:
        model.config.stop_early = early
        model(pixels, output_hidden_states=True) if not early else model(pixels, output_hidden_states=[-2])

    return say("tower", side_by_side({"stopped": lambda: run(True), "whole": lambda: run(False)}, steps))


def rows() -> list[Row]:
    """All parts in few steps."""
    torch.manual_seed(0)
    return [*logits(3), *batches(2), *packing(2), *labels(300, 3), *tower(3)]


def main() -> None:
    parser = Parser("python -m benchmarks.mllm", description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1000)
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads; the last number is how many times longer the usual way takes")
    logits(options.steps)
    batches(options.steps)
    packing(options.steps)
    labels(options.rows, options.steps)
    tower(options.steps)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
