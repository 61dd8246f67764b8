"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const view = { axis: "steps", smoothing: 0.8, log: false, events: true, range: null };
const GRAVE = ["resume", "stop", "rollback", "failed", "failure", "hang"]; // these have a line in every panel
const KINDS = ["start", "config", ...GRAVE, "save failed", "bad checkpoint", "skip", "bad sample", "done", "saved", "samples", "samples failed"];
const HEIGHT = 190, LEFT = 54, RIGHT = 12, TOP = 8, BOTTOM = 22;
const tip = document.getElementById("tip");
const byId = (id) => document.getElementById(id);

function html(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const scale = (run) => (view.axis === "images" ? run.batch : 1);
const kindClass = (kind) => (KINDS.includes(kind) ? "kind-" + kind.replaceAll(" ", "-") : "kind-other");

// ---- numbers

function short(value, percent = false) {
  if (percent) return +(100 * value).toPrecision(3) + "%";
  const size = Math.abs(value);
  if (size >= 1e9) return +(value / 1e9).toPrecision(3) + "G";
  if (size >= 1e6) return +(value / 1e6).toPrecision(3) + "M";
  if (size >= 1e4) return +(value / 1e3).toPrecision(3) + "k";
  if (size !== 0 && size < 1e-3) return value.toExponential(1);
  return String(+value.toPrecision(4));
}

function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high * (1 + 1e-12); i++) found.push(i * step);
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const factor of [1, 2, 5]) found.push(factor * 10 ** power);
  const inside = found.filter((value) => value >= low && value <= high);
  return inside.length > 1 ? inside : ticks(low, high, 4);
}

// An exponential average over points, divided by the sum of its weights so that it starts at the first point.
function smooth(rows, weight) {
  let sum = 0, norm = 0;
  return rows.map(([x, y]) => {
    sum = weight * sum + (1 - weight) * y;
    norm = weight * norm + (1 - weight);
    return [x, sum / norm];
  });
}

// ---- data to draw

function seriesOf(panel) {
  return data.runs.flatMap((run, index) => {
    let rows = run.curves[panel.key];
    if (!rows) return [];
    const factor = scale(run);
    rows = rows.map((row) => [row[0] * factor, ...row.slice(1)]);
    if (view.log) rows = rows.filter((row) => row[1] > 0);
    if (view.range) rows = rows.filter((row) => row[0] >= view.range[0] && row[0] <= view.range[1]);
    if (!rows.length) return [];
    const smoothed = panel.noisy && view.smoothing > 0 && rows.length > 8;
    return [{ run, index, rows, smoothed, line: smoothed ? smooth(rows, view.smoothing) : rows }];
  });
}

function wholeRange() {
  let high = 0, low = Infinity;
  for (const run of data.runs)
    for (const rows of Object.values(run.curves))
      for (const end of [rows[0], rows[rows.length - 1]]) {
        high = Math.max(high, end[0] * scale(run));
        low = Math.min(low, end[0] * scale(run));
      }
  return high > low ? [low, high] : [0, Math.max(high, 1)];
}

// The range of all lines, and of the raw values behind them without the most extreme hundredth at each end.
function heights(series) {
  const values = [];
  for (const { line, rows } of series) {
    const sorted = rows.map((row) => row[1]).sort((a, b) => a - b), cut = Math.floor(sorted.length / 100);
    values.push(sorted[cut], sorted[sorted.length - 1 - cut]);
    for (const [, y] of line) values.push(y);
  }
  let low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
  if (high - low <= 1e-6 * Math.abs(high)) [low, high] = low > 0 ? [low * 0.9, high * 1.1] : [low - 1, high + 1];
  const margin = view.log ? (high / low) ** 0.04 : (high - low) * 0.05;
  return view.log ? [low / margin, high * margin] : [low >= 0 ? Math.max(0, low - margin) : low - margin, high + margin];
}

// ---- drawing

