"use strict";
(() => {  // what is wider than its place says so, and an address inside a folded part opens it
  const places = [...document.querySelectorAll(".scroll, nav ul")];
  const tell = () => places.forEach(p => p.classList.toggle("sideways", p.scrollWidth > p.clientWidth + 1));
  const unfold = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (let n = target; n; n = n.parentElement) if (n.tagName === "DETAILS") n.open = true;
    if (target) target.scrollIntoView();
  };
  document.addEventListener("toggle", tell, true);
  window.addEventListener("resize", tell);
  window.addEventListener("hashchange", unfold);
  document.querySelectorAll("nav a").forEach(a => a.addEventListener("click", () => setTimeout(unfold)));
  tell();
  if (location.hash) unfold();
})();
(() => {
  const holder = document.getElementById("example-data");
  if (!holder) return;
  const data = JSON.parse(holder.textContent);
  const STEP = 30;
  const tiles = document.getElementById("tiles"), panel = document.getElementById("panel");
  const outcome = document.getElementById("filter-outcome"), split = document.getElementById("filter-split");
  const words = document.getElementById("filter-words"), count = document.getElementById("example-count");
  const more = document.getElementById("more");
  let found = [], shown = 0, pinned = -1;

  const make = (tag, cls, text) => {
    const node = document.createElement(tag);
    if (cls) node.className = cls;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const option = (select, value, text) => {
    const node = make("option", "", text);
    node.value = value;
    select.append(node);
  };
  option(outcome, "all", "all");
  option(outcome, "wrong", "wrong: any model");
  data.models.forEach((model, i) => option(outcome, "wrong-" + i, "wrong: " + model));
  if (data.models.length > 1) option(outcome, "changed", "answers differ between models");
  option(outcome, "same", "same answer with another image");
  option(split, "all", "all");
  [...new Set(data.items.map(e => e.s))].forEach(s => option(split, s, s || "(no split)"));

  const plain = text => text.trim().toLowerCase();
  const passes = e => {
    const given = e.a.filter(a => a), kind = outcome.value;
    if (split.value !== "all" && e.s !== split.value) return false;
    if (words.value && !plain(e.q).includes(plain(words.value))) return false;
    if (kind === "wrong") return given.some(a => !a[2]);
    if (kind.startsWith("wrong-")) return e.a[kind.slice(6)] && !e.a[kind.slice(6)][2];
    if (kind === "changed") return new Set(given.map(a => plain(a[0]))).size > 1;
    if (kind === "same") return given.some(a => a[1] && plain(a[0]) === plain(a[1]));
    return true;
  };

  // black, purple, red, orange, pale yellow: brightness alone carries the value
  const STOPS = [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]];
  const colour = value => {
    const x = value / 255 * (STOPS.length - 1), i = Math.min(Math.floor(x), STOPS.length - 2);
    return STOPS[i].map((c, k) => c + (STOPS[i + 1][k] - c) * (x - i));
  };
  const drawHeat = (heat, shot) => {
    const [columns, packed] = heat;
    const bytes = Uint8Array.from(atob(packed), c => c.charCodeAt(0));
    const canvas = make("canvas", "heat");
    canvas.width = columns;
    canvas.height = bytes.length / columns;
    const image = new ImageData(canvas.width, canvas.height);
    bytes.forEach((v, i) => {
      const [r, g, b] = colour(v);
      image.data.set([r, g, b, 255 * (0.45 + 0.3 * v / 255)], 4 * i);
    });
    canvas.getContext("2d").putImageData(image, 0, 0);
    const side = Math.min(shot.w, shot.h);  // the model sees the middle square
    canvas.style.width = 100 * side / shot.w + "%";
    canvas.style.height = 100 * side / shot.h + "%";
    return canvas;
  };
  const imageOf = (e, alt) => {
    const shot = data.images[e.p];
    if (!shot) return make("span", "noimage", "image missing");
    const image = make("img", Math.max(shot.w, shot.h) <= 96 ? "small" : "");
    image.src = shot.u;
    image.alt = alt;
    image.width = shot.w;
    image.height = shot.h;
    return image;
  };
  const mark = right => make("span", right ? "right" : "wrong", right ? "\u2713" : "\u2717");

  const show = number => {
    const e = data.items[number];
    if (!e) return;
    const shots = make("div", "shots");
    const add = (heat, name, colourOf) => {
      const figure = make("figure"), frame = make("div", "frame");
      frame.append(imageOf(e, "The image asked about"));
      if (heat && data.images[e.p]) frame.append(drawHeat(heat, data.images[e.p]));
      const caption = make("figcaption", "", name);
      if (colourOf !== undefined) caption.prepend(make("span", "dot model-" + colourOf % 6));
      figure.append(frame, caption);
      shots.append(figure);
    };
    add(null, "image");
    data.models.forEach((model, i) => e.h[i] && add(e.h[i], model, i));
    const facts = make("table", "answers"), head = make("tr");
    ["", "answer", "with another image"].forEach(t => head.append(make("th", "", t)));
    facts.append(head);
    data.models.forEach((model, i) => {
      const row = make("tr"), name = make("th", "", model), a = e.a[i];
      name.scope = "row";
      name.prepend(make("span", "dot model-" + i % 6));
      const answer = make("td", "", a ? (a[0] || "(empty)") + " " : "not stored");
      if (a) answer.append(mark(a[2]));
      row.append(name, answer, make("td", "muted", a ? a[1] || "\u2013" : ""));
      facts.append(row);
    });
    const label = make("p", "muted", "right answer: ");
    label.append(make("strong", "", e.l || "(none)"), document.createTextNode(" \u00b7 split: " + (e.s || "(none)")));
    const drawn = e.h.some(h => h);
    const note = drawn ? "Bright patches speak for \u201c" + e.t + "\u201d in the dual encoder\u2019s vision tower."
      : "No attention was kept for this question.";
    panel.replaceChildren(shots, make("h3", "", e.q), label, facts, make("p", "muted", note));
    tiles.querySelectorAll("[aria-pressed=true]").forEach(t => t.setAttribute("aria-pressed", "false"));
    const tile = tiles.querySelector("[data-number='" + number + "']");
    if (tile) tile.setAttribute("aria-pressed", "true");
  };

  const tile = number => {
    const e = data.items[number], button = make("button", "tile");
    button.type = "button";
    button.dataset.number = number;
    button.setAttribute("aria-pressed", "false");
    button.append(imageOf(e, ""), make("span", "question", e.q));
    const marks = make("span", "marks");
    data.models.forEach((model, i) => {
      if (!e.a[i]) return;
      const one = mark(e.a[i][2]);
      one.prepend(make("span", "dot model-" + i % 6));
      one.title = model + ": " + e.a[i][0];
      one.append(make("span", "hidden", " " + model + (e.a[i][2] ? " is right" : " is wrong")));
      marks.append(one);
    });
    button.append(marks);
    button.addEventListener("mouseenter", () => show(number));
    button.addEventListener("focus", () => { pinned = number; show(number); });
    button.addEventListener("click", () => { pinned = number; show(number); });
    return button;
  };
  tiles.addEventListener("mouseleave", () => show(pinned));
  tiles.addEventListener("keydown", event => {
    const all = [...tiles.children], at = all.indexOf(document.activeElement);
    const across = all.filter(t => t.offsetTop === all[0].offsetTop).length || 1;
    const move = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across};
    Object.assign(move, {Home: -at, End: all.length - 1 - at});
    const target = all[at + move[event.key]];
    if (at < 0 || !target) return;
    event.preventDefault();
    target.focus();
  });

  const grow = () => {
    const next = found.slice(shown, shown + STEP);
    tiles.append(...next.map(tile));
    shown += next.length;
    more.hidden = shown >= found.length;
    more.textContent = "Show " + Math.min(STEP, found.length - shown) + " more";
  };
  const refresh = () => {
    found = [];
    data.items.forEach((e, i) => { if (passes(e)) found.push(i); });
    const number = n => n.toLocaleString("en");
    count.textContent = number(found.length) + " of " + number(data.items.length) + " examples";
    tiles.replaceChildren();
    shown = 0;
    grow();
    pinned = -1;
    if (!found.length) return panel.replaceChildren(make("p", "muted", "No example passes these filters."));
    pinned = found[0];
    show(pinned);
  };
  more.addEventListener("click", () => {
    const first = shown;
    grow();
    if (tiles.children[first]) tiles.children[first].focus();
  });
  [outcome, split].forEach(s => s.addEventListener("change", refresh));
  words.addEventListener("input", refresh);
  refresh();
})();
