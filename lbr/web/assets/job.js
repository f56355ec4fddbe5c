// One job: why did it fail, and what did it cost?
import { h } from "./dom.js";
import { compact, count, latency, moment, money, NONE, pill, words } from "./format.js";
import { address } from "./runs.js";

const SHOWN = 20_000;
const MAX_FIELDS = 200;

export function job([id]) {
  return {
    paths: () => [`api/jobs/${id}`],
    title: (one) => `Input ${one.idx} of ${one.run}`,
    view: (one) => [
      h("p", { class: "crumbs" }, h("a", { href: "#/" }, "Runs"), h("a", { href: address(one.run) }, one.run), h("a", { href: address(one.run, "/jobs") }, "Jobs")),
      h("div", { class: "title" }, h("h1", {}, `Input ${count(one.idx)}`), pill(one.state),
        h("div", { class: "actions" }, step(one.previous, "prev", "Previous"), step(one.next, "next", "Next"))),
      facts(one),
      one.turns.map(turn),
      one.answer !== null && one.answer !== undefined && answer(one),
      attempts(one.attempts),
    ],
  };
}

function step(id, rel, word) {
  const known = id !== null && id !== undefined;
  return h("a", { class: "button", rel, href: known ? `#/jobs/${id}` : null, "aria-disabled": !known && "true" }, word);
}

function facts(one) {
  const known = [
    ["Tokens", one.tokens === undefined ? null : count(one.tokens)], ["Cost", money(one.cost_usd)], ["Latency", latency(one.latency_ms)],
    ["Finish reason", one.finish_reason], ["Model", one.model], ["Attempts", count(one.attempts.length)], ["Id", one.custom_id], ["Error", one.error],
  ].filter(([, value]) => value !== null && value !== undefined && value !== NONE);
  return h("dl", { class: "facts" }, known.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

function turn(one) {
  return h("section", { class: "panel text" }, h("h2", {}, one.role), text(one.content ?? one.text));
}

/** A text as it is, cut if it is long. */
function text(value) {
  const whole = typeof value === "string" ? value : JSON.stringify(value, null, 2) ?? "";
  if (whole.length <= SHOWN) return h("pre", { dir: "auto" }, whole);
  const more = (event) => event.target.closest("div").replaceChildren(h("pre", { dir: "auto" }, whole));
  return h("div", { keep: true }, h("pre", { dir: "auto" }, `${whole.slice(0, SHOWN)}…`),
    h("button", { type: "button", on: { click: more } }, `Show all ${compact(whole.length)} characters`));
}

function answer(one) {
  const parsed = parse(one.answer);
  const raw = one.raw ?? (typeof one.answer === "string" ? one.answer : null);
  if (parsed === undefined) return h("section", { class: "panel text" }, h("h2", {}, "Answer"), text(one.answer));
  return h("div", { class: "sides" },
    h("section", { class: "panel text" }, h("h2", {}, "Answer"), h("div", { class: "tree" }, fold("", parsed, true))),
    raw !== null && h("section", { class: "panel text" }, h("h2", {}, "Raw"), text(raw)));
}

/** Return the object or list of a text; undefined for any other text, and for what is too long to fold. */
function parse(value) {
  if (typeof value !== "string") return value;
  try {
    const found = value.length <= SHOWN * 5 && JSON.parse(value);
    return found && typeof found === "object" ? found : undefined;
  } catch {
    return undefined;
  }
}

function fold(name, value, open) {
  const label = name === "" ? null : h("span", { class: "name" }, `${name}: `);
  if (value === null || typeof value !== "object") return h("div", { class: "leaf" }, label, h("bdi", { class: typeof value }, typeof value === "string" ? value : String(value)));
  const fields = Object.entries(value);
  const size = Array.isArray(value) ? `[${fields.length}]` : `{${fields.length}}`;
  return h("details", { open }, h("summary", {}, label, h("span", { class: "muted" }, size)),
    fields.slice(0, MAX_FIELDS).map(([key, one]) => fold(key, one, fields.length < 20)),
    fields.length > MAX_FIELDS && h("div", { class: "muted" }, `and ${count(fields.length - MAX_FIELDS)} more, in the raw answer`));
}

function attempts(all) {
  if (!all.length) return null;
  return h("section", {}, h("h2", {}, "Attempts"), h("ol", { class: "attempts" }, all.map((one, place) =>
    h("li", { class: "panel" },
      h("div", { class: "title" }, h("span", { class: "muted" }, `${place + 1}`), pill(one.what), h("time", {}, moment(one.at)),
        h("span", { class: "muted" }, [one.tokens && `${count(one.tokens)} tokens`, one.cost_usd && money(one.cost_usd), one.latency_ms && latency(one.latency_ms)].filter(Boolean).join(" · "))),
      one.error && h("p", {}, one.family && h("span", { class: "family" }, words(one.family)), h("strong", {}, ` ${one.error}`)),
      one.message && h("pre", { class: "message", dir: "auto" }, one.message),
      one.text && h("details", { open: one.text.length < 2000 }, h("summary", {}, "Raw answer"), text(one.text))))));
}
