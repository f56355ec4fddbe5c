// Requests to the server. The token comes in the fragment, and stays in this tab's session storage.

const PLACE = "lbr-token";
const SECONDS = 15;
const seen = new Map();

/** What went wrong, in the server's words; `status` is 0 if it did not answer. */
export class Problem extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Move a token from the address to the session storage. */
export function takeToken() {
  const found = location.hash.slice(1);
  if (!found || found.startsWith("/")) return;
  setToken(found);
  history.replaceState(null, "", `${location.pathname}#/`);
}

/** Keep a token, or the whole address that ends with one. */
export function setToken(text) {
  seen.clear();
  sessionStorage.setItem(PLACE, text.trim().split("#").pop());
}

export const forgetAnswers = () => seen.clear();

async function send(path, options) {
  let answer;
  const headers = { Authorization: `Bearer ${sessionStorage.getItem(PLACE) ?? ""}`, ...options.headers };
  try {
    answer = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit", signal: AbortSignal.timeout(SECONDS * 1000) });
  } catch {
    throw new Problem(0, "no answer");
  }
  if (answer.ok || answer.status === 304) return answer;
  const { error } = await answer.json().catch(() => ({}));
  throw new Problem(answer.status, error ?? `the server answered ${answer.status}`);
}

/** Read a resource; the same object again if it has not changed. */
export async function get(path) {
  const known = seen.get(path);
  const answer = await send(path, { headers: known ? { "If-None-Match": known.etag } : {} });
  if (answer.status === 304) return known.data;
  const data = await answer.json();
  if (answer.headers.has("ETag")) seen.set(path, { etag: answer.headers.get("ETag"), data });
  return data;
}

export async function post(path, body) {
  const answer = await send(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
  return answer.json();
}
