"""Failures are judged by the other calls: what one worker saw, what all know, and how much is left to do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lbr.core.errors import Family, Symptom, Usage
from lbr.core.outages import (
    FIRST_WAIT_MS,
    MAX_WAIT_MS,
    REFUSALS,
    Backlog,
    Evidence,
    ModelState,
    Suspicion,
    judge,
)
from lbr.core.types import (
    Claim,
    Failure,
    JobId,
    JobState,
    Outcome,
    PauseCause,
    Paused,
    Prompt,
    Reply,
    RunId,
    Settlement,
    WorkerId,
)

MANY, FEW = Backlog(open=100, done=0), Backlog(open=2, done=5)
NOW = 1_000_000
MINE = Evidence(
    WorkerId(1),
    refusals=REFUSALS,
    jobs=3,
    first_ms=500,
    unsuccessful_ms=5_000,
    succeeded=False,
    patience_ms=10_000,
)


def failure(symptom: Symptom | None, family: Family = Family.TRANSIENT) -> Failure:
    """Return a failure that says this about other calls."""
    return Failure(family, "SomeError", "it failed", symptom=symptom)


def ended(
    symptom: Symptom | None,
    *,
    evidence: Evidence | None = None,
    probe: bool = False,
    family: Family = Family.TRANSIENT,
) -> Settlement:
    """Return the settlement of a call that failed, charged to its job."""
    claim = Claim(JobId(1), RunId(1), 1, 0, 0, Prompt("a"), b"", probe=probe)
    outcome = Outcome(None, failure(symptom, family), 10)
    return Settlement(claim, JobState.PENDING, outcome, charge=1, wait_ms=700, evidence=evidence)


def refused(job: int, latency_ms: int = 10) -> tuple[JobId, Outcome]:
    """Return a job and how its call was refused."""
    return JobId(job), Outcome(None, failure(Symptom.UNREACHABLE), latency_ms)


def verdict(settlement: Settlement, state: ModelState, backlog: Backlog) -> str:
    """Return what a judgement comes to for the job, the worker or all of them."""
    one = judge(settlement, "m", state, backlog, NOW)
    if one.pause is not None or one.alone:
        return "alone" if one.alone else "paused"
    if one.state.since is not None:
        return "outage"
    return "charged" if one.settlement.charge else "uncharged"


class TestSuspicion:
    """What one worker counts."""

    def test_five_refusals_are_evidence_and_name_their_jobs(self) -> None:
        """The fifth refusal without a success between them is evidence, with the number of different jobs."""
        seen = Suspicion(started=0.0)
        for job in (1, 2, 2, 3):
            assert seen.note(*refused(job), now=1.0)
            assert not seen.is_evidence
        seen.note(*refused(3), now=2.0)
        assert seen.is_evidence
        evidence = seen.evidence(WorkerId(7), 3.0, patience=60)
        assert evidence == Evidence(WorkerId(7), 5, 3, 2_000, 3_000, False, 60_000)

    def test_a_success_that_began_after_the_first_refusal_clears_it(self) -> None:
        """Only a call that began later shows that the model is there."""
        seen = Suspicion(started=0.0)
        for job in range(4):
            seen.note(*refused(job), now=10.0)
        seen.note(JobId(9), Outcome(Reply("old"), None, latency_ms=5_000), now=11.0)
        assert len(seen.refusals) == 4
        seen.note(JobId(9), Outcome(Reply("new"), None, latency_ms=500), now=11.0)
        assert not seen.refusals

    def test_only_the_latest_refusals_are_evidence(self) -> None:
        """Those of an outage that is over do not count with the next ones: five new ones are needed."""
        seen, state = Suspicion(started=0.0), ModelState(recovered_at=NOW - 1_000)
        judged = []
        for job, now in enumerate((1.0, 1.0, 1.0, 1.0, 1.0, 9.5, 9.5, 9.5, 9.5, 9.5)):
            seen.note(*refused(job), now=now)
            evidence = seen.evidence(WorkerId(1), 10.0, patience=60)
            judged.append(verdict(ended(Symptom.UNREACHABLE, evidence=evidence), state, MANY))
        assert judged == ["charged"] * 9 + ["outage"]

    @pytest.mark.parametrize("symptom", [None, Symptom.SET_UP])
    def test_failures_of_a_job_alone_count_for_nothing(self, symptom: Symptom | None) -> None:
        """A read timeout, an exception of a function or a wrong request is no sign of an outage."""
        seen = Suspicion(started=0.0)
        assert not any(seen.note(JobId(job), Outcome(None, failure(symptom), 10), now=1.0) for job in range(20))

    def test_a_bad_answer_that_was_paid_for_is_a_success(self) -> None:
        """The model was there, whatever it said."""
        seen = Suspicion(started=0.0)
        seen.note(*refused(1), now=1.0)
        bad = Failure(Family.BAD_ANSWER, "BadAnswer", "no JSON", usage=Usage(1, 1))
        seen.note(JobId(2), Outcome(None, bad, 10), now=2.0)
        assert not seen.refusals


class TestJudge:
    """What a failed call means."""

    @pytest.mark.parametrize("symptom", [Symptom.UNREACHABLE, Symptom.SERVER_ERROR])
    def test_a_refusal_without_evidence_is_charged(self, symptom: Symptom) -> None:
        """A single refusal is the job's own."""
        assert verdict(ended(symptom), ModelState(), MANY) == "charged"

    @pytest.mark.parametrize("symptom", [Symptom.UNREACHABLE, Symptom.SERVER_ERROR, Symptom.DENIED])
    def test_evidence_makes_all_wait(self, symptom: Symptom) -> None:
        """Five refusals of three jobs are an outage, or a key that nobody gets in with: no job is charged."""
        one = judge(ended(symptom, evidence=MINE), "m", ModelState(), MANY, NOW)
        assert (one.settlement.state, one.settlement.charge) == (JobState.PENDING, 0)
        assert (one.state.since, one.state.probe_at) == (NOW, NOW + FIRST_WAIT_MS)
        assert one.notice is not None

    def test_evidence_of_too_few_jobs_is_none(self) -> None:
        """One prompt that is refused five times is no outage while others wait."""
        evidence = replace(MINE, jobs=1)
        settlement = ended(Symptom.SERVER_ERROR, evidence=evidence)
        assert verdict(settlement, ModelState(), MANY) == "charged"

    def test_a_refusal_while_all_wait_is_not_charged(self) -> None:
        """A call that was under way when the outage was recognised, by whichever worker, costs its job nothing."""
        state = ModelState(since=NOW - 500, worker=2)
        assert verdict(ended(Symptom.UNREACHABLE), state, MANY) == "outage"

    @pytest.mark.parametrize(
        ("symptom", "expected"),
        [
            (Symptom.SERVER_ERROR, "charged"),
            (Symptom.UNREACHABLE, "uncharged"),
        ],
    )
    def test_the_last_two_jobs_of_a_model_that_answered(self, symptom: Symptom, expected: str) -> None:
        """With fewer than three jobs left, a 5xx is the job's own; a refused connection never is."""
        assert verdict(ended(symptom), ModelState(), FEW) == expected

    def test_a_prompt_that_a_firewall_refuses_is_the_last(self) -> None:
        """Put back by hand, it fails again: the run has answers, so that the key is good."""
        assert verdict(ended(Symptom.FORBIDDEN), ModelState(), FEW) == "charged"

    def test_a_single_job_with_a_wrong_key_is_not_charged(self) -> None:
        """A run of one prompt is paused for a wrong key too: nothing has succeeded with it."""
        alone = Backlog(open=1, done=0)
        first = verdict(ended(Symptom.DENIED), ModelState(), alone)
        later = verdict(ended(Symptom.DENIED, evidence=replace(MINE, jobs=1)), ModelState(), alone)
        assert (first, later) == ("uncharged", "outage")

    def test_a_probe_that_is_denied_pauses(self) -> None:
        """A key that lets no call in, of any worker, pauses the model's runs with the provider's words."""
        state = ModelState(since=NOW - 500, worker=2)
        one = judge(ended(Symptom.DENIED, probe=True), "m", state, MANY, NOW)
        assert (one.pause, one.state.since) == (
            Paused(PauseCause.ACCOUNT, "SomeError: it failed"),
            None,
        )
        assert one.settlement.charge == 0

    def test_a_probe_that_is_denied_while_others_have_calls_in_flight_decides_nothing(self) -> None:
        """A worker with the right key may be busy with long calls: its probe comes, and no run is paused."""
        state = ModelState(since=NOW - 500, worker=2, wait_ms=1_000, patience_ms=10_000)
        one = judge(ended(Symptom.DENIED, probe=True), "m", state, replace(MANY, others=1), NOW)
        assert (one.pause, one.settlement.charge, one.state.wait_ms) == (None, 0, 2_000)
        succeeded = judge(ended(Symptom.DENIED, probe=True), "m", state, replace(MANY, done=4), NOW)
        assert (succeeded.pause, succeeded.state.done) == (None, 4)

    def test_evidence_from_before_the_end_of_an_outage_is_none(self) -> None:
        """One stray 5xx after an outage is charged to its job, though the worker counted refusals before."""
        state = ModelState(recognised_by=1, recovered_by=2, recovered_at=NOW - 400)
        assert verdict(ended(Symptom.SERVER_ERROR, evidence=MINE), state, MANY) == "charged"

    def test_five_refused_connections_of_one_job_are_evidence(self) -> None:
        """No prompt has its connection refused, so that they need not be of three jobs."""
        evidence = replace(MINE, jobs=1)
        assert verdict(ended(Symptom.UNREACHABLE, evidence=evidence), ModelState(), MANY) == "outage"

    def test_a_refused_connection_fails_no_job(self) -> None:
        """At the last attempt of a job, before there is evidence, it is tried again uncharged."""
        last = replace(ended(Symptom.UNREACHABLE), state=JobState.FAILED)
        assert verdict(last, ModelState(), MANY) == "uncharged"

    def test_an_expired_key_fails_no_last_job(self) -> None:
        """What succeeded by another key, earlier, says nothing about this worker's."""
        settlement = ended(Symptom.DENIED, evidence=replace(MINE, jobs=2))
        assert verdict(settlement, ModelState(), FEW) == "outage"
        early = ended(Symptom.DENIED, evidence=replace(MINE, refusals=1, jobs=1))
        assert verdict(early, ModelState(), FEW) == "uncharged"

    def test_this_worker_alone(self) -> None:
        """A worker that sees a second outage, after another's probe succeeded, is wrong itself."""
        state = ModelState(recognised_by=1, recovered_by=2, recovered_at=NOW - 1_000)
        settlement = ended(Symptom.UNREACHABLE, evidence=MINE)
        assert verdict(settlement, state, MANY) == "alone"
        since_then = replace(MINE, unsuccessful_ms=500)
        assert verdict(replace(settlement, evidence=since_then), state, MANY) == "outage"


