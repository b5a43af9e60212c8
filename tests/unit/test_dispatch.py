from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec
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
    ProspectTold,
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
from ensemble.core.model import Cause, Claim, Node, Outcome, Room
from ensemble.core.wholenodes import WholeNodes

AT = datetime(2030, 1, 1, tzinfo=UTC)
LATER = AT + timedelta(seconds=90)


class Brain:
    """A dispatcher that is checked after every event."""

    def __init__(self, nodes: int = 2, *, now: float = 0.0, **policy):
        names = [Node(name=f"n{i}", cores=4) for i in range(nodes)]
        self.inner = Dispatcher(WholeNodes(names), Policy(nodes=nodes, **policy), now=now)

    def __call__(self, event):
        effects = self.inner.handle(event)
        self.inner.validate()
        return effects

    def run(self, *claims: Claim):
        """Claim and start these; nothing is asked for any more afterwards."""
        self(WorkRang())
        for effect in self(Claimed(claims=claims)):
            if isinstance(effect, Launch):
                self(started(effect.claim))
        self(Claimed(claims=()))
        assert self.inner.busy_nodes == sum(claim.num_nodes for claim in claims)


def task(task_id: int = 1, *, attempt: int = 1, nodes: int = 1, limit: float | None = None):
    return Claim(
        id=task_id,
        attempt=attempt,
        name="t",
        workflow="",
        app=None,
        argv=("true",),
        workdir="d",
        num_nodes=nodes,
        time_limit_minutes=limit,
    )


def started(claim: Claim):
    return Started(id=claim.id, attempt=claim.attempt, at=AT)


def ended(claim: Claim, status: int = 0, **more):
    return Ended(id=claim.id, attempt=claim.attempt, at=LATER, status=status, **more)


def kill(*claims: Claim):
    return KillAsked(pairs=frozenset((claim.id, claim.attempt) for claim in claims))


def kinds(effects):
    return [type(effect) for effect in effects]


def end_in(effects):
    (end,) = [effect.end for effect in effects if isinstance(effect, RecordEnd)]
    return end


# ------------------------------------------------------------------ taking work


def test_a_ring_asks_for_all_free_nodes():
    brain = Brain(3, deadline=600.0)
    assert brain(WorkRang()) == [Ask(Room(nodes=3, left_s=600.0, max_tasks=3))]


def test_one_question_at_a_time():
    brain = Brain()
    brain(WorkRang())
    assert brain(WorkRang()) == []
    assert brain(Ticked(now=100.0)) == []


def test_what_was_claimed_is_launched_and_more_is_asked_for():
    brain = Brain(3)
    brain(WorkRang())
    launch, ask = brain(Claimed(claims=(task(1, nodes=2),)))
    assert isinstance(launch, Launch)
    assert launch.placement.names == ("n0", "n1")
    assert ask == Ask(Room(nodes=1, left_s=None, max_tasks=1))


def test_an_empty_answer_is_not_questioned_until_something_happens():
    brain = Brain()
    brain(WorkRang())
    assert brain(Claimed(claims=())) == []
    assert brain(Ticked(now=1.0)) == []
    assert kinds(brain(Ticked(now=10.0))) == [Ask]


def test_a_ring_while_the_answer_is_on_its_way_asks_again():
    brain = Brain()
    brain(WorkRang())
    brain(WorkRang())
    assert kinds(brain(Claimed(claims=()))) == [Ask]
    assert brain(Claimed(claims=())) == []


def test_a_node_freed_while_the_answer_is_on_its_way_asks_again():
    brain = Brain(2)
    brain.run(task(1))
    assert brain(WorkRang()) == [Ask(Room(nodes=1, left_s=None, max_tasks=1))]
    assert kinds(brain(ended(task(1)))) == [RecordEnd]
    assert brain(Claimed(claims=())) == [Ask(Room(nodes=2, left_s=None, max_tasks=2))]


