// Chooses the page of the address, and keeps it up to date while it is visible.
import { forgetAnswers, get, Problem, setToken, takeToken } from "./api.js";
import { h, patch } from "./dom.js";
import { job } from "./job.js";
import { jobs } from "./jobs.js";
import { run } from "./run.js";
import { runs } from "./runs.js";
import { batches, doctor, workers } from "./system.js";

const EVERY_MS = 2_000;
const ROUTES = [
  [/^\/$/, runs],
  [/^\/runs\/([^/]+)$/, run],
  [/^\/runs\/([^/]+)\/jobs$/, jobs],
  [/^\/jobs\/(\d+)$/, job],
  [/^\/workers$/, workers],
  [/^\/batches$/, batches],
  [/^\/doctor$/, doctor],
];
const main = document.getElementById("main");
const banner = document.getElementById("banner");
const live = document.getElementById("live");
let page, body, timer, seenAt;
let round = 0;

function open() {
  takeToken();
  const [path, query] = (location.hash.slice(1) || "/").split("?");
  for (const [pattern, make] of ROUTES) {
    const found = pattern.exec(path);
    if (found) page = make(found.slice(1).map(decodeURIComponent), new URLSearchParams(query), refresh);
    if (found) break;
    page = null;
  }
  for (const link of document.querySelectorAll("nav a")) {
    const here = link.hash === "#/" ? path === "/" || /^\/(runs|jobs)\//.test(path) : link.hash === `#${path}`;
    link.toggleAttribute("data-here", here);
    if (link.hash === `#${path}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  forgetAnswers();
  seenAt = null;
  body = h("div", { class: "page", "aria-busy": "true" });
  main.replaceChildren(body);
  scrollTo(0, 0);
  if (page) refresh();
  else show([h("h1", {}, "No such page"), h("p", {}, h("a", { href: "#/" }, "All runs"))], "no such page");
}

async function refresh() {
  clearTimeout(timer);
  const mine = ++round;
  try {
    const data = await Promise.all(page.paths().map(get));
    if (mine !== round) return;
    seenAt = Date.now();
    connected();
    show(page.view(...data), page.title(...data));
    page.drawn?.(...data);
  } catch (problem) {
    if (mine !== round) return;
    if (!(problem instanceof Problem)) throw problem;
    failed(problem);
    if (problem.status === 401) return; // until the user has given a token
  }
  if (!document.hidden) timer = setTimeout(refresh, EVERY_MS);
}

function show(nodes, title) {
  body.removeAttribute("aria-busy");
  patch(body, nodes.flat(Infinity).filter(Boolean));
  document.title = `${title} · lbr`;
}

function connected() {
  banner.hidden = true;
  body.classList.remove("stale");
  live.textContent = "Live";
  live.className = "live on";
}

/** Say what is wrong, and that what is shown is old. */
function failed(problem) {
  live.textContent = "Not live";
  live.className = "live off";
  if (problem.status === 401) return askToken();
  if (problem.status === 404) return show([h("h1", {}, "Not here"), h("p", {}, problem.message), h("p", {}, h("a", { href: "#/" }, "All runs"))], "not here");
  const what = problem.status === 0 ? "lbr dashboard does not answer. Is it still running?" : problem.message;
  const since = seenAt ? ` These numbers are from ${new Date(seenAt).toLocaleTimeString([], { hour12: false })}.` : "";
  banner.textContent = `${what}${since} Trying again.`;
  banner.hidden = false;
  body.classList.add("stale");
}

function askToken() {
  banner.hidden = true;
  const enter = (event) => {
    setToken(new FormData(event.target).get("token"));
    refresh();
  };
  const field = h("input", { id: "token", name: "token", type: "password", autocomplete: "off", spellcheck: "false", required: true });
  show([
    h("form", { class: "gate", on: { submit: enter } },
      h("h1", {}, "Paste the token"),
      h("p", {}, h("code", {}, "lbr dashboard"), " prints an address that ends with it. A bookmark or a second tab does not have it."),
      h("label", { for: "token" }, "Token or whole address"),
      h("div", { class: "row" }, field, h("button", { class: "primary" }, "Open"))),
  ], "token");
  document.getElementById("token").focus();
}

function move(step) {
  const rows = [...main.querySelectorAll("[data-row]")];
  const at = rows.findIndex((row) => row.contains(document.activeElement));
  rows.at(at < 0 && step < 0 ? -1 : Math.max(0, at + step))?.querySelector("a").focus();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea, dialog")) return;
  const step = { j: 1, k: -1 }[event.key];
  const neighbour = step && main.querySelector(step > 0 ? "a[rel=next]" : "a[rel=prev]");
  if (neighbour && !main.querySelector("[data-row]")) neighbour.click();
  else if (step) move(step);
  else if (event.key === "/" && main.querySelector("input")) {
    event.preventDefault();
    main.querySelector("input").focus();
  }
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && page) refresh();
});
addEventListener("hashchange", open);
open();