function draw(panel, box) {
  const series = seriesOf(panel), width = Math.max(220, box.clientWidth);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, role: "img", "aria-label": panel.title });
  box.replaceChildren(picture);
  if (!series.length) return picture.append(svg("text", { x: LEFT, y: HEIGHT / 2 }, "nothing to show here"));
  const [x0, x1] = view.range || wholeRange(), [y0, y1] = heights(series);
  const bend = view.log ? Math.log : (value) => value;
  const X = (x) => LEFT + ((x - x0) / (x1 - x0)) * (width - LEFT - RIGHT);
  const Y = (y) => HEIGHT - BOTTOM - ((bend(y) - bend(y0)) / (bend(y1) - bend(y0))) * (HEIGHT - TOP - BOTTOM);
  axes(picture, panel, width, [x0, x1], [y0, y1], X, Y);
  const clip = "clip-" + panel.key.replace(/\W/g, "-");
  picture.append(svg("clipPath", { id: clip }, svg("rect", { x: LEFT, y: TOP, width: width - LEFT - RIGHT, height: HEIGHT - TOP - BOTTOM })));
  const inside = svg("g", { "clip-path": `url(#${clip})` });
  picture.append(inside);
  if (view.events) for (const { run } of series) inside.append(...eventLines(run, X, [x0, x1]));
  for (const one of series) inside.append(...curve(one, X, Y));
  explore(picture, panel, series, width, [x0, x1], X, Y);
}