def test_after_a_failed_question_the_tick_asks_again():
    brain = Brain(poll_s=10.0)
    brain(WorkRang())
    assert brain(ClaimFailed()) == []
    assert kinds(brain(Ticked(now=10.0))) == [Ask]


def test_after_a_failed_question_nothing_is_asked_before_the_tick_however_much_ends():
    brain = Brain(3, poll_s=10.0)
    brain.run(task(1), task(2))
    brain(WorkRang())
    brain(ClaimFailed())
    assert kinds(brain(ended(task(1)))) == [RecordEnd]
    assert brain(WorkRang()) == []
    assert kinds(brain(Ticked(now=1.0))) == [Ask]
    brain(ClaimFailed())
    assert brain(Ticked(now=2.0)) == []
    assert kinds(brain(ended(task(2)))) == [RecordEnd, Ask]


def test_a_freed_node_is_refilled_at_once():
    brain = Brain(1)
    brain.run(task(1))
    record, ask = brain(ended(task(1)))
    assert isinstance(record, RecordEnd)
    assert ask == Ask(Room(nodes=1, left_s=None, max_tasks=1))


def test_nothing_is_asked_for_without_a_free_node():
    brain = Brain(1)
    brain.run(task(1))
    assert brain(WorkRang()) == []


@pytest.mark.parametrize(("left_s", "asks"), [(59.9, False), (60.0, True)])
def test_nothing_is_asked_for_with_less_than_the_least_useful_time_left(left_s, asks):
    brain = Brain(deadline=left_s, min_useful_s=60.0)
    assert bool(brain(WorkRang())) is asks


def test_a_claim_that_arrives_while_leaving_is_given_back():
    brain = Brain()
    brain(WorkRang())
    assert kinds(brain(DrainAsked(reason="TERM"))) == [MarkDrained]
    record, leave = brain(Claimed(claims=(task(1),)))
    assert record.end.outcome is Outcome.GIVEN_BACK
    assert leave == Leave("TERM")


def test_a_claim_that_does_not_fit_is_given_back_and_does_not_keep_the_launcher():
    brain = Brain(1, idle_timeout_s=5.0)
    brain(WorkRang())
    effects = brain(Claimed(claims=(task(1, nodes=2),)))
    assert end_in(effects).outcome is Outcome.GIVEN_BACK
    brain(Claimed(claims=()))
    assert kinds(brain(Ticked(now=5.0))) == [AskProspect]


# ------------------------------------------------------------------ short tasks are claimed ahead


def quick_brain(nodes: int = 1):
    """A brain that has seen a run of 10 ms, and waits for an answer."""
    brain = Brain(nodes)
    brain.run(task(1))
    quick = AT + timedelta(seconds=0.01)
    (_, ask) = brain(Ended(id=1, attempt=1, at=quick, status=0))
    assert ask.room.ahead > 0
    assert ask.room.max_tasks == ask.room.nodes + ask.room.ahead
    return brain


def test_a_task_claimed_ahead_starts_with_the_end_of_another():
    brain = quick_brain()
    effects = brain(Claimed(claims=(task(2), task(3))))
    assert [effect.claim.id for effect in effects if isinstance(effect, Launch)] == [2]
    assert (3, 1) in brain.inner.known
    brain(started(task(2)))
    effects = brain(ended(task(2)))
    assert [effect.claim.id for effect in effects if isinstance(effect, Launch)] == [3]


def test_long_tasks_are_not_claimed_ahead():
    brain = Brain(1)
    brain.run(task(1))
    (_, ask) = brain(ended(task(1)))
    assert ask.room.ahead == 0


def test_what_was_claimed_ahead_is_given_back_by_a_kill_and_by_a_drain():
    brain = quick_brain()
    brain(Claimed(claims=(task(2), task(3), task(4))))
    assert end_in(brain(kill(task(3)))).id == 3
    effects = brain(DrainAsked(reason="TERM"))
    assert end_in(effects).id == 4
    assert Terminate(2) in effects


