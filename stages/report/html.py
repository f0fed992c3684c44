"""The report as one self-contained page: inline style, figures and pictures, one script of its own, no network.

The template escapes everything that comes from runs; only our own figures are passed through as markup. The page's
policy lets no script run but ours, by its hash.
"""

import base64
import hashlib
import re
from dataclasses import dataclass, field

from stages.report.beyond import cost, cost_verdict, localisation
from stages.report.cells import Table
from stages.report.data import Arms
from stages.report.examples import examples
from stages.report.figures import Figure
from stages.report.layout import mmvp, table1, table2, table3, table4, table5
from stages.report.paper import paper_figure4, paper_table1, paper_table2, paper_table3
from stages.report.pope import pope, pope_pairs, pope_verdict
from stages.report.script import SCRIPT
from stages.report.setup import checks, details, setup, stand_in
from stages.report.style import CSS
from stages.report.tables import comparison, evidence, others, tally

TEMPLATE = """
{%- macro grid(table, label) -%}
<div class="scroll" tabindex="0" role="region" aria-label="{{ label }}">
<table{% if table.prose %} class="prose"{% endif %}>
<thead>{% if table.groups %}<tr>{% for text, width in table.groups %}
{%- if text %}<th class="group" scope="colgroup" colspan="{{ width }}">{{ text }}</th>
{%- else %}<td colspan="{{ width }}"></td>{% endif %}{% endfor %}</tr>{% endif %}
<tr>{% for c in table.columns %}{% if c %}<th scope="col">{{ c }}</th>{% else %}<td></td>{% endif %}
{%- endfor %}</tr></thead>
<tbody>
{% for row in table.rows -%}
{% if row|length == 1 %}<tr class="heading"><th colspan="{{ table.columns|length }}">{{ row[0] }}</th></tr>
{% elif table.prose and row|length > 2 and row[1:]|unique|list|length == 1 -%}
<tr><th scope="row">{{ row[0] }}</th><td colspan="{{ row|length - 1 }}">{{ row[1] }}</td></tr>
{% else %}<tr><th scope="row">{{ row[0] }}</th>{% for c in row[1:] %}<td>{{ c|deltas }}</td>{% endfor %}</tr>
{% endif %}{% endfor -%}
</tbody></table></div>
{% if table.notes %}<ol class="notes" aria-label="Why numbers are missing">
{% for n in table.notes %}<li>{{ n }}.</li>{% endfor %}
</ol>{% endif %}
{%- endmacro -%}
{%- macro files(folder, name, kinds) -%}
<span class="files">{% for kind in kinds -%}
<a href="{{ folder }}/{{ name }}.{{ kind }}">{{ kind|upper }}</a> {% endfor %}</span>
{%- endmacro -%}
{%- macro show_table(table) -%}
{% if table.published %}<div class="theirs"><details open><summary>{{ table.title }} (not ours)
{{ files("tables", table.name, ["csv", "tex"]) }}</summary>
<p class="caption">{{ table.caption }}</p>{{ grid(table, table.title) }}</details></div>
{% else %}<section class="table" id="{{ table.name }}"><h3>{{ table.title }}
{{ files("tables", table.name, ["csv", "tex"]) }}</h3>
<p class="caption">{{ table.caption }}</p>{{ grid(table, table.title) }}</section>{% endif %}
{%- endmacro -%}
{%- macro show_figure(f) -%}
{% if f.absent %}<figure class="figure absent" id="{{ f.anchor }}"><h3>{{ f.title }}</h3>
<figcaption>Not drawn: {{ f.absent }}.</figcaption></figure>
{% else %}<figure class="figure" id="{{ f.anchor }}">
<h3>{{ f.title }} {{ files("figures", f.name, ["svg", "png"]) }}</h3>
<div role="img" aria-label="{{ f.title }}: {{ f.caption }}">{{ f.svg|safe }}</div>
<figcaption>{{ f.caption }}</figcaption></figure>{% endif %}
{%- endmacro -%}
{%- macro marked(items, cls) -%}
<ul class="{{ cls }}">{% for ok, text in items %}
<li class="{{ 'yes' if ok else 'unknown' if ok is none else 'no' }}">{{ text }}</li>{% endfor %}
</ul>
{%- endmacro -%}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline';
 script-src 'sha256-{{ script_hash }}'; base-uri 'none'; form-action 'none'">
<title>{{ title }}</title>
<link rel="icon" href="data:,">
<style>{{ css|safe }}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
<header>
<h1>{{ title }}</h1>
<p class="muted">{{ subtitle }}</p>
</header>
<nav aria-label="Sections"><ul>
{% for s in sections %}<li><a href="#{{ s.anchor }}">{{ s.short }}</a></li>{% endfor %}
</ul></nav>
<main id="main">
{% if stand_in %}<p class="callout">The language model is a stand-in, taught on a little text for this run. It is not
Qwen2.5-0.5B-Instruct, and its answers say nothing about what that model would reach.</p>{% endif %}
<p class="callout">{{ evidence }}</p>
{% for s in sections %}
<h2 id="{{ s.anchor }}">{{ s.title }}</h2>
{% if s.text %}{% for paragraph in s.text.split("\n") %}<p>{{ paragraph }}</p>{% endfor %}{% endif %}

{% if s.verdicts %}{{ marked(s.verdicts, "verdicts") }}{% endif %}
{% if s.beside %}<div class="beside"><div>{% endif %}
{% if s.figures %}<div class="figures">{% for f in s.figures %}{{ show_figure(f) }}
{% endfor %}</div>{% endif %}
{% if s.beside %}</div><div>{% endif %}
{% for table in s.tables %}{{ show_table(table) }}
{% if s.beside == loop.index %}</div></div>{% endif %}
{% endfor %}
{% if s.anchor == "run" %}
<h3>{{ "May the arms be compared?" if models|length > 1 else "Checks" }}</h3>
{{ marked(checks, "checks") }}
{% if problems %}<h3>While reading the runs</h3>
<ul class="notes">{% for p in problems %}<li>{{ p }}.</li>{% endfor %}</ul>{% endif %}
{% elif s.anchor == "examples" %}
{% if gallery.items %}
<p class="muted">{{ "{:,}".format(gallery.items|length) }} of {{ "{:,}".format(gallery.stored) }} stored questions of
seed {{ gallery.seed }}, not chosen by outcome. Point at an example, or reach it with Tab and the arrow keys.
{% if gallery.without_picture %}{{ "{:,}".format(gallery.without_picture) }} stand without their picture, which would
make this page too large.{% endif %}</p>
<div class="filters">
<label>Show <select id="filter-outcome"></select></label>
<label>Split <select id="filter-split"></select></label>
<label>Question contains <input id="filter-words" type="search" maxlength="80"></label>
<span id="example-count" class="muted" role="status"></span>
</div>
<div class="viewer"><div id="panel" role="region" aria-label="The example in hand" tabindex="0"></div>
<div><div id="tiles" role="group" aria-label="Examples"></div>
<button id="more" type="button" hidden></button></div></div>
<noscript><p class="muted">The examples need the page's own script; they are in examples.jsonl of the evaluate
runs.</p></noscript>
<script type="application/json" id="example-data">{{ gallery.script_data()|safe }}</script>
{% else %}<p class="muted">No evaluate run stored examples (examples.jsonl).</p>{% endif %}
{% elif s.anchor == "details" %}
{% for run, table in details %}
<details><summary>{{ run.name }}: {{ run.state }}</summary>{{ grid(table, run.name) }}</details>{% endfor %}
{% endif %}
{% endfor %}
</main>
<footer class="muted">Written by <code>python -m stages.report</code> from run directories alone. The figures lie
beside this page in <code>figures/</code> (SVG, and PNG of 300 dpi), the tables in <code>tables/</code> (CSV, LaTeX),
the scores for machines in <code>table.csv</code>, the text in <code>report.md</code>.</footer>
<script>{{ script|safe }}</script>
</body></html>
"""