function axes(picture, panel, width, xs, ys, X, Y) {
  for (const y of view.log ? logTicks(...ys) : ticks(...ys, 4)) {
    picture.append(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: Y(y), y2: Y(y) }));
    picture.append(svg("text", { x: LEFT - 6, y: Y(y) + 4, "text-anchor": "end" }, short(y, panel.percent)));
  }
  for (const x of ticks(...xs, Math.max(2, Math.floor(width / 90)))) {
    const anchor = X(x) > width - RIGHT - 14 ? "end" : "middle";
    picture.append(svg("text", { x: X(x), y: HEIGHT - 6, "text-anchor": anchor }, short(x)));
  }
  picture.append(svg("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM }));
}

function eventLines(run, X, [x0, x1]) {
  const lines = [];
  for (const kind of GRAVE) {
    const steps = (run.marks[kind] || []).map((step) => step * scale(run)).filter((x) => x >= x0 && x <= x1);
    for (const x of steps.slice(0, 40)) lines.push(svg("line", { class: "when " + kindClass(kind), x1: X(x), x2: X(x), y1: TOP, y2: HEIGHT - BOTTOM }));
  }
  return lines;
}

function path(rows, X, Y, column = 1) {
  return rows.map((row, i) => `${i ? "L" : "M"}${X(row[0]).toFixed(1)} ${Y(row[column]).toFixed(1)}`).join("");
}

function curve({ index, rows, line, smoothed }, X, Y) {
  const parts = [], style = `run${index % 8}`;
  if (rows[0].length > 2) {
    const low = rows.map((row) => [row[0], view.log ? Math.max(row[2], 1e-12) : row[2]]), high = rows.map((row) => [row[0], row[3]]);
    parts.push(svg("path", { class: `spread ${style}`, d: path(high, X, Y) + path(low.reverse(), X, Y).replace("M", "L") + "Z" }));
  }
  if (smoothed) parts.push(svg("path", { class: `raw ${style}`, d: path(rows, X, Y) }));
  parts.push(svg("path", { class: `line ${style}`, d: path(line, X, Y) }));
  if (line.length <= 40) for (const [x, y] of line) parts.push(svg("circle", { class: `dot ${style}`, cx: X(x), cy: Y(y), r: 2.4 }));
  return parts;
}

// Shows the values under the pointer. A drag selects a range for all panels, and a double click resets it.
function explore(picture, panel, series, width, [x0, x1], X, Y) {
  const cross = svg("line", { class: "cross", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  const brush = svg("rect", { class: "brush", y: TOP, height: HEIGHT - TOP - BOTTOM, width: 0 });
  picture.append(cross, brush);
  let from = null;
  const at = (event) => {
    const box = picture.getBoundingClientRect(), share = ((event.clientX - box.left) * (width / box.width) - LEFT) / (width - LEFT - RIGHT);
    return x0 + Math.min(1, Math.max(0, share)) * (x1 - x0);
  };
  picture.addEventListener("pointermove", (event) => {
    const x = at(event);
    fill(cross, { x1: X(x), x2: X(x), visibility: "visible" }, []);
    if (from !== null) fill(brush, { x: X(Math.min(from, x)), width: Math.abs(X(x) - X(from)) }, []);
    const rows = series.map(({ run, index, line }) => {
      const near = line.reduce((best, row) => (Math.abs(row[0] - x) < Math.abs(best[0] - x) ? row : best));
      return html("div", { class: `run${index % 8}` }, html("i", { class: "swatch" }), run.name, html("b", {}, short(near[1], panel.percent)));
    });
    showTip(event, [html("div", {}, `${view.axis === "images" ? "image" : "step"} ${Math.round(x).toLocaleString("en")}`), ...rows]);
  });
  picture.addEventListener("pointerleave", () => { cross.setAttribute("visibility", "hidden"); brush.setAttribute("width", 0); tip.hidden = true; from = null; });
  picture.addEventListener("pointerdown", (event) => { if (event.pointerType === "mouse") from = at(event); });
  picture.addEventListener("pointerup", (event) => {
    const to = at(event);
    if (from !== null && Math.abs(X(to) - X(from)) > 6) { view.range = [Math.min(from, to), Math.max(from, to)]; redraw(); }
    from = null;
  });
  picture.addEventListener("dblclick", () => { view.range = null; redraw(); });
}

function showTip(event, content) {
  tip.replaceChildren(...content);
  tip.hidden = false;
  const left = event.clientX + 14 + tip.offsetWidth > innerWidth ? event.clientX - 14 - tip.offsetWidth : event.clientX + 14;
  tip.style.left = Math.max(4, left) + "px";
  tip.style.top = Math.min(innerHeight - tip.offsetHeight - 4, event.clientY + 14) + "px";
}

// ---- timeline

function drawTimeline() {
  const box = byId("timeline"), width = Math.max(240, box.clientWidth), row = 30, height = row * data.runs.length + 24;
  const [x0, x1] = view.range || wholeRange(), left = Math.min(150, width / 4);
  const X = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - RIGHT);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height });
  data.runs.forEach((run, index) => picture.append(...timelineRow(run, index, row * index + row / 2 + 2, X, [x0, x1], left)));
  for (const x of ticks(x0, x1, Math.max(2, Math.floor((width - left) / 100)))) {
    picture.append(svg("text", { x: X(x), y: height - 4, "text-anchor": X(x) > width - 26 ? "end" : "middle" }, short(x)));
  }
  box.replaceChildren(picture);
}

function timelineRow(run, index, y, X, [x0, x1], left) {
  const name = run.name.length > left / 8 ? run.name.slice(0, Math.floor(left / 8) - 1) + "…" : run.name;
  const last = Math.max(0, ...Object.values(run.curves).map((rows) => rows[rows.length - 1][0])) * scale(run);
  const parts = [svg("text", { class: "name", x: 0, y: y + 4 }, name)];
  parts.push(svg("rect", { class: `spread run${index % 8}`, x: X(x0), y: y - 6, width: Math.max(0, X(Math.min(last, x1)) - X(x0)), height: 12, rx: 3 }));
  const dots = ["saved", "samples"], weight = (kind) => GRAVE.includes(kind) - dots.includes(kind);
  for (const kind of Object.keys(run.marks).sort((a, b) => weight(a) - weight(b)))
    for (const step of run.marks[kind]) {
      const x = step * scale(run);
      if (x < Math.min(x0, 0) || x > x1) continue;
      const cx = X(Math.max(x, x0)), style = `mark ${kindClass(kind)}`, size = GRAVE.includes(kind) ? 10 : 6;
      const mark = dots.includes(kind)
        ? svg("circle", { class: style, cx, cy: y, r: 2 })
        : svg("rect", { class: style, x: cx - 1.25, y: y - size, width: 2.5, height: 2 * size, rx: 1.25 });
      mark.addEventListener("pointermove", (event) => showTip(event, [html("div", {}, `${run.name}: ${kind} at step ${step.toLocaleString("en")}`)]));
      mark.addEventListener("pointerleave", () => (tip.hidden = true));
      parts.push(mark);
    }
  return parts;
}