def test_what_was_claimed_ahead_is_not_reported_without_a_lease():
    brain = quick_brain()
    brain(Claimed(claims=(task(2), task(3))))
    assert brain(LeaseLost(reason="reaped")) == [Terminate(2, is_forced=True)]
    assert brain.inner.known == {(2, 1)}


def test_reconciling_forgets_what_was_claimed_ahead_and_is_not_held():
    brain = quick_brain()
    brain(Claimed(claims=(task(2), task(3))))
    brain(Claimed(claims=()))
    known, made = brain.inner.known, brain.inner.claims_made
    brain(Reconciled(held=frozenset({(2, 1)}), known=known, claims_made=made))
    assert brain.inner.known == {(2, 1)}


# ------------------------------------------------------------------ a task's life


def test_start_and_success_are_recorded():
    brain = Brain()
    brain(WorkRang())
    brain(Claimed(claims=(task(7, attempt=3),)))
    (record,) = brain(started(task(7, attempt=3)))
    assert (record.start.id, record.start.attempt, record.start.at) == (7, 3, AT)
    assert record.start.nodes == ("n0",)
    end = end_in(brain(ended(task(7, attempt=3), error="noise")))
    assert (end.id, end.attempt, end.outcome, end.exit_code) == (7, 3, Outcome.DONE, 0)
    assert (end.started_at, end.at, end.nodes) == (AT, LATER, ("n0",))
    assert (end.cause, end.reason, end.error) == (None, None, None)


@pytest.mark.parametrize(
    ("status", "cause", "reason"),
    [
        (1, Cause.EXIT_CODE, "1"),
        (128, Cause.EXIT_CODE, "128"),
        (139, Cause.SIGNAL, "SIGSEGV"),
        (143, Cause.SIGNAL, "SIGTERM"),
        (160, Cause.EXIT_CODE, "160"),  # 32 is no signal that has a name
        (255, Cause.EXIT_CODE, "255"),
    ],
)
def test_failures_say_why(status, cause, reason):
    brain = Brain()
    brain.run(task(1))
    end = end_in(brain(ended(task(1), status, error="last words")))
    assert (end.outcome, end.cause, end.reason) == (Outcome.ERROR, cause, reason)
    assert (end.exit_code, end.error) == (status, "last words")


def test_what_could_not_start_is_an_error_and_frees_its_node():
    brain = Brain(1)
    brain(WorkRang())
    brain(Claimed(claims=(task(1),)))
    effects = brain(CouldNotStart(id=1, attempt=1, at=AT, reason="no such file"))
    assert kinds(effects) == [RecordEnd, Ask]
    end = end_in(effects)
    assert (end.outcome, end.cause) == (Outcome.ERROR, Cause.COULD_NOT_START)
    assert (end.reason, end.exit_code) == ("no such file", None)


def test_a_program_that_its_mpi_launcher_could_not_start_could_not_start():
    brain = Brain()
    brain.run(task(1))
    end = end_in(brain(ended(task(1), 255, start_error="srun could not start x")))
    assert (end.outcome, end.cause) == (Outcome.ERROR, Cause.COULD_NOT_START)
    assert end.exit_code == 255


def test_a_start_error_of_a_killed_task_is_a_kill():
    brain = Brain()
    brain.run(task(1))
    brain(kill(task(1)))
    end = end_in(brain(ended(task(1), 1, was_signalled=True, start_error="aborted")))
    assert (end.outcome, end.cause) == (Outcome.KILLED, Cause.KILLED_BY_USER)


def test_what_was_skipped_is_given_back_and_frees_its_node():
    brain = Brain(1)
    brain(WorkRang())
    brain(Claimed(claims=(task(1),)))
    brain(kill(task(1)))
    effects = brain(Skipped(id=1, attempt=1, at=AT))
    assert kinds(effects) == [RecordEnd, Ask]
    assert end_in(effects).outcome is Outcome.GIVEN_BACK