class TestProbe:
    """How an outage goes on and ends."""

    def test_waits_double_to_a_minute_and_patience_counts_them(self) -> None:
        """After each failed probe all wait twice as long; when the waits exceed patience, the runs pause."""
        state = judge(
            ended(Symptom.UNREACHABLE, evidence=replace(MINE, patience_ms=200_000)),
            "m",
            ModelState(),
            MANY,
            0,
        ).state
        waits = []
        while True:
            one = judge(ended(Symptom.UNREACHABLE, probe=True), "m", state, MANY, 0)
            assert one.settlement.charge == 0
            state = one.state
            if one.pause is not None:
                break
            waits.append(state.wait_ms // 1000)
        assert waits == [2, 4, 8, 16, 32, MAX_WAIT_MS // 1000, MAX_WAIT_MS // 1000]
        assert one.pause.cause is PauseCause.OUTAGE
        assert "could not be reached in 3 min 03 s of waits" in one.pause.message
        assert state.since is None

    def test_an_answer_ends_it(self) -> None:
        """A probe that is answered lets all workers go on, and says after how long."""
        state = ModelState(since=NOW - 60_000, worker=2)
        claim = Claim(JobId(1), RunId(1), 1, 0, 0, Prompt("a"), b"", probe=True)
        done = Settlement(claim, JobState.DONE, Outcome(Reply("b"), None, 5), charge=1)
        one = judge(done, "m", state, MANY, NOW)
        assert one.settlement is done
        assert one.state == replace(state, since=None, recovered_by=2, recovered_at=NOW)
        assert one.notice == "m answers again, after 1 min 00 s"

    def test_a_probe_that_times_out_is_not_charged(self) -> None:
        """A server that falls silent is still away."""
        state = ModelState(since=NOW - 500, wait_ms=1_000, patience_ms=10_000)
        one = judge(ended(None, probe=True), "m", state, MANY, NOW)
        assert (one.settlement.charge, one.state.wait_ms) == (0, 2_000)

    def test_a_probe_that_is_refused_for_its_prompt_ends_it(self) -> None:
        """A 400 comes from a server that is there."""
        state = ModelState(since=NOW - 500, worker=2)
        one = judge(ended(Symptom.SET_UP, probe=True, family=Family.PERMANENT), "m", state, MANY, NOW)
        assert (one.state.since, one.settlement.charge) == (None, 1)
