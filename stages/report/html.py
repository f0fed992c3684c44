"""The report as one self-contained page: inline style, figures and images, one script of its own, no network.

The template escapes everything that comes from runs; only our own figures are passed through as markup. The page's
policy lets no script run but ours, by its hash.
"""

import base64
import hashlib
import re
from importlib.resources import files

from jinja2 import Environment
from markupsafe import Markup, escape

from stages.report.data import Arms
from stages.report.examples import examples
from stages.report.sections import Section
from stages.report.setup import checks, details, stand_in
from stages.report.tables import evidence


def page(arms: Arms, title: str, subtitle: str, parts: list[Section]) -> str:
    """The whole page as text."""
    template, style, script = (_own(f"page.{kind}") for kind in ("html.j2", "css", "js"))
    environment = Environment(autoescape=True, trim_blocks=True)
    environment.filters["deltas"] = deltas
    html = environment.from_string(template).render(
        title=title,
        subtitle=subtitle,
        css=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        sections=parts,
        stand_in=stand_in(arms),
        evidence=evidence(arms),
        models=arms.models,
        checks=checks(arms),
        problems=arms.problems,
        gallery=examples(arms),
        details=[(run, details(run)) for run in arms.runs],
    )
    return html.replace("95 %", "95\u00a0%")  # not to be parted at the end of a line


def _own(name: str) -> str:
    return files("stages.report").joinpath(name).read_text(encoding="utf-8")


def deltas(cell: str) -> str:
    """The cell, escaped, its difference in brackets coloured by its sign."""

    def coloured(match: re.Match) -> str:
        kind = {"+": "up", "\u2212": "down"}.get(match[1][0], "level")
        return f'<span class="{kind}">({match[1]})</span>'

    return Markup(re.sub(r"\(([+\u2212]?\d+\.\d+\*?)\)", coloured, str(escape(cell))))