@pytest.mark.parametrize(
    "event",
    [
        started(task(1, attempt=2)),
        CouldNotStart(id=1, attempt=2, at=AT, reason="late"),
        Skipped(id=1, attempt=2, at=AT),
        ended(task(1, attempt=2)),
        ended(task(9)),
        kill(task(1, attempt=2), task(9)),
    ],
)
def test_events_of_another_attempt_are_ignored(event):
    brain = Brain(1)
    brain.run(task(1))
    assert brain(event) == []
    assert brain.inner.known == {(1, 1)}


# ------------------------------------------------------------------ ending tasks


def test_a_claimed_task_is_killed_before_it_starts():
    brain = Brain()
    brain(WorkRang())
    brain(Claimed(claims=(task(1),)))
    assert brain(kill(task(1))) == [Terminate(1)]


def test_a_starting_task_that_is_killed_is_recorded_as_started_and_killed():
    brain = Brain()
    brain(WorkRang())
    brain(Claimed(claims=(task(1),)))
    brain(kill(task(1)))
    assert kinds(brain(started(task(1)))) == [RecordStart]
    end = end_in(brain(ended(task(1), 143, was_signalled=True)))
    assert (end.outcome, end.cause) == (Outcome.KILLED, Cause.KILLED_BY_USER)


def test_a_second_kill_is_ignored():
    brain = Brain()
    brain.run(task(1), task(2))
    assert brain(kill(task(1), task(2))) == [Terminate(1), Terminate(2)]
    assert brain(kill(task(1), task(2))) == []


def test_a_task_killed_while_it_is_handed_out_is_not_launched():
    brain = Brain()
    brain(WorkRang())
    assert brain(kill(task(1))) == []
    effects = brain(Claimed(claims=(task(1), task(2))))
    assert end_in(effects).id == 1
    assert [effect.claim.id for effect in effects if isinstance(effect, Launch)] == [2]


def test_status_0_after_our_signal_is_not_success():
    brain = Brain()
    brain.run(task(1))
    brain(kill(task(1)))
    assert end_in(brain(ended(task(1), 0, was_signalled=True))).outcome is Outcome.KILLED


def test_status_0_before_our_signal_is_success():
    brain = Brain()
    brain.run(task(1))
    brain(kill(task(1)))
    assert end_in(brain(ended(task(1), 0, was_signalled=False))).outcome is Outcome.DONE


def test_a_time_limit_is_marked_then_enforced():
    brain = Brain(idle_timeout_s=1e9)
    brain.run(task(1, limit=1.5), task(2))
    assert brain(Ticked(now=1.0)) == []
    assert brain(Ticked(now=90.9)) == []
    assert brain(Ticked(now=91.0)) == [MarkTimedOut(((1, 1),)), Terminate(1)]
    assert brain(Ticked(now=92.0)) == []
    end = end_in(brain(ended(task(1, limit=1.5), 143, was_signalled=True)))
    assert (end.outcome, end.cause) == (Outcome.TIMEOUT, Cause.TIME_LIMIT)
    assert end.reason == "1.5 minutes"


def test_a_time_limit_is_never_enforced_early():
    """The last tick is up to a second old when a task starts."""
    brain = Brain(1)
    brain(Ticked(now=10.0))
    brain.run(task(1, limit=1.0))  # in truth at 10.9
    brain(Ticked(now=11.0))
    assert brain(Ticked(now=70.5)) == []
    assert MarkTimedOut(((1, 1),)) in brain(Ticked(now=71.0))


def test_a_killed_task_does_not_time_out():
    brain = Brain(1)
    brain.run(task(1, limit=1.0))
    brain(kill(task(1)))
    brain(Ticked(now=1.0))
    assert brain(Ticked(now=500.0)) == []


def test_a_drain_marks_ends_and_leaves_when_all_is_gone():
    brain = Brain()
    brain.run(task(1), task(2))
    assert brain(DrainAsked(reason="TERM")) == [MarkDrained("TERM"), Terminate(1), Terminate(2)]
    end = end_in(brain(ended(task(1), 143, was_signalled=True)))
    assert (end.outcome, end.cause) == (Outcome.TIMEOUT, Cause.ALLOCATION_ENDED)
    record, leave = brain(ended(task(2), 0))
    assert record.end.outcome is Outcome.DONE
    assert leave == Leave("TERM")
    assert brain(WorkRang()) == []


