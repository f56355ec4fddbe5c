// Workers and their limits, batches, and what doctor finds.
import { h } from "./dom.js";
import { command, count, moment, NONE, pill, prose, rate, span } from "./format.js";

function table(title, heads, rows, empty) {
  if (!rows.length) return h("section", {}, title && h("h2", {}, title), h("div", { class: "nothing" }, empty));
  const cell = (value, place) => (place === 0 ? h("th", { scope: "row" }, value) : h("td", { "data-label": heads[place] }, value));
  return h("section", {}, title && h("h2", {}, title), h("div", { class: "panel" }, h("table", { class: "plain" },
    h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map(cell)))))));
}

export function workers() {
  const start = ["No worker is running. Start one, in as many terminals as you like: ", command("lbr worker")];
  const worker = (one) => [`${one.host} ${one.pid}`, count(one.concurrency), count(one.inflight), rate(one.per_minute), count(one.settled), span(one.up_seconds), `${span(one.seen_seconds_ago)} ago`];
  const limit = (one) => [one.answerer, count(one.rpm), count(one.tpm), one.concurrency === null ? learned(one) : `${count(one.concurrency)}, set`, count(one.inflight), one.command && command(one.command)];
  return {
    paths: () => ["api/workers"],
    title: () => "Workers",
    view: (data) => [
      h("h1", {}, "Workers and limits"),
      table("Workers", ["Worker", "Slots", "In flight", "Answers", "Settled", "Up for", "Last seen"], data.workers.map(worker), start),
      table("Limits", ["Model or function", "Requests a minute", "Tokens a minute", "Calls at a time", "In flight", "To change it"], data.limits.map(limit), "No model has been called yet."),
    ],
  };
}

const learned = (one) => (one.at_a_time === null || one.at_a_time >= one.slots ? "no limit" : `${count(one.at_a_time)} of ${count(one.slots)}, learned`);

export function batches() {
  const row = (one) => [one.run, one.provider_id ?? NONE, pill(one.state), count(one.jobs), moment(one.created_at), one.message ?? ""];
  return {
    paths: () => ["api/batches"],
    title: () => "Batches",
    view: (data) => [h("h1", {}, "Batches"), table("", ["Run", "Batch", "State", "Jobs", "Planned", ""], data.batches.map(row), "No batches: jobs of the batch lane appear here once they are sent to a provider.")],
  };
}

export function doctor() {
  return {
    paths: () => ["api/doctor"],
    title: () => "Doctor",
    view: (data) => [h("h1", {}, "Doctor"),
      h("ul", { class: "findings" }, data.findings.map((one) => h("li", { class: "panel" }, pill(one.gravity), h("div", {}, h("strong", {}, one.check), " ", prose(one.found), one.do && h("p", { class: "muted" }, prose(one.do))))))],
  };
}
