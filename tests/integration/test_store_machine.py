"""Anything in any order, from several leases: the store does what a small model of it says.

The model is in modelling.py. `LONG_RUN_MINUTES=10` in the environment goes on with other examples for so
many minutes; without it the examples are the same ones each time.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Coroutine, Iterator
from fractions import Fraction
from typing import Any, TypeVar

import asyncpg
import pytest
from hypothesis import HealthCheck, note, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from ensemble.core.database import connect
from ensemble.core.leases import Lease, Reaping
from ensemble.core.model import (
    Cause,
    Changes,
    Claim,
    End,
    NewTask,
    Room,
    Selector,
    SlotRoom,
    Start,
    Vacancy,
    Verdict,
)
from ensemble.core.states import FINAL, RETRYABLE, RUNNABLE, State, is_legal_history
from ensemble.core.store import Store
from ensemble.errors import IllegalMoveError, LeaseLostError, NotFoundError
from ensemble.site import OWNER, Site
from tests.integration.modelling import ENDINGS, Job, Model
from tests.integration.storing import Desk

LONG_RUN_MINUTES = float(os.environ.get("LONG_RUN_MINUTES", "0"))
MOST_TASKS, MOST_LEASES = 9, 4
TABLES = "task, task_spec, task_parent, attempt, event, lease, launcher, submission, workflow"
LOOK = """
    SELECT t.id, t.state, t.lease_id, t.attempt, t.failures, t.timeouts, t.losses, t.pending_parents, t.cause,
           ARRAY (SELECT ARRAY[e.from_state, e.to_state] FROM event e WHERE e.task_id = t.id ORDER BY e.id) AS moves,
           ARRAY (SELECT concat_ws(' ', a.attempt, 'lease', a.lease_id, coalesce(a.outcome, 'open'))
                    FROM attempt a WHERE a.task_id = t.id ORDER BY a.attempt) AS attempts
      FROM task t ORDER BY t.id
