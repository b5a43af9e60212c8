from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from ensemble.core.dispatch import Dispatcher, Policy
from ensemble.core.events import (
    Ask,
    AskProspect,
    Claimed,
    ClaimFailed,
    CouldNotStart,
    DrainAsked,
    Ended,
    KillAsked,
    Launch,
    LeaseLost,
    Leave,
    MarkDrained,
    MarkTimedOut,
    NodesGone,
    PilotJoined,
    PilotLost,
    PilotSilent,
    ProspectTold,
    Recall,
    Reconciled,
    RecordEnd,
    RecordStart,
    SetAside,
    Skipped,
    Started,
    Terminate,
    Ticked,
    WorkRang,
)
from ensemble.core.model import Cause, Claim, Node, Outcome
from ensemble.core.shares import Shares

AT = datetime(2030, 1, 1, tzinfo=UTC)
LATER = AT + timedelta(seconds=90)


def task(task_id: int = 1, packing: int = 2, *, attempt: int = 1, limit: float | None = None):
    return Claim(
        id=task_id,
        attempt=attempt,
        name="t",
        workflow="",
        app=None,
        argv=("true",),
        workdir="d",
        node_packing_count=packing,
        time_limit_minutes=limit,
    )


class Brain:
    """A dispatcher in serial mode that is checked after every event."""

    def __init__(self, nodes: int = 1, *, now: float = 0.0, **policy):
        self.inner = Dispatcher(Shares(), Policy(**policy), now=now)
        for i in range(nodes):
            self(joined(f"n{i}"))
        if nodes:
            self(Claimed(claims=()))

    def __call__(self, event):
        effects = self.inner.handle(event)
        self.inner.validate()
        return effects

    def claim(self, *claims: Claim):
        """Ask for, and get, these; nothing is asked for any more afterwards."""
        self(WorkRang())
        effects = self(Claimed(claims=claims))
        if any(isinstance(effect, Ask) for effect in effects):
            self(Claimed(claims=()))
        return effects

    def run(self, *claims: Claim):
        for effect in self.claim(*claims):
            if isinstance(effect, Launch):
                self(started(effect.claim))

    def run_short(self):
        """Let a task end that took no time: more like it may be sent ahead."""
        self.run(task(1000, 1))
        self(Ended(id=1000, attempt=1, at=AT + timedelta(milliseconds=100), status=0))
        self(Claimed(claims=()))


def joined(name: str = "n0"):
    return PilotJoined(node=Node(name=name, cores=4), cores=(), gpus=(), memory_mb=None)


def lost(name: str = "n0"):
    return PilotLost(node=name, at=LATER, reason=f"{name}: its pilot was killed")


def started(claim: Claim):
    return Started(id=claim.id, attempt=claim.attempt, at=AT)


def ended(claim: Claim, status: int = 0, **more):
    return Ended(id=claim.id, attempt=claim.attempt, at=LATER, status=status, **more)


def skipped(claim: Claim):
    return Skipped(id=claim.id, attempt=claim.attempt, at=LATER)


def kill(*claims: Claim):
    return KillAsked(pairs=frozenset((claim.id, claim.attempt) for claim in claims))


def kinds(effects):
    return [type(effect) for effect in effects]


def ends_in(effects):
    return [effect.end for effect in effects if isinstance(effect, RecordEnd)]


def end_in(effects):
    (end,) = ends_in(effects)
    return end


# ------------------------------------------------------------------ pilots join


def test_nothing_is_claimed_before_a_pilot_has_joined():
    brain = Brain(nodes=0)
    assert brain(WorkRang()) == []
    assert brain(Ticked(now=11.0)) == []
    (ask,) = brain(joined())
    assert isinstance(ask, Ask)
    assert sum(kind.nodes for kind in ask.room.free) == 1


def test_a_launcher_whose_pilots_are_on_their_way_is_not_idle():
    brain = Brain(nodes=0, idle_timeout_s=5.0)
    for now in range(1, 100):
        assert brain(Ticked(now=float(now))) == []
    brain(joined())
    brain(Claimed(claims=()))
    assert AskProspect not in kinds(brain(Ticked(now=103.0)))
    brain(Claimed(claims=()))
    assert AskProspect in kinds(brain(Ticked(now=105.0)))


def test_a_pilot_that_joins_while_the_answer_is_on_its_way_is_asked_for_next():
    brain = Brain(nodes=0)
    brain(joined("n0"))
    assert brain(joined("n1")) == []
    (ask,) = brain(Claimed(claims=()))
    assert sum(kind.nodes for kind in ask.room.free) == 2


