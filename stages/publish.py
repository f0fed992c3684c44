"""Write a run's model card, and with --repo send the model to the Hub.

    diffclip publish runs/instruct --evaluate runs/evaluate                    # writes runs/instruct/README.md
    diffclip publish runs/instruct --evaluate runs/evaluate --repo me/diffclip-llava
    diffclip publish runs/instruct --repo me/diffclip-llava --dry_run          # shows the card and what would be sent

The card is made of what the run directories say: data with digests, recipe, what learnt, versions, scores. Resume
checkpoints, logs and what tells of this machine (run.json, paths, command lines) are not sent.
"""

import json
import os
import re
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import Any

import huggingface_hub  # which imports its parts when they are asked for
import yaml

from diffclip.base.commands import Parser
from diffclip.base.errors import InputError, exit_on_input_error, in_one_line
from diffclip.base.files import read_json, read_yaml, write_whole
from diffclip.base.hub import hub_errors
from diffclip.base.lines import markdown, print_line, printable
from diffclip.base.schema import CHECKPOINTS, CONFIG, LOG, MANIFEST, METRICS, MODEL_CARD, RECORD
from diffclip.base.sealed import files_of
from stages.ledger import read_record

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
IGNORED = [CHECKPOINTS, "broken-*", "events.*", "runs/*", "*.jsonl", LOG, RECORD, CONFIG, MANIFEST, ".*"]
ORIGINS = ("_name_or_path", "name_or_path", "base_model_name_or_path")  # keys of configurations, which hold paths
HOMES = re.compile(r"/(?:home|Users)/[^/]+|/root")  # whose last part is somebody's name
PLACES = re.compile(r"(?<![\w:/.~-])(?:file:/*|~[\w.-]*|\.{1,2})?/(?:[^\s/'\",;]+/)*")  # before the last name of a path
LIMITS = """Trained for research, with the data below and no other; what it has not seen there, it does not know, and
what is wrong or unfair there, it has learnt. Nothing checks its answers: do not decide about people by them."""