"""
T = TypeVar("T")


class Hands:
    """A store, an owner who empties it and a user with a psql, on an event loop of their own."""

    def __init__(self, site: Site) -> None:
        self._loop = asyncio.Runner()
        self.do(self._open(site))

    async def _open(self, site: Site) -> None:
        self.owner = await connect(site.address(OWNER), name="machine owner")
        self.psql = await connect(site.address(), name="machine psql")
        # One connection, so that the next line is about all that launchers and users do.
        self.store = await Store.open(site.address(), name="machine", max_size=1)
        # Nothing here waits for a row that somebody has locked but a report, for a quarter of a second.
        await self.store.pool.execute("SET lock_timeout = '600ms'")
        await self.psql.execute("SET idle_in_transaction_session_timeout = 0")
        self.desk = Desk(self.store)
        self.reaping = Reaping(self.store.pool)

    def do(self, what: Coroutine[Any, Any, T]) -> T:
        return self._loop.run(what)

    def empty(self) -> None:
        self.do(self.owner.execute(f"TRUNCATE {TABLES} RESTART IDENTITY CASCADE"))

    def close(self) -> None:
        self.owner.terminate()
        self.psql.terminate()
        self.do(self.store.close())
        self._loop.close()


def pick(most: int = 1) -> st.SearchStrategy[list[int]]:
    """Numbers that choose among what there is, whatever that is."""
    return st.lists(st.integers(0, MOST_TASKS - 1), min_size=1, max_size=most, unique=True)


def choose(among: list[T], numbers: list[int]) -> list[T]:
    """What the numbers choose, in order and each once; the first is never in vain."""
    places = {number % len(among): None for number in numbers} if among else {}
    return [among[place] for place in places]


TASK = st.fixed_dictionaries(
    {
        "max_losses": st.sampled_from([0, 0, 1]),
        "max_timeouts": st.sampled_from([0, 1]),
        "num_nodes": st.sampled_from([1, 1, 2, 3]),
        "wall_time_minutes": st.sampled_from([0, 5, 60]),
    },
    optional={
        "workflow": st.sampled_from(["", "red", "blue"]),
        "ranks_per_node": st.sampled_from([1, 1, 2]),
        "node_packing_count": st.integers(1, 2),
        "priority": st.integers(-1, 1),
        "max_retries": st.integers(0, 2),
        "auto_timeout_retry": st.booleans(),
    },
)
#: A task, numbers of its parents, whether it waits for them, and whether it follows the one before it.
BATCH = st.lists(
    st.tuples(TASK, pick(2) | st.just([]), st.sampled_from([True] * 4 + [False]), st.booleans()),
    min_size=1,
    max_size=4,
)
ENDING = st.sampled_from(["well", "well", *ENDINGS])
LEASE = st.integers(0, MOST_LEASES)
ENDINGS_OF_TWO = st.tuples(ENDING, ENDING)
ROOM = st.fixed_dictionaries(
    {
        "nodes": st.integers(0, 5),
        "left_s": st.sampled_from([None, None, 30.0, 600.0]),
        "ahead": st.integers(0, 2),
        "workflows": st.sampled_from([None, None, ("red",), ("red", "blue")]),
        "most": st.integers(1, 4),
    }
)
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "priority": st.integers(-1, 1),
        "num_nodes": st.integers(1, 3),
        "ranks_per_node": st.integers(1, 2),
        "wall_time_minutes": st.sampled_from([0, 5, 60]),
        "max_retries": st.integers(0, 2),
        "workflow": st.sampled_from(["", "red", "blue"]),
    },
)
#: What can be done, how often, and with what.
STEPS: dict[str, tuple[int, dict[str, Any]]] = {
    "submit": (3, {"batch": BATCH, "key": st.sampled_from([None, None, "one", "two"])}),
    "kill": (3, {"numbers": pick(3)}),
    "retry": (4, {"numbers": pick(3)}),
    "remove": (2, {"numbers": pick(3)}),
    "modify": (1, {"numbers": pick(), "changes": CHANGES}),
    "transact": (
        4,
        {
            "numbers": pick(2),
            "what": st.sampled_from(["look", "touch", "kill"]),
            "is_near": st.booleans(),
            "commits": st.booleans(),
        },
    ),
    "register": (1, {"linger": st.booleans()}),
    "claim": (4, {"number": LEASE, "room": ROOM}),
    "claim_serial": (4, {"number": LEASE, "room": ROOM}),
    "begin_all": (5, {"number": LEASE}),
    "start": (3, {"number": LEASE, "numbers": pick(4)}),
    "finish": (
        10,
        {
            "number": LEASE,
            "numbers": pick(4),
            "endings": ENDINGS_OF_TWO,
            "with_start": st.booleans(),
        },
    ),
    "time_out": (2, {"number": LEASE, "numbers": pick(3)}),
    "drain": (2, {"number": LEASE}),
    "report_strays": (
        4,
        {
            "number": LEASE,
            "is_holder": st.booleans(),
            "numbers": pick(3),
            "what": st.sampled_from(["start", "time out", "finish"]),
            "endings": ENDINGS_OF_TWO,
        },
    ),
    "compare_holds": (1, {"number": LEASE}),
    "renew": (1, {"number": LEASE}),
    "end_lease": (
        2,
        {
            "number": LEASE,
            "how": st.sampled_from(["close", "expire", "bury"]),
            "releases": st.booleans(),
        },
    ),
    "release": (1, {}),
}
STEP = st.sampled_from([name for name, (times, _) in STEPS.items() for _ in range(times)]).flatmap(
    lambda name: st.tuples(st.just(name), st.fixed_dictionaries(STEPS[name][1]))
)


class StoreMachine(RuleBasedStateMachine):
    """The hands do something, the model says what must come of it, and then they are compared."""

    def __init__(self, hands: Hands) -> None:
        super().__init__()
        self.hands = hands
        self.model = Model()
        self.leases: list[Lease] = []
        self.lingering: set[int] = set()
        self.keys: dict[str, list[int]] = {}
        self.revived: set[int] = set()
        self.seen: dict[int, Any] = {}
        self.open: Any = None  # the user's transaction, and what it will have done
        self.pending: tuple[str, list[int]] = ("", [])
        self.is_sound = False
        hands.empty()

    def do(self, what: Coroutine[Any, Any, T]) -> T:
        self.is_sound = False  # until the comparison
        return self.hands.do(what)

    # ------------------------------------------------------------------ comparing

    @invariant()
    def is_as_the_model_says(self) -> None:
        rows = {row["id"]: row for row in self.do(self.hands.store.pool.fetch(LOOK))}
        for task_id, row in rows.items():
            self.check_promises(row, rows, self.seen.get(task_id))
        assert {i: told(row) for i, row in rows.items()} == {
            job.id: expected(job, self.model) for job in self.model.jobs.values()
        }
        self.seen, self.revived = rows, set()
        self.is_sound = True

    def check_promises(self, row: Any, rows: dict[int, Any], before: Any) -> None:
        """What holds whatever the model says."""
        moves = [(State(a), State(b)) for a, b in row["moves"]]
        assert is_legal_history(moves), moves
        still_open = [each for each in row["attempts"] if each.endswith("open")]
        assert len(still_open) == (row["lease_id"] is not None), row
        assert len(row["attempts"]) == row["attempt"]
        if row["state"] == State.RUNNING or (row["lease_id"] is not None):
            for parent in self.model.jobs[row["id"]].parents:
                assert parent not in rows or rows[parent]["state"] == State.JOB_FINISHED
        if before is not None:
            assert row["attempt"] >= before["attempt"]
            assert row["moves"][: len(before["moves"])] == before["moves"]
            if before["state"] in FINAL and row["id"] not in self.revived:
                assert row["state"] == before["state"]
            if before["lease_id"] is not None and row["lease_id"] is not None:
                assert (row["lease_id"], row["attempt"]) == (before["lease_id"], before["attempt"])

    @rule(step=STEP)
    def step(self, step: tuple[str, dict[str, Any]]) -> None:
        """Do one thing. One rule for all: of many, most examples would do without most."""
        name, values = step
        getattr(self, name)(**values)

    # ------------------------------------------------------------------ users

    @initialize(batch=BATCH, more=BATCH, linger=st.booleans())
    def begin(self, batch: list[Any], more: list[Any], linger: bool) -> None:
        self.register(linger)
        self.register(False)
        self.submit(batch, None)
        self.submit(more, None)

    def submit(self, batch: list[Any], key: str | None) -> None:
        if len(self.model.jobs) >= MOST_TASKS:
            return
        # A parent that somebody has locked would be waited for.
        there = [i for i in self.model.jobs if i not in self.model.locked]
        new, parents = [], []
        for place, (values, numbers, waits, follows) in enumerate(batch):
            above: list[int | str] = list(choose(there, numbers))
            if follows and place:
                above.append(f"t{place - 1}")
            new.append(
                NewTask(
                    command=["true"],
                    name=f"t{place}",
                    parents=above,
                    wait_for_parents=waits,
                    **values,
                )
            )
            parents.append(above if waits else [])
        ids = self.do(self.hands.store.add(new, key=key))
        note(f"add(key={key}) -> {ids}")
        if key in self.keys:
            assert ids == self.keys[key]
            return
        if key is not None:
            self.keys[key] = ids
        assert not set(ids) & set(self.seen)
        # Parents have the lower ids.
        for task_id, (values, *_), above in sorted(zip(ids, batch, parents, strict=True)):
            known = tuple(ids[int(p[1:])] if isinstance(p, str) else p for p in above)
            self.model.add(Job(id=task_id, parents=known, **values))

    def kill(self, numbers: list[int]) -> None:
        ids = self.free(numbers)
        found = self.do(self.hands.store.kill(ids, reason="why not"))
        note(f"kill({ids}) -> {found}")
        assert found == self.model.kill(ids)

    def retry(self, numbers: list[int]) -> None:
        ids = self.free(numbers, first=tuple(RETRYABLE))
        found = self.do(self.hands.store.retry(ids))
        note(f"retry({ids}) -> {found}")
        assert found == self.model.retry(ids)
        self.revived = set(found)

    def remove(self, numbers: list[int]) -> None:
        ids = self.free(numbers, first=tuple(FINAL))
        found = self.do(self.hands.store.remove(ids))
        note(f"remove({ids}) -> {found}")
        assert found == self.model.remove(ids)

    def modify(self, numbers: list[int], changes: dict[str, Any]) -> None:
        for task_id in self.free(numbers):
            note(f"modify({task_id}, {changes})")
            job = self.model.jobs.get(task_id)
            wanted = self.hands.store.modify(task_id, Changes(**changes))
            if job is None:
                with pytest.raises(NotFoundError):
                    self.do(wanted)
            elif job.lease is not None:
                with pytest.raises(IllegalMoveError, match=f"held by lease {job.lease}"):
                    self.do(wanted)
            else:
                self.do(wanted)
                for name, value in changes.items():
                    setattr(job, name, value)

    def free(self, numbers: list[int], first: tuple[State, ...] = ()) -> list[int]:
        """Choose tasks, and one that is not there, whose change waits for nobody."""
        ids = sorted(self.model.jobs, key=lambda i: self.model.jobs[i].state not in first)
        chosen = choose([*ids, 999], numbers)
        return [] if self.model.is_entangled(chosen) else chosen

    # ------------------------------------------------------------------ somebody's open transaction

    def transact(self, numbers: list[int], what: str, is_near: bool, commits: bool) -> None:
        if self.open is not None:
            self.let_go(commits)
        elif self.model.jobs:
            held = {job.id for job in self.model.jobs.values() if job.lease is not None}
            near = held.union(*(self.model.below(i) for i in held))
            self.hold(choose(sorted(near if is_near and near else self.model.jobs), numbers), what)

    def hold(self, ids: list[int], what: str) -> None:
        note(f"hold({ids}, {what})")
        self.do(self.begin_transaction(ids, what))
        self.pending = (what, ids)
        self.model.locked = set(ids)
        if what == "kill":
            alive = {i for i in ids if self.model.jobs[i].state not in FINAL}
            self.pending = (what, sorted(alive))  # what is final now is not killed then
            below = set().union(*(self.doomed_below(i) for i in alive))
            self.model.locked = alive | below

    def doomed_below(self, task_id: int) -> set[int]:
        """What fails when this one is killed."""
        found: set[int] = set()
        for child in self.model.children(task_id):
            if child.state is State.AWAITING_PARENTS:
                found |= {child.id} | self.doomed_below(child.id)
        return found

    async def begin_transaction(self, ids: list[int], what: str) -> None:
        psql = self.hands.psql
        self.open = psql.transaction()
        await self.open.start()
        if what == "look":
            await psql.execute("SELECT FROM task WHERE id = ANY ($1) FOR UPDATE", ids)
        elif what == "touch":
            await psql.execute("UPDATE task SET priority = priority + 1 WHERE id = ANY ($1)", ids)
        else:
            await psql.fetch("SELECT * FROM kill_tasks($1, 'by psql')", ids)

    def let_go(self, commits: bool) -> None:
        note(f"let_go({'commit' if commits else 'rollback'})")
        self.do(self.open.commit() if commits else self.open.rollback())
        what, ids = self.pending
        self.open, self.model.locked = None, set()
        if commits and what == "kill":
            self.model.kill(ids)
        elif commits and what == "touch":
            for task_id in ids:
                self.model.jobs[task_id].priority += 1

    # ------------------------------------------------------------------ launchers

    def register(self, linger: bool) -> None:
        if len(self.live()) == MOST_LEASES:
            return
        lease = self.do(self.hands.desk.register(linger_s=3600.0 if linger else 0.0))
        note(f"register(linger={linger}) -> {lease.id}")
        assert lease.id not in self.model.leases
        self.model.leases[lease.id] = "ACTIVE"
        if linger:
            self.lingering.add(lease.id)
        self.leases.append(lease)

    def live(self) -> list[Lease]:
        return [lease for lease in self.leases if self.is_live(lease)]

    def is_live(self, lease: Lease) -> bool:
        return self.model.leases[lease.id] == "ACTIVE"

    def lease(self, number: int) -> Lease:
        """Choose a lease: any for the highest number, else one that lives if there is one."""
        live = self.live() if number < MOST_LEASES else []
        return (live or self.leases)[number % len(live or self.leases)]

    def holder(self, number: int) -> Lease:
        """Choose a lease that holds something; where none does, let one begin what can be begun."""
        if not any(job.lease for job in self.model.jobs.values()):
            self.begin_all(number)
        holders = [lease for lease in self.leases if self.model.held(lease.id)] or self.leases
        return holders[number % len(holders)]

    def begin_all(self, number: int) -> None:
        lease = self.lease(number)
        self.claim(number, {"nodes": 6, "left_s": None, "ahead": 1, "workflows": None, "most": 2})
        fresh = [job for job in self.model.held(lease.id) if not job.tries[-1].is_started]
        self.report_starts(lease, [(job.id, len(job.tries)) for job in fresh])

    def start(self, number: int, numbers: list[int]) -> None:
        lease = self.holder(number)
        self.report_starts(lease, choose(self.pairs_of(lease), numbers))

    def finish(
        self, number: int, numbers: list[int], endings: tuple[str, str], with_start: bool
    ) -> None:
        lease = self.holder(number)
        self.report_ends(lease, choose(self.pairs_of(lease), numbers), endings, with_start)

    def time_out(self, number: int, numbers: list[int]) -> None:
        lease = self.holder(number)
        self.report_time_outs(lease, choose(self.pairs_of(lease), numbers))

    def claim(self, number: int, room: dict[str, Any]) -> None:
        lease = self.lease(number)
        nodes, ahead, most = room["nodes"], room["ahead"], room["most"]
        left_s, workflows = room["left_s"], room["workflows"]
        asked = Room(nodes=nodes, left_s=left_s, max_tasks=most, ahead=ahead)
        found = self.claim_with(lease, asked, workflows)
        if found is None:
            return
        within = None if workflows is None else set(workflows)
        wanted = self.model.choose(nodes, ahead, left_s, most, within)
        assert [claim.id for claim in found] == [job.id for job in wanted]
        self.take(lease, found)

    def claim_serial(self, number: int, room: dict[str, Any]) -> None:
        lease = self.lease(number)
        halves, ahead, most = divmod(room["nodes"], 3), room["ahead"], room["most"]
        left_s, workflows = room["left_s"], room["workflows"]
        free = tuple(vacancy(half) for half in halves if half)
        room = SlotRoom(free=free, whole=(vacancy(2),), left_s=left_s, max_tasks=most, ahead=ahead)
        found = self.claim_with(lease, room, workflows)
        if found is None:
            return
        can = [
            job
            for job in self.model.claimable()
            if job.is_serial
            and job.fits(left_s)
            and (workflows is None or job.workflow in workflows)
        ]
        taken = [self.model.jobs[claim.id] for claim in found]
        assert [job for job in can if job in taken] == taken, "not theirs, or not in order"
        assert len(taken) <= most
        assert sum(2 // job.node_packing_count for job in taken) <= sum(halves) + 2 * ahead
        for job in taken:  # of what needs the same, the first ones
            alike = [o for o in can if o.node_packing_count == job.node_packing_count]
            assert all(o in taken for o in alike[: alike.index(job)] if o.workflow == job.workflow)
        first_fits = any(2 // job.node_packing_count <= max(halves) for job in can)
        if first_fits or (can and ahead):
            assert taken, "there is a place, and nothing was taken"
        self.take(lease, found)

    def claim_with(self, lease: Lease, room: Any, workflows: Any) -> list[Claim] | None:
        ids = self.do(self.workflow_ids(workflows))
        if not self.is_live(lease):
            with pytest.raises(LeaseLostError):
                self.do(lease.claim(room, ids))
            return None
        found = self.do(lease.claim(room, ids))
        note(
            f"lease {lease.id}: claim({room}, {workflows}) -> {[(c.id, c.attempt) for c in found]}"
        )
        return found

    async def workflow_ids(self, names: tuple[str, ...] | None) -> list[int] | None:
        if names is None:
            return None
        return [i for name in names for i in await self.hands.store.workflow_ids(name) or []]

    def take(self, lease: Lease, claims: list[Claim]) -> None:
        for claim in claims:
            self.model.claim(self.model.jobs[claim.id], lease.id)
            assert claim.attempt == len(self.model.jobs[claim.id].tries)

    # A report is about attempts of the lease's own, or about any that ever were, and some that never were.

    def pairs_of(self, lease: Lease) -> list[tuple[int, int]]:
        return [(job.id, len(job.tries)) for job in self.model.held(lease.id)]

    def stray_pairs(self, numbers: list[int]) -> list[Any]:
        known = [
            (job.id, attempt)
            for job in self.model.jobs.values()
            for attempt in range(len(job.tries) + 2)
        ]
        gone = [(i, 1) for i in self.seen if i not in self.model.jobs]
        # One attempt of a task in a report, as launchers have it.
        return list(dict(choose([*known[::-1], *gone, (999, 1)], numbers)).items())

    def report_strays(
        self,
        number: int,
        is_holder: bool,
        numbers: list[int],
        what: str,
        endings: tuple[str, str],
    ) -> None:
        lease = self.holder(number) if is_holder else self.lease(number)
        pairs = self.stray_pairs(numbers)
        if what == "start":
            self.report_starts(lease, pairs)
        elif what == "time out":
            self.report_time_outs(lease, pairs)
        else:
            self.report_ends(lease, pairs, endings, False)

    def report_starts(self, lease: Lease, pairs: list[Any]) -> None:
        starts = [Start(id=i, attempt=a, at=self.hands.desk.soon) for i, a in pairs]
        found = self.do(lease.start(starts))
        note(f"lease {lease.id}: start({pairs}) -> {verdicts(found)}")
        assert set(found) == set(pairs)
        for pair in pairs:
            assert found[pair] in self.model.judge(lease.id, *pair)
        for task_id, _ in (pair for pair in pairs if found[pair] is Verdict.APPLIED):
            self.model.start(task_id)

    def report_ends(
        self, lease: Lease, pairs: list[Any], endings: tuple[str, str], with_start: bool
    ) -> None:
        ways = {}
        for place, pair in enumerate(pairs):
            job, way = self.model.jobs.get(pair[0]), endings[place % 2]
            # Launchers report as killed only what somebody has killed.
            is_killed = job is not None and job.state is State.USER_KILLED
            ways[pair] = "signal" if way == "killed" and not is_killed else way
        at = self.hands.desk.soon if with_start else None
        ends = [
            End(id=i, attempt=a, outcome=ENDINGS[way][0], cause=ENDINGS[way][1], started_at=at)
            for (i, a), way in ways.items()
        ]
        found = self.do(lease.finish(ends))
        note(f"lease {lease.id}: finish({ways}) -> {verdicts(found)}")
        assert set(found) == set(pairs)
        for pair in pairs:
            assert found[pair] in self.model.judge(lease.id, *pair, ways[pair])
        before = {i: self.model.jobs[i].state for i in self.model.locked}
        for pair in (pair for pair in pairs if found[pair] is Verdict.APPLIED):
            self.model.finish(pair[0], ways[pair])
        assert before == {i: self.model.jobs[i].state for i in self.model.locked}, (
            "applied, though what it changes is locked"
        )

    def report_time_outs(self, lease: Lease, pairs: list[Any]) -> None:
        found = self.do(lease.time_out(pairs))
        note(f"lease {lease.id}: time_out({pairs}) -> {found}")
        jobs = self.model.jobs
        current = {i for i, attempt in pairs if i in jobs and len(jobs[i].tries) == attempt}
        assert found == self.model.cut_off(lease.id, Cause.TIME_LIMIT, current)

    def drain(self, number: int) -> None:
        lease = self.holder(number)
        found = self.do(lease.drain("the allocation ends"))
        note(f"lease {lease.id}: drain() -> {found}")
        everything = set(self.model.jobs)
        assert found == self.model.cut_off(lease.id, Cause.ALLOCATION_ENDED, everything)

    def compare_holds(self, number: int) -> None:
        lease = self.holder(number)
        held = {(job.id, len(job.tries)): job.state for job in self.model.held(lease.id)}
        assert self.do(lease.held()) == held
        runs = RUNNABLE | {State.RUNNING}
        assert self.do(lease.doomed()) == {p for p, state in held.items() if state not in runs}

    def renew(self, number: int) -> None:
        lease = self.lease(number)
        note(f"lease {lease.id}: renew()")
        if self.is_live(lease):
            self.do(self.hands.desk.sql("UPDATE lease SET ttl = '1 hour' WHERE id = $1", lease.id))
            self.do(lease.renew())
        else:
            with pytest.raises(LeaseLostError):
                self.do(lease.renew())

    # ------------------------------------------------------------------ reapers

    def end_lease(self, number: int, how: str, releases: bool) -> None:
        if not self.live():
            return
        lease = self.lease(number)
        note(f"lease {lease.id}: {how}")
        {"close": self.close, "expire": self.expire, "bury": self.bury}[how](lease)
        rows = self.do(self.hands.store.pool.fetch("SELECT id, state, swept FROM lease"))
        assert {row["id"]: row["state"] for row in rows} == self.model.leases
        for row in rows:
            assert not (row["swept"] and self.model.held(row["id"]))
        if releases:
            self.release()

    def close(self, lease: Lease) -> None:
        self.do(lease.close("no work is left"))
        if self.is_live(lease):
            self.model.leases[lease.id] = "RELEASED"
        self.check_released({lease.id})

    def expire(self, lease: Lease) -> None:
        self.do(
            self.hands.desk.sql(
                "UPDATE lease SET ttl = '1 ms', renewed_at = now() - interval '1 day',"
                " expires_at = now() - interval '1 day' WHERE id = $1",
                lease.id,
            )
        )
        assert self.do(self.hands.reaping.expire()) == [lease.id] * self.is_live(lease)
        if self.is_live(lease):
            self.model.leases[lease.id] = "EXPIRED"

    def bury(self, lease: Lease) -> None:
        closes = self.is_live(lease) and lease.id not in self.lingering
        found = self.do(self.hands.reaping.bury(lease.id, state="EXPIRED", evidence="gone"))
        assert found == closes
        if closes:
            self.model.leases[lease.id] = "EXPIRED"
        assert self.do(self.hands.reaping.expire()) == []  # one that lingers is not silent yet

    def release(self) -> None:
        before = sum(job.lease is not None for job in self.model.jobs.values())
        found = self.do(self.hands.reaping.release())
        note(f"release() -> {found}")
        self.check_released({i for i, state in self.model.leases.items() if state != "ACTIVE"})
        assert found == before - sum(job.lease is not None for job in self.model.jobs.values())

    def check_released(self, closed: set[int]) -> None:
        """What a closed lease held is free, unless somebody has it or something below it locked."""
        rows = self.do(self.hands.store.pool.fetch("SELECT id, lease_id FROM task"))
        still = {row["id"]: row["lease_id"] for row in rows}
        before = {i: self.model.jobs[i].state for i in self.model.locked}
        for job in [j for j in self.model.jobs.values() if j.lease in closed]:
            if job.id in self.model.locked:
                assert still[job.id] == job.lease
            elif still[job.id] is None:
                self.model.release(job)
            else:
                assert self.model.is_in_the_way(
                    job.id, lambda model, i=job.id: model.release(model.jobs[i])
                ), f"{job.id} is still held"
        assert before == {i: self.model.jobs[i].state for i in self.model.locked}

    # ------------------------------------------------------------------ the end

    def teardown(self) -> None:
        if not self.is_sound:
            if self.open is not None:
                self.hands.do(self.open.rollback())
            return
        if self.open is not None:
            self.let_go(False)
        while self.live():
            self.close(self.live()[0])
        self.release()
        self.is_as_the_model_says()
        assert self.do(self.hands.desk.sql("SELECT bool_and(swept) FROM lease"))
        assert self.do(self.hands.store.check()) == []
        self.run_out()
        assert self.do(self.hands.store.check()) == []

    def run_out(self) -> None:
        """Whatever can move, does; then nothing is left that has not ended."""
        self.register(False)
        lease = self.leases[-1]
        while found := self.claim_with(lease, Room(nodes=99, left_s=None, max_tasks=99), None):
            assert [c.id for c in found] == [j.id for j in self.model.choose(99, 0, None, 99, None)]
            self.take(lease, found)
            self.report_ends(lease, [(c.id, c.attempt) for c in found], ("well", "well"), True)
            self.is_as_the_model_says()
        states = self.do(self.hands.store.task_states(Selector()))
        assert set(states.values()) <= FINAL


def vacancy(halves: int) -> Vacancy:
    """A node of which so many halves are free."""
    return Vacancy(
        nodes=1, share=Fraction(halves, 2), cores=halves, all_cores=2, gpus=0, memory_mb=None
    )


def verdicts(found: Any) -> dict[Any, str]:
    return {pair: str(verdict) for pair, verdict in found.items()}


def told(row: asyncpg.Record) -> dict[str, Any]:
    """A task as the store has it, and its history."""
    return {
        "state": row["state"],
        "lease": row["lease_id"],
        "counters": (row["failures"], row["timeouts"], row["losses"], row["pending_parents"]),
        "cause": row["cause"] if row["state"] in FINAL else None,
        "moves": [tuple(move) for move in row["moves"]],
        "attempts": row["attempts"],
    }


def expected(job: Job, model: Model) -> dict[str, Any]:
    """The same, as the model has it."""
    return {
        "state": job.state,
        "lease": job.lease,
        "counters": (job.failures, job.timeouts, job.losses, model.pending(job)),
        "cause": job.cause if job.state in FINAL else None,
        "moves": job.moves,
        "attempts": [
            f"{number} lease {one.lease} {one.outcome or 'open'}"
            for number, one in enumerate(job.tries, 1)
        ],
    }


def run_machine(hands: Hands, **more: Any) -> None:
    """Run so many examples of so many steps."""
    run_state_machine_as_test(
        lambda: StoreMachine(hands),
        settings=settings(
            deadline=None, suppress_health_check=list(HealthCheck), database=None, **more
        ),
    )


@pytest.fixture
def hands(site: Site) -> Iterator[Hands]:
    found = Hands(site)
    yield found
    found.close()


@pytest.mark.timeout(600 + 60 * LONG_RUN_MINUTES)
def test_the_store_does_what_the_model_says_in_any_order(hands):
    run_machine(hands, max_examples=50, stateful_step_count=40, derandomize=True)
    deadline = time.monotonic() + 60 * LONG_RUN_MINUTES
    while time.monotonic() < deadline:
        run_machine(hands, max_examples=100, stateful_step_count=60)