def test_a_second_drain_forces():
    brain = Brain(3)
    brain.run(task(1), task(2), task(3))
    brain(kill(task(2)))
    assert brain(DrainAsked(reason="TERM")) == [MarkDrained("TERM"), Terminate(1), Terminate(3)]
    assert brain(DrainAsked(reason="INT")) == [Terminate(i, is_forced=True) for i in (1, 2, 3)]


def test_the_deadline_drains_once():
    brain = Brain(deadline=100.0, min_useful_s=10.0)
    brain.run(task(1))
    assert brain(Ticked(now=99.9)) == []
    effects = brain(Ticked(now=100.0))
    assert kinds(effects) == [MarkDrained, Terminate]
    assert brain(Ticked(now=101.0)) == []


# ------------------------------------------------------------------ exits by signal


def test_an_exit_by_signal_is_held_back_and_then_an_error():
    brain = Brain(1, signal_hold_s=2.0)
    brain.run(task(1))
    assert kinds(brain(ended(task(1), 143))) == [Ask]
    brain(Claimed(claims=()))
    assert brain(Ticked(now=1.0)) == []
    assert brain(Ticked(now=2.9)) == []
    end = end_in(brain(Ticked(now=3.0)))
    assert (end.outcome, end.cause, end.reason) == (Outcome.ERROR, Cause.SIGNAL, "SIGTERM")


def test_an_exit_by_signal_that_a_drain_explains_is_a_timeout():
    brain = Brain(1, signal_hold_s=2.0)
    brain.run(task(1))
    brain(ended(task(1), 137))
    brain(Claimed(claims=()))
    effects = brain(DrainAsked(reason="received SIGTERM"))
    assert kinds(effects) == [MarkDrained, RecordEnd, Leave]
    end = end_in(effects)
    assert (end.outcome, end.cause) == (Outcome.TIMEOUT, Cause.ALLOCATION_ENDED)
    assert (end.exit_code, end.reason) == (137, "received SIGTERM")


@pytest.mark.parametrize(("hold_s", "status"), [(0.0, 143), (2.0, 139), (2.0, 1)])
def test_other_exits_are_not_held_back(hold_s, status):
    brain = Brain(1, signal_hold_s=hold_s)
    brain.run(task(1))
    assert end_in(brain(ended(task(1), status))).outcome is Outcome.ERROR


def test_a_killed_tasks_exit_by_signal_is_not_held_back():
    brain = Brain(1, signal_hold_s=2.0)
    brain.run(task(1))
    brain(kill(task(1)))
    end = end_in(brain(ended(task(1), 143, was_signalled=True)))
    assert end.outcome is Outcome.KILLED


def test_an_end_that_is_held_back_is_not_given_back_by_reconciling():
    brain = Brain(1, signal_hold_s=2.0)
    brain.run(task(1))
    brain(ended(task(1), 143))
    brain(Claimed(claims=()))
    known = brain.inner.known
    assert known == {(1, 1)}
    answer = Reconciled(held=known, known=known, claims_made=brain.inner.claims_made)
    assert brain(answer) == []


def test_an_end_that_is_held_back_is_not_lost_by_leaving():
    brain = Brain(1, signal_hold_s=2.0, idle_timeout_s=5.0)
    assert kinds(brain(Ticked(now=5.0))) == [AskProspect]
    brain.run(task(1))
    brain(ended(task(1), 143))
    brain(Claimed(claims=()))
    assert brain(ProspectTold(has_prospect=False)) == []
    brain(Ticked(now=6.0))
    assert end_in(brain(Ticked(now=8.0))).outcome is Outcome.ERROR


