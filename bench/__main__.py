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

from bench import add, claim, cli, kill, refill, starts

BENCHES: dict[str, Callable[[], Awaitable[dict[str, object]]]] = {
    "starts": starts.run,
    "kill": kill.run,
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
    results = []
    for name in names:
        result = asyncio.run(BENCHES[name]())  # type: ignore[arg-type]
        results.append({"name": name, **result})
        print(f"{name:9} {result['what']}")
        print(f"{'':9} bar {result['bar']}; measured {result['measured']}\n", flush=True)
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    file = folder / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    file.write_text(json.dumps(results, indent=1), "utf-8")
    print(f"kept in {file}")


if __name__ == "__main__":
    main()
