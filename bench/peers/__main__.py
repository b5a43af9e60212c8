"""Measure Ensemble's serial mode beside its peers, in alternating rounds; print one table, keep JSON."""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

from bench import floor
from bench.__main__ import keep
from bench.peers.contenders import (
    WIDTH,
    CLoop,
    Contender,
    Ensemble,
    Parallel,
    PythonPeer,
    Xargs,
    forks,
)
from bench.scratch import BenchError
from bench.serial import TASKS, TRUE
from ensemble.errors import EnsembleError

ROUNDS = 5
SLEEP_S, SLEEPS = "0.05", 200
PROOFS = 60
FAILURES = (BenchError, EnsembleError, OSError, TimeoutError)
Figures = dict[str, dict[str, list[float]]]


def main() -> None:
    arguments = parsed()
    asyncio.run(measure(arguments))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(base) / "ensemble-bench",
        metavar="DIR",
        help="where the peers' virtual environments are made, and kept [%(default)s]",
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="words that name some of them")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="[%(default)s]")
    parser.add_argument("--tasks", type=int, default=TASKS, help="of /bin/true [%(default)s]")
    parser.add_argument("--sleeps", type=int, default=SLEEPS, help="of `sleep` [%(default)s]")
    return parser.parse_args()


def contenders(cache: Path, loop: floor.Floor) -> list[Contender]:
    return [
        Ensemble(),
        CLoop(loop),
        Xargs(),
        Parallel(),
        PythonPeer("HyperQueue", "hyperqueue", "two output files", cache),
        PythonPeer("Parsl", "parsl", "nothing", cache),
    ]


async def measure(arguments: argparse.Namespace) -> None:
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
    kinds = {
        "true": (TRUE, arguments.tasks),
        "sleep": (("sleep", SLEEP_S), arguments.sleeps),
    }
    with floor.compiled() as loop:
        everyone = contenders(arguments.cache.expanduser().resolve(), loop)
        chosen = [
            one
            for one in everyone
            if not arguments.only
            or one.name == CLoop.name  # what the others are compared with
            or any(word.lower() in one.name.lower() for word in arguments.only)
        ]
        versions, missing = await prepared(chosen)
        figures: Figures = defaultdict(lambda: defaultdict(list))
        for turn in range(arguments.rounds):
            for kind, (argv, count) in kinds.items():
                for one in [one for one in chosen if one.name not in missing]:
                    try:
                        took = await timed(one, argv, count)
                    except FAILURES as error:
                        missing[one.name] = f"round {turn + 1}, {kind}: {error or 'too slow'}"
                        continue
                    figures[one.name][kind].append(took)
            print(f"round {turn + 1} of {arguments.rounds} done", flush=True)
    rates = {name: scored(by_kind, arguments) for name, by_kind in figures.items()}
    show(chosen, rates, versions, missing, arguments)
    kept = keep(
        "peers-",
        {
            "seconds": figures,
            "tasks": {kind: count for kind, (_, count) in kinds.items()},
            "versions": versions,
            "missing": missing,
        },
    )
    print(f"kept in {kept}")


async def prepared(chosen: list[Contender]) -> tuple[dict[str, str], dict[str, str]]:
    """Make everyone ready and have them prove that they run what they are asked to."""
    versions, missing = {}, {}
    for one in chosen:
        try:
            versions[one.name] = await one.prepare()
            await prove(one)
        except FAILURES as error:
            missing[one.name] = str(error) or "too slow"
    return versions, missing


async def prove(one: Contender) -> None:
    """Let it run tasks that leave a trace each, and count the traces."""
    with tempfile.TemporaryDirectory(prefix="ensemble-bench-") as folder:
        trace = Path(folder) / "ran"
        trace.touch()
        script = 'echo ran >> "$1"'
        await one.seconds(("sh", "-c", script, "sh", str(trace)), PROOFS)
        lines = len(trace.read_text().splitlines())
    if lines != PROOFS:
        raise BenchError(f"of {PROOFS} tasks of a trial {lines} ran")


async def timed(one: Contender, argv: tuple[str, ...], count: int) -> float:
    """Return the seconds of one round; the machine must have made as many processes at least."""
    before = forks()
    took = await one.seconds(argv, count)
    if before > 0 and forks() - before < count:
        raise BenchError(f"{count} tasks, but only {forks() - before} new processes")
    return took


def scored(by_kind: dict[str, list[float]], arguments: argparse.Namespace) -> dict[str, float]:
    """Return the medians: tasks a second, and the ideal time divided by what it took."""
    ideal = arguments.sleeps * float(SLEEP_S) / WIDTH
    scores = {}
    if by_kind["true"]:
        scores["true"] = arguments.tasks / statistics.median(by_kind["true"])
    if by_kind["sleep"]:
        scores["sleep"] = ideal / statistics.median(by_kind["sleep"])
    return scores


def show(
    chosen: list[Contender],
    rates: dict[str, dict[str, float]],
    versions: dict[str, str],
    missing: dict[str, str],
    arguments: argparse.Namespace,
) -> None:
    """Print the table; every ratio is to the loop in C, and to Ensemble where that ran."""
    loop, ours = (rates.get(name, {}).get("true") for name in (CLoop.name, Ensemble.name))
    print(
        f"\nmedians of {arguments.rounds} rounds; {WIDTH} tasks at a time\n\n"
        f"{'':14} {arguments.tasks} x /bin/true{'':17} {arguments.sleeps} x sleep {SLEEP_S}\n"
        f"{'':14} {'tasks/s':>9} {'of C':>7} {'Ensemble is':>12}  {'efficiency':>14}  writes"
    )
    for one in sorted(chosen, key=lambda one: -rates.get(one.name, {}).get("true", 0.0)):
        scores = rates.get(one.name, {})
        if one.name in missing or not scores:
            continue
        rate = scores["true"]
        of_loop = f"{rate / loop:.2f} x" if loop else "-"
        times = f"{ours / rate:.2f} x" if ours else "-"
        print(
            f"{one.name:14} {rate:9,.0f} {of_loop:>7} {times:>12}  {scores['sleep']:14.3f}  {one.writes}"
        )
    for name, why in missing.items():
        print(f"\nskipped: {name}: {why}")
    print("\nversions: " + "; ".join(f"{name}: {text}" for name, text in versions.items() if text))


if __name__ == "__main__":
    main()