def test_tasks_share_a_node_and_say_so():
    brain = Brain(2)
    effects = brain.claim(*(task(i) for i in range(1, 5)))
    launches = [effect for effect in effects if isinstance(effect, Launch)]
    assert sorted(launch.placement.names for launch in launches) == [("n0",)] * 2 + [("n1",)] * 2
    assert brain.inner.busy_nodes == 2.0
    start, *_ = brain(started(task(1)))
    assert isinstance(start, RecordStart)
    assert start.start.nodes == launches[0].placement.names


def test_what_has_no_place_is_given_back():
    brain = Brain()
    effects = brain.claim(task(1), task(2), task(3))
    assert [(end.id, end.outcome) for end in ends_in(effects)] == [(3, Outcome.GIVEN_BACK)]


def test_a_part_that_comes_free_is_asked_for():
    brain = Brain()
    brain.run(task(1), task(2))
    assert brain(WorkRang()) == []
    record, ask = brain(ended(task(1)))
    assert record.end.outcome is Outcome.DONE
    assert float(ask.room.free[0].share) == 0.5


def test_a_part_that_comes_free_while_another_node_falls_silent_is_asked_for():
    brain = Brain(2)
    brain.run(task(1, 1), task(2))
    brain(WorkRang())
    brain(PilotSilent(node="n1"))
    brain(ended(task(1, 1)))
    assert kinds(brain(Claimed(claims=()))) == [Ask]


# ------------------------------------------------------------------ sent ahead


def test_short_tasks_are_sent_ahead_and_start_without_us():
    brain = Brain()
    brain.run_short()
    effects = brain.claim(task(1, 1), task(2, 1))
    assert [type(e) for e in effects if not isinstance(e, Ask)] == [Launch, Launch]
    brain(started(task(1, 1)))
    assert brain.inner.running == 2
    effects = brain(ended(task(1, 1)))
    assert end_in(effects).outcome is Outcome.DONE
    assert RecordStart in kinds(brain(started(task(2, 1))))


def test_a_recalled_task_is_given_back_when_its_pilot_has_dropped_it():
    brain = Brain()
    brain.run_short()
    brain.claim(task(1, 1), task(2, 1))
    brain(started(task(1, 1)))
    recalled = [e for now in (1.0, 2.0) for e in brain(Ticked(now=now)) if isinstance(e, Recall)]
    assert recalled == [Recall(((2, 1),))]
    assert brain.inner.running == 2
    end = end_in(brain(skipped(task(2, 1))))
    assert (end.id, end.attempt, end.outcome) == (2, 1, Outcome.GIVEN_BACK)
    assert brain.inner.running == 1


def test_a_task_that_started_as_it_was_recalled_runs():
    brain = Brain()
    brain.run_short()
    brain.claim(task(1, 1), task(2, 1))
    for now in (1.0, 2.0):
        brain(Ticked(now=now))
    brain(ended(task(1, 1), started_at=AT))
    assert RecordStart in kinds(brain(started(task(2, 1))))
    end = end_in(brain(ended(task(2, 1))))
    assert end.outcome is Outcome.DONE
    assert end.started_at == AT


def test_when_no_time_is_left_what_waits_at_pilots_comes_back():
    brain = Brain(deadline=100.0, min_useful_s=20.0)
    brain.run_short()
    brain.claim(task(1, 1), task(2, 1))
    brain(started(task(1, 1)))
    assert Recall(((2, 1),)) in brain(Ticked(now=81.0))
    assert end_in(brain(skipped(task(2, 1)))).outcome is Outcome.GIVEN_BACK
    assert kinds(brain(ended(task(1, 1)))) == [RecordEnd]
    assert kinds(brain(Ticked(now=82.0))) == [Leave]


def test_a_start_that_is_told_with_the_end_is_on_record():
    brain = Brain()
    brain.claim(task(1))
    end = end_in(brain(ended(task(1), started_at=AT)))
    assert (end.started_at, end.at, end.nodes) == (AT, LATER, ("n0",))


def test_a_task_that_cannot_start_makes_room():
    brain = Brain()
    brain.claim(task(1, 1))
    failed = CouldNotStart(id=1, attempt=1, at=AT, reason="no such file")
    record, ask = brain(failed)
    assert record.end.cause is Cause.COULD_NOT_START
    assert ask.room.free[0].share == 1


# ------------------------------------------------------------------ lost pilots


def test_everything_on_a_lost_node_is_reported_lost():
    brain = Brain(2)
    brain.claim(task(1, 1), task(2, 1))
    brain(started(task(1, 1)))
    node = brain.inner._runs[1].placement.names[0]
    brain(PilotSilent(node=node))
    end = end_in(brain(lost(node)))
    assert (end.outcome, end.cause) == (Outcome.LOST, Cause.NODE_LOST)
    assert (end.started_at, end.at, end.nodes) == (AT, LATER, (node,))
    assert "killed" in end.reason
    assert brain.inner.running == 1
    assert brain.inner.nodes == 1


