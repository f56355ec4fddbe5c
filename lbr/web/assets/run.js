// One run: is it slower? What fails, and is it a single cause? Is the budget enough?
import { cancel, pause, resume, retryJobs } from "./actions.js";
import { h } from "./dom.js";
import { bar, clock, compact, count, money, NONE, pill, plural, prose, rate, span, STATES, words } from "./format.js";
import { Plots } from "./plots.js";
import { address, progress } from "./runs.js";

const SPANS = [[15, "15 min"], [60, "1 h"], [360, "6 h"], [1440, "24 h"], [2880, "48 h"]];

export function run([name], query, refresh) {
  const plots = new Plots();
  const minutes = Number(query.get("minutes")) || 60;
  const api = `api/runs/${encodeURIComponent(name)}`;
  return {
    paths: () => [api, `${api}/series?minutes=${minutes}`],
    title: () => name,
    view: (one) => [
      h("p", { class: "crumbs" }, h("a", { href: "#/" }, "Runs")),
      h("div", { class: "title" }, h("h1", {}, one.name), pill(one.state), h("div", { class: "actions" }, buttons(one, refresh))),
      h("p", { class: "under" }, h("span", { class: "muted" }, one.model), one.reason && h("span", { class: "reason" }, prose(one.reason))),
      tiles(one),
      h("nav", { class: "tabs", "aria-label": "Jobs" },
        ["", ...STATES].filter((state) => !state || one.counts[state]).map((state) =>
          h("a", { href: address(name, `/jobs${state && `?state=${state}`}`) }, state ? words(state) : "all jobs", state && h("span", { class: "badge" }, count(one.counts[state]))))),
      h("div", { class: "title" }, h("h2", {}, "Over time"),
        h("nav", { class: "spans", "aria-label": "Time shown" }, SPANS.map(([size, word]) =>
          h("a", { href: address(name, `?minutes=${size}`), "aria-current": size === minutes && "true" }, word)))),
      plots.node,
      errors(one, refresh),
      task(one),
    ],
    drawn: (one, series) => plots.update(series),
  };
}

function buttons(one, refresh) {
  if (one.read_only) return h("span", { class: "muted" }, "read-only");
  const button = (word, click, kind) => h("button", { type: "button", class: kind, key: word, on: { click } }, word);
  const open = one.counts.pending + one.counts.inflight + (one.counts.at_provider ?? 0) > 0;
  return [
    one.state === "active" && open && button("Pause", () => pause(one.name, refresh)),
    one.state === "paused" && button("Resume…", () => resume(one, refresh), "primary"),
    (one.counts.failed > 0 || one.counts.cancelled > 0) && button("Retry failed…", () => retryJobs(one.name, one.counts.cancelled ? {} : { state: "failed" }, refresh)),
    (one.state === "paused" || (one.state === "active" && open)) && button("Cancel…", () => cancel(one, refresh), "quiet"),
  ];
}

function tiles(one) {
  const tile = (name, value, ...more) => h("div", { class: "tile" }, h("dt", {}, name), h("dd", {}, value), more.length > 0 && h("dd", { class: "more" }, more));
  const share = one.budget_usd ? Math.min(100, (100 * (one.cost_usd ?? 0)) / one.budget_usd) : null;
  const tokens = typeof one.tokens === "object" ? one.tokens : { input: one.input_tokens, output: one.output_tokens };
  const ends = one.eta_seconds === null ? "" : `at about ${clock(Date.now() + one.eta_seconds * 1000)}`;
  return h("dl", { class: "tiles" },
    h("div", { class: "tile wide" }, h("dt", {}, `${plural(one.inputs, "input")}`), h("dd", { class: "progress" }, progress(one)), h("dd", {}, bar(one.counts))),
    tile("Answers", rate(one.per_minute)),
    tile("Time left", span(one.eta_seconds), ends),
    tile("Cost", money(one.cost_usd), share === null ? "no limit" : [`of ${money(one.budget_usd)} (${Math.floor(share)} %)`]),
    tile("Tokens", tokens ? `${compact(tokens.input)} in` : NONE, `${compact(tokens?.output)} out`));
}

/** Return a text that all errors of a group contain: its words before the first number or quotation. */
function common(group) {
  const words = group.message.split("\n")[0].split(/\d|"|'/)[0].split(" ").slice(0, 8).join(" ").trim();
  return words.length >= 10 ? words : group.error;
}

function errors(one, refresh) {
  if (!one.errors.length) return null;
  const row = (group) => {
    const filter = { state: "failed", family: group.family, error: common(group) };
    return h("tr", {},
      h("td", { "data-label": "Jobs" }, count(group.count)),
      h("td", { "data-label": "Family" }, h("span", { class: "family" }, words(group.family))),
      h("td", { class: "wide", "data-label": "Error" }, h("strong", {}, group.error), " ", h("bdi", { class: "muted" }, group.message)),
      h("td", { class: "row" },
        h("a", { class: "button", href: address(one.name, `/jobs?${new URLSearchParams(filter)}`) }, "Show"),
        !one.read_only && h("button", { type: "button", on: { click: () => retryJobs(one.name, filter, refresh) } }, "Retry these…")));
  };
  return h("section", {}, h("h2", {}, "Why jobs failed"), h("div", { class: "panel" }, h("table", { class: "errors" },
    h("thead", {}, h("tr", {}, ["Jobs", "Family", "Error", ""].map((head) => h("th", { scope: "col" }, head)))),
    h("tbody", {}, one.errors.map(row)))));
}

function task({ task: asked }) {
  const shown = Object.entries(asked ?? {}).filter(([, value]) => value !== null && value !== undefined && !(typeof value === "object" && !Object.keys(value).length));
  return h("details", { class: "panel task" }, h("summary", {}, "Task"),
    h("dl", {}, shown.map(([name, value]) => h("div", {}, h("dt", {}, words(name)),
      h("dd", {}, h("pre", { dir: "auto" }, typeof value === "string" ? value : JSON.stringify(value, null, 2)))))));
}
