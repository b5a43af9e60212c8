"""The service as users start it, on the local scheduler, and a Slurm of shell scripts that does what it is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ensemble import config
from ensemble.batch import Submitter, find_system, new_job
from ensemble.core.batchjob import BatchJob, JobState, NewBatchJob
from ensemble.core.jobs import Jobs
from ensemble.core.store import Store
from ensemble.drivers import batch
from ensemble.drivers.batch import BatchSystem
from ensemble.service.look import Lookout
from ensemble.site import Site
from tests.integration.launching import MPICH

#: Short periods: rounds follow each other at once, and what takes minutes takes a second.
QUICK = """
[scheduler]
kind = "{kind}"
timeout_s = {timeout_s}
max_running = 3
[service]
period_s = 0.2
submissions_per_minute = 1000
lost_looks = 2
lost_s = 0.5
retry_s = 0.2
capacity_retry_s = 0.3
[launcher]
grace_s = 1
min_useful_s = 0
margin_s = 1
idle_timeout_s = 0
[mpi]
command = "{mpi}"
"""
#: A job that prints this and dies, before there is a launcher.
DYING = '#!/bin/bash\nprintf "{words}\\n"\nexit 7\nexec {{{{ launch }}}}\n'

_SBATCH = r"""#!/bin/bash
cd "$(dirname "$0")/state" || exit 99
for word; do
  case $word in --job-name=*) name=${word#*=};; esac
done
mode=$(<sbatch)
echo "$mode|$name" >> calls
printf '%s\n' "$@" > argv
accept() {
  number=$(( $(<next) + 1 ))
  echo $number > next
  echo "$number|PENDING|Priority|$name" >> jobs
  echo "$name" >> accepted
}
fail() { printf 'sbatch: error: %b\n' "$@" >&2; exit 1; }
case $mode in
  ok) accept; echo $number;;
  slow) sleep 1; accept; echo $number;;
  hang) accept; exec sleep 60;;
  kill) accept; kill -KILL $PPID;;
  kill-before) kill -KILL $PPID;;
  lost) accept; fail 'Batch job submission failed: Socket timed out on send/recv operation';;
  timeout) fail 'Batch job submission failed: Socket timed out on send/recv operation';;
  down) fail 'Batch job submission failed: Unable to contact slurm controller (connect failure)';;
  full) fail 'QOSMaxSubmitJobPerUserLimit' \
    "Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)";;
  invalid) fail 'invalid partition specified: \033[31mnowhere' \
    'Batch job submission failed: Invalid partition name specified';;
  nonsense) accept; echo 'Welcome to the machine';;
  silent) ;;
esac
"""
_SQUEUE = r"""#!/bin/bash
cd "$(dirname "$0")/state" || exit 99
mode=$(<squeue)
echo "$mode" >> looks
heading='JOBID|STATE|REASON|START_TIME|END_TIME|NODES|PARTITION|NAME'
case $mode in
  ok) echo "$heading"
    while IFS='|' read -r number state reason name; do
      echo "$number|$state|$reason|N/A|N/A|1|debug|$name"
    done < jobs;;
  no-jobs) echo "$heading";;
  nothing) ;;
  garbage) echo "$heading"; printf '\001\377%%s ||| \033[2J\n1|2|3\n';;
  half) echo "$heading"; printf '1|PENDI';;
  down) echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1;;
  hang) exec sleep 60;;
esac
"""
_SCANCEL = r"""#!/bin/bash
cd "$(dirname "$0")/state" || exit 99
for number; do :; done
echo "$number" >> cancels
case $(<scancel) in
  down) echo 'scancel: error: Kill job error on job id 1: Unable to contact slurm controller (connect failure)' >&2; exit 1;;
