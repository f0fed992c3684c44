"""For mkdocs: the pages that a forge wants at the top of the repository are pages of the site, too."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
TOP = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")


def on_files(files: Files, config: Any) -> Files:
    for name in TOP:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **rest: Any) -> str:
    """Links from docs/ to the top, and from there to docs/, meet in one folder."""
    if page.file.src_uri in TOP:
        return re.sub(r"\]\(docs/", "](", markdown)
    return re.sub(rf"\]\(\.\./({'|'.join(map(re.escape, TOP))})", r"](\1", markdown)


def on_page_content(html: str, page: Any, **rest: Any) -> str:
    """Links of notebooks, which mkdocs-jupyter leaves as they are."""
    if page.file.src_uri.endswith(".ipynb"):
        return re.sub(r'href="\.\./(\w+)\.md', r'href="../../\1/', html)
    return html
