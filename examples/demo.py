"""The demonstration behind `make demo`: a real ensemble on four virtual nodes of this machine.

It makes a site with a database of its own, registers three apps, and adds

- a sweep of the 2-D Ising model (ising.py) over temperature, two random seeds each,
- MPI programs that are not Ensemble's: two of mpi4py's benchmarks on 1 and on 2 nodes,
- one task that waits for the whole sweep and collects it into a CSV file;

then it launches them, shows progress, and reads the results back from the database. What a user
would type is done by the command line, and shown; the sweep and the results go through the API.

    python examples/demo.py [DIR]      the site's directory; else $DEMO_DIR, else a new one in $TMPDIR
"""

from __future__ import annotations

import asyncio
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import ising

import ensemble
from ensemble.core.model import Task
from ensemble.core.states import FINAL, State
from ensemble.errors import EnsembleError

HERE = Path(__file__).resolve().parent
NODES = 4
TEMPERATURES = [1.5, 1.7, 1.9, 2.0, 2.1, 2.15, 2.2, 2.22, 2.24, 2.26, 2.28, 2.3, 2.35, 2.4, 2.5,
                2.6, 2.8, 3.0, 3.25, 3.5]  # fmt: skip
SEEDS = (1, 2)
#: Program, nodes, ranks on each.
MPI_RUNS = [("helloworld", 1, 2), ("helloworld", 2, 1), ("ringtest", 1, 2), ("ringtest", 2, 1)]
BAR = 40


class DemoError(Exception):
    """The demonstration cannot go on, in one line for the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ensemble:
    """The ids of what was added."""

    sweep: list[int]
    mpi: list[int]
    collect: int

    @property
    def ids(self) -> list[int]:
        """All of them."""
        return [*self.sweep, *self.mpi, self.collect]


# ---------------------------------------------------------------------------- the command line


def program() -> str:
    """Return the path of the `ensemble` command of this Python's environment."""
    beside = Path(sys.executable).with_name("ensemble")
    return str(beside) if beside.exists() else "ensemble"


def shown(words: Sequence[str]) -> str:
    """Write a command line as a user would type it."""
    return "$ ensemble " + shlex.join(words)


def environ() -> dict[str, str]:
    """Return our environment without a site of the user's: the directory says which is meant."""
    return {name: value for name, value in os.environ.items() if name != "ENSEMBLE_SITE"}


def say(words: Sequence[str], *, site: Path | None = None) -> str:
    """Show a command, run it in the site's directory, show and return what it printed."""
    print(shown(words), flush=True)
    done = subprocess.run(
        [program(), *words], cwd=site, env=environ(), text=True, stdout=subprocess.PIPE
    )
    for line in done.stdout.splitlines():
        print(f"  {line}")
    if done.returncode != 0:
        raise DemoError(f"`ensemble {words[0]}` ended with status {done.returncode}")
    return done.stdout


def heading(text: str) -> None:
    """Begin a part of the demonstration."""
    print(f"\n--- {text}", flush=True)


# ---------------------------------------------------------------------------- the steps


def choose_directory() -> Path:
    """Return where the site will be: the argument, $DEMO_DIR, or a new scratch directory."""
    named = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DEMO_DIR")
    if not named:
        return Path(tempfile.mkdtemp(prefix="ensemble-demo-"))
    path = Path(named).expanduser().absolute()
    if (path / "ensemble.toml").exists():
        raise DemoError(f"{path} holds a site already; name another directory in DEMO_DIR")
    return path


def register_apps(site: Path) -> None:
    """Register what the ensemble runs."""
    python, model = shlex.quote(sys.executable), shlex.quote(str(HERE / "ising.py"))
    for name, command in (
        ("ising", f"{python} {model} run --temperature {{temperature}} --seed {{seed}}"),
        ("collect", f"{python} {model} collect"),
        ("mpibench", f"{python} -m mpi4py.bench"),
    ):
        say(["app", "add", name, "--command", command], site=site)


async def add_sweep(site: Path) -> list[int]:
    """Add one task for each temperature and seed, through the API; return their ids."""
    sweep = [
        ensemble.NewTask(
            app="ising",
            name=f"ising_T{temperature:g}_{seed}",
            workflow="demo/ising",
            params={"temperature": str(temperature), "seed": str(seed)},
        )
        for temperature in TEMPERATURES
        for seed in SEEDS
    ]
    async with ensemble.connect(site) as ens:
        ids = await ens.tasks.add(sweep)
    print(f"(Python) await ens.tasks.add(sweep)      # {len(sweep)} tasks: one transaction")
    print(f"  {ids[0]}-{ids[-1]}")
    return ids