esac
sed -i "s/^$number|[A-Z]*|[^|]*|/$number|CANCELLED|None|/" jobs
echo "scancel: Terminating job $number" >&2
"""
_SACCT = "#!/bin/bash\necho 'Slurm accounting storage is disabled' >&2\nexit 1\n"


class FakeSlurm:
    """sbatch, squeue and scancel in a directory; files in `state` tell what there is and how they behave."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.state.mkdir(parents=True)
        for name, text in (
            ("sbatch", _SBATCH), ("squeue", _SQUEUE), ("scancel", _SCANCEL), ("sacct", _SACCT),
        ):  # fmt: skip
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        for name in ("jobs", "accepted", "calls", "looks", "cancels"):
            (self.state / name).write_text("")
        (self.state / "next").write_text("100\n")
        self.be(sbatch="ok", squeue="ok", scancel="ok")

    @property
    def path(self) -> str:
        """PATH with its commands first, and no real scheduler's."""
        return f"{self.folder}:/usr/bin:/bin"

    def be(self, **modes: str) -> None:
        """Have commands behave in another way from now on."""
        for command, mode in modes.items():
            temporary = self.state / f".{command}"
            temporary.write_text(mode)
            temporary.rename(self.state / command)

    def lines(self, name: str) -> list[str]:
        """Return the lines of a file of the state, those that are whole."""
        return (self.state / name).read_text().split("\n")[:-1]

    def count(self, name: str) -> int:
        """Count the lines of a file of the state."""
        return len(self.lines(name))

    def live(self) -> list[str]:
        """Return the names of the jobs that wait or run."""
        return [
            words[3]
            for line in self.lines("jobs")
            if (words := line.split("|"))[1] in ("PENDING", "RUNNING")
        ]

    def move(self, state: str, *, reason: str = "None", name: str = "") -> None:
        """Put all jobs, or one by its name, into another state."""
        moved = [
            "|".join((words[0], state, reason, words[3])) if name in ("", words[3]) else line
            for line in self.lines("jobs")
            if (words := line.split("|"))
        ]
        temporary = self.state / ".jobs"
        temporary.write_text("".join(f"{line}\n" for line in moved))
        temporary.rename(self.state / "jobs")

    def check(self) -> None:
        """Check that no batch job was ever submitted twice."""
        twice = [name for name, times in Counter(self.lines("accepted")).items() if times > 1]
        assert twice == [], f"submitted twice: {twice}"


class Served:
    """One `ensemble serve` that runs."""

    def __init__(self, argv: Sequence[str], log: Path, environ: dict[str, str]) -> None:
        self.log_path = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                argv,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return self.log_path.read_text(errors="replace")

    def kill(self) -> None:
        """End it without ceremony."""
        self.process.kill()
        self.process.wait()


