"""Writes what docs/ says from the source: settings.md, and the list of messages in troubleshooting.md.

python docs/generate.py            after settings or messages have changed; with --check nothing is written
"""

import ast
import dataclasses
import functools
import re
import sys
import typing
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from stages import settings  # noqa: E402 # once the checkout is on the path

STAGES = {
    "pretrain": settings.PretrainConfig,
    "language": settings.LanguageConfig,
    "align": settings.AlignConfig,
    "instruct": settings.InstructConfig,
    "evaluate": settings.EvaluateConfig,
    "pipeline": settings.PipelineConfig,
}
PACKAGES = ("diffclip", "mllm", "stages")
BEGIN = "<!-- from here on written by docs/generate.py -->\n"
# A sentence brings its cure from the first of these words on that stands behind a colon, a comma or the like.
IMPERATIVES = (
    "add annotate ask bring check choose clear compare copy correct delete do double download drop end "
    "evaluate expected export fetch free give go install join keep leave log lower make mend move name number "
    "pip put raise register remove rename replace rows save score see set show sort spell split start take "
    "train try unpack use wait write"
).replace(" ", "|")
CURE = re.compile(rf"(?:^|: |; |, so |, and |, or |\. |\()((?:first |the |or )?(?:{IMPERATIVES})\b.*)$", re.DOTALL)


def cell(text: object) -> str:
    """Text for one cell of a Markdown table."""
    escaped = str(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
    return escaped.replace("*", "\\*").replace("[", "\\[")


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def kind(hint: object) -> str:
    """What a type hint is called to somebody who writes a command line."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if typing.get_origin(hint) is list:
        return f"{kind(arguments[0])}s"
    if arguments and typing.get_origin(hint) is not dict:
        return kind(next(part for part in arguments if part is not type(None)))
    return {str: "text", int: "number", float: "number", bool: "true, false"}.get(hint, "mapping")  # type: ignore[call-overload]


def default(field: dataclasses.Field) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    value = " ".join(map(str, value)) if isinstance(value, list) else value
    value = str(value).lower() if isinstance(value, bool) else value
    return "" if value in ("", None, {}) else f"`{value}`"


def settings_page() -> str:
    """docs/settings.md: a table for each stage."""
    page = [
        "# Settings\n\nOne dataclass of `stages/settings.py` is one YAML file is one command line: `--config NAME` "
        "reads a file, flags\nbehind it win, and what was resolved is kept as `config.yaml` in the run directory. "
        "An unknown key or a number out of\nits range ends the command before anything heavy starts. Settings with a "
        "mark decide the result: a paused run is not\ngone on with under another value "
        "([reliability.md](reliability.md#what-may-change-between-two-starts)).\n\n"
        "This page is written by `python docs/generate.py`.\n"
    ]
    for verb, config in STAGES.items():
        hints = typing.get_type_hints(config)
        rows = []
        for field in dataclasses.fields(config):
            allowed = f"{kind(hints[field.name])} {field.metadata.get('range', '')}".strip()
            mark = "●" if field.metadata.get("decides", True) and verb not in ("evaluate", "pipeline") else ""
            shown = field.metadata.get("flag", field.name)
            rows.append((f"`{shown}`", allowed, default(field), cell(field.metadata.get("help", "")), mark))
        head = ("setting", "value", "default", "what it says", "decides")
        page.append(f"\n## diffclip {verb}\n\n{table(head, rows)}")
    return "".join(page)


def words_of(node: ast.AST) -> str:
    """The text of an expression, … for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(words_of(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return words_of(node.left) + words_of(node.right)
    if isinstance(node, ast.IfExp):
        return words_of(node.body)
    return "…"


@functools.cache
def messages() -> list[tuple[str, str]]:
    """(module, sentence) of every `InputError(…)` in the source that has words of its own."""
    found = []
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("InputError") and node.args:
                sentence = re.sub("…+", "…", words_of(node.args[0])).strip()
                if re.search("[A-Za-z]{3}", sentence):
                    found.append((path.relative_to(ROOT).with_suffix("").as_posix(), sentence))
    return found


def troubleshooting_list() -> str:
    """The part of docs/troubleshooting.md that the source and docs/cures.yaml decide."""
    topics = yaml.safe_load((ROOT / "docs" / "cures.yaml").read_text(encoding="utf-8"))
    rows: dict[str, set[tuple[str, str]]] = {topic["topic"]: set() for topic in topics}
    for module, sentence in messages():
        topic = next(t for t in topics if any(module.startswith(prefix) for prefix in t["modules"]))
        rows[topic["topic"]].add((sentence, cure_of(sentence, topic)))
    page = []
    for topic in topics:
        if of_topic := sorted(rows[topic["topic"]], key=lambda row: (row[0].strip("…:`- ").lower(), row)):
            lines = [(cell(sentence), cure) for sentence, cure in of_topic]
            page.append(f"\n### {topic['topic']}\n\n{table(('it says', 'what to do'), lines)}")
    return "".join(page)


def cure_of(sentence: str, topic: dict) -> str:
    """What to do: the end of the sentence if it says that, else what docs/cures.yaml says of its words or its topic."""
    for words, cure in topic["cures"].items():
        if words in sentence:
            return cure
    if match := CURE.search(sentence):
        cure = match[1].rstrip(")")
        return cell(cure[0].upper() + cure[1:])
    return topic["cure"]


def troubleshooting_page() -> str:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return page[: page.index(BEGIN)] + BEGIN + troubleshooting_list()


PAGES = {"settings.md": settings_page, "troubleshooting.md": troubleshooting_page}


def main(argv: list[str]) -> int:
    """Write the pages; with --check only say which are not up to date, and return 1 if any is."""
    old = 0
    for name, page in PAGES.items():
        path, text = ROOT / "docs" / name, page()
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            old = 1
            print(
                f"docs/{name}: "
                + ("not what the source says: python docs/generate.py" if "--check" in argv else "written")
            )
            if "--check" not in argv:
                path.write_text(text, encoding="utf-8")
    return old if "--check" in argv else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