function legend(target, items) {
  target.replaceChildren(...items.map(([style, color, name]) => html("span", { class: style }, html("i", { class: "swatch", style: `background:var(${color})` }), name)));
}

// ---- samples

function setUpSamples() {
  const place = byId("sample-grids");
  if (!place) return;
  const steps = [...new Set(data.runs.flatMap((run) => run.pictures.map((picture) => picture.step)))].sort((a, b) => a - b);
  const slider = html("input", { type: "range", min: 0, max: steps.length - 1, value: steps.length - 1, "aria-label": "step of the samples" });
  const output = html("output"), grids = html("div", { class: "grids" });
  const show = () => {
    const step = steps[slider.value];
    output.textContent = `step ${step.toLocaleString("en")}`;
    grids.replaceChildren(...data.runs.flatMap((run, index) => {
      const picture = run.pictures.filter((one) => one.step <= step).pop();
      if (!picture) return [];
      const image = html("img", { src: picture.source, width: picture.width, height: picture.height, alt: `samples of ${run.name} at step ${picture.step}` });
      return [html("figure", { class: `run${index % 8}` }, html("figcaption", {}, html("i", { class: "swatch" }), `${run.name}, step ${picture.step.toLocaleString("en")}`), image)];
    }));
  };
  slider.addEventListener("input", show);
  place.append(html("div", { class: "slider" }, slider, output), grids);
  show();
}

// ---- the whole page

function setUpPanels() {
  const place = byId("curves"), boxes = [];
  for (const group of [...new Set(data.panels.map((panel) => panel.group))]) {
    const panels = data.panels.filter((panel) => panel.group === group), small = panels.length > 6;
    const grid = html("div", { class: "panels" + (small ? " small" : "") });
    for (const panel of panels) {
      const box = html("div", { class: "chart" });
      grid.append(html("div", { class: "panel" }, html("h3", {}, panel.title), box));
      boxes.push([panel, box]);
    }
    const folded = group === "Other";
    const section = folded ? html("details", {}, html("summary", {}, "other quantities"), grid) : html("section", {}, html("h2", {}, group), grid);
    if (folded) section.addEventListener("toggle", redraw);
    place.append(section);
  }
  return boxes;
}

const boxes = setUpPanels();

function redraw() {
  byId("reset").hidden = view.range === null;
  drawTimeline();
  for (const [panel, box] of boxes) if (box.clientWidth) draw(panel, box);
}

const kindsHere = KINDS.filter((kind) => data.runs.some((run) => run.marks[kind]));
legend(byId("kinds"), kindsHere.map((kind) => [kindClass(kind), "--kind", kind]));
legend(byId("legend"), data.runs.map((run, index) => [`run${index % 8}`, "--run", run.name]));
byId("axis").addEventListener("change", (event) => { view.axis = event.target.value; view.range = null; redraw(); });
byId("smoothing").addEventListener("input", (event) => { view.smoothing = +event.target.value; byId("smoothing-value").textContent = view.smoothing.toFixed(2); redraw(); });
byId("log").addEventListener("change", (event) => { view.log = event.target.checked; redraw(); });
byId("show-events").addEventListener("change", (event) => { view.events = event.target.checked; redraw(); });
byId("reset").addEventListener("click", () => { view.range = null; redraw(); });
byId("controls").addEventListener("submit", (event) => event.preventDefault());
setUpSamples();
redraw();
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; redraw(); } });