@pytest.mark.parametrize("why", [{"is_cut_off": True}, {"lost": "mpiexec lost a node"}])
def test_a_failure_whose_launcher_may_have_been_cut_off_is_held_back_as_well(why):
    brain = Brain(1, signal_hold_s=2.0)
    brain.run(task(1))
    assert kinds(brain(ended(task(1), 255, **why))) == [Ask]
    brain(Claimed(claims=()))
    end = end_in(brain(DrainAsked(reason="received SIGTERM")))
    assert (end.outcome, end.cause) == (Outcome.TIMEOUT, Cause.ALLOCATION_ENDED)


# ------------------------------------------------------------------ nodes that are lost


def test_a_task_that_its_launcher_lost_with_a_node_is_lost_and_not_failed():
    brain = Brain(2)
    brain.run(task(1, nodes=2))
    end = end_in(brain(ended(task(1, nodes=2), 255, lost="mpiexec lost a node", error="text")))
    assert (end.outcome, end.cause, end.reason) == (
        Outcome.LOST, Cause.NODE_LOST, "mpiexec lost a node",
    )  # fmt: skip
    assert (end.exit_code, end.error, end.nodes) == (255, "text", ("n0", "n1"))


def test_a_killed_task_that_was_lost_with_a_node_is_killed():
    brain = Brain(2)
    brain.run(task(1))
    brain(kill(task(1)))
    assert end_in(brain(ended(task(1), 255, lost="a node"))).outcome is Outcome.KILLED


def test_a_node_on_which_tasks_are_lost_again_and_again_is_set_aside():
    brain = Brain(2)
    brain.run(task(9))  # on n0, to the end
    for number in range(1, 4):
        (launch,) = [e for e in brain(Claimed(claims=(task(number),))) if isinstance(e, Launch)]
        assert launch.placement.names == ("n1",)
        effects = brain(ended(task(number), 255, lost="a node"))
    assert [effect.nodes.keys() for effect in effects if isinstance(effect, SetAside)] == [{"n1"}]
    assert brain.inner.nodes == 1


def test_nodes_that_the_scheduler_took_away_are_used_no_more_however_many_they_are():
    brain = Brain(4)
    brain.run(task(1, nodes=2))
    (aside,) = brain(NodesGone(names=("n0", "n1", "n2"), reason="Slurm took it out of the job"))
    assert isinstance(aside, SetAside)
    assert aside.nodes.keys() == {"n0", "n1", "n2"}
    assert brain.inner.nodes == 1
    ends = brain(ended(task(1, nodes=2), 1, start_error="Slurm would not start true"))
    assert end_in(ends).outcome is Outcome.LOST
    assert brain(NodesGone(names=("n0",), reason="again")) == []


def test_a_suspect_whose_start_is_not_on_record_yet_is_given_back_by_a_drain():
    brain = Brain()
    brain(WorkRang())
    brain(Claimed(claims=(msgspec.structs.replace(task(), is_suspect=True),)))
    end = end_in(brain(DrainAsked(reason="TERM")))
    assert (end.outcome, end.started_at) == (Outcome.GIVEN_BACK, None)


# ------------------------------------------------------------------ leaving


def leaves(brain, now):
    """Go through the questions that precede leaving for want of work; return the reason."""
    effects = brain(Ticked(now=now))
    for _ in range(5):
        for effect in effects:
            if isinstance(effect, Leave):
                return effect.reason
        if Ask in kinds(effects):
            effects = brain(Claimed(claims=()))
        elif AskProspect in kinds(effects):
            effects = brain(ProspectTold(has_prospect=False))
        else:
            return None
    raise AssertionError("it asks for ever")


def test_it_leaves_when_all_its_nodes_are_gone_however_long_it_is_to_stay():
    brain = Brain(is_persistent=True)
    brain.run(task(1))
    brain(NodesGone(names=("n0", "n1"), reason="Slurm took it out of the job"))
    assert leaves(brain, 1.0) is None
    brain(ended(task(1), 255, lost="a node"))
    assert leaves(brain, 2.0) == "no node is left"


