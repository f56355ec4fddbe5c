// Numbers, times and states in words, as the terminal shows them.
import { h } from "./dom.js";

const NUMBER = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const COMPACT = new Intl.NumberFormat("en-US", { notation: "compact", maximumFractionDigits: 1 });
export const NONE = "–";
export const STATES = ["done", "failed", "inflight", "at_provider", "pending", "cancelled"];
export const FAMILIES = ["transient", "rate_limited", "cut_off", "outage", "bad_answer", "permanent", "account"];

const known = (value, show) => (value === null || value === undefined ? NONE : show(value));

export const words = (name) => (name === "inflight" ? "in flight" : String(name ?? "").replaceAll("_", " "));
export const count = (value) => known(value, (one) => NUMBER.format(one));
export const compact = (value) => known(value, (one) => COMPACT.format(one));
export const plural = (value, noun) => `${count(value)} ${noun}${value === 1 ? "" : "s"}`;
export const rate = (value) => known(value, (one) => `${one >= 10 ? NUMBER.format(one) : one.toFixed(1)}/min`);
export const clock = (ms) => new Date(ms).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hour12: false });
export const moment = (ms) => known(ms, (one) => new Date(one).toLocaleString([], { dateStyle: "medium", timeStyle: "medium" }));
export const latency = (ms) => known(ms, (one) => (one < 1000 ? `${NUMBER.format(one)} ms` : `${Number((one / 1000).toPrecision(3))} s`));

/** Dollars with cents, or with two digits that are not 0. */
export function money(value) {
  return known(value, (one) => {
    if (!one || one >= 0.1) return `$${one.toLocaleString("en-US", { minimumFractionDigits: 2, maximumFractionDigits: 2 })}`;
    return `$${Number(one.toPrecision(2)).toLocaleString("en-US", { maximumFractionDigits: 9 })}`;
  });
}

export function span(value) {
  return known(value, (one) => {
    const seconds = Math.round(one);
    const minutes = Math.round(seconds / 60);
    if (seconds < 60) return `${seconds} s`;
    if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${String(seconds % 60).padStart(2, "0")} s`;
    if (minutes < 2880) return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
    return `${Math.floor(minutes / 1440)} d ${Math.floor(minutes / 60) % 24} h`;
  });
}

/** A sentence of lbr, in which commands stand between backticks. */
export const prose = (text) => text.split("`").map((part, place) => (place % 2 ? h("code", {}, part) : part));

/** A state, by its colour and its word. */
export const pill = (state) => h("span", { class: `pill ${state}` }, words(state));

/** A command to run in a terminal, with a button that copies it. */
export function command(text) {
  const copy = (event) => {
    const button = event.target.closest("button");
    navigator.clipboard.writeText(text).then(() => {
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    }, () => getSelection().selectAllChildren(button.previousSibling));
  };
  return h("span", { class: "command" }, h("code", {}, text),
    h("button", { type: "button", class: "copy", "aria-label": `Copy ${text}`, on: { click: copy }, keep: true }, "Copy"));
}

/** The jobs by state as one bar. */
export function bar(counts) {
  const total = STATES.reduce((sum, state) => sum + (counts[state] ?? 0), 0);
  let left = 0;
  const parts = STATES.filter((state) => counts[state]).map((state) => {
    const share = (100 * counts[state]) / total;
    left += share;
    return h("rect", { class: state, x: `${left - share}%`, width: `${Math.max(share, 0.6)}%`, height: "100%" });
  });
  const label = STATES.filter((state) => counts[state]).map((state) => `${count(counts[state])} ${words(state)}`).join(", ");
  return h("svg", { class: "bar", role: "img", "aria-label": label || "no jobs", preserveAspectRatio: "none" }, parts);
}

/** The answers of the last hour, by the minute, as a small picture. */
export function sparkline(values) {
  const top = Math.max(1, ...values);
  const wide = 2;
  const bars = values.map((value, place) => {
    const high = value ? Math.max(1, (value / top) * 24) : 0;
    return value ? `M${place * wide} 24v${-high}h${wide - 0.5}v${high}z` : "";
  });
  const label = `${count(values.reduce((sum, one) => sum + one, 0))} answers in the last hour`;
  return h("svg", { class: "spark", role: "img", "aria-label": label, viewBox: `0 0 ${values.length * wide || 1} 24`, preserveAspectRatio: "none" },
    h("path", { d: bars.join("") }));
}
