#!/usr/bin/env -S python3 -I -S
"""A batch scheduler to test with: one program that speaks Slurm, PBS, Cobalt, LSF, Grid Engine and Flux.

It is called through links, BIN/<dialect>/<command>: the directory is the dialect, the name is the command. What
it knows is in $FAKEBATCH_DIR, under a lock. A job that it accepts is really run, by a process that detaches itself:
with the variables that the dialect's jobs have, and ended as that scheduler ends jobs. Messages are verbatim where
they are on record (`tests/data`, manuals, sources); Cobalt's and Flux's refusals are likely ones.

$FAKEBATCH_DIR/knobs.json sets what sort of machine it is, and what goes wrong: see KNOBS.
"""

# ruff: noqa: RUF012  the tables of classes are never changed
from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
import re
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

KNOBS: dict[str, Any] = {
    # The machine.
    "room": 4,  # jobs that run at once
    "most": 1000,  # jobs of a user, queued and running ones
    "minutes": 60,  # the longest job, and the time of one that states none
    "queues": ["batch", "debug"],
    "second": 0.02,  # how long a second of the scheduler's lasts: of limits and of graces
    "is_history_kept": True,
    # What goes wrong.
    "is_down": False,  # no server answers
    "latency_s": {},  # of a verb: submit, status, cancel, history
    "hangs_after_accept": False,  # the job is accepted, and the command never ends
    "is_silent": False,  # the job is accepted, and nothing is printed
    "noise": "",  # on standard error, of every command
    "nonsense": {},  # of a verb: what it prints instead, with status 0
    "cut": 0,  # so many characters are missing at the end of a listing
    "vanished": [],  # jobs, by name, that no listing shows
}
USER = pwd.getpwuid(os.getuid()).pw_name
SERVER = "fakehead"

Job = dict[str, Any]
Answer = tuple[str, str, int]
#: Signals, to whom ("all", or "script" alone), and the seconds until the next step.
Step = tuple[tuple[int, ...], str, float]
KILL: Step = ((signal.SIGKILL,), "all", 0)


class Refused(Exception):
    """A submission that is not accepted: an argument is the kind."""


# What it knows


def read_knobs() -> dict[str, Any]:
    try:
        with open(os.path.join(os.environ["FAKEBATCH_DIR"], "knobs.json")) as file:
            return KNOBS | json.load(file)
    except FileNotFoundError:
        return KNOBS


