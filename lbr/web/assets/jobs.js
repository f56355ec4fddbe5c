// The jobs of a run: show the bad ones, and put them back.
import { retryJobs } from "./actions.js";
import { h } from "./dom.js";
import { count, FAMILIES, latency, money, pill, words } from "./format.js";
import { address } from "./runs.js";

const TABS = ["", "failed", "done", "pending", "inflight", "cancelled"];
const LIMIT = 50;
const AGAIN = ["failed", "done", "cancelled"];

export function jobs([name], query, refresh) {
  const filter = Object.fromEntries([...query].filter(([key, value]) => value && key !== "after"));
  const asked = new URLSearchParams({ ...filter, limit: LIMIT });
  if (query.get("after")) asked.set("after", query.get("after"));
  const to = (changes) => {
    const next = new URLSearchParams(Object.entries({ ...filter, ...changes }).filter(([, value]) => value));
    return address(name, `/jobs${String(next) && `?${next}`}`);
  };
  const api = `api/runs/${encodeURIComponent(name)}`;
  const view = (run, found) => [
    h("p", { class: "crumbs" }, h("a", { href: "#/" }, "Runs"), h("a", { href: address(name) }, name)),
    h("div", { class: "title" }, h("h1", {}, "Jobs"),
      h("div", { class: "actions" }, retryButton(name, filter, found, run, refresh))),
    h("nav", { class: "tabs", "aria-label": "State" }, TABS.map((state) => tab(state, filter, run.counts, to))),
    form(filter, to),
    found.jobs.length ? table(found.jobs) : h("p", { class: "nothing" }, found.more ? "No match so far." : "No job matches."),
    pager(filter, query, found, to),
  ];
  return { paths: () => [api, `${api}/jobs?${asked}`], title: () => `Jobs of ${name}`, view };
}

function tab(state, filter, counts, to) {
  const here = (filter.state ?? "") === state;
  const total = state ? counts[state] : Object.values(counts).reduce((sum, one) => sum + (one ?? 0), 0);
  return h("a", { href: to({ state }), "aria-current": here && "page" }, state ? words(state) : "all", h("span", { class: "badge" }, count(total)));
}

function form(filter, to) {
  const set = (event) => {
    const values = Object.fromEntries(new FormData(event.target.closest("form")));
    location.hash = to(values).slice(1);
  };
  const input = (name, label, hint) => h("label", { class: "field" }, label, h("input", { name, type: "search", value: filter[name] ?? "", placeholder: hint, maxlength: "500" }));
  const family = h("select", { name: "family", on: { change: set } },
    h("option", { value: "" }, "any"), FAMILIES.map((one) => h("option", { value: one, selected: filter.family === one }, words(one))));
  return h("form", { class: "filter", role: "search", on: { submit: set } },
    input("text", "Prompt or answer", "contains"),
    input("error", "Error", "class or message"),
    h("label", { class: "field" }, "Family", family),
    input("finish_reason", "Finish reason", "for example length"),
    h("div", { class: "actions" }, h("button", {}, "Filter"),
      Object.keys(filter).some((key) => key !== "state") && h("a", { class: "button quiet", href: to({ text: "", error: "", family: "", finish_reason: "" }) }, "Clear")));
}

function retryButton(name, filter, found, run, refresh) {
  if (run.read_only || filter.text || (filter.state && !AGAIN.includes(filter.state))) return null;
  return h("button", { disabled: !found.jobs.length, on: { click: () => retryJobs(name, filter, refresh) } }, "Retry all that match");
}

function table(rows) {
  const head = ["Input", "State", "Prompt", "Answer or error", "Tokens", "Cost", "Latency"];
  return h("div", { class: "panel" }, h("table", { class: "jobs" },
    h("thead", {}, h("tr", {}, head.map((one) => h("th", { scope: "col" }, one)))),
    h("tbody", {}, rows.map(row))));
}

function row(one) {
  const go = (event) => {
    if (!event.target.closest("a") && !String(getSelection())) location.hash = `/jobs/${one.id}`;
  };
  return h("tr", { key: String(one.id), "data-row": true, class: "link", on: { click: go } },
    h("th", { scope: "row" }, h("a", { href: `#/jobs/${one.id}`, "aria-label": `Input ${one.idx}` }, count(one.idx))),
    h("td", {}, pill(one.state)),
    h("td", { class: "cut", "data-label": "Prompt" }, h("bdi", {}, one.prompt)),
    h("td", { class: "cut", "data-label": one.error ? "Error" : "Answer" }, h("bdi", { class: one.error ? "bad" : "" }, one.error ?? one.answer ?? "")),
    h("td", { "data-label": "Tokens" }, count(one.tokens)),
    h("td", { "data-label": "Cost" }, money(one.cost_usd)),
    h("td", { "data-label": "Latency" }, latency(one.latency_ms)));
}

function pager(filter, query, found, to) {
  const searched = filter.text && found.scanned_to ? `Searched up to job ${count(found.scanned_to)}. ` : "";
  const on = filter.text && found.jobs.length < LIMIT ? "Search on" : `Next ${LIMIT}`;
  return h("p", { class: "pager" },
    query.get("after") && h("a", { class: "button", href: to({}) }, "First page"),
    h("span", { class: "muted" }, searched),
    found.more && h("a", { class: "button", href: to({ after: found.next }) }, on));
}
