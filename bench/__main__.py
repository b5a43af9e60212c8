"""Run the measurements that were named, or all; print a table, keep JSON in bench/results/."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from bench import (
    add,
    claim,
    cli,
    drain,
    kill,
    killload,
    outage,
    pilots,
    recovery,
    refill,
    serial,
    starts,
)
from bench.scratch import BenchError
from ensemble.errors import EnsembleError

BENCHES: dict[str, Callable[[], Awaitable[dict[str, object]]]] = {
    "starts": starts.run,
    "serial": serial.run,
    "serial-short": serial.run_short,
    "serial-start": serial.run_start,
    "pilots": pilots.run,
    "kill": kill.run,
    "kill-load": killload.run,
    "drain": drain.run,
    "recovery": recovery.run,
    "outage": outage.run,
    "refill": refill.run,
    "add": add.run,
    "claim": claim.run,
    "filtered": claim.run_filtered,
    "cli": cli.run,
}


def main() -> None:
    names = sys.argv[1:] or list(BENCHES)
    if unknown := [name for name in names if name not in BENCHES]:
        sys.exit(f"no measurement {unknown[0]!r}; there are {', '.join(BENCHES)}")
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}\n")
    results, missing = [], []
    for name in names:
        try:
            result = asyncio.run(BENCHES[name]())  # type: ignore[arg-type]
        except (BenchError, EnsembleError, TimeoutError) as error:
            missing.append(name)
            print(f"{name:12} not measured: {error or 'it took too long'}\n", flush=True)
            continue
        results.append({"name": name, **result})
        print(f"{name:12} {result['what']}")
        print(f"{'':12} bar {result['bar']}; measured {result['measured']}\n", flush=True)
    if results:
        print(f"kept in {keep('', results)}")
    if missing:
        sys.exit(f"not measured: {', '.join(missing)}")


def keep(prefix: str, results: object) -> Path:
    """Write raw numbers to a file of their own; return it."""
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    file = folder / f"{prefix}{time.strftime('%Y%m%d-%H%M%S')}.json"
    file.write_text(json.dumps(results, indent=1), "utf-8")
    return file


if __name__ == "__main__":
    main()
