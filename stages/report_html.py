"""The report as one self-contained page: inline style, figures and pictures, no script, nothing from the network.

The template escapes everything that comes from runs; only our own figures are passed through as markup.
"""

from stages.figures import inline
from stages.report_data import Arms
from stages.report_examples import SHOWN, examples
from stages.report_tables import (
    Table,
    checks,
    comparison,
    details,
    evidence,
    others,
    pope,
    pope_verdict,
    setup,
    stand_in,
)

CSS = """
:root { color-scheme: light dark;
  --paper: #ffffff; --ink: #1d2127; --muted: #5c6470; --grid: #dcdfe4; --soft: #f4f5f7; --accent: #0b5cad;
  --good: #0a6b45; --bad: #a8321a; --warn-paper: #fff6e0; --warn-edge: #d09a1c;
  --model-0: #0072b2; --model-1: #d55e00; --model-2: #00846a; --model-3: #b4508c; --model-4: #6b6b00;
  --model-5: #6a51a3; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #15181d; --ink: #e8eaee; --muted: #a3abb8; --grid: #343a44; --soft: #1d2128; --accent: #7db8f5;
  --good: #5cc795; --bad: #ff9079; --warn-paper: #2b2513; --warn-edge: #b98a1e;
  --model-0: #4fa8e8; --model-1: #f58b45; --model-2: #36b899; --model-3: #e08cc0; --model-4: #c3c04a;
  --model-5: #b09be6; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5; overflow-wrap: anywhere;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; font-size: 16px; }
main, header, footer { max-width: 68rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--grid); }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
p { margin: .5rem 0; max-width: 46rem; }
a { color: var(--accent); }
a:focus-visible, summary:focus-visible, .scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.muted, figcaption, .notes { color: var(--muted); font-size: .875rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; padding: 0; margin: .8rem 0 0; list-style: none;
  font-size: .9rem; }
.callout { border-left: 4px solid var(--warn-edge); background: var(--warn-paper); padding: .6rem .9rem;
  margin: .8rem 0; max-width: 46rem; border-radius: 0 4px 4px 0; }
.verdicts, .checks { list-style: none; padding: 0; margin: .6rem 0; max-width: 46rem; }
.verdicts li, .checks li { padding-left: 1.6rem; position: relative; margin: .3rem 0; }
.verdicts li::before, .checks li::before { position: absolute; left: 0; font-weight: 700; }
.yes::before { content: "\\2713"; color: var(--good); } .no::before { content: "\\2717"; color: var(--bad); }
.unknown::before { content: "?"; color: var(--muted); }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .28rem .9rem .28rem 0; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper);
  min-width: 7.5rem; font-weight: 400; }
td { white-space: nowrap; }
thead th, thead th:first-child { font-weight: 600; border-bottom: 2px solid var(--ink); vertical-align: bottom; }
tbody tr:not(.heading) { border-bottom: 1px solid var(--grid); }
tr.heading th { text-align: left; font-weight: 600; padding-top: .9rem; }
table.prose td { white-space: normal; text-align: left; min-width: 9rem; max-width: 30rem; overflow-wrap: anywhere; }
table.prose thead th { text-align: left; }
.notes { padding-left: 1.4rem; max-width: 46rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1.5rem 2rem;
  align-items: start; }
.beside { display: grid; grid-template-columns: minmax(0, 1fr); gap: 0 2.5rem; align-items: start; }
@media (min-width: 62rem) { .beside { grid-template-columns: minmax(0, max-content) minmax(22rem, 1fr); } }
figure { margin: .6rem 0; min-width: 0; max-width: 34rem; }
figure svg { width: 100%; height: auto; display: block; overflow: visible;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15.5rem), 1fr)); gap: 1rem; }
.example { border: 1px solid var(--grid); border-radius: 6px; padding: .8rem; font-size: .9rem; min-width: 0; }
.example img { display: block; width: 9rem; max-width: 100%; height: auto; border-radius: 3px; }
.example img.small { image-rendering: pixelated; }
.example p { margin: .5rem 0 .4rem; } .example .nopicture { color: var(--muted); }
.example dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem .8rem; margin: 0; }
.example dt { color: var(--muted); } .example dd { margin: 0; }
.right::after { content: " \\2713"; color: var(--good); } .wrong::after { content: " \\2717"; color: var(--bad); }
details { border-bottom: 1px solid var(--grid); } summary { cursor: pointer; padding: .45rem 0; }
footer { margin: 3rem auto 2rem; }
@media (max-width: 40rem) { body { font-size: 15px; } table { font-size: .85rem; }
  th, td { padding-right: .7rem; } th:first-child, td:first-child { min-width: 5.5rem; max-width: 38vw;
  white-space: normal; } }
@media print { nav { display: none; } .scroll { overflow: visible; } h2 { break-after: avoid; }
  figure, .example, tr { break-inside: avoid; } }
"""

