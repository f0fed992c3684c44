"""The two multimodal stages at the paper's full size for two steps each, under deepspeed on whatever there is.

    python -m benchmarks.full_size --tokenizer DIR --out DIR [--ranks 1] [--batch 4] [--micro 2]

The tower of DiffCLIP-B/16 and a language model of Qwen2.5-0.5B's shape, with seeded random weights, the real tokenizer
(a folder with tokenizer.json). Random images and text: what is shown is that the stages run at this size, how long a
step takes, and how much memory beside what `--dry-run` predicts. Needs 16 GB of memory and 8 GB of disk.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import diffclip
from diffclip.base.commands import Parser
from diffclip.base.errors import exit_on_input_error
from diffclip.base.files import read_json, read_jsonl, write_json
from mllm.assemble import assembled_config
from stages.costs import HARDWARE, count_conversation, estimate
from stages.pipeline import free_port

QWEN = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}
ROOT = Path(__file__).parents[1]


def make_parts(out: Path, tokenizer: str, rows: int) -> None:
    torch.manual_seed(0)
    if not (out / "tower").exists():
        diffclip.save(diffclip.build("DiffCLIP-B-16"), out / "tower")
    if not (out / "language").exists():
        words = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
        model = Qwen2ForCausalLM(Qwen2Config(**QWEN, eos_token_id=words.eos_token_id, bos_token_id=None))
        model.save_pretrained(out / "language")
        words.save_pretrained(out / "language")
    rng = np.random.default_rng(0)
    (out / "images").mkdir(exist_ok=True)
    conversations = []
    for n in range(rows):
        Image.fromarray(rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)).save(out / f"images/{n}.png")
        question = "<image>\nWhat is in the image, and where? " + "Think of every object. " * int(rng.integers(1, 8))
        answer = "There is a dog beside a red chair. " * int(rng.integers(1, 6))
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer.strip()}]
        conversations.append({"id": str(n), "image": f"{n}.png", "conversations": turns})
    write_json(out / "rows.json", conversations)


def peaks(process: subprocess.Popen, out: Path) -> dict[str, float]:
    """Gigabytes at the worst moments of loading, training and saving; pages that processes share are counted once."""
    most = {"loading": 0.0, "training": 0.0, "saving": 0.0}
    while process.poll() is None:
        try:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            used = sum(member.memory_full_info().pss for member in family) / 1e9
            logged = (out / "metrics.jsonl").read_text().count("\n") if (out / "metrics.jsonl").exists() else 0
            # the first step has begun once the run record says how many there are
            begun = (out / "run.json").exists() and '"steps"' in (out / "run.json").read_text()
            phase = "saving" if logged == 2 else "training" if begun else "loading"
            most[phase] = max(most[phase], used)
        except (psutil.Error, OSError):
            pass
        time.sleep(0.2)
    return most


def main() -> None:
    parser = Parser("python -m benchmarks.full_size", description=__doc__)
    parser.add_argument("--tokenizer", required=True, help="folder with Qwen2.5's tokenizer.json")
    parser.add_argument("--out", type=Path, required=True, help="where parts and runs go")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--micro", type=int, default=2)
    parser.add_argument("--zero", type=int, default=2, choices=(0, 1, 2, 3))
    options = parser.parse_args()
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    make_parts(out, options.tokenizer, 2 * options.batch)
    llava = assembled_config(out / "tower", out / "language")
    data = [f"--data={out / 'rows.json'}", f"--image_root={out / 'images'}", "--image_prefix="]
    sizes = [f"--global_batch_size={options.batch}", f"--micro_batch_size={options.micro}", "--precision=fp32"]
    common = ["--num_workers=0", "--logging_steps=1", "--report_to=none", "--save_steps=1000"]
    common += [] if torch.cuda.is_available() else ["--use_cpu=true"]
    stages = {
        "align": [f"--vision_tower={out / 'tower'}", f"--language_model={out / 'language'}"],
        "instruct": [f"--model={out / 'align'}"],
    }
    for stage, models in stages.items():
        command = ["deepspeed", "--num_gpus", str(options.ranks), "--master_port", str(free_port()), "--module"]
        config = [f"--config={ROOT / f'stages/configs/paper/{stage}.yaml'}", f"--output_dir={out / stage}"]
        config += [f"--deepspeed={ROOT / f'stages/configs/deepspeed/zero{options.zero}.json'}"]
        command[0] = str(Path(sys.executable).parent / "deepspeed")
        log = open(out / f"{stage}.log", "w")  # noqa: SIM115 - the process writes to it until it ends
        start = time.time()
        process = subprocess.Popen(
            [sys.executable, *command, f"stages.{stage}", *config, *models, *data, *sizes, *common],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
        )
        most = peaks(process, out / stage)
        record = read_json(out / stage / "run.json")
        metrics = [row for _, row in read_jsonl(out / stage / "metrics.jsonl")]
        changed = [name for name in record["before"] if record["before"][name] != record["after"][name]]
        losses = ", ".join(f"{row['loss']:.3f}" for row in metrics)
        seconds = read_json(out / stage / "metrics.json")["train_runtime"]
        print(
            f"{stage}: {record['state']} after {time.time() - start:.0f} s, losses {losses}; "
            f"changed: {', '.join(changed)}; {seconds / len(metrics):.0f} s a step; "
            f"peak {', '.join(f'{phase} {size:.1f}' for phase, size in most.items())} GB",
            flush=True,
        )
        learns = {"projector"} | ({"language_model"} if stage == "instruct" else set())
        parts, learning, counted = count_conversation(llava, learns, 120, 0, bf16=False)
        guess = estimate(
            counted,
            learning,
            frozen=sum(parts.values()) - learning,
            samples=2 * options.batch,
            batch=options.micro,
            chunked=False,
            bf16=False,
            zero_stage=options.zero,
            hardware=HARDWARE["a100-80gb"],
            devices=options.ranks,
        )
        if not torch.cuda.is_available():  # on a CPU only what is written into the buckets takes memory
            guess = guess._replace(buckets=min(guess.buckets, 4 * learning))
        print(
            f"   predicted for each rank: weights {guess.weights / 1e9:.1f}, gradients {guess.gradients / 1e9:.1f}, "
            f"optimiser {guess.optimizer / 1e9:.1f}, buckets {guess.buckets / 1e9:.1f}, "
            f"activations {guess.activations / 1e9:.1f}, "
            f"together {guess.memory / 1e9:.1f} GB, beside Python and its libraries",
            flush=True,
        )


if __name__ == "__main__":
    with exit_on_input_error():
        main()
