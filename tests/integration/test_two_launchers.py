"""Several launchers at once share the work, and every task runs once at a time."""

from __future__ import annotations

import signal

from ensemble.core.model import Outcome
from ensemble.core.states import State
from tests.integration.launching import WHEEL, Ensemble, sh

pytestmark = WHEEL

#: O_EXCL (set -C) shows a second run of one task at the same time, or of one attempt at any time.
ONCE = """
[ "${PMI_RANK:-0}" = 0 ] || exit 0  # one rank of two will do
set -C
trap 'rm -f lock; exit 98' TERM
: > lock || exit 99
: > attempt-$ENSEMBLE_ATTEMPT || exit 99
sleep $1
echo $ENSEMBLE_ATTEMPT >> finished
rm lock
"""


async def test_two_launchers_share_200_tasks_and_each_runs_once(ens: Ensemble) -> None:
    ids = await ens.store.add(
        [sh(ONCE, "0.02", name="t", num_nodes=1 + (n % 10 == 0)) for n in range(188)]
        + [sh(ONCE, "600", name="long", priority=1) for _ in range(4)]
        + [sh(ONCE, "0.02", name="last", priority=-1) for _ in range(8)]
    )
    long = ids[188:192]
    launchers = [ens.launch("--persistent", nodes=4) for _ in range(2)]
    await ens.reach(State.RUNNING, *long)

    async def done(number: int) -> bool:
        return (await ens.states()).count(State.JOB_FINISHED) >= number

    await ens.eventually(lambda: done(30))
    await ens.store.kill(long[:2])
    killed = ids[150:170]  # some wait, some are claimed, some run or have run
    await ens.store.kill(killed)
    await ens.eventually(lambda: done(100))
    for launched in launchers:
        launched.signal(signal.SIGTERM)
    assert [await ens.leave(each) for each in launchers] == [0, 0]
    assert (await ens.store.counts()).held == {}
    states = dict(zip(ids, await ens.states(), strict=True))
    assert State.RUNNING not in states.values()
    assert {states[id] for id in long[2:]} == {State.RESTART_READY}
    shares = [int(each.summary.split(" done=")[1].split()[0]) for each in launchers]
    assert min(shares) > 10, "one launcher did all the work"

    await ens.store.kill(long[2:])
    launched = ens.launch("--idle-timeout=0", nodes=4)
    assert await ens.leave(launched) == 0
    for task in await ens.tasks():
        assert task.state in {State.JOB_FINISHED, State.USER_KILLED}, task
        finished = ens.workdir(task) / "finished"
        attempts = (await ens.store.detail(task.id)).attempts
        assert "99" not in {str(a.exit_code) for a in attempts}, ens.output(task)
        if task.state is State.JOB_FINISHED:
            (good,) = [a.attempt for a in attempts if a.outcome is Outcome.DONE]
            others = set(finished.read_text().split()) - {str(good)}
            # A run that the drain hit in its last moment may have done its work: it is not believed.
            cut_off = {str(a.attempt) for a in attempts if a.outcome is Outcome.TIMEOUT}
            assert others <= cut_off, "it ran twice"
        else:
            assert task.id in {*long, *killed}


async def test_a_launcher_takes_what_another_gives_back(ens: Ensemble) -> None:
    (task_id,) = await ens.store.add([sh("test $ENSEMBLE_ATTEMPT = 2 || sleep 600")])
    first = ens.launch("--persistent", nodes=1)
    await ens.reach(State.RUNNING, task_id)
    second = ens.launch("--persistent", nodes=1, LAUNCHER_POLL_S=600)
    await ens.leased(second)
    first.signal(signal.SIGTERM)
    assert await ens.leave(first) == 0
    await ens.reach(State.JOB_FINISHED, task_id, within_s=30)
    second.signal(signal.SIGTERM)
    assert await ens.leave(second) == 0


async def test_work_claimed_ahead_is_not_hoarded(ens: Ensemble) -> None:
    # Short tasks make a launcher claim ahead; then all its nodes are taken by long ones.
    await ens.store.add([sh("true") for _ in range(40)])
    hoarder = ens.launch("--persistent", nodes=1, LAUNCHER_POLL_S=60)
    await ens.reach(State.JOB_FINISHED)
    await ens.store.add([sh("sleep 600", priority=1)] + [sh("true") for _ in range(10)])
    await ens.eventually(lambda: ens.processes())
    other = ens.launch("--idle-timeout=5", nodes=1, LAUNCHER_POLL_S=60)

    async def all_but_one() -> bool:
        return (await ens.states()).count(State.JOB_FINISHED) == 50

    await ens.eventually(all_but_one)
    for launched in (hoarder, other):
        launched.signal(signal.SIGTERM)
        assert await ens.leave(launched) == 0
