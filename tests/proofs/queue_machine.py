"""A machine that does to a real queue all that can be done to it, and compares it with a small model after each step.

`tests/proofs/test_properties.py` has Hypothesis choose the steps.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from sqlalchemy import delete, update

from lbr.core.errors import Family, RunChangedError, Usage, UsageError
from lbr.core.retry import RetryPolicy, decide
from lbr.core.types import (
    Claim,
    Failure,
    Item,
    KeyMaker,
    Outcome,
    Prompt,
    Reply,
    RunState,
    Settlement,
    Task,
)
from lbr.store import enqueue, limits, redo, runs, schema
from lbr.store import settle as settling
from lbr.store.database import open_database
from tests.proofs.model_of_queue import Job, Key, Model, RefusedError, broken_promises
from tests.proofs.queue_seen import Seen, outside
from tests.support import ECHO, Clock, Queue

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from sqlalchemy import Connection

    from lbr.core.types import Millis, Run
    from lbr.store.database import Database

LEASE = 60.0
TASKS = {"a": ECHO, "b": ECHO, "other": Task(model="offline:other")}
ANSWER = Usage(5, 3, 70)
TRY = Usage(2, None, 11)
FAILURES = {
    "transient": Failure(Family.TRANSIENT, "ServerError", "503", usage=TRY, overloaded=True),
    "limited": Failure(Family.RATE_LIMITED, "RateLimit", "429", retry_after=10.0, usage=TRY),
    "bad": Failure(Family.BAD_ANSWER, "BadAnswer", "no field n", text="n is one", usage=TRY),
    "worse": Failure(Family.BAD_ANSWER, "BadAnswer", "no field n", text="nothing", usage=TRY),
    "permanent": Failure(Family.PERMANENT, "BadRequest", "400", usage=TRY),
    "account": Failure(Family.ACCOUNT, "Quota", "no credit", usage=TRY),
}
PATIENT, SHORT = (
    RetryPolicy(max_attempts=3, bad_answer_retries=1),
    RetryPolicy(max_attempts=1, bad_answer_retries=0),
)
CONDITIONS = (
    None,
    "status=done",
    "status=failed",
    "status=cancelled",
    "family=transient",
    "family=bad_answer",
)
STEPS = (2.0, 31.0, 61.0, 7200.0, -2.0, -3600.0)

names = st.sampled_from(sorted(TASKS))
workers = st.integers(0, 1)
orders = st.permutations(sorted(TASKS))
picks = st.lists(st.integers(0, 7), min_size=1, max_size=4)
texts = st.lists(st.sampled_from("pqrstu"), min_size=1, max_size=6)
rarely = st.sampled_from([False, False, False, True])
ends = st.sampled_from(["answer", "answer", "answer", "transient", "transient", "bad", "worse", *FAILURES])

# Each kind of step with its weight and its arguments. Which claims a step is about is said by their age, so that
# steps can be left out of a sequence when a failing one is made shorter.
KINDS: dict[str, tuple[int, tuple[st.SearchStrategy[Any], ...]]] = {
    "enqueue": (3, (names, texts, st.sampled_from(["append", "again", "start"]), st.booleans())),
    "claim": (8, (workers, orders, st.integers(1, 4), rarely)),
    "settle": (8, (picks, st.lists(ends, min_size=4, max_size=4), rarely)),
    "renew": (2, (workers, picks, rarely)),
    "release": (3, (workers, picks, rarely)),
    "wait": (3, (st.sampled_from(STEPS),)),
    "reclaim": (2, (workers,)),
    "lapse": (4, (workers, st.integers(0, 4))),
    "cancel": (1, (st.integers(0, 5),)),
    "retry": (3, (st.integers(0, 17), st.booleans())),
    "reparse": (1, (names,)),
    "pause": (1, (names,)),
    "resume": (3, (names,)),
}
a_step = st.one_of(
    *(st.tuples(st.just(kind), *arguments) for kind, (weight, arguments) in KINDS.items() for _ in range(weight))
)


@dataclass(slots=True)
class Held:
    """A claim that was once given out, and how its call ended, None as long as it has not."""

    key: Key
    worker: int
    claim: Claim
    settlement: Settlement | None = None


class World:
    """One queue, open twice as by two workers' processes, that is emptied for every example."""

    def __init__(self, url: str) -> None:
        self.clock = Clock()
        self._begin = self.clock.now
        self._runner = asyncio.Runner()
        self.runs: dict[str, Run] = {}
        self.databases: list[Database] = []
        self.workers: list[Any] = []
        self.do(self._open(url))
        self._outside = outside(url)

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Carry one call of the store out, and return what it returns."""
        return self._runner.run(work)

    async def _open(self, url: str) -> None:
        for n in range(2):
            database = await open_database(url, create=True, clock=self.clock)
            self.databases.append(database)
            self.workers.append(await Queue(database).register(host="h", pid=n, concurrency=4))
        for name, task in TASKS.items():
            self.runs[name] = await self.databases[0].write(runs.open_run, runs.RunSpec(name, task, 8))
            # Fixed by hand, and wide: what is learned of an answerer has tests of its own.
            await self.databases[0].write(limits.set_limits, task.answerer, {"concurrency": 1_000})

    def reset(self) -> None:
        """Empty the queue and set its clock back."""

        def work(connection: Connection, _now: Millis) -> None:
            for name in ("items", "results", "attempts", "prompts", "jobs", "counters"):
                connection.execute(delete(schema.metadata.tables[name]))
            connection.execute(update(schema.runs).values({"state": RunState.ACTIVE} | runs.NOT_PAUSED))
            connection.execute(update(schema.limits).values(cooldown_until=0))

        self.clock.now = self._begin
        self.do(self.databases[0].write(work))

    def refuse_much(self) -> None:
        """Let the next refusal cool every worker down: the share of refused calls has tests of its own."""
        much = update(schema.limits).values(refused=1.0, answered=2**40)
        self.do(self.databases[0].write(lambda connection, _: connection.execute(much)))

    def close(self) -> None:
        """Close the queue."""
        self._outside.close()
        for database in self.databases:
            self.do(database.close())
        self._runner.close()

    def seen(self) -> Seen:
        """Return everything that the queue holds."""
        names: dict[int, str] = {run.id: name for name, run in self.runs.items()}
        return Seen(self._outside, names, {worker: n for n, worker in enumerate(self.workers)})


class QueueMachine(RuleBasedStateMachine):
    """Every step goes to the store and to the model; then all that both hold is compared.

    `world` is to be set before it is run; `examples` and `steps` count what was run since.
    """

    world: World
    examples = 0
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).examples += 1
        self.world.reset()
        self.clock = self.world.clock
        self.model = Model({name: task.answerer for name, task in TASKS.items()})
        self.calls: list[Held] = []
        self.before: dict[Key, Job] = {}
        self.keys: dict[int, Key] = {}

    @property
    def _database(self) -> Database:
        return self.world.databases[0]

    def _queue(self, worker: int) -> Queue:
        return Queue(self.world.databases[worker])

    def _compare(self, *, by_hand: bool = False) -> None:
        """Check the promises that hold without the model, then that the store is as the model."""
        seen = self.world.seen()
        broken = list(broken_promises(self.before, seen.jobs, by_hand=by_hand))
        assert not broken, broken
        for name, inputs in seen.items.items():
            assert {Key(name, text) for text in inputs} == {key for key in seen.jobs if key.run == name}
        assert seen.counters == seen.recount, f"counters: {seen.counters}, recount: {seen.recount}"
        assert list(seen.jobs.items()) == list(self.model.jobs.items()), _differences(seen.jobs, self.model.jobs)
        runs_ = self.model.runs.items()
        assert seen.items == {name: run.items for name, run in runs_}
        assert seen.run_states == {name: run.state for name, run in runs_}
        assert seen.cooldowns == self.model.cooldowns
        self.before, self.keys = seen.jobs, seen.keys

    def _both(self, model: Callable[[], object], store: Coroutine[Any, Any, Any]) -> Any:
        """Carry a step out in the model and in the store: both do it, or both refuse it."""
        try:
            model()
        except RefusedError:
            with pytest.raises((UsageError, RunChangedError)):
                self.world.do(store)
            return None
        return self.world.do(store)

    @initialize(inputs=texts)
    def begin(self, inputs: list[str]) -> None:
        """Begin with something to do."""
        self._enqueue("a", inputs, "start", reuse=True)

    @rule(step=a_step)
    def carry_out(self, step: tuple[Any, ...]) -> None:
        """Carry one step out, in the store and in the model."""
        type(self).steps += 1
        kind, *arguments = step
        getattr(self, f"_{kind}")(*arguments)

    def _enqueue(self, name: str, inputs: list[str], place: str, reuse: bool) -> None:
        """Enqueue: all that is known and more, behind all, or something else at the start, which is refused."""
        if place == "again":
            inputs = self.model.runs[name].items + inputs
        run, maker = self.world.runs[name], KeyMaker(TASKS[name])
        idx = self.world.do(self._database.read(enqueue.next_idx, run)) if place == "append" else 0
        items = [Item(Prompt(text=text)) for text in inputs]
        keys = [maker.key(item.prompt) for item in items]
        self._both(
            lambda: self.model.enqueue(self.clock.now, name, idx, inputs, reuse=reuse),
            self._database.write(enqueue.add_chunk, run, idx, items, keys, reuse=reuse),
        )
        self._compare()

    def _claim(self, worker: int, order: list[str], most: int, suspects: bool) -> None:
        """Claim what is due of all runs."""
        ids = [self.world.runs[name].id for name in order]
        work = self._queue(worker).claim(self.world.workers[worker], ids, most, lease=LEASE, suspects=suspects)
        claims = self.world.do(work)
        expected = self.model.claim(
            self.clock.now, worker, order, most, suspects=suspects, lease_ms=round(LEASE * 1000)
        )
        found = {
            self.keys[c.job_id]: (
                c.claim_seq,
                c.attempts,
                c.crashes,
                c.history.bad_answers,
                c.history.limited_tries,
            )
            for c in claims
        }
        assert found == expected, f"claims: {found}, expected: {expected}"
        self.calls += [Held(self.keys[c.job_id], worker, c) for c in claims]
        self._compare()

    def _settle(self, chosen: list[int], how: list[str], again: bool) -> None:
        """Settle claims, of whatever age; each always in one way, as a call ends in one."""
        batch = []
        for held, word in zip(self._chosen(chosen, again), how, strict=False):
            if held.settlement is None:
                held.settlement = _ended(held, word)
            batch.append((held.key, held.settlement))
        if not batch:
            return
        self.world.refuse_much()
        told = self.world.do(self._database.write(settling.settle, [s for _, s in batch]))
        taken, stale = self.model.settle(self.clock.now, batch)
        found = {self.keys[n] for n in told.taken}, {self.keys[n] for n in told.stale}
        assert found == (taken, stale), f"taken and stale: {found}, expected: {(taken, stale)}"
        self._compare()

    def _renew(self, worker: int, chosen: list[int], again: bool) -> None:
        """Renew a worker's claims, of whatever age."""
        if not (held := self._held_by(worker, chosen, again)):
            return
        work = self._queue(worker).renew(
            self.world.workers[worker], list(held.values()), lease=LEASE, settled=0, rate=0.0
        )
        lost = self.world.do(work)
        seqs = {key: claim.claim_seq for key, claim in held.items()}
        expected = self.model.renew(self.clock.now, worker, seqs, lease_ms=round(LEASE * 1000))
        assert lost == {held[key].job_id for key in expected}
        self._compare()

    def _release(self, worker: int, chosen: list[int], again: bool) -> None:
        """Give a worker's claims back."""
        if not (held := self._held_by(worker, chosen, again)):
            return
        work = self._queue(worker).release(self.world.workers[worker], list(held.values()))
        seqs = {key: claim.claim_seq for key, claim in held.items()}
        assert self.world.do(work) == self.model.release(worker, seqs)
        self._compare()

    def _reclaim(self, worker: int) -> None:
        """Take back what leases ran out for."""
        found = self.world.do(self._queue(worker).reclaim())
        assert {self.keys[one.job_id]: one.state for one in found} == self.model.reclaim(self.clock.now)
        self._compare()

    def _wait(self, seconds: float) -> None:
        """Let time pass, or set the clock back."""
        self.clock.forward(seconds)

    def _lapse(self, worker: int, most: int) -> None:
        """Let every lease run out; one worker notices, and claims what it gets."""
        self.clock.forward(LEASE + 1)
        self._reclaim(worker)
        if most:
            self._claim(worker, sorted(TASKS), most, suspects=False)

    def _cancel(self, which: int) -> None:
        """Cancel a run, rather one with calls in flight."""
        flying = {key.run for key, job in self.model.jobs.items() if job.lease_until is not None}
        choice = sorted(flying or TASKS)
        name = choice[which % len(choice)]
        assert self.world.do(runs.cancel(self._database, self.world.runs[name])) == self.model.cancel(name)
        self._compare()

    def _retry(self, which: int, own: bool) -> None:
        """Put jobs back by hand, answered ones too, some with settings of their own."""
        ways = [(name, condition) for name in sorted(TASKS) for condition in CONDITIONS]
        # Rather one that finds something: most find nothing.
        ways = [one for one in ways if self.model.chosen(*one)] or ways
        name, condition = ways[which % len(ways)]
        conditions = redo.read_conditions([condition]) if condition else []
        own_settings = {"seed": 1} if own else None
        work = redo.retry(self._database, self.world.runs[name], conditions, own_settings)
        expected = self.model.retry(self.clock.now, name, condition, '{"seed":1}' if own else None)
        assert self.world.do(work) == expected
        self._compare(by_hand=True)

    def _reparse(self, name: str) -> None:
        """Validate kept bad answers once more."""

        def check(text: str) -> str:
            if "one" not in text:
                raise ValueError(text)
            return text

        told = self.world.do(redo.reparse(self._database, self.world.runs[name], check))
        assert (told.taken, told.left) == self.model.reparse(name, lambda text: "one" in text)
        self._compare()

    def _pause(self, name: str) -> None:
        """Pause a run."""
        work = self._database.write(runs.pause, self.world.runs[name], "by hand")
        self._both(lambda: self.model.set_state(name, RunState.PAUSED), work)
        self._compare()

    def _resume(self, name: str) -> None:
        """Let a run go on."""
        work = self._database.write(runs.resume, self.world.runs[name])
        self._both(lambda: self.model.set_state(name, RunState.ACTIVE), work)
        self._compare()

    def _chosen(self, numbers: list[int], again: bool, worker: int | None = None) -> list[Held]:
        """Return a worker's claims, or anybody's, of these numbers, counted from the newest, each once.

        Those whose call has not ended, or with `again` any that there ever was: a settlement may be repeated.
        """
        there = [one for one in self.calls if (again or one.settlement is None) and worker in {None, one.worker}]
        held = [there[-1 - n % len(there)] for n in numbers if there]
        return list({id(one): one for one in held}.values())

    def _held_by(self, worker: int, numbers: list[int], again: bool) -> dict[Key, Claim]:
        return {one.key: one.claim for one in self._chosen(numbers, again, worker)}


def _differences(store: dict[Key, Job], model: dict[Key, Job]) -> str:
    keys = [key for key in {**store, **model} if store.get(key) != model.get(key)]
    return "\n".join(f"{key}: {store.get(key)}, expected: {model.get(key)}" for key in keys) or "their order"


def _ended(held: Held, how: str) -> Settlement:
    claim = held.claim
    reply = Reply(f"{held.key.text} by claim {claim.claim_seq}", ANSWER) if how == "answer" else None
    outcome = Outcome(reply, FAILURES.get(how), 5)
    # Two kinds of runs in one: what is given up at once can be put back by hand the sooner.
    policy = SHORT if claim.claim_seq % 2 else PATIENT
    return decide(claim, outcome, policy, Random(claim.claim_seq))
