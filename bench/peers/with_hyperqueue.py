"""Run in HyperQueue's own virtual environment: COUNT WIDTH PROGRAM [ARGUMENT...]; print seconds and tasks."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from hyperqueue import Job, LocalCluster
from hyperqueue.cluster import WorkerConfig


def main() -> None:
    count, width, argv = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    server = Path("server").resolve()  # its link to the current server is taken from there
    server.mkdir()
    with LocalCluster(str(server), worker_config=WorkerConfig(cores=width)) as cluster:
        client = cluster.client()

        def run(tasks: int, words: list[str], name: str) -> int:
            folder = Path(name).resolve()
            folder.mkdir()
            job = Job(default_workdir=str(folder))  # its usual way: two files a task
            for _ in range(tasks):
                job.program(words)
            client.wait_for_jobs([client.submit(job)])  # raises when a task failed
            return sum(1 for _ in folder.rglob("*.stdout"))

        run(4 * width, ["true"], "warm")
        began = time.perf_counter()
        ran = run(count, argv, "work")
        seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "ran": ran}))


if __name__ == "__main__":
    main()