def add_others(site: Path, sweep: list[int]) -> Ensemble:
    """Add the MPI programs, and the task that waits for the sweep, as a user types it."""
    mpi = [
        say(
            [
                *("add", "--app", "mpibench", "--name", bench, "--workflow", "demo/mpi"),
                *("--num-nodes", str(nodes), "--ranks-per-node", str(ranks), "--", bench),
            ],
            site=site,
        )
        for bench, nodes, ranks in MPI_RUNS
    ]
    after = f"{sweep[0]}-{sweep[-1]}"
    table = str(site / "ising.csv")
    collect = say(
        ["add", "--app", "collect", "--workflow", "demo/ising", "--after", after, "--", table],
        site=site,
    )
    return Ensemble(sweep=sweep, mpi=[int(text) for text in mpi], collect=int(collect))


async def launch(site: Path, added: Ensemble) -> None:
    """Run a launcher until no work is left, with a progress line meanwhile."""
    words = ["launch", "--nodes", str(NODES), "--idle-timeout", "1"]
    log = site / "log" / "launcher.log"
    print(f"{shown(words)} 2> {log.relative_to(site)}", flush=True)
    with log.open("wb") as file:
        launcher = await asyncio.create_subprocess_exec(
            program(), *words, cwd=site, env=environ(), stdout=file, stderr=file
        )
    async with ensemble.connect(site) as ens:
        try:
            await show_progress(ens, launcher, added)
        finally:
            if launcher.returncode is None:
                launcher.terminate()
            status = await launcher.wait()
    if status != 0:
        last = (log.read_text("utf-8", "replace").splitlines() or ["no output"])[-1]
        raise DemoError(f"the launcher ended with status {status}: {last} ({log})")


async def show_progress(
    ens: ensemble.Client, launcher: asyncio.subprocess.Process, added: Ensemble
) -> None:
    """Follow the tasks' events, pushed by the database, until the launcher has ended."""
    states = dict(await ens.tasks.states())
    progress = Progress(states)

    async def follow() -> None:
        async for event in ens.watch(workflow="demo/"):
            states[event.task_id] = event.to_state

    async def draw() -> None:
        while True:
            progress.draw()
            await asyncio.sleep(0.1)

    async with asyncio.TaskGroup() as group:
        workers = [group.create_task(work()) for work in (follow, draw)]
        await launcher.wait()
        for worker in workers:
            worker.cancel()
    states.update(await ens.tasks.states())
    progress.draw(is_last=True)


class Progress:
    """One line that is rewritten on a terminal, and a new line now and then elsewhere."""

    def __init__(self, states: dict[int, State]) -> None:
        self._states = states
        self._began = time.monotonic()
        self._is_terminal = sys.stdout.isatty()
        self._shown = ""
        self._shown_at = -1.0

    def draw(self, *, is_last: bool = False) -> None:
        """Show where the ensemble stands."""
        counts = Counter(self._states.values())
        total = len(self._states)
        ended = sum(counts[state] for state in FINAL)
        bad = counts[State.FAILED] + counts[State.USER_KILLED]
        filled = BAR * ended // total
        counted = f"{ended:3d} of {total} tasks have ended, {bad} failed"
        elapsed = time.monotonic() - self._began
        line = f"  [{'#' * filled}{'.' * (BAR - filled)}] {counted}  {elapsed:4.1f} s"
        if self._is_terminal:
            print(f"\r\033[K{line}", end="\n" if is_last else "", flush=True)
        elif counted != self._shown and (is_last or elapsed - self._shown_at >= 1.0):
            print(line, flush=True)
            self._shown, self._shown_at = counted, elapsed


# ---------------------------------------------------------------------------- the results


def read_sweep(tasks: Sequence[Task], ens: ensemble.Client) -> dict[float, list[dict[str, Any]]]:
    """Return the results of what ended well, by temperature."""
    found: dict[float, list[dict[str, Any]]] = {}
    for task in tasks:
        if task.state is State.JOB_FINISHED:
            result = ising.read_result(Path(ens.tasks.output(task)))
            found.setdefault(result["temperature"], []).append(result)
    return dict(sorted(found.items()))


def print_sweep(found: dict[float, list[dict[str, Any]]]) -> None:
    """Print the averages over seeds, with a plot of the magnetisation."""
    columns = ("energy", "magnetisation", "susceptibility", "acceptance")
    print("     T     E/spin    |m|/spin     chi   accepted   |m|: 0" + " " * (BAR - 2) + "1")
    is_marked = False
    for temperature, results in found.items():
        if temperature > ising.CRITICAL_TEMPERATURE and not is_marked:
            is_marked = True
            print(f"  {ising.CRITICAL_TEMPERATURE:.3f} {' T_c, infinite lattice ':-^{46 + BAR}}")
        energy, magnetisation, susceptibility, acceptance = (
            fmean(result[column] for result in results) for column in columns
        )
        bar = " " * round(BAR * magnetisation) + "*"
        print(
            f"  {temperature:5.3f}  {energy:8.4f}   {magnetisation:8.4f}"
            f"  {susceptibility:7.2f}  {acceptance:8.3f}   |{bar}"
        )


