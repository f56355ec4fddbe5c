// All runs: is everything running, and if not, what to do?
import { h } from "./dom.js";
import { bar, command, count, money, NONE, pill, plural, prose, rate, span, sparkline } from "./format.js";

const FIRST = [
  ["Put prompts into a queue", "lbr enqueue prompts.txt --model openai-chat:gpt-4o-mini"],
  ["Answer them, in as many terminals as you like", "lbr worker"],
  ["Write the answers to a file, in the order of the prompts", "lbr collect prompts -o answers.csv"],
];

export function runs() {
  return { paths: () => ["api/runs"], title: () => "Runs", view: (data) => [h("h1", {}, "Runs"), attention(data.attention), data.runs.length ? table(data.runs) : empty()] };
}

function empty() {
  return h("section", { class: "empty" },
    h("h2", {}, "No runs yet"),
    h("p", {}, "Three commands make one. This page shows it as soon as it is there. Without a key, use ", h("code", {}, "--model offline:echo"), "."),
    h("ol", {}, FIRST.map(([why, text]) => h("li", {}, h("span", {}, why), command(text)))));
}

function attention(items) {
  if (!items.length) return null;
  return h("section", { class: "attention", "aria-label": "Needs attention" },
    h("h2", {}, "Needs attention"),
    h("ul", {}, items.map((one) => h("li", {}, h("span", {}, prose(one.text)), one.command && command(one.command)))));
}

export const address = (name, rest = "") => `#/runs/${encodeURIComponent(name)}${rest}`;

function table(all) {
  const head = ["Run", "Progress", "Rate", "Cost", "Last hour"];
  return h("div", { class: "panel" }, h("table", { class: "runs" },
    h("thead", {}, h("tr", {}, head.map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, all.map(row))));
}

function row(one) {
  const go = (event) => {
    if (!event.target.closest("a, button") && !String(getSelection())) location.hash = address(one.name).slice(1);
  };
  return h("tr", { key: one.name, "data-row": true, class: "link", on: { click: go } },
    h("th", { scope: "row", class: "who" },
      h("a", { href: address(one.name) }, one.name), pill(one.state),
      h("small", { class: "muted" }, one.model),
      one.reason && h("small", { class: "reason" }, prose(one.reason))),
    h("td", { class: "progress", "data-label": "Progress" }, bar(one.counts), h("small", {}, progress(one))),
    h("td", { "data-label": "Rate" }, rate(one.per_minute), h("small", {}, one.eta_seconds === null ? "" : `${span(one.eta_seconds)} left`)),
    h("td", { "data-label": "Cost" }, money(one.cost_usd), h("small", {}, one.budget_usd === null ? "" : `of ${money(one.budget_usd)}`)),
    h("td", { "data-label": "Last hour" }, sparkline(one.spark)));
}

/** Return the jobs that have ended, and those that need a look, in words. */
export function progress({ counts, inputs }) {
  const jobs = Object.values(counts).reduce((sum, one) => sum + (one ?? 0), 0);
  const ended = counts.done + counts.failed + counts.cancelled;
  const share = jobs ? ` (${Math.floor((100 * ended) / jobs)} %)` : ` of ${plural(inputs, "input")}`;
  const more = [["failed", "failed"], ["cancelled", "cancelled"], ["inflight", "in flight"], ["at_provider", "at the provider"]];
  const parts = more.filter(([name]) => counts[name]).map(([name, word]) => h("span", { class: `count ${name}` }, `${count(counts[name])} ${word}`));
  return [h("span", {}, jobs ? `${count(ended)} of ${count(jobs)}${share}` : NONE), parts];
}
