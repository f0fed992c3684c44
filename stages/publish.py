"""Write a run's model card, and with --repo send the model to the Hub.

    diffclip publish runs/instruct --evaluate runs/evaluate                    # writes runs/instruct/README.md
    diffclip publish runs/instruct --evaluate runs/evaluate --repo me/diffclip-llava

The card is made of what the run directories say: data with digests, recipe, what learnt, versions, scores. Resume
checkpoints and logs are not sent.
"""

import os
from pathlib import Path
from typing import Any

import yaml

from diffclip.base.commands import Parser
from diffclip.base.errors import InputError, exit_on_input_error, in_one_line
from diffclip.base.files import read_json, read_yaml, write_whole
from diffclip.base.lines import print_line
from diffclip.base.schema import CHECKPOINTS, CONFIG, LOG, METRICS, MODEL_CARD, RECORD

USE = {
    "pretrain": """import diffclip

model, preprocess, tokenizer = diffclip.load("{repo}")""",
    "align": """from diffclip.base.images import open_image
from mllm.model import load

vlm = load("{repo}")
print(vlm.ask("What is in the image?", [open_image("a.jpg")]))""",
}
USE["instruct"] = USE["align"]
USE["language"] = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = AutoModelForCausalLM.from_pretrained("{repo}")
ids = tokenizer("An image of", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=20)[0]))"""
KIND = {  # library, pipeline tag and tags for the Hub
    "pretrain": ("open_clip", "zero-shot-image-classification", ["differential-attention", "clip"]),
    "language": ("transformers", "text-generation", ["qwen2"]),
    "align": ("transformers", "image-text-to-text", ["differential-attention", "clip", "llava"]),
}
KIND["instruct"] = KIND["align"]
INSTALL = """First `pip install diffclip-stack`. (Without it transformers loads the model with `trust_remote_code=True`,
which runs the copies of that package's modules in this repository.)

"""


def model_card(run: Path, evaluations: list[Path], repo: str) -> str:
    """The model card of a finished run as Markdown with the Hub's front matter.

    Raises:
        InputError: not a finished run of a training stage, or an evaluation without scores.
    """
    record = _read(run / RECORD)
    stage = record.get("stage")
    if stage not in USE or record.get("state") != "finished":
        raise InputError(
            f"{run}: is no finished run of {', '.join(USE)} (its run.json says {stage}, {record.get('state')})"
        )
    library, pipeline, tags = KIND[stage]
    about = f"Vision model: {record.get('model', 'not recorded')}."
    if stage == "language":
        about = "A small language model that stands in for Qwen2, taught on text alone."
    lines = [
        f"---\nlibrary_name: {library}\npipeline_tag: {pipeline}\ntags:",
        *(f"- {tag}" for tag in tags),
        f"---\n# {repo.split('/')[-1] or run.name}\n",
        f"Made by the stage `{stage}` of DiffCLIP Stack, an implementation of *DiffCLIP: Differential Attention Meets "
        f"CLIP* (Hammoud and Ghanem, 2025). {about}",
        f"\n## Use\n\n{'' if stage == 'language' else INSTALL}```python\n{USE[stage].format(repo=repo or run)}\n```",
        "\n## Data\n\n| role | path | digest |\n| --- | --- | --- |",
        *(f"| {role} | `{_name(what['path'])}` | `{what['digest']}` |" for role, what in record["inputs"].items()),
        f"\n## Recipe\n\n```yaml\n{_recipe(run / CONFIG)}\n```\n",
        *_facts(record),
        "\n## Evaluation\n",
        *_scores(evaluations),
        "",
    ]
    return "\n".join(lines)


def _facts(record: dict[str, Any]) -> list[str]:
    parts = record.get("parameters", {})
    learns = record.get("learns", [])
    if isinstance(parts, int):  # pretrain and language: one number, all of it learnt
        parts, learns = {"whole model": parts}, ["whole model"]
    lines = [f"- {part}: {n:,} parameters, {'learnt' if part in learns else 'frozen'}" for part, n in parts.items()]
    lines += [f"- {part}: fingerprint `{value}`" for part, value in record.get("after", {}).items()]
    lines.append(f"- seed {record.get('seed')}, {record.get('wall_seconds', 0):,.0f} s on {record.get('hardware')}")
    versions = record.get("versions", {})
    return [*lines, f"- {', '.join(f'{name} {version}' for name, version in versions.items())}"]


def _scores(evaluations: list[Path]) -> list[str]:
    if not evaluations:
        return ["This model has not been evaluated."]
    lines = ["| score | value |", "| --- | --- |"]
    for folder in evaluations:
        scores = _read(folder / METRICS)
        shares = {k: v for k, v in scores.items() if "/" in k and isinstance(v, (int, float))}
        if not shares:
            raise InputError(f"{folder}: metrics.json holds no scores; give a run of stages.evaluate")
        lines += [f"| {name} | {value:.1f} |" for name, value in shares.items()]
    return lines


def _recipe(path: Path) -> str:
    """The resolved settings, paths shortened."""

    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [short(each) for each in value]
        return _name(value) if isinstance(value, str) and os.path.isabs(value) else value

    settings = {key: short(value) for key, value in read_yaml(path).items()}
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip()


def _name(path: str) -> str:
    """The last two parts of a path: enough to know the data, nothing about the machine."""
    return "/".join(Path(path).parts[-2:])


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path} does not exist: give a run directory")
    return read_json(path)


def upload(run: Path, repo: str, private: bool) -> str:
    """Upload a run to the Hub and return its address.

    Raises:
        InputError: the Hub refuses or cannot be reached.
    """
    import huggingface_hub  # not at the top: only sending needs it
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    ignored = [CHECKPOINTS, "events.*", "runs/*", "*.jsonl", LOG, ".*"]
    try:
        huggingface_hub.create_repo(repo, private=private, exist_ok=True)
        return str(huggingface_hub.upload_folder(repo_id=repo, folder_path=run, ignore_patterns=ignored))
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        reason = in_one_line(error, 200)
        raise InputError(
            f"{repo}: the Hub did not take it ({reason}); log in with `hf auth login`, start again"
        ) from None


def main(argv: list[str] | None = None) -> None:
    parser = Parser("diffclip publish", description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run of pretrain, language, align or instruct")
    parser.add_argument("--evaluate", type=Path, nargs="*", default=[], help="runs of evaluate whose scores to state")
    parser.add_argument("--repo", default="", help="owner/name on the Hub; without it only the card is written")
    parser.add_argument("--private", action="store_true", help="make the repository a private one")
    options = parser.parse_args(argv)
    write_whole(options.run / MODEL_CARD, model_card(options.run, options.evaluate, options.repo))
    print_line(f"wrote {options.run / MODEL_CARD}")
    if options.repo:
        print_line(f"sent to {upload(options.run, options.repo, options.private)}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