def print_mpi(tasks: Sequence[Task], ens: ensemble.Client) -> None:
    """Print what the MPI programs wrote."""
    print("  program     nodes x ranks  state         last line of its output")
    for task in tasks:
        output = Path(ens.tasks.output(task))
        lines = output.read_text("utf-8", "replace").splitlines() if output.exists() else []
        size = f"{task.num_nodes} x {task.ranks_per_node}"
        last = lines[-1] if lines else "(none)"
        print(f"  {task.name:10s}  {size:13s}  {task.state:12s}  {last}")


def print_summary(tasks: Sequence[Task]) -> int:
    """Print how it went; return how many tasks did not finish."""
    failed = [task for task in tasks if task.state is not State.JOB_FINISHED]
    runs = [
        (task.started_at, task.ended_at, len(task.nodes))
        for task in tasks
        if task.started_at is not None and task.ended_at is not None
    ]
    print(f"  tasks        {len(tasks)}")
    print(f"  failures     {len(failed)}")
    if runs:
        wall_s = (
            max(end for _, end, _ in runs) - min(start for start, _, _ in runs)
        ).total_seconds()
        busy_s = sum((end - start).total_seconds() * nodes for start, end, nodes in runs)
        print(f"  wall time    {wall_s:.1f} s, first start to last end")
        print(f"  utilisation  {busy_s / (wall_s * NODES):.0%} of {NODES} virtual nodes")
    for task in failed:
        print(f"  task {task.id} ({task.name}) is {task.state}: {task.cause}, {task.reason}")
    return len(failed)


async def show_results(site: Path, added: Ensemble) -> int:
    """Read everything back from the store and print it; return how many tasks did not finish."""
    async with ensemble.connect(site) as ens:
        tasks = {task.id: task for task in await ens.tasks.find()}
        heading(f"Results: the magnetisation vanishes at T_c ({len(SEEDS)} seeds each)")
        print_sweep(read_sweep([tasks[task_id] for task_id in added.sweep], ens))
        print(f"  as a table: {site / 'ising.csv'} (written by task {added.collect})")
        heading("Results: MPI programs")
        print_mpi([tasks[task_id] for task_id in added.mpi], ens)
        heading("On record: every task has its history, such as this MPI run on two nodes")
        say(["show", str(added.mpi[1])], site=site)
        say(["db", "check"], site=site)
        heading("Summary")
        return print_summary([tasks[task_id] for task_id in added.ids])


def print_next(site: Path) -> None:
    """Say where the site is, and what to type."""
    ours = Path(program()).parent
    where = shlex.quote(str(site))
    print(f"""
The site is {site}; its database runs until you stop it. What to type next:
  export PATH={shlex.quote(str(ours))}:$PATH
  cd {where}
  ensemble status                      # everything on one screen
  ensemble ls --workflow ising         # the tasks; show ID, log ID and dir ID tell more
  ensemble add -- echo hello           # one more task …
  ensemble launch --nodes 2            # … and a launcher to run it
To stop the database and remove the site:
  ensemble --site {where} db stop && rm -r {where}""")


def first_of(error: Exception) -> Exception:
    """Return the first error in a group of them."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def main() -> int:
    """Run the demonstration; return 0 when every task finished."""
    site = None
    try:
        site = choose_directory()
        heading("A site: a directory with a database of its own")
        say(["init", str(site)])
        print(f"$ cd {shlex.quote(str(site))}")
        heading("Apps: how to run something")
        register_apps(site)
        heading("An ensemble: a sweep, MPI programs, and a task that waits for the sweep")
        added = add_others(site, asyncio.run(add_sweep(site)))
        heading(f"A launcher on {NODES} virtual nodes of this machine")
        asyncio.run(launch(site, added))
        failed = asyncio.run(show_results(site, added))
    except (DemoError, EnsembleError, OSError, ExceptionGroup) as error:
        print(f"\nThe demonstration failed: {first_of(error)}", file=sys.stderr)
        if site is not None:
            print(f"What there is of the site is in {site}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        if site is not None:
            print(f"To clean up: {program()} --site {site} db stop; rm -r {site}", file=sys.stderr)
        return 130
    print_next(site)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
