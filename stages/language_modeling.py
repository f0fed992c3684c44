"""A stand-in for Qwen2, tokenizer and model, learnt from text and from conversations without their images."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, set_seed

from diffclip.base.errors import InputError
from diffclip.base.files import read_jsonl
from mllm.conversation import IGNORE, IMAGE, VICUNA_SYSTEM
from mllm.data.examples import pack, pad_batch
from mllm.data.files import of_split, read_rows
from mllm.data.layouts import read_conversation
from stages.attention import attention_of, check_attention, set_attention
from stages.callbacks import Watch
from stages.run import Run
from stages.settings import LanguageConfig
from stages.trainer import StageTrainer
from stages.training import check_trainer, per_device_batch, train, training_arguments

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
INITIALIZER_RANGE = 0.06  # Qwen's 0.02 is for a width of 896; narrow models start too slowly with it
# Qwen's template without its tool calls; the default system sentence is Qwen2.5's role, not its wording.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ANSWER = re.compile(r" ?ASSISTANT:(.*?<\|im_end\|>|.*$)", re.DOTALL)


def train_language_model(config: LanguageConfig, run: Run) -> None:
    """Train tokenizer and model on the texts that the settings name, and write them to `config.output_dir`."""
    check_trainer(config)
    check_attention(config)
    texts = list(read_texts(config.text)) if config.text else []
    texts += [text for path in config.conversations for text in read_conversations(path)]
    # the system sentence stands before every conversation later on: its words deserve tokens of their own
    words = [text for path in config.vocabulary_from for text in read_conversations(path)]
    tokenizer = train_tokenizer([*texts, *words, *[VICUNA_SYSTEM] * (1 + len(texts) // 10)], config.vocabulary)
    set_seed(config.seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.hidden_size * 4,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=config.max_positions,
            initializer_range=INITIALIZER_RANGE,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    set_attention(model, attention_of(config))
    rows = [encode(text, tokenizer, config.max_tokens) for text in texts]
    if empty := [i for i, row in enumerate(rows) if not supervised(row)]:
        why = f"no answer begins in their first {config.max_tokens} tokens, text {empty[0]} the first: raise max_tokens"
        if len(empty) == len(rows):
            raise InputError(f"there is nothing to learn from {len(rows):,} texts, since {why}")
        run.log(f"language: leaves {len(empty):,} of {len(rows):,} texts out, since {why}")
        rows = [row for row in rows if supervised(row)]
    tokens = sum(len(row["input_ids"]) for row in rows)
    steps = max(1, int(len(rows) * config.epochs) // config.global_batch_size)
    parameters = sum(p.numel() for p in model.parameters())
    run.log(
        f"language: stand-in Qwen2 with {parameters:,} parameters and {len(tokenizer):,} tokens, all learn; "
        f"{len(rows):,} texts = {tokens:,} tokens, {steps:,} steps of {config.global_batch_size}"
    )
    run.note(parameters=parameters, stand_in=True, tokens=tokens, steps=steps)

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        ids, labels = ([torch.tensor(row[name]) for row in rows] for name in ("input_ids", "labels"))
        batch = (packed_batch if config.packing else pad_batch)(ids, labels, tokenizer.pad_token_id)
        return {**batch, "use_cache": False}  # with one, transformers takes packed texts for one text

    trainer = StageTrainer(
        model=model,
        args=training_arguments(
            config, steps, per_device_batch(config), lr_scheduler_type="cosine", warmup_steps=0.05, max_grad_norm=1.0
        ),
        train_dataset=rows,
        data_collator=collate,
        callbacks=[Watch(run, config.global_batch_size)],
    )
    metrics = train(trainer, run)
    if run.is_main:
        model.save_pretrained(config.output_dir)
        tokenizer.save_pretrained(config.output_dir)
    run.finish(metrics)


def packed_batch(ids: list[torch.Tensor], labels: list[torch.Tensor], pad_token: int) -> dict[str, torch.Tensor]:
    """Texts behind each other in one row, for a causal language model that computes supervised logits alone.

    Returns:
        input_ids and position_ids, (1, tokens) int64, as `mllm.data.examples.pack`; logits_to_keep (supervised tokens,)
        int64, where logits are needed, and labels and shift_labels (1, supervised tokens) int64, what follows there.
    """
    row = pack(ids, labels, pad_token)
    following = row.pop("labels")[:, 1:]
    places = (following[0] != IGNORE).nonzero().flatten()
    targets = following[:, places]
    return {**row, "labels": targets, "shift_labels": targets, "logits_to_keep": places}


def read_texts(path: str) -> Iterator[str]:
    """The `text` of every line; InputError names the first line that has none."""
    for number, row in read_jsonl(path):
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise InputError(f'{path}:{number}: expected a JSON object with a non-empty "text"')
        yield text


def read_conversations(path: str) -> Iterator[str]:
    """The text of each conversation in the form that instruct will use, without system sentence and image."""
    for number, row in enumerate(read_rows(path)):
        if not of_split(row):
            continue
        try:
            turns, _ = read_conversation(row)
        except InputError as error:
            raise InputError(f"{path}: row {number}: {error}") from None
        words = [
            f"USER: {turn['value'].replace(IMAGE, '').strip()} "
            if turn.get("from") == "human"
            else f"ASSISTANT: {turn['value']}<|im_end|>"
            for turn in turns
            if turn["from"] != "system"
        ]
        if words:
            yield "".join(words)


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of Qwen2's class and pre-tokenisation, with Qwen's special tokens."""
    empty = Qwen2Tokenizer(vocab={}, merges=[])
    tokenizer = empty.train_new_from_iterator(
        texts, vocabulary - len(SPECIAL_TOKENS), show_progress=False, new_special_tokens=[]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS[1:])})
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def supervised(row: dict[str, list[int]]) -> bool:
    """Whether anything is learnt from a row of `encode`: the loss of a batch without would be no number."""
    return any(label != -100 for label in row["labels"][1:])


def encode(text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> dict[str, list[int]]:
    """Token ids and labels of one text: of a conversation only the answers and their end tokens are learnt.

    Learning the questions too, or texts that see each other, hides for many times longer what the answers depend on.
    """
    encoded = tokenizer(text, return_offsets_mapping=True)  # cut below: the tokenizer would go on cutting where saved
    ids, offsets = encoded["input_ids"][:max_tokens], encoded["offset_mapping"][:max_tokens]
    answers = [m.span(1) for m in ANSWER.finditer(text)]
    learnt = [not answers or any(start <= a and b <= end for start, end in answers) for a, b in offsets]
    return {"input_ids": ids, "labels": [i if yes else -100 for i, yes in zip(ids, learnt)]}