TEMPLATE = """
{%- macro grid(table, label) -%}
<div class="scroll" tabindex="0" role="region" aria-label="{{ label }}">
<table{% if table.prose %} class="prose"{% endif %}>
<thead><tr>{% for c in table.columns %}<th scope="col">{{ c }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows -%}
{% if row|length == 1 %}<tr class="heading"><th colspan="{{ table.columns|length }}">{{ row[0] }}</th></tr>
{% else %}<tr><th scope="row">{{ row[0] }}</th>{% for c in row[1:] %}<td>{{ c }}</td>{% endfor %}</tr>
{% endif %}{% endfor -%}
</tbody></table></div>
{% if table.notes %}<ol class="notes" aria-label="Why numbers are missing">
{% for n in table.notes %}<li>{{ n }}.</li>{% endfor %}
</ol>{% endif %}
{%- endmacro -%}
{%- macro chart(names) -%}
<div class="figures">{% for name, caption, svg in figures if name in names or name.split("-")[0] in names %}
<figure role="img" aria-label="{{ caption }}">{{ svg|safe }}<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}</div>
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
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<link rel="icon" href="data:,">
<style>{{ css|safe }}</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
<p class="muted">{{ subtitle }}</p>
<nav aria-label="Sections"><ul>
{% for anchor, name in sections %}<li><a href="#{{ anchor }}">{{ name }}</a></li>{% endfor %}
</ul></nav>
</header>
<main>
{% if stand_in %}<p class="callout">The language model is a stand-in, taught on a little text for this run. It is not
Qwen2.5-0.5B-Instruct, and its answers say nothing about what that model would reach.</p>{% endif %}
<p class="callout">{{ evidence }}</p>

<h2 id="run">What was run</h2>
{{ grid(setup, "What was run") }}
<h3>{{ "May the arms be compared?" if models|length > 1 else "Checks" }}</h3>
{{ marked(checks, "checks") }}
{% if problems %}<h3>While reading the runs</h3>
<ul class="notes">{% for p in problems %}<li>{{ p }}.</li>{% endfor %}</ul>{% endif %}

<h2 id="comparison">Comparison</h2>
<p class="muted">Percentages; higher is better. Differences are in percentage points.</p>
<div class="beside"><div>{{ grid(comparison, "Comparison") }}</div>
{{ chart(["tasks", "shifts", "mmvp"]) }}</div>

<h2 id="pope">POPE with its controls</h2>
<p>Does the model see an object, or guess from its name? A model that looks at the picture beats the blind rule, the
best answer for each object's name without any picture, and loses its lead when the pictures are shuffled among the
questions.</p>
{{ marked(verdicts, "verdicts") }}
<div class="beside"><div>{{ grid(pope, "POPE with its controls") }}</div>
{{ chart(["pope"]) }}</div>

<h2 id="curves">Training curves</h2>
{% if figures|selectattr(0, "in", curve_names)|list %}{{ chart(["loss", "logit"]) }}
{% else %}<p class="muted">No run holds a metrics.jsonl with steps in it.</p>{% endif %}

<h2 id="examples">Examples</h2>
{% if examples %}
<p class="muted">{{ examples|length }} of {{ stored }} stored questions of seed {{ seed }}, evenly spaced in each split,
not chosen by outcome. In brackets: the answer to the same question with another picture.</p>
<div class="examples">{% for e in examples %}
<article class="example">
{% if e.picture %}<img src="{{ e.picture }}" alt="The picture asked about" class="{{ 'small' if e.width <= 96 }}">
{% else %}<p class="nopicture">The picture is missing or cannot be read.</p>{% endif %}
<p>{{ e.question }}</p>
<dl><dt>label ({{ e.split }})</dt><dd>{{ e.label }}</dd>
{% for model in models %}<dt>{{ model }}</dt>
{% if model in e.answers %}{% set answer, other, right = e.answers[model] %}
<dd><span class="{{ 'right' if right else 'wrong' }}">{{ answer or "(empty)" }}</span>
{% if other %} <span class="muted">({{ other }})</span>{% endif %}</dd>
{% else %}<dd class="muted">not stored</dd>{% endif %}{% endfor %}</dl>
</article>{% endfor %}</div>
{% else %}<p class="muted">No evaluate run stored examples (examples.jsonl).</p>{% endif %}

{% if others.rows %}<h2 id="other">Other numbers</h2>
<p class="muted">Whatever else the evaluate runs wrote, as it stands there.</p>
{{ grid(others, "Other numbers") }}{% endif %}

<h2 id="details">Every run</h2>
<p class="muted">What learnt, what was frozen, fingerprints of the weights before and after, digests of the inputs.</p>
{% for run, table in details %}
<details><summary>{{ run.name }}: {{ run.state }}</summary>{{ grid(table, run.name) }}</details>{% endfor %}
</main>
<footer class="muted">Written by <code>python -m stages.report</code> from run directories alone. The figures lie
beside this page in <code>figures/</code>, the comparison in
<code>table.csv</code>, the text in <code>report.md</code>.</footer>
</body></html>
"""


def page(arms: Arms, title: str, subtitle: str, figures: list[tuple[str, str, str]]) -> str:
    """The whole page as text; `figures` are (name, caption, SVG) from `stages.figures`."""
    from jinja2 import Environment

    shown, stored, seed = examples(arms)
    other: Table = others(arms)
    sections = ["run", "comparison", "pope", "curves", "examples", *(["other"] if other.rows else []), "details"]
    names = {
        "run": "What was run",
        "comparison": "Comparison",
        "pope": "POPE",
        "curves": "Curves",
        "examples": "Examples",
        "other": "Other numbers",
        "details": "Every run",
    }
    environment = Environment(autoescape=True, trim_blocks=True)
    return environment.from_string(TEMPLATE).render(
        title=title,
        subtitle=subtitle,
        css=CSS,
        sections=[(anchor, names[anchor]) for anchor in sections],
        stand_in=stand_in(arms),
        evidence=evidence(arms),
        models=arms.models,
        setup=setup(arms),
        checks=checks(arms),
        problems=arms.problems,
        comparison=comparison(arms),
        pope=pope(arms),
        verdicts=[pope_verdict(arms, model) for model in arms.models],
        figures=[(name, caption, inline(svg, name)) for name, caption, svg in figures],
        curve_names=[name for name, _, _ in figures if name.startswith(("loss-", "logit-"))],
        examples=shown[:SHOWN],
        stored=stored,
        seed=seed,
        others=other,
        details=[(run, details(run)) for run in arms.runs],
    )