def model_card(run: Path, evaluations: list[Path], repo: str, licence: str = "", data_licence: str = "") -> str:
    """The model card of a finished run as Markdown with the Hub's front matter.

    Raises:
        InputError: not a finished run of a training stage, or an evaluation without scores.
    """
    if (record := read_record(run)) is None:
        raise InputError(f"{run / RECORD} does not exist: give a run directory")
    stage = record.get("stage")
    if stage == "evaluate":
        raise InputError(f"{run}: an evaluation has no weights to publish; give its model's run, and it by --evaluate")
    if stage not in USE or record.get("state") != "finished":
        raise InputError(
            f"{run}: is no finished run of {', '.join(USE)} (its run.json says {stage}, {record.get('state')})"
        )
    library, pipeline, tags = KIND[stage]
    about = f"Vision model: {markdown(record.get('model', 'not recorded'))}."
    title, owner = repo.rpartition("/")[2] or run.resolve().name, repo or run.resolve().name
    if stage == "language":
        about = "A small language model that stands in for Qwen2, taught on text alone."
    use = USE[stage].format(repo=printable(owner))
    terms = markdown(data_licence) or "not stated here; it is to be looked up where the data is from"
    lines = [
        f"---\nlibrary_name: {library}\npipeline_tag: {pipeline}\ntags:",
        *(f"- {tag}" for tag in tags),
        *([f"license: {json.dumps(licence)}"] if licence else []),
        f"---\n# {markdown(title)}\n",
        f"Made by the stage `{stage}` of DiffCLIP Stack, an implementation of *DiffCLIP: Differential Attention Meets "
        f"CLIP* (Hammoud and Ghanem, 2025). {about}",
        f"\n## Use\n\n{'' if stage == 'language' else INSTALL}```python\n{use}\n```",
        f"\n## Limits\n\n{LIMITS}",
        "\n## Data\n\n| role | name | digest |\n| --- | --- | --- |",
        *(
            f"| {markdown(role)} | {markdown(_name(str(what['path'])))} | {markdown(what['digest'])} |"
            for role, what in record.get("inputs", {}).items()
        ),
        f"\nLicence of the data: {terms}.",
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
    lines = [f"{part}: {n:,} parameters, {'learnt' if part in learns else 'frozen'}" for part, n in parts.items()]
    lines += [f"{part}: fingerprint {value}" for part, value in record.get("after", {}).items()]
    lines.append(f"seed {record.get('seed')}, {record.get('wall_seconds', 0):,.0f} s on {record.get('hardware')}")
    lines.append(", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items()))
    return [f"- {markdown(line)}" for line in lines]


def _scores(evaluations: list[Path]) -> list[str]:
    if not evaluations:
        return ["This model has not been evaluated."]
    head, controls = ["| score | value |", "| --- | --- |"], list[str]()
    lines = list(head)
    for folder in evaluations:
        scores = read_json(folder / METRICS) if (folder / METRICS).is_file() else None
        given = scores.items() if isinstance(scores, dict) else ()
        shares = {k: v for k, v in given if "/" in k and isinstance(v, (int, float))}
        if not shares:
            raise InputError(f"{folder}: metrics.json holds no scores; give a run of stages.evaluate")
        for name, value in shares.items():
            control = name.startswith("pope_") and not name.startswith("pope_margin")
            (controls if control else lines).append(f"| {markdown(name)} | {value:.1f} |")
    if controls:
        lines += ["\nControls of POPE, the same questions without the image that they ask about:\n", *head]
    return [*lines, *controls]


def _recipe(path: Path) -> str:
    """The resolved settings without places of this machine."""
    text = yaml.safe_dump(_placeless(read_yaml(path)), sort_keys=False, allow_unicode=True).strip()
    return printable(text, keep="\n").replace("```", "` ` `")  # which would end the block


def _placeless(value: Any) -> Any:
    """A setting in which paths are the names of their files and folders."""
    if isinstance(value, dict):
        return {key: _placeless(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_placeless(each) for each in value]
    return _name(value) if isinstance(value, str) else value


def _name(text: str) -> str:
    """A path's last part, which tells the data and not the machine; names of the Hub and addresses as they are."""
    if text.startswith("hf:") or re.match(r"https?://", text):
        return re.sub(r"(?<=://)[^/@]*@", "", text)  # a password
    home = os.path.realpath(os.path.expanduser("~"))
    whole = text.startswith(("/", "~", "./", "../", "file:")) or text.count("/") > 1 or os.path.exists(text)
    if whole:
        place = os.path.realpath(os.path.expanduser(text))
        return "~" if place == home or HOMES.fullmatch(place) else PurePath(text).name or "/"
    return PLACES.sub("", text)


def upload(run: Path, repo: str, private: bool) -> str:
    """Upload a run to the Hub and return its address.

    Raises:
        InputError: the Hub refuses or cannot be reached.
    """
    changed = without_origins(run)
    try:
        huggingface_hub.create_repo(repo, private=private, exist_ok=True)
        for name, text in changed.items():
            huggingface_hub.upload_file(repo_id=repo, path_or_fileobj=text.encode(), path_in_repo=name)
        ignored = [*IGNORED, *changed]
        return str(huggingface_hub.upload_folder(repo_id=repo, folder_path=run, ignore_patterns=ignored))
    except hub_errors() + (OSError, ValueError) as error:
        reason = in_one_line(error, 200)
        raise InputError(
            f"{repo}: the Hub did not take it ({reason}); log in with `hf auth login`, start again"
        ) from None


def to_send(run: Path) -> list[str]:
    """The files of a run that `upload` sends, by their names in it."""
    names = (str(file.relative_to(run)) for file in files_of(run))
    return [name for name in names if not any(fnmatch(name, pattern) for pattern in IGNORED)]


def without_origins(run: Path) -> dict[str, str]:
    """{name: text} of the configurations to send that tell where on this machine a model came from, without that."""
    changed = {}
    for name in to_send(run):
        if Path(name).name in ("config.json", "adapter_config.json", "tokenizer_config.json"):
            settings = read_json(run / name)
            if (safe := _without_origin(settings)) != settings:
                changed[name] = json.dumps(safe, indent=2, ensure_ascii=False) + "\n"
    return changed


def _without_origin(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_origin(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {k: _name(v) if k in ORIGINS and isinstance(v, str) else _without_origin(v) for k, v in value.items()}


def main(argv: list[str] | None = None) -> None:
    parser = Parser("diffclip publish", description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run of pretrain, language, align or instruct")
    parser.add_argument("--evaluate", type=Path, nargs="*", default=[], help="runs of evaluate whose scores to state")
    parser.add_argument("--repo", default="", help="owner/name on the Hub; without it only the card is written")
    parser.add_argument("--private", action="store_true", help="make the repository a private one")
    parser.add_argument("--license", default="", help="of the weights, as the Hub names licences: apache-2.0, ...")
    parser.add_argument("--data_license", default="", help="of the data, in words")
    parser.add_argument("--dry_run", action="store_true", help="show the card and what would be sent; write nothing")
    options = parser.parse_args(argv)
    card = model_card(options.run, options.evaluate, options.repo, options.license, options.data_license)
    if options.dry_run:
        print_line(card, keep="\n")
        print_line(f"would be sent to {options.repo or '--repo'}:")
        for name in sorted({*to_send(options.run), MODEL_CARD}):
            print_line(f"  {name}")
        return
    write_whole(options.run / MODEL_CARD, card)
    print_line(f"wrote {options.run / MODEL_CARD}")
    if options.repo:
        print_line(f"sent to {upload(options.run, options.repo, options.private)}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