def test_what_waited_at_a_lost_pilot_is_lost_too():
    brain = Brain()
    brain.run_short()
    brain.claim(task(1, 1), task(2, 1))
    brain(started(task(1, 1)))
    ends = {end.id: end for end in ends_in(brain(lost()))}
    assert {id: end.outcome for id, end in ends.items()} == dict.fromkeys((1, 2), Outcome.LOST)
    assert ends[1].started_at == AT
    assert ends[2].started_at is None


@pytest.mark.parametrize(
    ("prepare", "outcome", "cause"),
    [
        (kill(task()), Outcome.KILLED, Cause.KILLED_BY_USER),
        (DrainAsked(reason="TERM"), Outcome.TIMEOUT, Cause.ALLOCATION_ENDED),
    ],
)
def test_a_task_that_was_being_ended_as_its_node_was_lost(prepare, outcome, cause):
    brain = Brain(signal_hold_s=2.0)
    brain.run(task())
    assert Terminate(1) in brain(prepare)
    end = end_in(brain(lost()))
    assert (end.outcome, end.cause) == (outcome, cause)


def test_a_task_past_its_limit_as_its_node_was_lost():
    brain = Brain()
    brain.run(task(limit=1.0))
    brain(Ticked(now=1.0))
    assert kinds(brain(Ticked(now=61.0)))[:2] == [MarkTimedOut, Terminate]
    end = end_in(brain(lost()))
    assert (end.outcome, end.cause) == (Outcome.TIMEOUT, Cause.TIME_LIMIT)


def test_in_a_batch_job_the_loss_of_a_pilot_waits_for_an_explanation():
    brain = Brain(2, signal_hold_s=2.0)
    brain.run(task(1, 1), task(2, 1))
    node = brain.inner._runs[1].placement.names[0]
    assert ends_in(brain(lost(node))) == []
    assert (1, 1) in brain.inner.known
    effects = brain(DrainAsked(reason="TERM"))
    assert kinds(effects) == [MarkDrained, RecordEnd, Terminate]
    end = end_in(effects)
    assert (end.id, end.outcome) == (1, Outcome.TIMEOUT)
    assert end.cause is Cause.ALLOCATION_ENDED


def test_in_a_batch_job_a_loss_that_nothing_explains_is_a_loss():
    brain = Brain(2, signal_hold_s=2.0)
    brain.run(task(1, 1))
    node = brain.inner._runs[1].placement.names[0]
    brain(lost(node))
    assert ends_in(brain(Ticked(now=1.0))) == []
    assert ends_in(brain(Ticked(now=2.9))) == []
    assert end_in(brain(Ticked(now=3.0))).outcome is Outcome.LOST


def test_a_late_word_of_a_lost_task_is_not_heard():
    brain = Brain(2)
    brain.run(task(1, 1))
    node = brain.inner._runs[1].placement.names[0]
    brain(lost(node))
    brain(Claimed(claims=()))
    assert ends_in(brain(ended(task(1, 1)))) == []
    brain(joined(node))
    brain(Claimed(claims=(task(1, 1, attempt=2),)))
    assert ends_in(brain(ended(task(1, 1)))) == []
    assert ends_in(brain(skipped(task(1, 1)))) == []
    assert brain(started(task(1, 1))) == []
    assert brain.inner.running == 1


def test_what_is_claimed_for_a_node_that_fell_silent_is_given_back():
    brain = Brain(nodes=0)
    brain(joined())
    brain(PilotSilent(node="n0"))
    assert end_in(brain(Claimed(claims=(task(),)))).outcome is Outcome.GIVEN_BACK


def test_nothing_is_asked_for_while_no_pilot_can_be_reached():
    brain = Brain()
    brain(PilotSilent(node="n0"))
    assert brain(WorkRang()) == []
    assert brain(lost()) == []
    assert brain(WorkRang()) == []
    assert kinds(brain(joined())) == [Ask]


def test_without_a_pilot_it_waits_and_a_drain_ends_it():
    brain = Brain(idle_timeout_s=5.0)
    brain.run(task())
    brain(lost())
    for now in range(1, 60):
        assert Leave not in kinds(brain(Ticked(now=float(now))))
    effects = brain(DrainAsked(reason="no pilot is left"))
    assert kinds(effects) == [MarkDrained, Leave]


def test_a_pilot_lost_while_draining_lets_it_leave():
    brain = Brain()
    brain.run(task())
    brain(DrainAsked(reason="TERM"))
    assert kinds(brain(lost())) == [RecordEnd, Leave]