@dataclass
class Section:
    """A heading of the report and what stands under it, in this order."""

    anchor: str
    short: str
    title: str
    text: str = ""
    verdicts: list[tuple[bool | None, str]] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    beside: int = 0  # so many of the tables stand beside the figures where there is room


def sections(arms: Arms, drawn: list[Figure]) -> list[Section]:
    """The report in the paper's order; then what the paper does not have."""
    figure = {f.name: f for f in drawn}
    curves = [f for f in drawn if f.name.startswith("loss-") or f.name in ("lambda", "logit-scale")]
    pairs = pope_pairs(arms)
    rest = others(arms)
    found = [
        Section("run", "Runs", "What was run", tables=[setup(arms)]),
        Section(
            "glance",
            "Fig. 1, 2",
            "At a glance",
            "\n".join(tally(arms)),
            figures=[figure["figure1"], figure["figure2"]],
        ),
        Section("classification", "Tab. 1", "Linear probing and few-shot", tables=[table1(arms), paper_table1()]),
        Section("retrieval", "Tab. 2", "Retrieval and zero-shot", tables=[table2(arms), paper_table2()]),
        Section(
            "robustness",
            "Fig. 3, 4",
            "Out of distribution, and fine-grained vision",
            figures=[figure["figure3"], figure["figure4"]],
            tables=[mmvp(arms), paper_figure4()],
        ),
        Section("variants", "Fig. 5", "Variants", figures=[figure["figure5"]]),
        Section(
            "hallucination",
            "Tab. 3",
            "Object hallucination: POPE",
            "Does the model see an object, or guess from its name? A model that looks at the picture beats the blind "
            "rule, the best answer for each object's name without any picture, and loses its lead when the pictures "
            "are shuffled among the questions.",
            verdicts=[pope_verdict(arms, model) for model in arms.models],
            figures=[figure["pope"]],
            tables=[table3(arms), paper_table3(), pope(arms), *([pairs] if pairs else [])],
            beside=2,
        ),
        Section("appendix", "Tab. 4, 5", "The numbers behind Figures 3 and 5", tables=[table4(arms), table5(arms)]),
        Section("more-attention", "Fig. 6", "More attention maps", figures=[figure["figure6"]]),
        Section(
            "localisation-part",
            "Localisation",
            "Localisation, measured",
            figures=[figure["localisation"]],
            tables=[localisation(arms)],
            beside=1,
        ),
        Section("curves", "Curves", "Training curves", figures=curves),
        Section("cost-part", "Cost", "Cost", cost_verdict(arms), figures=[figure["cost"]], tables=[cost(arms)]),
        Section("examples", "Examples", "Examples"),
        Section("all-scores", "Scores", "All scores", tables=[comparison(arms)]),
    ]
    if rest.rows:
        found.append(Section("other", "Other", "Other numbers", tables=[rest]))
    text = "What learnt, what was frozen, fingerprints of the weights before and after, digests of the inputs."
    return [*found, Section("details", "Each run", "Every run", text)]


def page(arms: Arms, title: str, subtitle: str, parts: list[Section]) -> str:
    """The whole page as text."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True)
    environment.filters["deltas"] = deltas
    html = environment.from_string(TEMPLATE).render(
        title=title,
        subtitle=subtitle,
        css=CSS,
        script=SCRIPT,
        script_hash=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
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


def deltas(cell: str) -> str:
    """The cell, escaped, its difference in brackets coloured by its sign."""
    from markupsafe import Markup, escape

    def coloured(match: re.Match) -> str:
        kind = {"+": "up", "\u2212": "down"}.get(match[1][0], "level")
        return f'<span class="{kind}">({match[1]})</span>'

    return Markup(re.sub(r"\(([+\u2212]?\d+\.\d+\*?)\)", coloured, str(escape(cell))))