def test_of_those_that_are_left_when_others_are_gone_one_is_always_used():
    brain = Brain(8, idle_timeout_s=1.0)
    brain.run(task(1, nodes=8))
    brain(ended(task(1, nodes=8)))
    brain(Claimed(claims=()))
    brain(NodesGone(names=tuple(f"n{i}" for i in range(6)), reason="Slurm took it out of the job"))
    effects = []
    for number in range(10, 60):
        brain(WorkRang())
        assert Launch in kinds(brain(Claimed(claims=(task(number),))))
        effects += brain(CouldNotStart(id=number, attempt=1, at=AT, reason="no such file"))
        brain(Claimed(claims=()))
    effects += brain(Ticked(now=1.0)) + brain(Ticked(now=10.0))
    causes = [effect.end.cause for effect in effects if isinstance(effect, RecordEnd)]
    assert causes == [Cause.COULD_NOT_START] * 50, "what fails everywhere is no node's fault"


def test_it_leaves_when_idle_for_long_without_prospects():
    brain = Brain(idle_timeout_s=60.0)
    assert leaves(brain, 59.0) is None
    assert leaves(brain, 60.0) == "no work is left"


def test_it_stays_while_there_are_prospects():
    brain = Brain(idle_timeout_s=60.0, poll_s=1e9)
    assert brain(Ticked(now=60.0)) == [AskProspect()]
    assert brain(Ticked(now=61.0)) == []
    assert brain(ProspectTold(has_prospect=True)) == []
    assert brain(Ticked(now=120.0)) == []
    assert brain(Ticked(now=121.0)) == [AskProspect()]


def test_it_stays_when_work_came_and_went_while_prospects_were_asked_for():
    brain = Brain(1, idle_timeout_s=60.0, poll_s=1e9)
    assert brain(Ticked(now=60.0)) == [AskProspect()]
    brain.run(task(1))
    brain(ended(task(1)))
    brain(Claimed(claims=()))
    assert brain(ProspectTold(has_prospect=False)) == []
    assert not brain.inner.is_leaving


def test_it_leaves_even_if_it_polls_with_every_tick():
    brain = Brain(idle_timeout_s=3.0, poll_s=1.0)
    assert [leaves(brain, now) for now in (1.0, 2.0)] == [None, None]
    assert leaves(brain, 3.0) == "no work is left"


def test_idleness_begins_with_the_last_end():
    brain = Brain(idle_timeout_s=60.0)
    brain.run(task(1))
    assert leaves(brain, 500.0) is None
    brain(ended(task(1)))
    brain(Claimed(claims=()))
    assert leaves(brain, 559.0) is None
    assert leaves(brain, 560.0) == "no work is left"


def test_a_persistent_launcher_stays():
    brain = Brain(is_persistent=True)
    assert leaves(brain, 1e6) is None


def test_it_leaves_when_no_time_is_left_to_start_anything():
    brain = Brain(deadline=100.0, min_useful_s=60.0, is_persistent=True)
    brain.run(task(1))
    assert brain(Ticked(now=41.0)) == []
    brain(ended(task(1)))
    (leave,) = brain(Ticked(now=42.0))
    assert leave.reason == "no time is left to start anything"


def test_nothing_follows_leave():
    brain = Brain()
    assert kinds(brain(DrainAsked(reason="TERM"))) == [MarkDrained, Leave]
    held = frozenset({(1, 1)})
    for event in (
        DrainAsked(reason="TERM"),
        LeaseLost(reason="reaped"),
        Ticked(now=1e6),
        Reconciled(held=held, known=frozenset(), claims_made=0),
    ):
        assert brain(event) == []


# ------------------------------------------------------------------ the lease, and agreement


