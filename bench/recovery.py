"""Recovery: from the SIGKILL of a launcher to the first of its tasks being claimed by another that waits."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from bench.memory import role_of, tree
from bench.scratch import BenchError, opened, scratch_site
from ensemble.core.model import NewTask
from ensemble.core.store import Store
from ensemble.site import Site

ROUNDS = 5
TASKS = 4
LEASE_S = 2.0
#: A process name space of its own stands for another host: nobody here can tell whether the launcher lives,
#: and the death of its first process is the death of all.
ELSEWHERE = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc")
QUICK = {"ENSEMBLE_LAUNCHER_LEASE_TTL_S": str(LEASE_S), "ENSEMBLE_LAUNCHER_HEARTBEAT_S": "0.3"}
#: So that its trust lasts: it ends what runs a grace and a bit before its lease does.
QUICK["ENSEMBLE_LAUNCHER_GRACE_S"] = "0.1"


async def run() -> dict[str, object]:
    cases: dict[str, Callable[[], Awaitable[list[float]]]] = {
        "guard alive, mpi mode": lambda: measure("mpi", kill_launcher),
        "guard alive, serial mode": lambda: measure("serial", kill_launcher),
        f"both killed, lease {LEASE_S:g} s": lambda: measure("serial", kill_both, **QUICK),
    }
    if can_be_elsewhere():
        cases[f"no evidence, lease {LEASE_S:g} s"] = lambda: measure(
            "mpi", kill_both, *ELSEWHERE, **QUICK
        )
    took = {name: await case() for name, case in cases.items()}
    if len(took) < 4:
        took_text = "; no evidence: NOT MEASURED, no process name space to be had"
    else:
        took_text = ""
    return {
        "what": f"recovery: SIGKILL of a launcher to the first claim by another, {ROUNDS} each, the worst",
        "bar": f"guard alive <= 2 s; both killed <= lease + 1 s = {LEASE_S + 1:g} s",
        "measured": "; ".join(
            f"{name}: median {statistics.median(times):.2f} s, worst {max(times):.2f} s"
            for name, times in took.items()
        )
        + took_text,
        "detail": took,
    }


async def measure(
    mode: str, kill: Callable[[int], None], *prefix: str, **environ: str
) -> list[float]:
    """Let one launcher run tasks while another waits; kill the first; that many times."""
    times = []
    async with scratch_site() as site, opened(site) as store:
        task = NewTask(command=["sleep", "1000"], node_packing_count=2, max_losses=1000)
        await store.add([task] * TASKS)
        with contextlib.ExitStack() as launchers:
            here = launchers.enter_context(started(site, mode, *prefix, **environ))
            await running(store, 0)
            for _ in range(ROUNDS):
                other = launchers.enter_context(started(site, mode, *prefix, **environ))
                await ready(store, 2)
                ((last,),) = await store.pool.fetch("SELECT max(lease_id) FROM task")
                began = time.time()
                kill(here.pid)
                times.append(await running(store, last) - began)
                here.wait(30)
                here = other
    return times


@contextlib.contextmanager
def started(
    site: Site, mode: str, *prefix: str, **environ: str
) -> Iterator[subprocess.Popen[bytes]]:
    argv = [*prefix, sys.executable, "-m", "ensemble", "--site", str(site.path), "launch"]
    argv += [f"--job-mode={mode}", "--nodes=4", "--persistent"]
    log = (site.path / "log" / "bench.log").open("ab")
    with log, subprocess.Popen(argv, env=os.environ | environ, stdout=log, stderr=log) as process:
        try:
            yield process
        finally:
            for pid in reversed(tree(process.pid)):  # unshare heeds no TERM
                if role_of(pid) == "launcher":
                    os.kill(pid, signal.SIGTERM)


async def ready(store: Store, count: int) -> None:
    """Wait until so many launchers are there, and those of serial mode can run tasks."""
    async with asyncio.timeout(60):
        while len(await store.launchers()) < count:
            await asyncio.sleep(0.02)
    await asyncio.sleep(2)  # what comes up takes the processors


async def running(store: Store, lease: int) -> float:
    """Wait until all tasks run under a younger lease; return when the first of them was claimed."""
    async with asyncio.timeout(60):
        while True:
            ((count, first),) = await store.pool.fetch(
                "SELECT count(*) FILTER (WHERE t.state = 'RUNNING'),"
                " extract(epoch FROM min(a.claimed_at))::float"
                " FROM task t JOIN attempt a ON a.task_id = t.id AND a.attempt = t.attempt"
                " WHERE t.lease_id > $1",
                lease,
            )
            if count == TASKS:
                return float(first)
            await asyncio.sleep(0.02)


def kill_launcher(root: int) -> None:
    os.kill(process_of("launcher", root), signal.SIGKILL)


def kill_both(root: int) -> None:
    pids = [process_of("guard of launcher", root), process_of("launcher", root)]
    for pid in pids:
        with contextlib.suppress(
            ProcessLookupError
        ):  # in a name space, the first takes the other along
            os.kill(pid, signal.SIGKILL)


def process_of(role: str, root: int) -> int:
    found = [pid for pid in tree(root) if role_of(pid) == role]
    if not found:
        raise BenchError(f"there is no {role} below process {root}")
    return found[0]


def can_be_elsewhere() -> bool:
    if not Path("/usr/bin/unshare").exists():
        return False
    return subprocess.run([*ELSEWHERE, "true"], capture_output=True).returncode == 0
