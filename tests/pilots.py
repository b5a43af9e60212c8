"""A stand-in for the pilot: it finds its companions as the real one does, tells what it found, and waits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ensemble.drivers import proctree

#: Arguments: a folder with link.json, the expected number, seconds for MPI.
PILOT = """
import asyncio, json, os, signal, sys, time
from pathlib import Path
import uvloop
from ensemble.drivers import process, world
from ensemble.errors import LaunchError

folder, expected, timeout_s = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])

async def main():
    begin = time.monotonic()
    told = {"pilot": os.getpid(), "guard": os.getppid(), "node": os.environ.get("SLURMD_NODENAME")}
    try:
        met = await world.meet(folder / "link.json", expected, timeout_s, os.environ)
        told |= {name: getattr(met, name) for name in ("rank", "size", "place", "how", "note", "hosts")}
        told["launcher"] = met.link.launcher_id
    except LaunchError as error:
        told |= {"rank": -1, "error": str(error)}
    told["s"] = time.monotonic() - begin
    draft = folder / f"{os.getpid()}.draft"
    draft.write_text(json.dumps(told))
    draft.rename(draft.with_suffix(".told"))
    stops = folder / "stop", folder / f"stop{told['rank']}"
    while not any(stop.exists() for stop in stops):
        await asyncio.sleep(0.02)

process.die_with_parent(signal.SIGKILL)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, signal.SIG_IGN)
with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    runner.run(main())
"""


def stories(folder: Path, expected: int) -> list[dict[str, Any]] | None:
    """Return what the pilots told, by rank; None until all have."""
    told = [json.loads(path.read_text()) for path in folder.glob("*.told")]
    return sorted(told, key=lambda each: each["rank"]) if len(told) == expected else None


def is_alive(pid: int) -> bool:
    """Tell whether a process runs: a zombie does not."""
    stat = proctree.read_stat(pid)
    return stat is not None and not stat.is_zombie