def test_without_a_lease_all_is_ended_at_once_and_nothing_is_recorded():
    brain = Brain(3, signal_hold_s=2.0)
    brain.run(task(1), task(2), task(3))
    brain(ended(task(3), 143))  # held back; asks for work
    effects = brain(LeaseLost(reason="reaped"))
    assert effects == [Terminate(1, is_forced=True), Terminate(2, is_forced=True)]
    assert brain(LeaseLost(reason="reaped")) == []
    assert [brain(Ticked(now=now)) for now in (1.0, 9.0)] == [[], []]
    assert brain(ended(task(1), 137, was_signalled=True)) == []
    assert brain(Claimed(claims=(task(4),))) == []
    held = frozenset({(2, 1), (4, 1)})
    reconciled = Reconciled(held=held, known=brain.inner.known, claims_made=3)
    assert brain(reconciled) == []
    assert brain(ended(task(2), 0)) == [Leave("reaped", is_lost=True)]


@pytest.mark.parametrize(
    "event",
    [
        CouldNotStart(id=1, attempt=1, at=AT, reason="no such file"),
        Skipped(id=1, attempt=1, at=AT),
    ],
)
def test_without_a_lease_what_did_not_start_is_not_recorded_either(event):
    brain = Brain(1)
    brain(WorkRang())
    brain(Claimed(claims=(task(1),)))
    brain(LeaseLost(reason="reaped"))
    assert kinds(brain(event)) == [Leave]


def test_without_a_lease_a_start_is_not_recorded():
    brain = Brain(1)
    brain(WorkRang())
    brain(Claimed(claims=(task(1),)))
    brain(LeaseLost(reason="reaped"))
    assert brain(started(task(1))) == []


def reconciled(brain, *held, known=None, claims_made=None):
    return brain(
        Reconciled(
            held=frozenset(held),
            known=brain.inner.known if known is None else frozenset(known),
            claims_made=brain.inner.claims_made if claims_made is None else claims_made,
        )
    )


def test_reconciling_finds_agreement():
    brain = Brain()
    brain.run(task(1))
    assert reconciled(brain, (1, 1)) == []


def test_what_was_handed_out_and_never_reached_us_is_given_back():
    brain = Brain()
    brain.run(task(1))
    end = end_in(reconciled(brain, (1, 1), (5, 2)))
    assert (end.id, end.attempt, end.outcome) == (5, 2, Outcome.GIVEN_BACK)


def test_an_answer_older_than_a_claim_gives_nothing_back():
    brain = Brain()
    known, made = brain.inner.known, brain.inner.claims_made
    brain.run(task(1))
    assert RecordEnd not in kinds(reconciled(brain, (1, 1), (5, 2), known=known, claims_made=made))


def test_nothing_is_given_back_while_a_claim_is_on_its_way():
    brain = Brain()
    brain(WorkRang())
    assert RecordEnd not in kinds(reconciled(brain, (5, 2)))


def test_a_report_that_is_not_written_yet_is_not_given_back():
    brain = Brain()
    assert reconciled(brain, (5, 2), known={(5, 2)}) == []


def test_what_is_not_ours_any_more_is_ended_and_not_reported():
    brain = Brain(1)
    brain.run(task(1))
    assert reconciled(brain) == [Terminate(1, is_forced=True)]
    assert reconciled(brain) == []
    assert kinds(brain(ended(task(1), 137, was_signalled=True))) == [Ask]


def test_what_is_not_ours_any_more_and_did_not_start_frees_its_node():
    brain = Brain(1)
    brain(WorkRang())
    brain(Claimed(claims=(task(1),)))
    reconciled(brain)
    assert kinds(brain(Skipped(id=1, attempt=1, at=AT))) == [Ask]


def test_an_attempt_unknown_when_the_store_was_asked_is_left_alone():
    brain = Brain()
    brain.run(task(1))
    assert reconciled(brain, known=()) == []
    assert brain.inner.known == {(1, 1)}


def test_another_attempt_of_what_still_dies_is_given_back():
    brain = Brain()
    brain.run(task(1))
    reconciled(brain)
    brain(WorkRang())
    effects = brain(Claimed(claims=(task(1, attempt=2),)))
    assert end_in(effects).attempt == 2
    assert Launch not in kinds(effects)
