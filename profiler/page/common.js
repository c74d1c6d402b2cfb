"use strict";
/* What plots and tables share: the data, the chosen phase, numbers as text, choices of buttons.
   Names from the report reach the page as text nodes, or through escaped() where plotly reads markup. */

const data = JSON.parse(document.getElementById("data").textContent);
const [SECONDS, FLOPS, EXECUTED, BYTES, LIMIT, BOUND, CALLS] = [0, 1, 2, 3, 4, 5, 6];
const EMPTY = [null, 0, 0, 0, null, null, 0];
const state = { phase: "all" };
const listeners = [];

const cell = (row, whose) => row[whose][state.phase] || EMPTY;
const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const byId = (id) => document.getElementById(id);

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/* ---- numbers: three digits and a prefix, as [number, unit] ---- */

function digits(number) {
  const size = Math.abs(number);
  return number.toFixed(size >= 99.95 ? 0 : size >= 9.995 ? 1 : 2);
}

function quantity(number, unit = "") {
  if (number === null || number === undefined || Number.isNaN(number)) return null;
  if (!Number.isFinite(number)) return ["∞", unit];
  const prefixes = ["", "K", "M", "G", "T", "P", "E"];
  let scaled = number, index = 0;
  while (Math.abs(scaled) >= 999.5 && index < prefixes.length - 1) { scaled /= 1000; index += 1; }
  const exact = index === 0 && Number.isInteger(scaled);
  return [exact ? String(scaled) : digits(scaled), prefixes[index] + unit];
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return null;
  if (seconds === 0) return ["0", "s"];
  const units = [[1, "s"], [1e-3, "ms"], [1e-6, "µs"], [1e-9, "ns"]];
  const [scale, unit] = units.find(([each]) => seconds >= 0.9995 * each) || units[3];
  return [digits(seconds / scale), unit];
}

function percent(share) {
  if (share === null || share === undefined || !Number.isFinite(share)) return null;
  const value = 100 * share;
  if (value > 0 && value < 0.05) return ["<0.1", "%"];
  return [value >= 9.95 || value === 0 ? value.toFixed(0) : value.toFixed(1), "%"];
}

const said = (parts) => (parts ? `${parts[0]}${parts[1] === "%" ? "" : " "}${parts[1]}`.trim() : "–");

/* ---- what a cell says ---- */

const efficiency = (c) => (c[LIMIT] !== null && c[SECONDS] ? c[LIMIT] / c[SECONDS] : null);
const rate = (c) => (c[SECONDS] && c[EXECUTED] ? c[EXECUTED] / c[SECONDS] : null);
const intensity = (c) => (c[BYTES] && c[EXECUTED] ? c[EXECUTED] / c[BYTES] : null);
const VERDICTS = { memory: "memory", compute: "compute", latency: "latency" };

/* ---- choices: a group of buttons of which one is pressed ---- */

function choice(id, onChoose) {
  const buttons = [...byId(id).querySelectorAll("button")];
  buttons.forEach((button) => button.addEventListener("click", () => {
    buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
    onChoose(button.value);
  }));
}

choice("phases", (phase) => {
  state.phase = phase;
  listeners.forEach((listener) => listener());
});
