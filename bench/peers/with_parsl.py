"""Run in Parsl's own virtual environment: COUNT WIDTH PROGRAM [ARGUMENT...]; print seconds and tasks."""

from __future__ import annotations

import json
import shlex
import sys
import time

import parsl
from parsl.config import Config
from parsl.executors import HighThroughputExecutor
from parsl.providers import LocalProvider


@parsl.bash_app
def program(line: str) -> str:
    return line


def main() -> None:
    count, width, argv = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    executor = HighThroughputExecutor(
        label="htex",
        address="127.0.0.1",
        max_workers_per_node=width,
        provider=LocalProvider(init_blocks=1, min_blocks=1, max_blocks=1),
    )
    config = Config(
        executors=[executor],
        strategy="none",
        usage_tracking=0,
        initialize_logging=False,  # a file of debug lines would only slow it down
        run_dir="runinfo",
    )
    with parsl.load(config):

        def run(tasks: int, line: str) -> int:
            # A bash app's result is its exit status; another one than 0 is an exception.
            futures = [program(line) for _ in range(tasks)]
            return sum(future.result() == 0 for future in futures)

        run(4 * width, "true")
        began = time.perf_counter()
        ran = run(count, shlex.join(argv))
        seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "ran": ran}))


if __name__ == "__main__":
    main()
