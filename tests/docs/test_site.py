"""The pages that are written from the source are up to date, and the site is built of all pages without a warning."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launch import ROOT

from stages import settings
from stages.config import SettingsParser

DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
import generate  # noqa: E402


def read(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", generate.PAGES)
def test_pages_from_the_source_are_up_to_date(name):
    assert read(name) == generate.PAGES[name](), "run: python docs/generate.py"


def test_every_stage_and_every_setting_has_its_row():
    configs = {name for name in vars(settings) if name.endswith("Config")} - {"TrainingConfig", "ConversationConfig"}
    assert {config.__name__ for config in generate.STAGES.values()} == configs
    sections = re.split(r"^## diffclip (\w+)$", read("settings.md"), flags=re.MULTILINE)[1:]
    for verb, section in zip(sections[::2], sections[1::2]):
        rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.MULTILINE))
        helped = SettingsParser(generate.STAGES[verb], "").format_help()
        assert rows.keys() == {*re.findall(r"^  --(\w+)", helped, re.MULTILINE)} - {"config"}


def raised() -> list[tuple[str, list[str]]]:
    """(where, the fixed words between what is filled in) of each `InputError(…)` in the source."""
    found = []
    for package in ("diffclip", "mllm", "stages"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("InputError", "errors.InputError"):
                    inner = [part for part in node.args[:1] if isinstance(part, ast.JoinedStr | ast.Constant)]
                    parts = [p for part in inner for p in getattr(part, "values", [part])]
                    words = [str(p.value) for p in parts if isinstance(p, ast.Constant)]
                    found.append((f"{path.relative_to(ROOT)}:{node.lineno}", words))
    return found


@pytest.mark.slow
def test_every_message_is_found_by_its_words_and_has_a_cure():
    page = read("troubleshooting.md").replace("\\", "").replace("&lt;", "<")
    messages = raised()
    assert len(messages) > 400
    missing = [
        (where, text)
        for where, words in messages
        for text in (" ".join(word.split()) for word in words)
        if len(text) > 12 and text.replace("\\", "") not in page
    ]
    assert not missing
    rows = re.findall(r"^\| (.*) \| (.*) \|$", page[page.index(generate.BEGIN) :], re.MULTILINE)
    assert not [sentence for sentence, cure in rows if len(cure) < 3]


def test_no_cure_waits_for_words_that_nothing_says():
    """Of docs/cures.yaml; what is left over there once a message is gone."""
    said = [sentence for _, sentence in generate.messages()]
    cures = [words for topic in yaml.safe_load(read("cures.yaml")) for words in topic["cures"]]
    assert not [words for words in cures if not any(words in sentence for sentence in said)]


def test_what_the_python_api_names_is_there():
    names = re.findall(r"^::: (\S+)$", read("api.md"), re.MULTILINE)
    assert len(names) > 20
    for name in names:
        module, _, attribute = name.rpartition(".")
        tree = ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_bytes())  # imports take seconds
        made = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert attribute in made and ast.get_docstring(made[attribute]), name


def pages_of(entry: object) -> list[str]:
    inner = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ()
    return [entry] if isinstance(entry, str) else [page for part in inner for page in pages_of(part)]


def test_every_page_stands_in_the_navigation_once():
    listed = pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    paths = (path.relative_to(DOCS) for ext in ("md", "ipynb") for path in DOCS.rglob(f"*.{ext}"))
    pages = [path.with_suffix(".md").as_posix() for path in paths]
    assert sorted(listed) == sorted([*pages, "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    for package in ("material", "mkdocstrings"):
        pytest.importorskip(package, reason="the site needs the extra `docs`")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    ended = subprocess.run(
        words, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    site = tmp_path / "site"
    html = (site / "api" / "index.html").read_text(encoding="utf-8")
    assert 'id="diffclip.checkpoints.load"' in html and ":::" not in html
    for page in site.rglob("index.html"):
        html = page.read_text(encoding="utf-8")
        for link in re.findall(r'(?:href|src)="(?!https?:|#|data:|mailto:|/)([^"#?]+)', html):
            assert (page.parent / link).exists(), f"{page.relative_to(site)} links to {link}"
        # nothing is fetched from elsewhere when a page is opened
        assert not re.findall(r'<(?:script|img|link rel="stylesheet")[^>]+(?:src|href)="https?:[^"]*"', html), page


@pytest.mark.parametrize("path", sorted(ROOT.glob(".github/ISSUE_TEMPLATE/*.yml")), ids=lambda path: path.stem)
def test_forms_of_issues_are_forms(path: Path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.stem == "config":
        return
    assert {"name", "description", "body"} <= form.keys()
    ids = [item["id"] for item in form["body"]]
    assert len(ids) == len(set(ids)) and all(item["attributes"]["label"] for item in form["body"])


def test_hooks_before_a_commit_start_what_is_there():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    for hook in hooks:
        for word in hook["entry"].split():
            assert not word.endswith(".py") or (ROOT / word).is_file(), word


def test_the_citation_is_the_readmes():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["preferred-citation"]["title"] in (ROOT / "README.md").read_text(encoding="utf-8")
    source = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "diffclip/__init__.py"))
    assert re.findall(r'^(?:__version__|version) = "(.+)"$', source, re.MULTILINE) == [cited["version"]]