@pytest.mark.parametrize("hold_s", [0.0, 2.0])
def test_what_waited_at_a_pilot_that_was_lost_as_the_job_ended_never_ran(hold_s):
    brain = Brain(signal_hold_s=hold_s)
    brain.run_short()
    brain.claim(task(1, 1), task(2, 1))
    brain(started(task(1, 1)))
    effects = brain(PilotSilent(node="n0"))
    if hold_s:
        effects += brain(lost())
        effects += brain(DrainAsked(reason="TERM"))
    else:
        effects += brain(DrainAsked(reason="TERM"))
        effects += brain(lost())
    ends = {end.id: end.outcome for end in ends_in(effects)}
    assert ends == {1: Outcome.TIMEOUT, 2: Outcome.LOST if hold_s else Outcome.GIVEN_BACK}


def test_a_node_that_was_given_up_and_joins_late_is_said_to_be_used_again():
    brain = Brain(nodes=0)
    (aside,) = brain(NodesGone(names=("n0",), reason="no pilot joined"))
    assert isinstance(aside, SetAside)
    effects = brain(joined())
    assert SetAside({}) in effects
    assert Ask in kinds(effects)


def test_a_last_look_that_nobody_can_answer_is_none():
    brain = Brain(idle_timeout_s=5.0)
    brain(Ticked(now=5.0))
    brain(PilotSilent(node="n0"))
    assert brain(ProspectTold(has_prospect=False)) == []
    brain(lost())
    assert kinds(brain(joined())) == [Ask]
    assert brain(Claimed(claims=())) == [], "it leaves as soon as a pilot is back"


# ------------------------------------------------------------------ ending tasks


def test_a_task_that_is_killed_while_it_waits_at_its_pilot():
    brain = Brain()
    brain.run_short()
    brain.claim(task(1, 1), task(2, 1))
    assert brain(kill(task(2, 1))) == [Terminate(2)]
    assert brain(kill(task(2, 1))) == []
    end = end_in(brain(skipped(task(2, 1))))
    assert (end.id, end.outcome) == (2, Outcome.GIVEN_BACK)


def test_a_drain_gives_back_what_had_not_started():
    brain = Brain()
    brain.run_short()
    brain.claim(task(1, 1), task(2, 1))
    brain(started(task(1, 1)))
    effects = brain(DrainAsked(reason="TERM"))
    assert effects == [MarkDrained("TERM"), Terminate(1), Terminate(2)]
    assert end_in(brain(skipped(task(2, 1)))).outcome is Outcome.GIVEN_BACK
    record, leave = brain(ended(task(1, 1), 143, was_signalled=True))
    assert record.end.outcome is Outcome.TIMEOUT
    assert isinstance(leave, Leave)


def test_a_drain_gives_back_what_is_on_its_way():
    brain = Brain(nodes=0)
    brain(joined())
    assert kinds(brain(DrainAsked(reason="TERM"))) == [MarkDrained]
    assert kinds(brain(Claimed(claims=(task(1), task(2))))) == [RecordEnd, RecordEnd, Leave]


def test_a_task_whose_earlier_attempt_is_still_here_is_given_back():
    brain = Brain()
    brain.run(task(1))
    brain(Reconciled(held=frozenset(), known=frozenset({(1, 1)}), claims_made=2))
    brain(WorkRang())
    end = end_in(brain(Claimed(claims=(task(1, attempt=2),))))
    assert (end.attempt, end.outcome) == (2, Outcome.GIVEN_BACK)


def test_a_lost_lease_ends_everything_and_reports_nothing():
    brain = Brain(2, signal_hold_s=2.0)
    brain.run(task(1, 1), task(2, 1))
    node = brain.inner._runs[1].placement.names[0]
    assert brain(LeaseLost(reason="reaped")) == [Terminate(1, True), Terminate(2, True)]
    assert brain(lost(node)) == []
    assert brain(ended(task(2, 1), 137)) == [Leave("reaped", is_lost=True)]


def test_the_store_is_told_what_is_at_pilots():
    brain = Brain()
    brain.run_short()
    brain.claim(task(1, 1), task(2, 1))
    known = brain.inner.known
    assert known == {(1, 1), (2, 1)}
    made = brain.inner.claims_made
    assert brain(Reconciled(held=known, known=known, claims_made=made)) == []
    effects = brain(Reconciled(held=known | {(3, 1)}, known=known, claims_made=made))
    assert (end_in(effects).id, end_in(effects).outcome) == (3, Outcome.GIVEN_BACK)
    effects = brain(Reconciled(held=frozenset({(1, 1)}), known=known, claims_made=made))
    assert effects == [Terminate(2, is_forced=True)]
    assert ends_in(brain(skipped(task(2, 1)))) == []


def test_a_claim_that_failed_is_asked_again_at_the_next_poll():
    brain = Brain(nodes=0)
    brain(joined())
    assert brain(ClaimFailed()) == []
    assert kinds(brain(Ticked(now=11.0))) == [Ask]
