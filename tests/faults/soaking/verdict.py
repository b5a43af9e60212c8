"""What must hold when all is over: the books, the witnesses, the logs, and nothing left."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from ensemble.core.store import Store
from tests.faults.soaking.ground import Ground

#: So many of what breaks one promise are named.
_NAMED = 5
#: Plain SQL, each over whole tables once; shares nothing with `ensemble db check`.
PROMISES = {
    "is not over": """
        SELECT id FROM task WHERE state NOT IN ('JOB_FINISHED', 'FAILED', 'USER_KILLED')
           OR lease_id IS NOT NULL
    """,
    "has not one successful attempt and is finished, or has one and is not": """
        SELECT id FROM task t
          LEFT JOIN (SELECT task_id, count(*) AS done FROM attempt WHERE outcome = 'done' GROUP BY 1) a
            ON a.task_id = t.id
         WHERE coalesce(done, 0) <> (state = 'JOB_FINISHED')::int
    """,
    "has attempts that overlap, or one that has no end": """
        SELECT DISTINCT task_id AS id FROM (
          SELECT task_id, claimed_at, ended_at,
                 lag(ended_at) OVER (PARTITION BY task_id ORDER BY attempt) AS before FROM attempt) a
         WHERE ended_at IS NULL OR claimed_at < before
    """,
    "has attempts that end before they start": """
        SELECT DISTINCT task_id AS id FROM attempt
         WHERE ended_at < started_at - interval '0.1 s' OR started_at < claimed_at - interval '5 s'
    """,
    "has attempts with a wrong number": """
        SELECT t.id FROM task t
          LEFT JOIN (SELECT task_id, count(*) AS many, max(attempt) AS last FROM attempt GROUP BY 1) a
            ON a.task_id = t.id
         WHERE coalesce(many, 0) <> t.attempt OR coalesce(last, 0) <> t.attempt
    """,
    "has a history with a gap": """
        SELECT DISTINCT task_id AS id FROM (
          SELECT task_id, from_state,
                 lag(to_state, 1, 'CREATED') OVER (PARTITION BY task_id ORDER BY id) AS before FROM event) e
         WHERE from_state <> before
    """,
    "is a history of no task": """
        SELECT e.task_id AS id FROM event e LEFT JOIN task t ON t.id = e.task_id WHERE t.id IS NULL
    """,
    "is a lease that is not closed and swept": """
        SELECT id FROM lease WHERE state = 'ACTIVE' OR NOT swept
    """,
    "is a batch job that is not over": """
        SELECT id FROM batch_job WHERE state IN ('NEW', 'SUBMITTED', 'QUEUED', 'RUNNING')
    """,
}


async def judge(
    ground: Ground, store: Store, ids: Collection[int], removals: Collection[int]
) -> list[str]:
    """Return what is wrong.

    Args:
        ids: Of all tasks that were added.
        removals: Of those that somebody asked to have removed.
    """
    wrong = [
        f"db check: {problem.check}: {problem.task_id} {problem.problem}"
        for problem in (await store.check())[: 4 * _NAMED]
    ]
    for promise, query in PROMISES.items():
        rows = await store.pool.fetch(query, timeout=600)
        if rows:
            named = ", ".join(str(row["id"]) for row in rows[:_NAMED])
            wrong.append(f"{len(rows)} x {promise}: {named}")
    wrong += await _books(store, ids, removals)
    wrong += [f"left: {each.pid} {each.role}: {each.words[:200]}" for each in ground.workers()]
    wrong += _files(ground)
    wrong += _logs(ground)
    return wrong


async def _books(store: Store, ids: Collection[int], removals: Collection[int]) -> Iterator[str]:
    found = {row["id"] for row in await store.pool.fetch("SELECT id FROM task", timeout=600)}
    added = set(ids)
    wrong = []
    if len(added) != len(ids):
        wrong.append(f"{len(ids) - len(added)} ids were given twice")
    if lost := added - found - set(removals):
        wrong.append(f"{len(lost)} tasks are gone that nobody removed: {sorted(lost)[:_NAMED]}")
    if strange := found - added:
        wrong.append(
            f"{len(strange)} tasks are there that we did not add: {sorted(strange)[:_NAMED]}"
        )
    return iter(wrong)


def _files(ground: Ground) -> Iterator[str]:
    log = ground.path / "log"
    for pattern in ("**/link*.json", "spool/*", "launcher-*/*"):
        found = (path for path in log.glob(pattern) if path.suffix != ".log")
        yield from (f"left: {path}" for path in sorted(found)[:_NAMED])
    data = (ground.path / "data").resolve()
    for path in sorted(data.glob("**/overlap"))[:_NAMED]:
        yield f"attempts {path.read_text().split()} met an older one alive: {path.parent}"
    for path in data.glob("**/witness"):
        begun = [line.split()[0] for line in path.read_text().splitlines() if "begun" in line]
        if begun != sorted(set(begun), key=int):
            yield f"attempts began twice or out of order, {begun}: {path.parent}"


def _logs(ground: Ground) -> Iterator[str]:
    """Find what no fault is a reason for."""
    for path in sorted((ground.path / "log").glob("**/*")):
        if path.is_file() and path.suffix in (".log", ".out", ".txt", ".err"):
            text = path.read_text(errors="replace")
            if found := re.search(r"Traceback .*?\n(\w[^\n]*)", text, re.DOTALL):
                yield f"a traceback in {path.name}: {found[1][:200]}"
