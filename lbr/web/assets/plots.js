// Four plots of a run with one cursor.
/* global uPlot */
import { h } from "./dom.js";
import { clock, compact, count, latency, money } from "./format.js";

const HEIGHT = 150;
const STACK = ["done", "failed", "retried", "limited"];
const scheme = matchMedia("(prefers-color-scheme: dark)");
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** Return the sums of the counts up to each one, so that drawn from the last to the first they stack. */
function stacked(series) {
  let sums = series.t.map(() => 0);
  return STACK.map((name) => (sums = sums.map((sum, place) => sum + (series[name][place] ?? 0))));
}

const flat = (series, value) => series.t.map((_, place) => (Array.isArray(value) ? value[place] : value) ?? null);
const positive = (values) => values.map((value) => (value > 0 ? value : null));

const KINDS = [
  { title: "Answers per minute", show: count, lines: STACK.map((name) => ({ name, bars: true })),
    data: (series) => stacked(series), raw: (series) => STACK.map((name) => series[name]) },
  { title: "Latency", show: latency, log: true, lines: [{ name: "p50", ink: "accent" }, { name: "p95", ink: "limited" }, { name: "slowest", ink: "retried", dots: true }],
    data: (series) => [series.p50, series.p95, series.slowest].map(positive) },
  { title: "Cost", show: money, lines: [{ name: "cost", ink: "accent", fill: true }, { name: "budget", ink: "failed", dash: true }],
    data: (series) => [series.cost, flat(series, series.budget_usd)] },
  { title: "Tokens per minute", show: compact, lines: [{ name: "tokens", ink: "accent", fill: true }, { name: "limit (TPM)", ink: "failed", dash: true }, { name: "calls at a time", ink: "retried", scale: "slots", show: count }],
    data: (series) => [series.tokens, flat(series, series.tpm), series.slots] },
];

export class Plots {
  constructor() {
    this.places = KINDS.map((kind) => h("figure", { class: "plot" },
      h("figcaption", {}, h("strong", {}, kind.title), h("span", { class: "values" }, kind.lines.map((line) =>
        h("span", { class: `value ink-${line.ink ?? line.name}` }, line.name, " ", h("b", {}, ""))))),
      h("div", { class: "canvas", role: "img" })));
    this.node = h("div", { class: "plots", keep: true, key: "plots" }, this.places);
    this.drawn = [];
  }

  /** Draw a series that has changed. */
  update(series) {
    if (series === this.series) return;
    this.series = series;
    const data = KINDS.map((kind) => [series.t, ...kind.data(series)]);
    this.raw = KINDS.map((kind, place) => kind.raw?.(series) ?? data[place].slice(1));
    if (!this.drawn.length) this.draw(data);
    else this.drawn.forEach((plot, place) => plot.setData(order(KINDS[place], data[place])));
    this.drawn.forEach((plot) => this.label(plot.kind, plot.cursor.idx));
  }

  draw(data) {
    this.drawn = KINDS.map((kind, place) => {
      const canvas = this.places[place].lastChild;
      const plot = new uPlot(options(kind, canvas.clientWidth, (idx) => this.label(place, idx)), order(kind, data[place]), canvas);
      plot.kind = place;
      new ResizeObserver(() => plot.setSize({ width: canvas.clientWidth, height: HEIGHT })).observe(canvas);
      return plot;
    });
    const again = () => (this.node.isConnected ? this.drawn.forEach((plot) => plot.redraw()) : scheme.removeEventListener("change", again));
    scheme.addEventListener("change", again);
  }

  /** Show the values under the cursor, or the latest. */
  label(place, idx) {
    const kind = KINDS[place];
    const at = idx ?? this.series.t.length - 1;
    const values = kind.lines.map((line, number) => [line, this.raw[place][number][at]]);
    const figure = this.places[place];
    figure.querySelectorAll("b").forEach((node, number) => {
      const [line, value] = values[number];
      node.textContent = (line.show ?? kind.show)(value);
      node.parentNode.hidden = line.dash && (value === null || value === undefined);
    });
    const when = this.series.t.length ? clock(this.series.t[at] * 1000) : "";
    figure.querySelector("strong").textContent = idx === null || idx === undefined ? kind.title : `${kind.title}, ${when}`;
    const spoken = values.map(([line, value]) => `${line.name} ${(line.show ?? kind.show)(value)}`).join(", ");
    figure.lastChild.setAttribute("aria-label", `${kind.title} at ${when}: ${spoken}`);
  }
}

/** Return the columns as they are drawn: of a stack the highest first. */
const order = (kind, [t, ...columns]) => [t, ...(kind.lines[0].bars ? columns.reverse() : columns)];

const powers = (_, splits) => splits.map((one) => (Number.isInteger(Math.log10(one)) ? one : null));

function options(kind, width, label) {
  const ink = (name) => () => colour(name);
  const lines = kind.lines[0].bars ? [...kind.lines].reverse() : kind.lines;
  const axis = (more) => ({ stroke: ink("muted"), font: "11px system-ui", grid: { stroke: ink("grid"), width: 1 }, ticks: { show: false }, ...more });
  const values = (show) => (_, splits) => splits.map((one) => (one === null ? "" : show(one)));
  return {
    width,
    height: HEIGHT,
    legend: { show: false },
    padding: [8, 8, 0, 0],
    cursor: { sync: { key: "run" }, y: false, drag: { x: false, y: false } },
    hooks: { setCursor: [(plot) => label(plot.cursor.left < 0 ? null : plot.cursor.idx)] },
    scales: {
      x: { time: true },
      y: kind.log ? { distr: 3 } : { range: (_, low, high) => [0, Math.max(high ?? 0, kind.show === money ? 1e-6 : 1) * 1.08] },
      slots: { range: (_, low, high) => [0, Math.max(high ?? 0, 1) * 1.3] },
    },
    axes: [
      axis({ grid: { show: false }, values: (_, splits) => splits.map((one) => clock(one * 1000)), space: 60, size: 26 }),
      axis({ values: values(kind.show), size: 56, space: 32, grid: { stroke: ink("grid"), width: 1, ...(kind.log && { filter: powers }) } }),
      ...(lines.some((line) => line.scale) ? [axis({ side: 1, scale: "slots", grid: { show: false }, values: values(count), size: 32 })] : []),
    ],
    series: [{}, ...lines.map((line) => ({
      label: line.name,
      scale: line.scale ?? "y",
      stroke: ink(line.ink ?? line.name),
      width: line.bars ? 0 : 1.5,
      dash: line.dash && [4, 4],
      fill: line.bars ? ink(line.name) : line.fill ? ink("wash") : undefined,
      paths: line.bars ? uPlot.paths.bars({ size: [0.8, 24] }) : undefined,
      points: { show: Boolean(line.dots) && ((plot) => plot.data[0].length < 100), size: 4, fill: ink(line.ink) },
      spanGaps: false,
    }))],
  };
}
