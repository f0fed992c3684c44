"""The page's style: light and dark by the reader's setting, phone to print, contrast AA throughout."""

CSS = """
:root { color-scheme: light dark;
  --paper: #ffffff; --ink: #1d2127; --muted: #565e6a; --grid: #dcdfe4; --soft: #f4f5f7; --accent: #0b5cad;
  --good: #0a6b45; --bad: #a8321a; --warn-paper: #fff6e0; --warn-edge: #d09a1c;
  --theirs: #f3f0fa; --theirs-edge: #8a76b8;
  --model-0: #0072b2; --model-1: #d55e00; --model-2: #00846a; --model-3: #b4508c; --model-4: #6b6b00;
  --model-5: #6a51a3; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #15181d; --ink: #e8eaee; --muted: #a9b1bd; --grid: #343a44; --soft: #1d2128; --accent: #7db8f5;
  --good: #5cc795; --bad: #ff9079; --warn-paper: #2b2513; --warn-edge: #b98a1e;
  --theirs: #211d2e; --theirs-edge: #8a76b8;
  --model-0: #4fa8e8; --model-1: #f58b45; --model-2: #36b899; --model-3: #e08cc0; --model-4: #c3c04a;
  --model-5: #b09be6; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 3rem; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5; overflow-wrap: anywhere;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; font-size: 16px; }
main, header, footer { max-width: 72rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.25rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.015em; }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 3rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--grid);
  letter-spacing: -.01em; }
h3 { font-size: 1rem; line-height: 1.35; margin: 1.6rem 0 .3rem; }
p { margin: .5rem 0; max-width: 48rem; }
a { color: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.skip { position: absolute; left: -100rem; } .skip:focus { left: 1rem; top: .5rem; background: var(--paper);
  padding: .3rem .6rem; z-index: 9; }
.muted, figcaption, .notes, .caption { color: var(--muted); font-size: .875rem; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
nav { position: sticky; top: 0; background: var(--paper); border-bottom: 1px solid var(--grid); z-index: 5;
  margin-top: 1.2rem; }
nav ul { display: flex; gap: 0 1.1rem; padding: .55rem 1.25rem; margin: 0 auto; max-width: 72rem; list-style: none;
  font-size: .875rem; overflow-x: auto; white-space: nowrap; }
nav a { text-decoration: none; padding: .15rem 0; } nav a:hover { text-decoration: underline; }
.callout { border-left: 4px solid var(--warn-edge); background: var(--warn-paper); padding: .6rem .9rem;
  margin: .8rem 0; max-width: 48rem; border-radius: 0 4px 4px 0; }
.verdicts, .checks { list-style: none; padding: 0; margin: .6rem 0; max-width: 48rem; }
.verdicts li, .checks li { padding-left: 1.6rem; position: relative; margin: .3rem 0; }
.verdicts li::before, .checks li::before { position: absolute; left: 0; font-weight: 700; }
.yes::before { content: "\\2713"; color: var(--good); } .no::before { content: "\\2717"; color: var(--bad); }
.unknown::before { content: "?"; color: var(--muted); }
.table { margin: 1.4rem 0; }
.table h3 { margin-top: 0; } .files { font-weight: 400; font-size: .8rem; margin-left: .5rem; white-space: nowrap; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .28rem .9rem .28rem 0; text-align: right; vertical-align: top; }
.scroll th:first-child, .scroll td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--paper); min-width: 7rem; font-weight: 400; }
td { white-space: nowrap; }
@media screen { table:has(tr > :nth-child(11)) { font-size: .79rem; }  /* the paper's nine sets fit a desktop's width */
  table:has(tr > :nth-child(11)) :is(th, td) { padding-right: .5rem; } }
.scroll thead th, .scroll thead th:first-child { font-weight: 600; vertical-align: bottom; }
thead tr:last-child th { border-bottom: 2px solid var(--ink); }
th.group { text-align: center; border-bottom: 1px solid var(--grid); }
tbody tr:not(.heading) { border-bottom: 1px solid var(--grid); }
.scroll tr.heading th { text-align: left; font-weight: 600; padding-top: .8rem; }
table.prose td { white-space: normal; text-align: left; min-width: 10rem; max-width: 32rem; overflow-wrap: anywhere; }
table.prose thead th { text-align: left; }
.up { color: var(--good); } .down { color: var(--bad); } .level { color: var(--muted); }
.notes { padding-left: 1.4rem; max-width: 48rem; margin: .4rem 0; }
.theirs { background: var(--theirs); border-left: 4px solid var(--theirs-edge); border-radius: 0 4px 4px 0;
  padding: .1rem .9rem; margin: .8rem 0; }
.theirs summary { font-weight: 600; font-size: .92rem; } .theirs details { border: 0; }
.theirs .scroll th:first-child, .theirs .scroll td:first-child { background: var(--theirs); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: .5rem 2.5rem;
  align-items: start; }
figure { margin: .8rem 0; min-width: 0; }
.figure { max-width: 36rem; } .figure h3 { margin: .4rem 0 .2rem; }
figure svg { width: 100%; height: auto; display: block; overflow: visible;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
.absent { color: var(--muted); border: 1px dashed var(--grid); border-radius: 6px; padding: .2rem .9rem .6rem; }
.filters { display: flex; flex-wrap: wrap; gap: .6rem 1.2rem; align-items: end; margin: .8rem 0; font-size: .9rem; }
.filters label { display: grid; gap: .15rem; color: var(--muted); max-width: 100%; }
select, input, button { font: inherit; color: var(--ink); background: var(--paper); border: 1px solid var(--muted);
  border-radius: 5px; padding: .3rem .5rem; max-width: 100%; min-height: 2.2rem; }
button { cursor: pointer; }
.viewer { display: grid; grid-template-columns: minmax(0, 1fr); gap: 1rem 1.6rem; align-items: start; }
#panel { border: 1px solid var(--grid); border-radius: 8px; padding: .9rem; background: var(--soft); min-width: 0; }
#panel h3 { margin: .5rem 0 .2rem; font-size: 1.1rem; } #panel p { margin: .2rem 0; }
.shots { display: flex; flex-wrap: wrap; gap: .6rem; } .shots figure { margin: 0; flex: 1 1 8rem; max-width: 14rem; }
.frame { position: relative; display: grid; place-items: center; background: var(--grid); border-radius: 4px;
  overflow: hidden; }
.frame img { display: block; width: 100%; height: auto; } .frame .nopicture { padding: 2rem .5rem; }
canvas.heat { position: absolute; inset: 0; margin: auto; image-rendering: auto; }
img.small { image-rendering: pixelated; }
.answers { margin: .5rem 0; background: none; } .answers th, .answers td { text-align: left; white-space: normal;
  padding-right: 1.1rem; } .answers th { font-weight: 400; color: var(--muted); }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .35em; }
.model-0 { background: var(--model-0); } .model-1 { background: var(--model-1); }
.model-2 { background: var(--model-2); } .model-3 { background: var(--model-3); }
.model-4 { background: var(--model-4); }
.model-5 { background: var(--model-5); }
#tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.6rem, 1fr)); gap: .6rem; }
.tile { display: flex; flex-direction: column; gap: .3rem; padding: .4rem; text-align: left; font-size: .8rem;
  line-height: 1.3; border-color: var(--grid); min-width: 0; }
.tile img { width: 100%; height: auto; aspect-ratio: 1; object-fit: cover; border-radius: 3px; }
.tile:hover { border-color: var(--accent); }
.tile[aria-pressed="true"] { border-color: var(--accent); box-shadow: 0 0 0 1px var(--accent); }
.question { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden; flex: 1; }
.marks { display: flex; flex-wrap: wrap; gap: 0 .7rem; } .marks > span { white-space: nowrap; }
.right { color: var(--good); } .wrong { color: var(--bad); }
.nopicture { color: var(--muted); font-size: .85rem; }
#more { margin: .9rem 0; }
.beside { display: grid; grid-template-columns: minmax(0, 1fr); gap: 0 2.5rem; align-items: start; }
@media (min-width: 62rem) { .beside { grid-template-columns: minmax(0, 26rem) minmax(0, 1fr); } }
@media (min-width: 60rem) { .viewer { grid-template-columns: minmax(22rem, 5fr) 7fr; }
  #panel { position: sticky; top: 3.4rem; max-height: calc(100vh - 4.5rem); overflow-y: auto; } }
@media (max-width: 60rem) { #panel { position: sticky; top: 2.7rem; max-height: 52vh; overflow-y: auto; z-index: 2;
  box-shadow: 0 6px 14px -8px rgba(0, 0, 0, .5); } }
details { border-bottom: 1px solid var(--grid); } summary { cursor: pointer; padding: .45rem 0; }
footer { margin: 3rem auto 2rem; }
@media (max-width: 40rem) { body { font-size: 15px; } table { font-size: .85rem; }
  main, header, footer { padding: 0 1rem; }
  th, td { padding-right: .7rem; } .scroll th:first-child, .scroll td:first-child { min-width: 5.5rem; max-width: 36vw;
  white-space: normal; } table.prose { width: 100%; } table.prose td { min-width: 6.5rem; padding-right: .4rem; }
  .shots figure { flex-basis: 5.5rem; } #panel { padding: .7rem; }
  #tiles { grid-template-columns: repeat(auto-fill, minmax(6.2rem, 1fr)); } }
@media print { nav, .filters, #more, .skip, .files { display: none; } .scroll { overflow: visible; }
  h2, h3 { break-after: avoid; } figure, tr, .tile, #panel { break-inside: avoid; } #panel { position: static; }
  main, header, footer { max-width: none; padding: 0; } body { font-size: 10pt; } table { font-size: 8pt; }
  .theirs table { font-size: 6.8pt; } th, td { white-space: normal; padding: .15rem .45rem .15rem 0; }
  .scroll th:first-child, .scroll td:first-child { min-width: 4rem; position: static; }
  .beside { display: block; } .theirs { padding: .1rem .4rem; } }
"""
