"""Runs the commands of batch schedulers, each with a time-out and an environment of its own."""

from __future__ import annotations

from collections.abc import Mapping

from ensemble.drivers import process
from ensemble.errors import LaunchError

#: Seconds that a scheduler's command may take: squeue needs nine to find that its controller is down.
ANSWER_TIMEOUT_S = 15.0


async def ask(argv: list[str], environ: Mapping[str, str]) -> str | None:
    """Return what a scheduler's command prints; None when it fails, is missing or is too slow."""
    # A user's SQUEUE_… would filter and format.
    env = {name: value for name, value in environ.items() if not name.startswith("SQUEUE_")}
    env |= {"LC_ALL": "C", "TZ": "UTC", "SLURM_TIME_FORMAT": "%s"}
    try:
        done = await process.run(argv, env=env, timeout_s=ANSWER_TIMEOUT_S)
    except LaunchError:
        return None
    return done.stdout if done.code == 0 else None
