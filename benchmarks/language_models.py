"""Every text family of the installed transformers as the language model: does it work, or is it refused in a sentence?

python -m benchmarks.language_models --output_dir sweep              # all of them, about a second each
python -m benchmarks.language_models --output_dir sweep gpt2 opt     # some

Each family's default configuration is made tiny; a model of it gets random weights and is assembled with a tiny tower.
"works" means: a sentence has the logits and the loss that the language model itself gives it, a training step has the
loss of evaluation, greedy generation with an image ends, two questions in a batch get the answers that each gets alone,
yes/no margins are those of the logits, and the saved run has the same logits again.
"""

import json
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES

from diffclip.base.commands import Parser
from diffclip.base.errors import InputError, exit_on_input_error, in_one_line
from mllm.assemble import assemble
from mllm.conversation import question_turn
from mllm.model import VisionLanguageModel, load
from mllm.packed import keeps_apart
from mllm.pope.margins import margins, yes_no_tokens
from mllm.pope.questions import POST_PROMPT, Question

SECONDS = 120  # for one family
LARGEST = 100_000_000  # parameters; a configuration that stays larger was not made tiny
QUESTIONS = ("Is there a red square?", "Is there a blue circle in the image?", "Red?")
ORDER = ("works", "refused", "not built", "FAILS")
WIDTH, LAYERS, HEADS = 32, 4, 2  # four layers: the fourth of some hybrids is the first with attention
DERIVED = {"head_dim", "num_key_value_heads"}  # None in some defaults, though their classes need it
SIZES = {  # what families call their sizes -> tiny ones
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "word_embed_proj_dim", "emb_dim", "dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "dff", "ffn_hidden_size", "d_inner"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp", "lru_width"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers",), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "encoder_attention_heads", "num_kv_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "v_head_dim", "qk_nope_head_dim", "global_head_dim"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), 256),
    **dict.fromkeys(("vocab_size_per_layer_input",), 400),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "hidden_size_per_layer_input"), 16),
    **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "rotary_dim": 8, "attention_window_size": 32},
}
MIXED = {"layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"]}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}
OF_SOME: dict[str, dict[str, Any]] = {  # what the defaults of a family tie to its large sizes
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16},
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention", "mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mamba2": {"head_dim": 16, "num_heads": 4, "n_groups": 1},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "v_head_dim": 16},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "codegen": {"n_head": 4, "n_ctx": 256, "rotary_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "mamba_ngroups": 1},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "kimi_linear": MIXED,
    "zaya": {"num_experts_per_tok": 1},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["full_attention"] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "reformer": {"is_decoder": True},
}


def tiny(family: str) -> PreTrainedConfig:
    """The default configuration of a family with few and small layers."""
    cls = CONFIG_MAPPING[family]
    return _tiny(cls, OF_SOME.get(family, {}))


def _tiny(cls: type[PreTrainedConfig], more: dict[str, Any]) -> PreTrainedConfig:
    default = cls()
    known = {**default.to_dict(), **{name: getattr(default, name, None) for name in default.attribute_map}}
    needed = {name for name, value in known.items() if isinstance(value, int) or name in DERIVED}
    sizes = {name: size for name, size in SIZES.items() if name in needed}
    parts = {name: _tiny(part, {}) for name, part in getattr(cls, "sub_configs", {}).items() if part is not AutoConfig}
    vocabulary = {"vocab_size": 400} if "vocab_size" in known else {}
    deterministic = {name: 0.0 for name, value in known.items() if "drop" in name and isinstance(value, float)}
    ends = {name: 1 for name in ("eos_token_id", "pad_token_id", "bos_token_id") if name in known}
    return cls(**{**vocabulary, **sizes, **deterministic, **ends, **parts, "initializer_range": 0.2, **more})


