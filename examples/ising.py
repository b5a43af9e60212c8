"""The two-dimensional Ising model: a ferromagnet on a square lattice, by the Metropolis method.

    python ising.py run --temperature 2.269      prints one JSON line
    python ising.py collect ising.csv            inside a task: gathers the results of its parents

Energies are in units of the coupling J, temperatures in J / k_B. On an infinite lattice the
magnetisation vanishes at T_c = 2 / ln(1 + sqrt 2) = 2.269 (Onsager 1944); a small lattice smears
that out. Standard library only, so that it runs wherever Python does.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import math
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CRITICAL_TEMPERATURE = 2 / math.log(1 + math.sqrt(2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Averages over the measured sweeps, per spin."""

    temperature: float
    seed: int
    size: int
    sweeps: int
    energy: float
    #: Of the absolute value: on a finite lattice the sign flips now and then.
    magnetisation: float
    susceptibility: float
    #: The share of proposed flips that were accepted.
    acceptance: float


def simulate(*, temperature: float, size: int, sweeps: int, seed: int) -> Result:
    """Run one lattice of *size* x *size* spins, from full order, and measure after a third of it."""
    draw = random.Random(seed).random
    spins = [1] * (size * size)
    neighbours = _neighbours(size)
    #: The chance to flip a spin s whose neighbours sum up to h, at index 4 + s * h.
    chance = [min(1.0, math.exp(-2 * x / temperature)) for x in range(-4, 5)]
    warm_up = sweeps // 3
    energies, magnets, accepted = [], [], 0
    for sweep in range(sweeps):
        flips = _sweep(spins, neighbours, chance, draw)
        if sweep >= warm_up:
            accepted += flips
            magnets.append(abs(sum(spins)))
            energies.append(_energy(spins, neighbours))
    measured, sites = sweeps - warm_up, size * size
    mean = sum(magnets) / measured
    variance = sum(m * m for m in magnets) / measured - mean * mean
    return Result(
        temperature=temperature,
        seed=seed,
        size=size,
        sweeps=sweeps,
        energy=round(sum(energies) / measured / sites, 5),
        magnetisation=round(mean / sites, 5),
        susceptibility=round(variance / sites / temperature, 5),
        acceptance=round(accepted / measured / sites, 5),
    )


def _neighbours(size: int) -> list[tuple[int, int, int, int]]:
    """Return the four neighbours of each spin; the lattice closes on itself."""
    sites = size * size
    return [
        (
            (i - size) % sites,
            (i + size) % sites,
            i - i % size + (i - 1) % size,
            i - i % size + (i + 1) % size,
        )
        for i in range(sites)
    ]


def _sweep(spins: list[int], neighbours: Sequence[tuple[int, ...]], chance: Any, draw: Any) -> int:
    """Propose to flip each spin once; return how many were flipped."""
    flips = 0
    for i, (up, down, left, right) in enumerate(neighbours):
        spin = spins[i]
        likely = chance[4 + spin * (spins[up] + spins[down] + spins[left] + spins[right])]
        if likely == 1.0 or draw() < likely:
            spins[i] = -spin
            flips += 1
    return flips


def _energy(spins: list[int], neighbours: Sequence[tuple[int, ...]]) -> int:
    """Count each bond once: with the neighbour below and the one to the right."""
    return -sum(
        spin * (spins[down] + spins[right])
        for spin, (_, down, _, right) in zip(spins, neighbours, strict=True)
    )


def read_result(output: Path) -> dict[str, Any]:
    """Return the result in a task's output file: its last line."""
    result: dict[str, Any] = json.loads(output.read_text("utf-8").splitlines()[-1])
    return result


async def collect(target: Path) -> int:
    """Write the results of this task's parents to a CSV file; return how many they were."""
    import ensemble

    parents = [int(task_id) for task_id in os.environ["ENSEMBLE_PARENT_IDS"].split(",")]
    async with ensemble.connect() as ens:  # the site that this task belongs to
        outputs = [ens.tasks.output(await ens.tasks.get(task_id)) for task_id in parents]
    rows = sorted(
        (read_result(Path(output)) for output in outputs),
        key=lambda row: (row["temperature"], row["seed"]),
    )
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return len(rows)


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="simulate one lattice and print one JSON line")
    run.add_argument("--temperature", type=float, required=True, help="in units of J / k_B")
    run.add_argument("--size", type=int, default=24, help="spins along one side [24]")
    run.add_argument("--sweeps", type=int, default=2000, help="proposed flips per spin [2000]")
    run.add_argument("--seed", type=int, default=1)
    gather = commands.add_parser("collect", help="inside a task: results of its parents as CSV")
    gather.add_argument("target", type=Path)
    given = parser.parse_args()
    if given.command == "collect":
        print(f"{asyncio.run(collect(given.target))} results in {given.target.absolute()}")
        return
    if given.temperature <= 0 or given.size < 2 or given.sweeps < 3:
        parser.error("needs a temperature above 0, a size of at least 2 and at least 3 sweeps")
    result = simulate(
        temperature=given.temperature, size=given.size, sweeps=given.sweeps, seed=given.seed
    )
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
