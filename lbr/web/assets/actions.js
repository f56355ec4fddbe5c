// What the user can do to a run. Each action says what it does before it costs anything, and what it did.
import { post } from "./api.js";
import { ask, toast } from "./dom.js";
import { plural, prose, words } from "./format.js";

async function act(name, action, body, done, refresh) {
  try {
    toast(done(await post(`api/runs/${encodeURIComponent(name)}/${action}`, body)));
  } catch (problem) {
    toast(problem.status === 0 ? "No answer from lbr dashboard: it is not known whether this was done. Look before you repeat it." : problem.message, "bad");
  }
  refresh();
}

export const pause = (name, refresh) => act(name, "pause", {}, () => `${name} is paused. Calls in flight go on.`, refresh);

export async function resume(one, refresh) {
  const answer = await ask({
    title: `Resume ${one.name}`,
    text: one.reason ? prose(one.reason) : "Its jobs can be claimed again.",
    field: { label: "Most that the run may cost, in dollars", value: one.budget_usd ?? "", hint: "The total, with what it has cost so far. Empty leaves it as it is." },
    confirm: "Resume",
  });
  if (!answer) return;
  const changed = answer.value !== null && answer.value !== one.budget_usd;
  await act(one.name, "resume", changed ? { max_cost: answer.value } : {}, () => `${one.name} goes on.`, refresh);
}

export async function cancel(one, refresh) {
  const answer = await ask({
    title: `Cancel ${one.name}`,
    text: `${plural(one.counts.pending, "pending job")} will not be called. Calls in flight finish, and every answer is kept.`,
    confirm: "Cancel the run",
    danger: true,
  });
  if (answer) await act(one.name, "cancel", {}, ({ count }) => `${one.name} is cancelled: ${plural(count, "job")}.`, refresh);
}

/** Put back the jobs of a filter; without one, all that failed or were cancelled. */
export async function retryJobs(name, filter, refresh) {
  const parts = Object.entries(filter).map(([key, value]) => (key === "error" ? `error contains “${value}”` : `${words(key)} is ${words(value)}`));
  const answer = await ask({
    title: "Retry jobs",
    text: `${parts.length ? `Jobs of ${name} that match: ${parts.join(", ")}.` : `All failed and cancelled jobs of ${name}.`} They become pending, and each is called and paid for again.`,
    confirm: "Retry them",
  });
  if (answer) await act(name, "retry", filter, ({ count }) => `${plural(count, "job")} back to pending.`, refresh);
}