@contextlib.contextmanager
def books() -> Iterator[dict[str, Any]]:
    """Lend everything that is known; what is changed is written back."""
    directory = os.environ["FAKEBATCH_DIR"]
    path = os.path.join(directory, "state.json")
    with open(os.path.join(directory, "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = ""
        with contextlib.suppress(FileNotFoundError), open(path) as file:
            text = file.read()
        state = json.loads(text) if text else {"next": 1, "jobs": {}}
        yield state
        new = json.dumps(state)
        if new != text:
            with open(path + ".new", "w") as file:
                file.write(new)
            os.replace(path + ".new", path)


# Words of command lines and scripts


def parse_words(words: list[str], values: set[str]) -> tuple[dict[str, str], list[str]]:
    """Return options, the last of a name wins, and what is none; *values* name those that take a word."""
    found: dict[str, str] = {}
    rest: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        name, has_value, value = word.partition("=")
        if word.startswith("--") and has_value:
            found[name] = value
        elif word in values:
            value = queue.pop(0) if queue else ""
            # -l may be given again and again, for other resources
            found[word] = f"{found[word]},{value}" if word == "-l" and word in found else value
        elif word.startswith("-"):
            found[word] = ""
        else:
            rest.append(word)
    return found, rest


def as_set(text: str) -> set[str]:
    return set(text.split())


def read_directives(text: str, prefix: str) -> list[str]:
    """Return the words of the directives before the first command."""
    import shlex  # seldom needed, and each command is a start of its own

    words: list[str] = []
    for line in text.splitlines():
        if line.startswith(prefix):
            words += shlex.split(line.removeprefix(prefix))
        elif line.strip() and not line.startswith("#"):
            break
    return words


def to_minutes(text: str, *, units: tuple[float, ...]) -> float:
    """Return minutes of `a`, `a:b` or `a:b:c`; units are the minutes of a lone number, then of `a` in `a:b`."""
    parts = [float(part) for part in text.split(":")]
    if len(parts) == 1:
        return parts[0] * units[0]
    if len(parts) == 2:
        return parts[0] * units[1] + parts[1] * units[1] / 60
    return parts[0] * 60 + parts[1] + parts[2] / 60


def escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# The dialects


class Dialect:
    """What all have in common; each sets tables and overrides what it prints."""

    name = ""
    commands: dict[str, str] = {}
    prefix = ""
    #: Options of the submit command that take a word.
    values: set[str] = set()
    #: What they are called: job name, output, queue, time, nodes.
    names: dict[str, tuple[str, ...]] = {}
    refusals: dict[str, tuple[str, int]] = {}
    exports_all = True

    def submit(self, words: list[str]) -> Job:
        knobs = read_knobs()
        found, rest = self.read_request(words)
        job = {
            "name": self.pick(found, "name") or os.path.basename(rest[0] if rest else "NONAME"),
            "output": self.pick(found, "output"),
            "queue": self.pick(found, "queue") or "batch",
            "nodes": int(self.pick(found, "nodes") or 1),
            "minutes": self.find_minutes(found),
            "notify": "-notify" in found,
        }
        job["minutes"] = job["minutes"] or float(knobs["minutes"])
        if job["queue"] not in knobs["queues"]:
            raise Refused("queue", job["queue"])
        if job["minutes"] > knobs["minutes"]:
            raise Refused("time", "")
        return job

    def read_request(self, words: list[str]) -> tuple[dict[str, str], list[str]]:
        found, rest = parse_words(words, self.values)
        if not rest:
            raise Refused("script", "")
        self.text = self.read_script(rest[0])
        stated, _ = parse_words(read_directives(self.text, self.prefix), self.values)
        if "-l" in stated and "-l" in found:
            found["-l"] = f"{stated['-l']},{found['-l']}"
        return stated | found, rest

    def read_script(self, path: str) -> str:
        try:
            with open(path) as file:
                return file.read()
        except OSError:
            raise Refused("script", path) from None

    def pick(self, found: dict[str, str], what: str) -> str:
        return next((found[name] for name in self.names.get(what, ()) if name in found), "")

    def find_minutes(self, found: dict[str, str]) -> float:
        text = self.pick(found, "time")
        return to_minutes(text, units=(1, 60)) if text else 0

    def refuse(self, kind: str, word: str) -> Answer:
        text, code = self.refusals[kind]
        return "", text.replace("{word}", word).replace("{user}", USER) + "\n", code

    def down(self, verb: str) -> Answer:
        return self.refuse("down", "")

    def accept(self, job: Job) -> str:
        raise NotImplementedError

    def status(self, jobs: list[Job], words: list[str]) -> Answer:
        raise NotImplementedError

    def history(self, jobs: list[Job], words: list[str]) -> Answer:
        raise NotImplementedError

    def cancel_id(self, words: list[str]) -> str:
        return words[-1]

    def number_of(self, text: str) -> int:
        match = re.match("[0-9]+", text)
        return int(match[0]) if match else -1

    def cancelled(self, job: Job | None, text: str, was: str) -> Answer:
        raise NotImplementedError

    def environ(
        self, job: Job, nodes: list[str], node_file: str, start: float, end: float
    ) -> dict[str, str]:
        raise NotImplementedError

    def end_plan(self, job: Job, why: str) -> list[Step]:
        raise NotImplementedError

    def extra(self, verb: str, words: list[str]) -> Answer | None:
        return None


class Slurm(Dialect):
    name = "slurm"
    commands = {"sbatch": "submit", "squeue": "status", "scancel": "cancel", "sacct": "history"}
    prefix = "#SBATCH"
    values = as_set(
        "-J -o -p -t -N -A -q -C --job-name --output --partition --time --nodes --account --qos --open-mode -D --chdir"
    )
    names = {
        "name": ("--job-name", "-J"),
        "output": ("--output", "-o"),
        "queue": ("--partition", "-p"),
        "time": ("--time", "-t"),
        "nodes": ("--nodes", "-N"),
    }
    refusals = {
        "script": ("sbatch: error: Unable to open file {word}", 1),
        "queue": (
            "sbatch: error: invalid partition specified: {word}\n"
            "sbatch: error: Batch job submission failed: Invalid partition name specified",
            1,
        ),
        "time": (
            "sbatch: error: Batch job submission failed: "
            "Requested time limit is invalid (missing or exceeds some limit)",
            1,
        ),
        "capacity": (
            "sbatch: error: QOSMaxSubmitJobPerUserLimit\n"
            "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy "
            "(job submit limit, user's size and/or time limits)",
            1,
        ),
    }

    def find_minutes(self, found: dict[str, str]) -> float:
        text = self.pick(found, "time")
        return to_minutes(text, units=(1, 1)) if text else 0  # M, M:S, H:M:S

    def down(self, verb: str) -> Answer:
        what = {
            "submit": "sbatch: error: Batch job submission failed: ",
            "status": "slurm_load_jobs error: ",
            "history": "sacct: error: ",
            "cancel": "scancel: error: ",
        }[verb]
        return "", f"{what}Unable to contact slurm controller (connect failure)\n", 1

    def accept(self, job: Job) -> str:
        is_short = "--parsable" in sys.argv
        return f"{job['number']}\n" if is_short else f"Submitted batch job {job['number']}\n"

    def state_of(self, job: Job) -> tuple[str, str]:
        if job["state"] != "ended":
            return {
                "queued": ("PENDING", "Resources"),
                "running": ("RUNNING", "None"),
                "ending": ("COMPLETING", "None"),
            }[job["state"]]
        if job["why"]:
            return {"cancel": ("CANCELLED", "None"), "limit": ("TIMEOUT", "TimeLimit")}[job["why"]]
        return ("COMPLETED", "None") if job["code"] == 0 else ("FAILED", "NonZeroExitCode")

    def stamp(self, at: float | None) -> str:
        form = os.environ.get("SLURM_TIME_FORMAT", "%Y-%m-%dT%H:%M:%S")
        return time.strftime(form, time.localtime(at)) if at else "N/A"

    def status(self, jobs: list[Job], words: list[str]) -> Answer:
        found, _ = parse_words(
            words, {"-t", "-o", "-j", "-u", "-M", "-n", "--states", "--format", "--jobs", "--user"}
        )
        if "all" not in (found.get("-t"), found.get("--states")):
            jobs = [job for job in jobs if job["state"] != "ended"]
        asked = found.get("-j", found.get("--jobs", ""))
        if asked:
            numbers = {self.number_of(word) for word in asked.split(",")}
            jobs = [job for job in jobs if job["number"] in numbers]
            if not jobs and len(numbers) == 1:
                return "", "slurm_load_jobs error: Invalid job id specified\n", 1
        form = found.get("-o", found.get("--format", "%i|%T|%j"))
        heads = {
            "i": "JOBID",
            "T": "STATE",
            "r": "REASON",
            "S": "START_TIME",
            "e": "END_TIME",
            "D": "NODES",
        }
        heads |= {"P": "PARTITION", "j": "NAME", "L": "TIME_LEFT", "u": "USER", "V": "SUBMIT_TIME"}
        head = (
            ""
            if "-h" in found
            else re.sub("%([A-Za-z])", lambda match: heads[match[1]], form) + "\n"
        )
        return head + "".join(self.line(form, job) + "\n" for job in jobs), "", 0

    def line(self, form: str, job: Job) -> str:
        state, reason = self.state_of(job)
        end = job["ended"] or (job["started"] + limit_s(job) if job["started"] else None)
        started, submitted = self.stamp(job["started"]), self.stamp(job["submitted"])
        values = {
            "i": str(job["number"]),
            "j": job["name"],
            "T": state,
            "r": reason,
            "P": job["queue"],
            "u": USER,
        }
        values |= {
            "D": str(job["nodes"]),
            "S": started,
            "e": self.stamp(end),
            "V": submitted,
            "L": "0:00",
        }
        return re.sub("%[.0-9]*([A-Za-z])", lambda match: values.get(match[1], ""), form)

    def history(self, jobs: list[Job], words: list[str]) -> Answer:
        if not read_knobs()["is_history_kept"]:
            return "", "Slurm accounting storage is disabled\n", 1
        found, _ = parse_words(words, {"-j", "-o", "-M", "-S", "-E", "--jobs", "--format"})
        asked = found.get("-j", found.get("--jobs", ""))
        numbers = {self.number_of(word) for word in asked.split(",")}
        fields = found.get("-o", found.get("--format", "JobID,State,ExitCode")).split(",")
        rows = [self.account(job, fields) for job in jobs if job["number"] in numbers]
        return "".join("|".join(row) + "\n" for row in rows), "", 0

    def account(self, job: Job, fields: list[str]) -> list[str]:
        state, reason = self.state_of(job)
        code = job["code"] or 0
        values = {
            "jobidraw": str(job["number"]),
            "jobname": job["name"],
            "state": f"CANCELLED by {os.getuid()}" if state == "CANCELLED" else state,
            "reason": reason,
            "exitcode": f"{code}:0" if code >= 0 else f"0:{-code}",
            "start": self.stamp(job["started"]).replace("N/A", "None"),
            "end": self.stamp(job["ended"]).replace("N/A", "Unknown"),
        }
        return [values.get(name.partition("%")[0].strip().lower(), "") for name in fields]

    def cancelled(self, job: Job | None, text: str, was: str) -> Answer:
        # As recorded: the status is 0 whatever happens, and without -v there is not a word.
        words = f"scancel: Terminating job {text}\n"
        if job is None or was == "ended":
            end = "Job/step already completing or completed" if job else "Invalid job id specified"
            words += f"scancel: error: Kill job error on job id {text}: {end}\n"
        return "", words if "-v" in sys.argv else "", 0

    def environ(
        self, job: Job, nodes: list[str], node_file: str, start: float, end: float
    ) -> dict[str, str]:
        return {
            "SLURM_JOB_ID": str(job["number"]),
            "SLURM_JOB_NODELIST": f"nid[001-{len(nodes):03}]" if len(nodes) > 1 else nodes[0],
            "SLURM_JOB_NUM_NODES": str(len(nodes)),
            "SLURM_JOB_CPUS_PER_NODE": f"4(x{len(nodes)})" if len(nodes) > 1 else "4",
            "SLURM_JOB_NAME": job["name"],
            "SLURMD_NODENAME": nodes[0],
            "SLURM_JOB_END_TIME": str(int(end)),
            "SLURM_SUBMIT_DIR": job["cwd"],
        }

    def end_plan(self, job: Job, why: str) -> list[Step]:
        return [((signal.SIGCONT, signal.SIGTERM), "all", 30), KILL]


class Pbs(Dialect):
    name = "pbs"
    commands = {"qsub": "submit", "qstat": "status", "qdel": "cancel", "pbsnodes": "none"}
    prefix = "#PBS"
    values = as_set("-N -o -e -q -l -A -j -r -k -W -v -P -S -a -m -M")
    names = {"name": ("-N",), "output": ("-o",), "queue": ("-q",)}
    refusals = {
        "script": ("qsub: script file:: No such file or directory", 1),
        "queue": ("qsub: Unknown queue", 170),
        "time": ("qsub: Job violates queue and/or server resource limits", 188),
        "capacity": ("qsub: would exceed queue generic's per-user limit", 38),
    }
    exports_all = False

    def submit(self, words: list[str]) -> Job:
        job = super().submit(words)
        # [host:]path
        job["output"] = re.sub("^[A-Za-z0-9.-]*:", "", job["output"])
        job["nodes"] = self.nodes
        return job

    def find_minutes(self, found: dict[str, str]) -> float:
        self.nodes = int(next(iter(re.findall(r"select=([0-9]+)", found.get("-l", ""))), 1))
        times = re.findall(r"walltime=([0-9:]+)", found.get("-l", ""))
        return to_minutes(times[-1], units=(1 / 60, 1)) if times else 0

    def down(self, verb: str) -> Answer:
        command = os.path.basename(sys.argv[0])
        words = f"Unknown Host.\n{command}: cannot connect to server {SERVER} (errno=15008)\n"
        # As recorded: a listing without jobs, but for its status and what is on standard error.
        return self.document({}) if "json" in sys.argv else "", words, 255

    def document(self, jobs: dict[str, Any]) -> str:
        head = {"timestamp": int(time.time()), "pbs_version": "23.06.06", "pbs_server": SERVER}
        return json.dumps(head | ({"Jobs": jobs} if jobs else {}), indent="\t") + "\n"

    def accept(self, job: Job) -> str:
        return f"{job['number']}.{SERVER}\n"

    def status(self, jobs: list[Job], words: list[str]) -> Answer:
        found, asked = parse_words(words, {"-F", "-u", "-D"})
        is_old_shown = "-x" in found and read_knobs()["is_history_kept"]
        by_number = {job["number"]: job for job in jobs}
        shown, errors, code = list(by_number.values()), "", 0
        if asked:
            shown = []
            for text in asked:
                job = by_number.get(self.number_of(text))
                if job is None or (job["state"] == "ended" and not read_knobs()["is_history_kept"]):
                    errors, code = errors + f"qstat: Unknown Job Id {text}\n", 153
                elif job["state"] == "ended" and not is_old_shown:
                    hint = "Job has finished, use -x or -H to obtain historical job information"
                    errors, code = errors + f"qstat: {text} {hint}\n", 35
                else:
                    shown.append(job)
        shown = [job for job in shown if job["state"] != "ended" or is_old_shown]
        return (
            self.document({f"{job['number']}.{SERVER}": self.describe(job) for job in shown}),
            errors,
            code,
        )

    def describe(self, job: Job) -> dict[str, Any]:
        start = job["started"]
        run_at = f"Job run at {time.strftime('%a %b %d at %H:%M', time.localtime(start))} on (nid001:ncpus=4)"
        letter, substate, end = {
            "queued": (
                "Q",
                10,
                "Not Running: Insufficient amount of resource: ncpus (R: 4 A: 0 T: 4)",
            ),
            "running": ("R", 42, run_at),
            "ending": ("E", 50, run_at),
            "ended": ("F", 92, f"{run_at} and finished"),
        }[job["state"]]
        told: dict[str, Any] = {}
        if job["state"] == "ended":
            code = job["code"]
            if job["why"] == "limit":
                code, substate, end = -29, 93, f"{run_at} and exceeded resource walltime"
            elif job["why"]:
                substate = 91
                end = f"{run_at if start else 'Not Running: Not enough free nodes'} and terminated by {USER}@{SERVER}"
            elif code:
                substate, end = 93, f"{run_at} and failed"
            if code is not None:
                told["Exit_status"] = 256 - code if code < 0 and job["why"] != "limit" else code
        if start:
            told |= {"stime": self.stamp(start), "exec_host": "nid001/0", "run_count": 1}
        return {
            "Job_Name": job["name"],
            "Job_Owner": f"{USER}@{SERVER}",
            "job_state": letter,
            "queue": job["queue"],
            "server": SERVER,
            "ctime": self.stamp(job["submitted"]),
            "mtime": self.stamp(job["ended"] or start or job["submitted"]),
            "Hold_Types": "n",
            "Output_Path": f"{SERVER}:{job['output']}",
            "qtime": self.stamp(job["submitted"]),
            "Resource_List": {"nodect": job["nodes"], "walltime": self.clock(job["minutes"])},
            "substate": substate,
            "Variable_List": {"PBS_O_HOME": "/home/hpc", "PBS_O_QUEUE": job["queue"]},
            "comment": end,
            "project": "_pbs_project_default",
            **told,
        }  # fmt: skip

    def stamp(self, at: float) -> str:
        return time.strftime("%a %b %d %H:%M:%S %Y", time.localtime(at))

    def clock(self, minutes: float) -> str:
        seconds = int(minutes * 60)
        return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def cancelled(self, job: Job | None, text: str, was: str) -> Answer:
        if job is None or (was == "ended" and not read_knobs()["is_history_kept"]):
            return "", f"qdel: Unknown Job Id {text}\n", 153
        return ("", f"qdel: Job has finished {text}\n", 35) if was == "ended" else ("", "", 0)

    def environ(
        self, job: Job, nodes: list[str], node_file: str, start: float, end: float
    ) -> dict[str, str]:
        # A line for each MPI process.
        with open(node_file, "w") as file:
            file.writelines(f"{node}\n" for node in nodes for _ in range(2))
        return {
            "PBS_JOBID": f"{job['number']}.{SERVER}",
            "PBS_JOBNAME": job["name"],
            "PBS_NODEFILE": node_file,
            "PBS_QUEUE": job["queue"],
            "PBS_O_WORKDIR": job["cwd"],
            "PBS_ENVIRONMENT": "PBS_BATCH",
        }

    def end_plan(self, job: Job, why: str) -> list[Step]:
        return [((signal.SIGTERM,), "all", 10), KILL]


class Cobalt(Dialect):
    name = "cobalt"
    commands = {"qsub": "submit", "qstat": "status", "qdel": "cancel", "cqwait": "none"}
    prefix = "#COBALT"
    values = as_set("--jobname -o -e -O --debuglog -q -t -n -A --cwd --env --attrs")
    names = {
        "name": ("--jobname",),
        "output": ("-o",),
        "queue": ("-q",),
        "time": ("-t",),
        "nodes": ("-n",),
    }
    refusals = {
        "script": ("command {word} not found, or is not executable", 1),
        "queue": ("Queue '{word}' does not exist", 1),
        "time": ("Walltime greater than the max walltime of the queue", 1),
        "capacity": ("The limit of 3 jobs per user in the 'batch' queue has been reached", 1),
        "down": ("Failed to connect to queue manager", 1),
    }
    exports_all = False

    def read_script(self, path: str) -> str:
        if not os.access(path, os.X_OK):
            raise Refused("script", path)
        return super().read_script(path)

    def accept(self, job: Job) -> str:
        return f"{job['number']}\n"

    def status(self, jobs: list[Job], words: list[str]) -> Answer:
        found, _ = parse_words(words, {"--header", "-u"})
        header = found.get("--header", "JobID:User:WallTime:Nodes:State:Location").split(":")
        rows = [header] + [
            [self.cell(name, job) for name in header] for job in jobs if job["state"] != "ended"
        ]
        widths = [max(len(row[n]) for row in rows) for n in range(len(header))]
        lines = [
            "".join(f"{cell:<{width}}  " for cell, width in zip(row, widths, strict=True))
            for row in rows
        ]
        lines.insert(1, "=" * (sum(widths) + 2 * len(widths)))
        return "\n".join(lines) + "\n", "", 0

    def cell(self, name: str, job: Job) -> str:
        state = {"queued": "queued", "running": "running", "ending": "killing"}[job["state"]]
        minutes = int(job["minutes"])
        start = time.strftime("%a %b %d %H:%M:%S %Y +0000 (UTC)", time.gmtime(job["started"] or 0))
        values = {
            "JobID": str(job["number"]),
            "JobName": job["name"],
            "User": USER,
            "State": state,
            "WallTime": f"{minutes // 60:02}:{minutes % 60:02}:00",
            "StartTime": start if job["started"] else "N/A",
        }
        return values.get(name, "-")

    def cancelled(self, job: Job | None, text: str, was: str) -> Answer:
        if job is None or was == "ended":
            return f"qdel: Job {text} not found\n", "", 0
        return f"      Deleted Jobs\nJobID  User  \n=============\n{text}  {USER}  \n", "", 0

    def environ(
        self, job: Job, nodes: list[str], node_file: str, start: float, end: float
    ) -> dict[str, str]:
        with open(node_file, "w") as file:
            file.write(",".join(nodes) + "\n")
        return {
            "COBALT_JOBID": str(job["number"]),
            "COBALT_NODEFILE": node_file,
            "COBALT_PARTNAME": f"1-{len(nodes)}",
            "COBALT_JOBSIZE": str(len(nodes)),
            "COBALT_STARTTIME": str(int(start)),
            "COBALT_ENDTIME": str(int(end)),
        }

    def end_plan(self, job: Job, why: str) -> list[Step]:
        return [((signal.SIGTERM,), "script", 300), KILL]


class Lsf(Dialect):
    name = "lsf"
    commands = {"bsub": "submit", "bjobs": "status", "bkill": "cancel", "bacct": "history"}
    prefix = "#BSUB"
    values = as_set("-J -o -e -q -W -P -nnodes -n -R -U -w -cwd")
    names = {
        "name": ("-J",),
        "output": ("-o",),
        "queue": ("-q",),
        "time": ("-W",),
        "nodes": ("-nnodes",),
    }
    refusals = {
        "queue": ("{word}: No such queue. Job not submitted.", 255),
        "time": ("RUNLIMIT: Cannot exceed queue's hard limit(s). Job not submitted.", 255),
        "capacity": (
            "batch: The destination queue has reached its job limit. Job not submitted.",
            255,
        ),
    }

    def read_request(self, words: list[str]) -> tuple[dict[str, str], list[str]]:
        found, _ = parse_words(words, self.values)
        self.text = sys.stdin.read()
        if not self.text.strip():
            raise Refused("queue", "Empty job")
        stated, _ = parse_words(read_directives(self.text, self.prefix), self.values)
        return stated | found, ["NONAME"]

    def find_minutes(self, found: dict[str, str]) -> float:
        text = self.pick(found, "time")
        return to_minutes(text, units=(1, 60)) if text else 0  # [H:]M

    def down(self, verb: str) -> Answer:
        if verb == "submit":
            words = "Failed in an LSF library call: Slave LIM configuration is not ready yet. Job not submitted."
            return "", words + "\n", 255
        return "", "LSF is down. Please wait ...\n", 255

    def accept(self, job: Job) -> str:
        return f"Job <{job['number']}> is submitted to queue <{job['queue']}>.\n"

    def status(self, jobs: list[Job], words: list[str]) -> Answer:
        found, asked = parse_words(words, {"-o", "-u", "-J"})
        if asked:
            jobs = [
                job for job in jobs if job["number"] in {self.number_of(text) for text in asked}
            ]
        if "-a" not in found:
            jobs = [job for job in jobs if job["state"] != "ended"]
        if "-json" not in found:
            return "".join("0:59 L\n" for _ in jobs), "", 0
        if not jobs:
            return "", "No job found\n", 0
        fields = found["-o"].upper().split()
        records = [{name: self.field(name, job) for name in fields} for job in jobs]
        return json.dumps({"COMMAND": "bjobs", "JOBS": len(jobs), "RECORDS": records}) + "\n", "", 0

    def field(self, name: str, job: Job) -> str:
        word = {"queued": "PEND", "running": "RUN", "ending": "RUN"}.get(job["state"])
        code = job["code"]
        is_well = code == 0
        reasons = {
            "cancel": "TERM_OWNER: job killed by owner",
            "limit": "TERM_RUNLIMIT: job killed after reaching LSF run time limit",
        }
        is_over = job["state"] == "ended"
        values = {
            "JOBID": str(job["number"]),
            "STAT": word or ("DONE" if is_well else "EXIT"),
            "JOB_NAME": job["name"],
            "EXIT_CODE": str(128 - code if code < 0 else code) if is_over and code else "",
            "EXIT_REASON": reasons.get(job["why"], "") if is_over and not is_well else "",
        }
        return values.get(name, "")

    def history(self, jobs: list[Job], words: list[str]) -> Answer:
        job = next((job for job in jobs if job["number"] == self.number_of(words[-1])), None)
        if job is None or job["state"] != "ended":
            return "", "No matching job found\n", 255
        reason = self.field("EXIT_REASON", job)
        end = "done" if job["code"] == 0 else f"exit>; {reason}." if reason else "exit"
        text = (
            f"Job <{job['number']}>, Job Name <{job['name']}>, User <{USER}>, Project <default>, Status <DONE>,\n"
            f"                     Queue <{job['queue']}>\nMon May  6 22:58:03: Completed <{end}"
        )
        return text + (">.\n" if not reason else "\n"), "", 0

    def cancelled(self, job: Job | None, text: str, was: str) -> Answer:
        if job is None:
            return "", f"Job <{text}>: No matching job found\n", 255
        if was == "ended":
            return "", f"Job <{text}>: Job has already finished\n", 255
        return f"Job <{text}> is being terminated\n", "", 0

    def environ(
        self, job: Job, nodes: list[str], node_file: str, start: float, end: float
    ) -> dict[str, str]:
        with open(node_file, "w") as file:
            file.writelines(f"{node}\n" for node in nodes for _ in range(4))
        return {
            "LSB_JOBID": str(job["number"]),
            "LSB_JOBINDEX": "0",
            "LSB_JOBNAME": job["name"],
            "LSB_DJOB_HOSTFILE": node_file,
            "LSB_MCPU_HOSTS": " ".join(f"{node} 4" for node in nodes),
            "LSB_QUEUE": job["queue"],
            "LS_SUBCWD": job["cwd"],
        }

    def end_plan(self, job: Job, why: str) -> list[Step]:
        steps: list[Step] = [((signal.SIGINT,), "all", 10), ((signal.SIGTERM,), "all", 10), KILL]
        return [((signal.SIGUSR2,), "all", 600), *steps] if why == "limit" else steps


class Sge(Dialect):
    name = "sge"
    commands = {
        "qsub": "submit",
        "qstat": "status",
        "qdel": "cancel",
        "qacct": "history",
        "qconf": "none",
    }
    prefix = "#$"
    values = as_set("-N -o -e -q -l -P -j -S -r -pe -hold_jid -u")
    names = {"name": ("-N",), "output": ("-o",), "queue": ("-q",)}
    refusals = {
        "script": (
            "Unable to read script file because of error: error opening {word}: No such file or directory",
            1,
        ),
        "queue": (
            'Unable to run job: Job was rejected because job requests unknown queue "{word}".\nExiting.',
            1,
        ),
        "time": ("Unable to run job: error: no suitable queues.\nExiting.", 1),
        "capacity": (
            "Unable to run job: job rejected: only 3 jobs are allowed per user (current job count: 3)\nExiting.",
            1,
        ),
        "down": (
            "error: commlib error: got select error (Connection refused)\n"
            f'error: unable to send message to qmaster using port 6444 on host "{SERVER}": got send error',
            1,
        ),
    }
    exports_all = False

    def find_minutes(self, found: dict[str, str]) -> float:
        times = re.findall(r"h_rt=([0-9:]+)", found.get("-l", ""))
        return to_minutes(times[-1], units=(1 / 60, 1)) if times else 0

    def submit(self, words: list[str]) -> Job:
        # -pe takes two words
        where = words.index("-pe") if "-pe" in words else None
        nodes = int(words[where + 2]) if where is not None else 1
        rest = words[:where] + words[where + 3 :] if where is not None else words
        return super().submit(rest) | {"nodes": nodes, "has_pe": where is not None}

    def accept(self, job: Job) -> str:
        text = f'Your job {job["number"]} ("{job["name"]}") has been submitted'
        return f"{job['number']}\n" if "-terse" in sys.argv else text + "\n"

    def status(self, jobs: list[Job], words: list[str]) -> Answer:
        running = "".join(
            self.element(job) for job in jobs if job["state"] in ("running", "ending")
        )
        pending = "".join(self.element(job) for job in jobs if job["state"] == "queued")
        return (
            "<?xml version='1.0'?>\n"
            '<job_info  xmlns:xsd="http://arc.liv.ac.uk/repos/darcs/sge/source/dist/util/resources/schemas/qstat/qstat.xsd">\n'
            f"  <queue_info>\n{running}  </queue_info>\n  <job_info>\n{pending}  </job_info>\n</job_info>\n",
            "",
            0,
        )

    def element(self, job: Job) -> str:
        word, letters = {
            "queued": ("pending", "qw"),
            "running": ("running", "r"),
            "ending": ("running", "dr"),
        }[job["state"]]
        at, tag = (
            (job["started"], "JAT_start_time")
            if job["started"]
            else (job["submitted"], "JB_submission_time")
        )
        return (
            f'    <job_list state="{word}">\n'
            f"      <JB_job_number>{job['number']}</JB_job_number>\n"
            "      <JAT_prio>0.55500</JAT_prio>\n"
            f"      <JB_name>{escape(job['name'])}</JB_name>\n"
            f"      <JB_owner>{USER}</JB_owner>\n"
            f"      <state>{letters}</state>\n"
            f"      <{tag}>{time.strftime('%Y-%m-%dT%H:%M:%S', time.localtime(at))}</{tag}>\n"
            "      <slots>1</slots>\n    </job_list>\n"
        )

    def history(self, jobs: list[Job], words: list[str]) -> Answer:
        number = self.number_of(words[-1])
        job = next((job for job in jobs if job["number"] == number), None)
        # One that never ran leaves no account.
        if (
            job is None
            or job["state"] != "ended"
            or not job["started"]
            or not read_knobs()["is_history_kept"]
        ):
            return "", f"error: job id {number} not found\n", 1
        code = job["code"]
        lines = {
            "qname": job["queue"],
            "owner": USER,
            "jobname": job["name"],
            "jobnumber": str(number),
            "taskid": "undefined",
            "start_time": time.strftime("%a %b %d %H:%M:%S %Y", time.localtime(job["started"])),
            "end_time": time.strftime("%a %b %d %H:%M:%S %Y", time.localtime(job["ended"])),
            "failed": "100 : assumedly after job" if code < 0 else "0",
            "exit_status": f"{128 - code}                  (Killed)" if code < 0 else str(code),
        }
        return (
            "=" * 62 + "\n" + "".join(f"{key:<13}{value}\n" for key, value in lines.items()),
            "",
            0,
        )

    def cancelled(self, job: Job | None, text: str, was: str) -> Answer:
        if job is None or was == "ended":
            return f'denied: job "{text}" does not exist\n', "", 1
        if was == "queued":
            return f"{USER} has deleted job {text}\n", "", 0
        return f"{USER} has registered the job {text} for deletion\n", "", 0

    def environ(
        self, job: Job, nodes: list[str], node_file: str, start: float, end: float
    ) -> dict[str, str]:
        told = {
            "JOB_ID": str(job["number"]),
            "SGE_TASK_ID": "undefined",
            "JOB_NAME": job["name"],
            "NSLOTS": str(len(nodes)),
            "NHOSTS": str(len(nodes)),
            "QUEUE": job["queue"],
            "SGE_O_WORKDIR": job["cwd"],
        }
        if job["has_pe"]:
            with open(node_file, "w") as file:
                file.writelines(f"{node} 4 {job['queue']}@{node} UNDEFINED\n" for node in nodes)
            told["PE_HOSTFILE"] = node_file
        return told

    def end_plan(self, job: Job, why: str) -> list[Step]:
        return [((signal.SIGUSR2,), "all", 60), KILL] if job["notify"] else [KILL]


class Flux(Dialect):
    name = "flux"
    commands = {"flux": "flux"}
    prefix = "# flux:"
    values = as_set("-N -t -q -B -n --job-name --output --queue --time-limit --nodes")
    names = {
        "name": ("--job-name",),
        "output": ("--output",),
        "queue": ("-q", "--queue"),
        "nodes": ("-N", "--nodes"),
    }
    refusals = {
        "script": ("flux-batch: ERROR: Failed to open script file: {word}", 1),
        "queue": ("flux-batch: ERROR: [Errno 22] Invalid queue '{word}' specified", 1),
        "time": (
            "flux-batch: ERROR: [Errno 22] requested duration (2h) exceeds policy limit of 1h",
            1,
        ),
        "capacity": ("flux-batch: ERROR: [Errno 22] user has max active jobs", 1),
        "down": ("flux: ERROR: Unable to connect to Flux: ENOENT: No such file or directory", 1),
    }
    alphabet = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
    #: Ids are large.
    first = 6731191091817518

    def find_minutes(self, found: dict[str, str]) -> float:
        text = found.get("-t", found.get("--time-limit", ""))
        unit = {"s": 1 / 60, "m": 1, "h": 60, "d": 1440}.get(text[-1:])
        return float(text[:-1]) * unit if unit else float(text or 0)

    def spell(self, number: int) -> str:
        value, digits = self.first + number, ""
        while value:
            value, digit = divmod(value, 58)
            digits = self.alphabet[digit] + digits
        return ("f" if os.environ.get("FLUX_F58_FORCE_ASCII") else "ƒ") + digits

    def number_of(self, text: str) -> int:
        if text.isdigit():
            return int(text) - self.first
        value = 0
        for digit in text[1:]:
            value = value * 58 + self.alphabet.index(digit)
        return value - self.first

    def accept(self, job: Job) -> str:
        return f"{self.spell(job['number'])}\n"

    def status(self, jobs: list[Job], words: list[str]) -> Answer:
        if "-a" not in words:
            jobs = [job for job in jobs if job["state"] != "ended"]
        return json.dumps({"jobs": [self.describe(job) for job in jobs]}) + "\n", "", 0

    def describe(self, job: Job) -> dict[str, Any]:
        state = {"queued": "SCHED", "running": "RUN", "ending": "CLEANUP", "ended": "INACTIVE"}[
            job["state"]
        ]
        told: dict[str, Any] = {
            "id": self.first + job["number"],
            "name": job["name"],
            "state": state,
            "urgency": 16,
            "exception": {"occurred": False},
            "t_submit": job["submitted"],
        }
        if job["started"]:
            told["t_run"] = job["started"]
        if job["why"]:
            kind = {"cancel": "cancel", "limit": "timeout"}[job["why"]]
            told["exception"] = {"occurred": True, "severity": 0, "type": kind, "note": ""}
        if state == "INACTIVE":
            code = job["code"]
            results = {
                "cancel": "CANCELED",
                "limit": "TIMEOUT",
                None: "FAILED" if code else "COMPLETED",
            }
            told["result"] = results[job["why"]]
            told["returncode"] = -128 if code is None else code
            told["t_inactive"] = job["ended"]
        return told

    def cancelled(self, job: Job | None, text: str, was: str) -> Answer:
        if job is None:
            return "", f"flux-cancel: ERROR: {text}: unknown job id\n", 1
        return (
            ("", f"flux-cancel: ERROR: {text}: job is inactive\n", 1)
            if was == "ended"
            else ("", "", 0)
        )

    def environ(
        self, job: Job, nodes: list[str], node_file: str, start: float, end: float
    ) -> dict[str, str]:
        with open(node_file, "w") as file:
            file.write(f"nid[001-{len(nodes):03}]\n{end}\n")
        return {"FLUX_ENCLOSING_ID": self.spell(job["number"]), "FLUX_URI": f"local://{node_file}"}

    def end_plan(self, job: Job, why: str) -> list[Step]:
        return [((signal.SIGTERM,), "all", 5), KILL]

    def extra(self, verb: str, words: list[str]) -> Answer | None:
        """Answer what is asked inside of an instance."""
        with open(os.environ["FLUX_URI"].removeprefix("local://")) as file:
            nodes, end = file.read().split()
        if words == ["getattr", "hostlist"]:
            return nodes + "\n", "", 0
        if words == ["job", "timeleft"]:
            return f"{max(0, int(float(end) - time.time()))}\n", "", 0
        return None


DIALECTS: dict[str, type[Dialect]] = {
    each.name: each for each in (Slurm, Pbs, Cobalt, Lsf, Sge, Flux)
}


# The commands


def main() -> int:
    directory, command = os.path.split(sys.argv[0])
    dialect = DIALECTS[os.path.basename(directory)]()
    verb, words = dialect.commands[command], sys.argv[1:]
    if verb == "flux":
        verbs = {"batch": "submit", "jobs": "status", "cancel": "cancel"}
        verb, words = verbs.get(words[0], "extra"), words[1:] if words[0] in verbs else words
    knobs = read_knobs()
    time.sleep(knobs["latency_s"].get(verb, 0))
    if knobs["noise"]:
        print(knobs["noise"], file=sys.stderr, flush=True)
    if knobs["is_down"]:
        out, err, code = dialect.down(verb)
    elif verb in knobs["nonsense"]:
        out, err, code = knobs["nonsense"][verb], "", 0
    else:
        out, err, code = perform(dialect, verb, words)
    if verb == "status" and knobs["cut"]:
        out = out[: -knobs["cut"]]
    sys.stdout.write(out)
    sys.stderr.write(err)
    return code


def perform(dialect: Dialect, verb: str, words: list[str]) -> Answer:
    knobs = read_knobs()
    if verb == "submit":
        return submit(dialect, words)
    if verb == "cancel":
        return cancel(dialect, words)
    with books() as state:
        jobs = [job for job in state["jobs"].values() if job["name"] not in knobs["vanished"]]
    if verb in ("status", "history"):
        return getattr(dialect, verb)(jobs, words)
    return dialect.extra(verb, words) or ("", f"not faked: {words}\n", 1)


def submit(dialect: Dialect, words: list[str]) -> Answer:
    knobs = read_knobs()
    try:
        job = dialect.submit(words)
        with books() as state:
            active = [each for each in state["jobs"].values() if each["state"] != "ended"]
            if len(active) >= knobs["most"]:
                raise Refused("capacity", "")
            number = state["next"]
            state["next"] += 1
            job |= {
                "number": number, "state": "queued", "why": None, "code": None, "started": None, "ended": None,
                "submitted": time.time(), "cwd": os.getcwd(), "supervisor": 0,
            }  # fmt: skip
            state["jobs"][str(number)] = job
            # As all do, it runs a copy.
            spool = os.path.join(os.environ["FAKEBATCH_DIR"], f"{number}.sh")
            with open(spool, "w") as file:
                file.write(dialect.text)
    except Refused as refused:
        return dialect.refuse(*refused.args)
    detach(dialect, number)
    if knobs["hangs_after_accept"]:
        time.sleep(3600)
    return "" if knobs["is_silent"] else dialect.accept(job), "", 0


def cancel(dialect: Dialect, words: list[str]) -> Answer:
    text = dialect.cancel_id(words)
    with books() as state:
        job = state["jobs"].get(str(dialect.number_of(text)))
        was = job["state"] if job else ""
        if job is not None and was in ("queued", "running"):
            job["why"] = "cancel"
        if job is not None and was == "queued":
            job |= {"state": "ended", "ended": time.time()}
    return dialect.cancelled(job, text, was)


# The process that looks after a job


def detach(dialect: Dialect, number: int) -> None:
    """Start the job's supervisor: nothing of its submitter's is left to it, pipes least of all."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    try:
        supervise(dialect, number)
    finally:
        os._exit(0)


def supervise(dialect: Dialect, number: int) -> None:
    key = str(number)
    # The test is over: at once while it waits, by the end of its script later.
    is_over = []
    signal.signal(signal.SIGTERM, lambda *_: is_over.append(True))
    with books() as state:
        state["jobs"][key]["supervisor"] = os.getpid()
    child = wait_for_turn(dialect, key, is_over)
    if child is None:
        return
    plan: list[Step] | None = None
    next_at = 0.0
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        if is_over:
            kill_all(child)
        if plan is None:
            plan = find_plan(dialect, key)
        if plan and time.time() >= next_at:
            next_at = time.time() + take_step(plan.pop(0), child)
        time.sleep(0.02)
    kill_all(child)
    with books() as state:
        code = os.waitstatus_to_exitcode(status)
        state["jobs"][key] |= {"state": "ended", "code": code, "ended": time.time()}


def find_plan(dialect: Dialect, key: str) -> list[Step] | None:
    """Return how a job is to be ended, once it was cancelled or its time is over."""
    with books() as state:
        job = state["jobs"][key]
        if not job["why"] and time.time() > job["started"] + limit_s(job):
            job["why"] = "limit"
        if not job["why"]:
            return None
        job["state"] = "ending"
        return dialect.end_plan(job, job["why"])


def take_step(step: Step, child: int) -> float:
    """Send a step's signals; return seconds until the next one."""
    signals, whom, pause_s = step
    for each in signals:
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if whom == "all" else os.kill)(child, each)
    return pause_s * read_knobs()["second"]


def limit_s(job: Job) -> float:
    return job["minutes"] * 60 * read_knobs()["second"]


def wait_for_turn(dialect: Dialect, key: str, is_over: list[bool]) -> int | None:
    """Return the process of the job's script, in a session of its own; None if it was cancelled before."""
    while not is_over:
        with books() as state:
            job = state["jobs"][key]
            if job["state"] == "ended":
                return None
            # First come, first served.
            ahead = [each for each in state["jobs"].values() if each["number"] < job["number"]]
            running = [
                each for each in state["jobs"].values() if each["state"] in ("running", "ending")
            ]
            if len(running) < read_knobs()["room"] and not any(
                each["state"] == "queued" for each in ahead
            ):
                job |= {"state": "running", "started": time.time()}
                return run_script(dialect, job)
        time.sleep(0.02)
    return None


def run_script(dialect: Dialect, job: Job) -> int:
    directory = os.environ["FAKEBATCH_DIR"]
    nodes = [f"nid{n + 1:03}" for n in range(job["nodes"])]
    end = job["started"] + limit_s(job)
    kept = ("PATH", "HOME", "LANG", "FAKEBATCH_DIR", "USER", "LOGNAME")
    env = {name: value for name, value in os.environ.items() if dialect.exports_all or name in kept}
    env |= dialect.environ(
        job, nodes, os.path.join(directory, f"{job['number']}.nodes"), job["started"], end
    )
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        for each in (signal.SIGINT, signal.SIGPIPE, signal.SIGHUP, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        path = job["output"] or os.path.join(directory, f"{job['number']}.out")
        output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(job["cwd"])
        os.execve("/bin/bash", ["bash", os.path.join(directory, f"{job['number']}.sh")], env)
    finally:
        os._exit(127)


def kill_all(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