def tokenizer_of() -> PreTrainedTokenizerFast:
    """One token per byte, and an end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    return tokenizer


def write_tower(path: Path) -> Path:
    """A CLIP vision model of 17 tokens."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(path)
    return path


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """TimeoutError after so many seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def examine(family: str, tower: Path, folder: Path) -> tuple[str, str]:
    """(works | refused | not built | FAILS, and what there is to say)."""
    tokenizer = tokenizer_of()
    try:
        config = tiny(family)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > LARGEST:
            return "not built", f"{size:,} parameters"
        torch.manual_seed(0)
        own = AutoModelForCausalLM.from_config(config).eval()
        own.save_pretrained(folder / "lm")
        tokenizer.save_pretrained(folder / "lm")
        own = AutoModelForCausalLM.from_pretrained(folder / "lm", trust_remote_code=False).eval()
        own(input_ids=torch.tensor([[5, 6, 7, 8]]))
    except TimeoutError:
        raise
    except Exception as error:  # of any kind: this is about transformers' own class
        return "not built", in_one_line(error, 120)
    name = type(own).__name__
    try:
        vlm = assemble(tower, folder / "lm", template="chatml")
    except InputError as error:
        return "refused", str(error).removeprefix(f"{folder / 'lm'}: ")
    if problem := faults(vlm, own, folder):
        return "FAILS", f"{name}: {problem}"
    apart = "" if keeps_apart(vlm.model) else ", not with packing"
    return "works", name + apart


def faults(vlm: VisionLanguageModel, own: Any, folder: Path) -> str:
    """In what an assembled model is not its language model, or ""."""
    model, processor = vlm
    ids = processor.tokenizer("USER: Is there a red square? ASSISTANT: yes", return_tensors="pt")["input_ids"]
    labels = ids.clone()
    labels[:, :20] = -100
    with torch.no_grad():
        expected = own(input_ids=ids, use_cache=False).logits
        found = model(input_ids=ids, labels=labels)
    if not torch.allclose(found.logits, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        return "other logits"
    loss = torch.nn.functional.cross_entropy(expected[:, 19:-1].flatten(0, 1), labels[:, 20:].flatten())
    if not torch.allclose(found.loss, loss, rtol=1e-3):
        return f"loss {found.loss:.4f}, its own {loss:.4f}"
    model.train()
    step = model(input_ids=ids, labels=labels).loss
    step.backward()
    if not torch.allclose(step, loss, rtol=0.02):
        return f"loss {step:.4f} in training, {loss:.4f} in evaluation"
    model.eval()
    pixels = vlm.pixels([Image.new("RGB", (32, 32), "red")])
    shown = vlm.encode([{"from": "human", "value": "<image>\nRed?"}], 1, ask=True)["input_ids"]
    model.generate(input_ids=torch.tensor([shown]), pixel_values=pixels, max_new_tokens=2)
    prompts, none = vlm.prompts([[{"from": "human", "value": text}] for text in ("Red or blue?", "Red?")]), [(), ()]
    alone = [vlm.generate([prompt], [()], max_new_tokens=4)[0] for prompt in prompts]
    if vlm.generate(prompts, none, max_new_tokens=4) != alone:
        return "other answers in a batch of two than alone"
    questions = [Question("", "", text, "yes", str(i), "") for i, text in enumerate(QUESTIONS)]
    with torch.no_grad():
        for question, margin in zip(questions, margins(vlm, questions, Image.open)):
            (turns,) = vlm.prompts([[question_turn(question.text + POST_PROMPT, 0)]])
            last = model(**vlm.inputs([turns], [()])).logits[0, -1].log_softmax(-1)
            yes, no = (last[tokens].logsumexp(-1) for tokens in yes_no_tokens(vlm))
            if abs(yes - no - margin) > 1e-2 * max(1.0, abs(margin)):
                return f"margin {margin:.4f}, by its logits {yes - no:.4f}"
    model.zero_grad()
    vlm.save(folder / "run")
    again = load(folder / "run")
    with torch.no_grad():
        if not torch.allclose(again.model(input_ids=ids).logits, found.logits, rtol=1e-4, atol=1e-4):
            return "other logits once saved and loaded"
    return ""


def table(results: dict[str, tuple[str, str]]) -> str:
    """Markdown: a row for each verdict and reason, with the families that have it."""
    groups: dict[tuple[str, str], list[str]] = {}
    for family, (verdict, why) in sorted(results.items()):
        if verdict == "works":
            why = "all but `--packing`" if "not with packing" in why else "all"
        why = re.sub(r"language models of class \w+ cannot be used( in a multimodal model \(|, which )", "", why)
        groups.setdefault((verdict, why.partition("; use another")[0].removesuffix(")")), []).append(family)
    lines = ["| | what, or why not | | |", "|---|---|---|---|"]
    for (verdict, why), families in sorted(groups.items(), key=lambda group: (ORDER.index(group[0][0]), group[0][1])):
        lines.append(f"| {verdict} | {why.replace('|', ' ')} | {len(families)} | {', '.join(families)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = Parser("benchmarks.language_models", description=__doc__)
    parser.add_argument("families", nargs="*", help="model types of transformers; all without any")
    parser.add_argument("--output_dir", type=Path, required=True, help="gets language_models.json and .md")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results: dict[str, tuple[str, str]] = {}
    options.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        tower = write_tower(Path(scratch) / "tower")
        for family in options.families or sorted(FAMILIES):
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                try:
                    with within(SECONDS):
                        results[family] = examine(family, tower, Path(folder))
                except TimeoutError as error:
                    results[family] = ("not built", str(error))
                except Exception as error:  # whatever ends in a traceback is what is looked for
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    name = f"{Path(where.filename).name}:{where.lineno}"
                    results[family] = ("FAILS", f"{type(error).__name__} at {name}: {in_one_line(error, 150)}")
            print(family, *results[family], flush=True)
    (options.output_dir / "language_models.json").write_text(json.dumps(results, indent=1))
    (options.output_dir / "language_models.md").write_text(table(results))
    return int(any(verdict == "FAILS" for verdict, _ in results.values()))


if __name__ == "__main__":
    with exit_on_input_error():
        sys.exit(main())