class Serving:
    """A site with an empty store whose settings each test writes."""

    def __init__(
        self, site: Site, store: Store, work: Path, eventually: Callable[..., Any]
    ) -> None:
        self.path = site.path
        self.store = store
        self.jobs = Jobs(store.pool)
        self.eventually = eventually
        self.cluster = site.cluster
        self.fake = FakeSlurm(work / "slurm")
        self.services: list[Served] = []
        self._store_text = f'[store]\nbin_dir = "{site.settings.store.bin_dir}"\n'
        self._kept = {
            path: path.read_bytes()
            for path in (self.path / "ensemble.toml", self.path / "templates" / "job.sh")
        }
        self._sweep()

    # ------------------------------------------------------------------ the site

    def write(self, text: str = "", *, kind: str = "slurm", timeout_s: float = 1.0) -> None:
        """Write ensemble.toml: quick settings, and *text* below them."""
        quick = QUICK.format(kind=kind, timeout_s=timeout_s, mpi=MPICH)
        temporary = self.path / ".ensemble.toml"
        temporary.write_text(f'name = "my site"\n{self._store_text}{quick}{text}')
        temporary.rename(self.path / "ensemble.toml")
        shutil.copy(batch_template("local" if kind == "local" else "slurm"), self.template)

    @property
    def template(self) -> Path:
        """The template of the site's batch jobs."""
        return self.path / "templates" / "job.sh"

    @property
    def site(self) -> Site:
        """The site, as its settings are now."""
        return Site(path=self.path, settings=config.load(self.path))

    @property
    def environ(self) -> dict[str, str]:
        """The environment of commands: the Slurm of scripts is first on PATH."""
        return {**os.environ, "PATH": self.fake.path}

    # ------------------------------------------------------------------ in this process

    def system(self) -> BatchSystem:
        """Return the site's scheduler."""
        return find_system(self.site, self.environ)

    def submitter(self) -> Submitter:
        """Return what submits batch jobs of the site."""
        return Submitter(self.site, self.jobs, self.system())

    def lookout(self) -> Lookout:
        """Return what looks at the scheduler for the site."""
        return Lookout(self.jobs, self.system(), self.site.settings.service)

    async def submit(self, **options: Any) -> BatchJob | None:
        """Submit a batch job of one node."""
        fields = {name: options.pop(name) for name in ("flags", "policy") if name in options}
        return await self.submitter().submit(
            new(self.submitter().scheduler, **fields), template_name="job.sh", **options
        )

    # ------------------------------------------------------------------ commands

    def argv(self, *words: str) -> list[str]:
        """Return the command line of `ensemble`."""
        return [sys.executable, "-P", "-m", "ensemble", "--site", str(self.path), *words]

    def run(self, *words: str, status: int = 0, **environ: str) -> str:
        """Run a command to its end; return everything it printed."""
        done = subprocess.run(
            self.argv(*words),
            env=self.environ | environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
        )
        text = done.stdout.decode(errors="replace")
        assert done.returncode == status, text
        assert "Traceback" not in text, text
        return text

    async def run_beside(self, *words: str, status: int = 0) -> str:
        """Run a command to its end while this event loop goes on."""
        return await asyncio.to_thread(lambda: self.run(*words, status=status))

    def serve(self, *flags: str, **environ: str) -> Served:
        """Start the service."""
        log = self.path / "log" / f"service-{time.monotonic_ns()}.log"
        served = Served(self.argv("serve", *flags), log, self.environ | environ)
        self.services.append(served)
        return served

    async def started(self, *flags: str, **environ: str) -> Served:
        """Start the service, and wait until it serves."""
        served = self.serve(*flags, **environ)
        await self.says(served, "service.started")
        return served

    async def says(self, served: Served, words: str, *, within_s: float = 60.0) -> None:
        """Wait until the service has logged something."""
        with contextlib.suppress(AssertionError):
            await self.eventually(
                lambda: words in served.log or served.process.poll() is not None, within_s=within_s
            )
        assert words in served.log, f"it did not say {words!r}:\n{served.log}"

    async def leave(self, served: Served, *, within_s: float = 60.0) -> int:
        """Wait until a service has ended; return its exit status."""
        with contextlib.suppress(AssertionError):
            await self.eventually(lambda: served.process.poll() is not None, within_s=within_s)
        status: int | None = served.process.poll()
        assert status is not None, f"it did not leave:\n{served.log}"
        assert "Traceback" not in served.log, served.log
        return status

    async def stop(self, served: Served, number: int = signal.SIGTERM) -> None:
        """Have a service leave in good order."""
        served.process.send_signal(number)
        assert await self.leave(served) == 0, served.log

    # ------------------------------------------------------------------ what there is

    async def states(self) -> list[str]:
        """Return the states of all batch jobs, the oldest first."""
        return [str(job.state) for job in reversed(await self.jobs.recent(1000))]

    async def active(self) -> list[BatchJob]:
        """Return the batch jobs that count."""
        return await self.jobs.active()

    async def reach(self, *states: str, within_s: float = 60.0) -> list[BatchJob]:
        """Wait until the batch jobs, the oldest first, are in these states; return them."""
        with contextlib.suppress(AssertionError):

            async def reached() -> bool:
                return await self.states() == list(states)

            await self.eventually(reached, within_s=within_s)
        jobs = list(reversed(await self.jobs.recent(1000)))
        logs = "\n".join(served.log for served in self.services)
        assert [str(job.state) for job in jobs] == list(states), f"{jobs}\n{logs}"
        return jobs

    async def paused(self, name: str) -> str:
        """Wait until the service has paused a queue; return why."""

        async def reason() -> str | None:
            state = (await self.jobs.queue_states()).get(name)
            return state.reason if state is not None and state.paused_by == "service" else None

        found: str = await self.eventually(reason, within_s=30)
        return found

    # ------------------------------------------------------------------ the end

    async def close(self) -> None:
        """End everything that was started, and leave the site as it was."""
        for served in self.services:
            served.kill()
        await self._end_local_jobs()
        for path, data in self._kept.items():
            path.write_bytes(data)
        self._sweep()

    async def _end_local_jobs(self) -> None:
        folder = self.path / "qsubmit" / ".local"
        if not folder.is_dir():
            return
        system = BatchSystem(
            batch.get("local", directory=folder, max_running=1), environ=os.environ, cwd=self.path
        )

        async def is_over() -> bool:
            listed = await system.listing([])
            left = [job for job in listed if job.state in (JobState.QUEUED, JobState.RUNNING)]
            for job in left:
                await system.cancel(job.id)
            return not left

        await self.eventually(is_over, within_s=30)

    def _sweep(self) -> None:
        shutil.rmtree(self.path / "qsubmit", ignore_errors=True)
        (self.path / "qsubmit").unlink(missing_ok=True)
        (self.path / "qsubmit").mkdir()
        for path in self.path.glob("log/serve*"):
            path.unlink()


def batch_template(name: str) -> Path:
    """Return a template that comes along."""
    from ensemble.drivers import template

    return template.builtin()[name]


def new(scheduler: str, *, policy: str | None = None, flags: tuple[str, ...] = ()) -> NewBatchJob:
    """Return a batch job of one node for ten minutes."""
    import dataclasses

    made = new_job(scheduler, nodes=1, minutes=10, flags=flags)
    return dataclasses.replace(made, policy=policy)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a log of JSON lines, each of which must be one."""
    return [json.loads(line) for line in path.read_text().splitlines()]
