"use strict";
/* Fills the figures that Python made: values, colours, what is said on hovering. Drawn anew when the phase changes, the
   reader chooses, or the colour scheme turns. */

/* The buttons are listed: by default plotly has one that sends the figure to its makers. */
const CONFIG = { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
const PLAIN = { ...CONFIG, displayModeBar: false };
const TINTS = 6;
/* Shares of the roofline below which a module has the colour of that number. */
const REACHED = [0.1, 0.3, 0.6, Infinity];
const chosen = { flame: data.widths[0][0], memory: data.memory[0][0] };

/* Custom properties of the style sheet, anywhere in a figure, by what they stand for now. */
function painted(figure) {
  const style = getComputedStyle(document.documentElement);
  const paint = (value) => {
    if (typeof value === "string") return value.startsWith("var(") ? style.getPropertyValue(value.slice(4, -1)).trim() : value;
    if (Array.isArray(value)) return value.map(paint);
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, paint(v)]));
    return value;
  };
  const layout = { ...figure.layout, font: { ...figure.layout.font, family: getComputedStyle(document.body).fontFamily } };
  return { data: paint(figure.data), layout: paint(layout) };
}

function draw(id, figure, config) {
  const { data: traces, layout } = painted(figure);
  return Plotly.react(id, traces, layout, config);
}

const whole = () => cell(data.modules[0], "total");

function hover(row, c, extra) {
  const lines = [`<b>${escaped(row.name)}</b>${row.kind ? ` ${escaped(row.kind)}` : ""}`];
  if (c[SECONDS] !== null) {
    lines.push(`${said(duration(c[SECONDS]))}, ${said(percent(c[SECONDS] / whole()[SECONDS]))} of the ${state.phase === "all" ? "step" : "phase"}`);
  }
  if (c[EXECUTED] || c[BYTES]) lines.push(`${said(quantity(c[EXECUTED], "FLOP"))}, ${said(quantity(c[BYTES], "B"))} moved`);
  if (rate(c)) lines.push(`${said(quantity(rate(c), "FLOP/s"))}, ${said(quantity(c[BYTES] / c[SECONDS], "B/s"))}`);
  if (efficiency(c) !== null) lines.push(`${said(percent(efficiency(c)))} of the roofline, bound by ${VERDICTS[c[BOUND]] || "nothing"}`);
  return lines.concat(extra || []).join("<br>");
}

/* ---- roofline ---- */

/* On a narrow screen the ceilings of other precisions go without labels, and dots are smaller. */
const narrow = matchMedia("(max-width: 640px)");

function fitted(layout) {
  if (!narrow.matches) return layout;
  const annotations = layout.annotations.filter((label) => label.name !== "other");
  return { ...layout, annotations, margin: { ...layout.margin, l: 44 }, yaxis: { ...layout.yaxis, title: { text: "" } } };
}

function drawRoofline() {
  const figure = data.figures.roofline;
  if (!figure) return;
  const taken = whole()[SECONDS] || whole()[LIMIT] || 1;
  const dots = {};
  let missing = 0, missingTime = 0;
  data.modules.forEach((row) => {
    const c = cell(row, "own"), time = c[SECONDS] || c[LIMIT];
    if (!time || c[LIMIT] === null) return;
    if (!c[EXECUTED] || !c[BYTES]) { missing += 1; missingTime += time; return; }
    const dot = dots[c[BOUND]] ||= { x: [], y: [], size: [], text: [] };
    dot.x.push(Math.max(0.01, intensity(c)));
    dot.y.push(c[EXECUTED] / time);
    dot.size.push(6 + (narrow.matches ? 22 : 46) * Math.sqrt(time / taken));
    dot.text.push(hover(row, c, [`${intensity(c).toPrecision(3)} operations a byte`]));
  });
  const traces = figure.data.map((trace) => {
    if (!trace.meta) return trace;
    const dot = dots[trace.meta] || { x: [null], y: [null], size: [6], text: [""] };
    const marker = { ...trace.marker, size: dot.size };
    return { ...trace, x: dot.x, y: dot.y, customdata: dot.text, marker, visible: dots[trace.meta] ? true : "legendonly", showlegend: Boolean(dots[trace.meta]) };
  });
  draw("plot-roofline", { data: traces, layout: fitted(figure.layout) }, CONFIG);
  const part = said(percent(missingTime / taken));
  byId("left-out").textContent = missing
    ? `The larger a dot, the more time it takes. Not shown: ${missing} ${missing === 1 ? "module that computes" : "modules that compute"} nothing, ${part} of the time.`
    : "The larger a dot, the more time it takes.";
}

/* ---- flame graph and memory ---- */

const WIDTHS = {
  time: (row) => cell(row, "own")[SECONDS] || 0,
  flops: (row) => cell(row, "own")[EXECUTED],
  bytes: (row) => cell(row, "own")[BYTES],
};

const depths = [];
data.modules.forEach((row, index) => { depths[index] = row.parent < 0 ? 0 : depths[row.parent] + 1; });
const tint = (depth) => `tint-${Math.round((depth / Math.max(1, LEVELS - 1)) * (TINTS - 1))}`;
const LEVELS = 1 + Math.max(...depths);

function bucket(c) {
  const reached = efficiency(c);
  return reached === null ? "none" : REACHED.findIndex((below) => reached < below);
}

function drawFlame() {
  const judged = data.timed && data.judged;
  const values = data.modules.map(WIDTHS[chosen.flame]);
  const totals = data.modules.map((row) => cell(row, "total"));
  const key = judged ? totals.map((c) => `share-${bucket(c)}`) : depths.map((depth) => tint(depth));
  const trace = {
    ...data.figures.flame.data[0],
    values,
    customdata: data.modules.map((row, index) => hover(row, totals[index])),
    marker: { colors: key.map((name) => `var(--${name})`), line: { width: 0 } },
    textfont: { size: 13, color: "var(--ink)" },
  };
  draw("plot-flame", { data: [trace], layout: data.figures.flame.layout }, PLAIN);
}

/* Rows hold the sums of their subtrees; plotly wants what is a row's own. */
function own(name) {
  const values = data.modules.map((row) => row[name]);
  data.modules.forEach((row) => { if (row.parent >= 0) values[row.parent] -= row[name]; });
  return values.map((value) => Math.max(0, value));
}

function drawMemory() {
  const name = chosen.memory;
  const trace = data.figures.memory.data[0];
  const all = data.modules[0][name] || 1;
  draw("plot-memory", {
    data: [{
      ...trace,
      values: own(name),
      customdata: data.modules.map((row) => `<b>${escaped(row.name)}</b> ${escaped(row.kind)}<br>${said(quantity(row[name], "B"))}, ${said(percent(row[name] / all))}`),
      text: data.modules.map((row) => said(quantity(row[name], "B"))),
      textinfo: "label+text",
      marker: { ...trace.marker, colors: depths.map((depth) => `var(--${tint(depth)})`), line: { width: 1, color: "var(--surface)" } },
      textfont: { size: 13, color: "var(--ink)" },
    }],
    layout: data.figures.memory.layout,
  }, PLAIN);
}

function drawAll() { drawRoofline(); drawFlame(); drawMemory(); }

choice("flame-by", (key) => { chosen.flame = key; drawFlame(); });
choice("memory-by", (key) => { chosen.memory = key; drawMemory(); });
listeners.push(() => { drawRoofline(); drawFlame(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
narrow.addEventListener("change", drawAll);
drawAll();
