"""What every fault test ends with: witnesses of its own besides the books.

Each task holds a lock on a file in its work directory for as long as any process of it lives, and the
next attempt that finds it taken leaves a file that says so. The histories are read with plain SQL that
shares nothing with `ensemble db check`, which is asked as well.
"""

from __future__ import annotations

from typing import Any

from ensemble.core.model import NewTask
from tests.integration.launching import Ensemble, sh

_FINAL = ("JOB_FINISHED", "FAILED", "USER_KILLED")

#: Descriptor 8 is inherited by whatever the task starts, so the lock tells of descendants, too.
_TAKE = """
exec 8>>lock
flock -n -E 75 8; [ $? != 75 ] || { echo "$ENSEMBLE_ATTEMPT" >> overlap; exit 99; }
echo "$ENSEMBLE_ATTEMPT begun" >> witness
"""
_TELL = """
echo "$ENSEMBLE_ATTEMPT ended" >> witness
"""


def witnessed(script: str = "", *args: str, **fields: Any) -> NewTask:
    """Make a task that runs a shell script while it holds its work directory's lock.

    The script may exit by itself; else the task exits with 0, and has said so in `witness`.
    """
    return sh(f"{_TAKE}{script}\n{_TELL}", *args, **{"name": "witnessed", **fields})


async def check(ens: Ensemble, *, is_over: bool = True) -> None:
    """Assert that no attempts overlapped, that the books are right and that nothing was left.

    Args:
        is_over: Every task is expected to be in a final state, and no launcher to be left.
    """
    problems = [
        f"{task.id}: {each}" for task in await ens.tasks() for each in _seen(ens, task.workdir)
    ]
    assert problems == []
    assert await ens.store.check() == []
    assert await _contradictions(ens) == {}
    if is_over:
        rows = await ens.store.pool.fetch(
            "SELECT id, state, lease_id FROM task WHERE state <> ALL ($1) OR lease_id IS NOT NULL",
            list(_FINAL),
        )
        assert rows == [], "tasks are not over"
        assert ens.processes() == [], "processes of tasks are left"
        assert list((ens.site.path / "log").glob("**/link*.json")) == [], "keys are left"
        assert list((ens.site.path / "log" / "spool").glob("*")) == [], "a spool is left"


def _seen(ens: Ensemble, workdir: str) -> list[str]:
    """Return what a task's witnesses say that should not be."""
    folder = ens.site.path / workdir
    found = []
    if (folder / "overlap").exists():
        found.append(f"attempts {(folder / 'overlap').read_text().split()} met an older one alive")
    if (folder / "witness").exists():
        lines = (folder / "witness").read_text().splitlines()
        begun = [line.split()[0] for line in lines if line.endswith("begun")]
        if len(begun) != len(set(begun)):
            found.append(f"an attempt began twice: {lines}")
        if begun != sorted(begun, key=int):
            found.append(f"attempts began out of order: {lines}")
    return found


async def _contradictions(ens: Ensemble) -> dict[str, list[int]]:
    """Read the history with plain SQL; return the tasks that contradict each promise."""
    found = {}
    for name, query in _PROMISES.items():
        if rows := await ens.store.pool.fetch(query):
            found[name] = [row["id"] for row in rows]
    return found


_PROMISES = {
    "a finished task has one successful attempt": """
        SELECT id FROM task t WHERE state = 'JOB_FINISHED'
           AND (SELECT count(*) FROM attempt a WHERE a.task_id = t.id AND a.outcome = 'done') <> 1
    """,
    "no attempt is claimed before the one before it has ended": """
        SELECT DISTINCT a.task_id AS id FROM attempt a
          JOIN attempt b ON b.task_id = a.task_id AND b.attempt = a.attempt + 1
         WHERE a.ended_at IS NULL OR b.claimed_at < a.ended_at
    """,
    "an attempt starts after its claim and ends after its start": """
        SELECT DISTINCT task_id AS id FROM attempt
         WHERE started_at < claimed_at - interval '5 s' OR ended_at < started_at
    """,
    "attempts are numbered from 1 without a gap": """
        SELECT t.id FROM task t LEFT JOIN attempt a ON a.task_id = t.id
         GROUP BY t.id HAVING count(a.*) <> t.attempt OR coalesce(max(a.attempt), 0) <> t.attempt
    """,
    "each move begins where the last one ended": """
        SELECT DISTINCT e.task_id AS id FROM event e
         WHERE e.from_state <> coalesce(
           (SELECT p.to_state FROM event p WHERE p.task_id = e.task_id AND p.id < e.id
             ORDER BY p.id DESC LIMIT 1), 'CREATED')
    """,
    "what runs is held by a lease that is not swept": """
        SELECT t.id FROM task t LEFT JOIN lease l ON l.id = t.lease_id
         WHERE t.state = 'RUNNING' AND (l.id IS NULL OR l.swept)
    """,
}
