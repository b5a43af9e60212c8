"""What becomes of tasks' outputs, in both job modes: files, the last 16 kB in the database, or nothing."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ensemble import api
from ensemble.core.model import NewTask
from ensemble.drivers.output import Tail
from ensemble.errors import UsageError
from tests.acceptance.test_cli import ROOT, Command, following, init, run

MPICH = Path(sys.executable).parent / "mpiexec"
KEPT = 16384

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(not MPICH.exists(), reason="NOT TESTED: no mpiexec of MPICH"),
]

#: Name -> what to run, besides how its output is kept.
LINES = "import sys\nfor n in range(100_000): print(f'line {n:06}')"
SCRIPTS = {
    "file": ("file", ["sh", "-c", "echo one; echo two >&2"]),
    "tail": ("tail", ["sh", "-c", "echo one; echo two >&2"]),
    "none": ("none", ["sh", "-c", "echo one; echo two >&2"]),
    "silent": ("tail", ["true"]),
    "long": ("tail", [sys.executable, "-c", LINES]),
    "line": ("tail", [sys.executable, "-c", "print('x' * 1_000_000, end='')"]),
    "binary": ("tail", ["printf", r"a\0b\377\300\n\033[31mred\033[0m\r\nlast"]),
    "left": ("tail", ["sh", "-c", "sleep 600 & echo gone"]),
    "bad-file": ("file", ["sh", "-c", "echo why; exit 3"]),
    "bad-tail": ("tail", ["sh", "-c", "seq 100; echo why; exit 3"]),
    "bad-none": ("none", ["sh", "-c", "echo why; exit 3"]),
    "missing": ("tail", ["./not-there"]),
    "again": ("tail", ["sh", "-c", "echo attempt $ENSEMBLE_ATTEMPT; test $ENSEMBLE_ATTEMPT = 2"]),
}
FAILING = {"bad-file", "bad-tail", "bad-none", "missing"}


@pytest.fixture(scope="module", params=["mpi", "serial"])
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def ens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    path = tmp_path_factory.mktemp("output") / "site"
    done = init(path, cwd=path.parent)
    try:
        assert done.status == 0, done
        yield Command(path)
    finally:
        run("--site", str(path), "db", "stop", cwd=path.parent)
        shutil.rmtree(path, ignore_errors=True)


class Launcher:
    """`ensemble launch` beside the test, until the block ends."""

    def __init__(self, ens: Command, mode: str, *flags: str, nodes: int = 2) -> None:
        self._log = (ens.site / "log" / f"test-{time.monotonic_ns()}").open("w+b")
        words = ["launch", "--job-mode", mode, f"--nodes={nodes}", *flags]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ensemble", *words],
            cwd=ens.site,
            env={**os.environ, "PYTHONPATH": str(ROOT), "ENSEMBLE_MPI_COMMAND": str(MPICH)},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                self.process.send_signal(number)
                try:
                    self.process.wait(20)
                except subprocess.TimeoutExpired:
                    continue
        self._log.close()

    def wait(self) -> None:
        """Wait until it has left, in good order."""
        status = self.process.wait(60)
        self._log.seek(0)
        assert status == 0, self._log.read().decode()


def launch(ens: Command, mode: str, workflow: str, **flags: int) -> None:
    """Run all tasks of a workflow."""
    with Launcher(ens, mode, "--wf-filter", workflow, "--idle-timeout=0", **flags) as launcher:
        launcher.wait()


def until(ens: Command, task: int, state: str) -> None:
    """Wait for a task's state."""
    deadline = time.monotonic() + 20
    while ens.json("show", str(task))["state"] != state:
        assert time.monotonic() < deadline, ens("show", str(task))


@pytest.fixture(scope="module")
def ran(ens: Command, mode: str) -> dict[str, int]:
    """Tasks that one launcher has run, by name."""
    rows = [
        {"name": name, "output": output, "command": argv, "max_retries": int(name == "again")}
        for name, (output, argv) in SCRIPTS.items()
    ]
    text = "\n".join(map(json.dumps, rows))
    ids = ens.full("add", "--workflow", f"all-{mode}", "--from", "-", text=text).ids
    launch(ens, mode, f"all-{mode}")
    found = ens.json("ls", "--workflow", f"all-{mode}")
    assert {task["job_mode"] for task in ens.json("ls", "launchers")} >= {mode}
    assert {task["name"] for task in found if task["state"] == "FAILED"} == FAILING
    assert {task["state"] for task in found} == {"FAILED", "JOB_FINISHED"}
    assert {task["name"]: task["output"] for task in found} == {
        name: output for name, (output, _) in SCRIPTS.items()
    }
    return dict(zip(SCRIPTS, ids, strict=True))


def show(ens: Command, task: int):
    return ens.json("show", str(task))


# ---------------------------------------------------------------------------- what is kept


def test_a_file_is_written_and_nothing_of_it_is_in_the_database(ens, ran):
    found = show(ens, ran["file"])
    assert Path(found["output_file"]).read_text() == "one\ntwo\n"
    assert found["attempts"][0]["output"] is None
    done = ens.full("log", str(ran["file"]))
    assert (done.out, done.err) == ("one\ntwo\n", "")


def test_a_tail_is_in_the_database_and_there_is_no_file(ens, ran):
    found = show(ens, ran["tail"])
    assert (found["output"], found["output_file"]) == ("tail", None)
    assert found["attempts"][0]["output"] == "one\ntwo\n"
    assert list(Path(found["path"]).iterdir()) == []
    done = ens.full("log", str(ran["tail"]))
    assert done.out == "one\ntwo\n"
    assert done.err.count("\n") == 1
    assert "only the end of its output" in done.err
    assert ens("log", str(ran["tail"]), "-f") == "one\ntwo\n"
    assert f"ensemble log {ran['tail']}" in ens("show", str(ran["tail"]))


def test_none_keeps_nothing(ens, ran):
    found = show(ens, ran["none"])
    assert (found["output_file"], found["attempts"][0]["output"]) == (None, None)
    assert list(Path(found["path"]).iterdir()) == []
    for flags in ((), ("-f",), ("--attempt", "1")):
        says = f"task {ran['none']} keeps no output (output = none)"
        ens.fails(3, says, "log", str(ran["none"]), *flags)


def test_of_a_megabyte_the_last_whole_lines_are_kept(ens, ran):
    written = "".join(f"line {n:06}\n" for n in range(100_000))
    kept = ens("log", str(ran["long"]))
    assert written.endswith(kept)
    assert KEPT - len("line 000000\n") < len(kept) <= KEPT
    assert kept.startswith("line ")


def test_of_a_megabyte_without_a_line_the_end_is_kept(ens, ran):
    assert ens("log", str(ran["line"])) == "x" * KEPT


def test_what_is_no_text_becomes_text(ens, ran):
    assert ens("log", str(ran["binary"])) == "ab\ufffd\ufffd\nred\nlast"


def test_a_program_without_output_has_an_empty_one(ens, ran):
    assert ens("log", str(ran["silent"])) == ""


def test_an_output_that_something_left_behind_held_open_is_kept(ens, ran):
    assert ens("log", str(ran["left"])) == "gone\n"


def test_a_failed_task_has_its_last_words_where_they_were_kept(ens, ran):
    errors = {name: show(ens, ran[name])["error"] for name in FAILING}
    assert errors["bad-file"] == "why"
    lines = [str(n) for n in range(82, 101)]
    assert errors["bad-tail"].split("\n") == [*lines, "why"]
    assert errors["bad-none"] is None
    assert "not-there" in errors["missing"]
    assert ens("log", str(ran["bad-tail"])).endswith("100\nwhy\n")
    assert "  why\n" in ens("show", str(ran["bad-tail"]))
    ens.fails(3, "left no output", "log", str(ran["missing"]))


def test_each_attempt_has_its_own_tail(ens, ran):
    task = str(ran["again"])
    assert ens("log", task) == ens("log", task, "--attempt", "2") == "attempt 2\n"
    assert ens("log", task, "--attempt", "1") == "attempt 1\n"
    ens.fails(3, "left no output of attempt 3", "log", task, "--attempt", "3")


def test_what_show_says_as_json_is_more_than_what_ls_says(ens, ran):
    (listed,) = ens.json("ls", str(ran["tail"]))
    shown = show(ens, ran["tail"])
    assert {key: shown.get(key) for key in listed if key != "age_s"} == {
        key: value for key, value in listed.items() if key != "age_s"
    }


# ---------------------------------------------------------------------------- while it runs


def test_the_log_of_a_task_that_runs_is_there_when_it_ends(ens, mode):
    task = ens.add(
        "--workflow", f"runs-{mode}", "--output", "tail", "--",
        "sh", "-c", "echo begun; until test -e go; do sleep 0.05; done; echo done",
    )  # fmt: skip
    ens.fails(3, "no output yet (-f waits for it)", "log", str(task))
    with following(ens, task) as follower:
        assert follower.stderr.readline() == (
            f"task {task} keeps only the end of its output: waiting for it\n".encode()
        )
        with Launcher(ens, mode, "--wf-filter", f"runs-{mode}", "--idle-timeout=0") as launcher:
            until(ens, task, "RUNNING")
            ens.fails(3, "is kept when it ends (-f waits for that)", "log", str(task))
            Path(show(ens, task)["path"], "go").touch()
            launcher.wait()
        assert follower.wait(20) == 0
        assert follower.stdout.read() == b"begun\ndone\n"


def test_a_killed_task_keeps_what_it_had_said(ens, mode):
    task = ens.add(
        "--workflow", f"killed-{mode}", "--output", "tail", "--",
        "sh", "-c", "echo begun; touch begun; sleep 600",
    )  # fmt: skip
    with Launcher(ens, mode, "--wf-filter", f"killed-{mode}", "--idle-timeout=0") as launcher:
        until(ens, task, "RUNNING")
        begun = Path(show(ens, task)["path"], "begun")
        deadline = time.monotonic() + 20
        while not begun.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        ens("kill", str(task))
        launcher.wait()
    assert ens("log", str(task)) == "begun\n"


# ---------------------------------------------------------------------------- mpi mode


def test_the_ranks_of_one_task_have_one_tail(ens):
    ranks = ens.add(
        "--workflow", "ranks", "--output", "tail", "--ranks-per-node", "2", "--",
        "sh", "-c", "echo rank $PMI_RANK",
    )  # fmt: skip
    quiet = ens.add(
        "--workflow", "ranks", "--output", "none", "--ranks-per-node", "2", "--", "echo", "x"
    )
    failing = ens.add(
        "--workflow", "ranks", "--output", "tail", "--num-nodes", "2", "--",
        "sh", "-c", "echo why; exit 3",
    )  # fmt: skip
    missing = ens.add(
        "--workflow", "ranks", "--output", "tail", "--ranks-per-node", "2", "--", "./not-there"
    )
    launch(ens, "mpi", "ranks")
    assert sorted(ens("log", str(ranks)).split("\n")) == ["", "rank 0", "rank 1"]
    assert "why" in show(ens, failing)["error"]
    found = show(ens, missing)
    assert (found["state"], found["cause"]) == ("FAILED", "could not start")
    assert "not-there" in found["error"]
    found = show(ens, quiet)
    assert (found["state"], list(Path(found["path"]).iterdir())) == ("JOB_FINISHED", [])


async def test_a_tail_that_no_program_was_given_leaves_nothing_open():
    before = os.listdir("/proc/self/fd")
    unused, used = Tail(), Tail()
    write_fd = used.open()
    os.write(write_fd, b"kept")
    os.close(write_fd)
    assert (unused.close(), used.close()) == ("", "kept")
    assert os.listdir("/proc/self/fd") == before


# ---------------------------------------------------------------------------- apps, programs


def test_a_task_keeps_its_output_as_its_app_says_unless_it_says_otherwise(ens):
    ens("app", "add", "quiet", "--command", "echo x", "--output", "none")
    ens("app", "add", "plain", "--command", "echo x")
    assert {app["name"]: app["output"] for app in ens.json("app", "ls")} == {
        "quiet": "none",
        "plain": "file",
    }
    quiet = ens.add("--app", "quiet")
    other = ens.add("--app", "quiet", "--output", "tail")
    plain = ens.add("--app", "plain")
    text = "output,priority\nfile,1\n,1\nnone,1\n"
    from_file = ens.full("add", "--app", "quiet", "--from", "-", "--output", "tail", text=text).ids
    found = [show(ens, task)["output"] for task in (quiet, other, plain, *from_file)]
    assert found == ["none", "tail", "file", "file", "tail", "none"]
    done = ens.full("add", "--output", "mail", "--", "true")
    assert (done.status, done.out) == (2, "")
    text = '{"command": "true", "output": "mail"}\n'
    says = "line 1: output: invalid enum value 'mail'; use file, tail, none"
    ens.fails(2, says, "add", "--from", "-", text=text)


def test_programs_say_it_too(ens):
    async def add() -> list[str]:
        async with api.connect(str(ens.site)) as client:
            made = await client.apps.add("kept", "echo x", output="tail")
            with pytest.raises(UsageError, match="use file, tail, none"):
                await client.apps.add("worse", "echo x", output="mail")
            with pytest.raises(UsageError, match="output"):
                await client.tasks.add(NewTask(command="x", output="mail"))
            ids = await client.tasks.add([NewTask(app="kept"), NewTask(app="kept", output="none")])
            return [made.output, *[(await client.tasks.get(task)).output for task in ids]]

    assert asyncio.run(add()) == ["tail", "tail", "none"]


# ---------------------------------------------------------------------------- what tasks wait for


def test_what_keeps_a_task_waiting_is_said(ens):
    task = ens.add("--workflow", "waits", "--ranks-per-node", "2", "--", "true")
    assert "waits      no launcher runs (ensemble launch); 1 node x 2 ranks: only mpi mode" in (
        ens("show", str(task))
    )
    with Launcher(ens, "serial", "--persistent"):
        deadline = time.monotonic() + 20
        while (waits := show(ens, task)["waits"]).startswith("no launcher"):
            assert time.monotonic() < deadline
        assert waits.startswith("1 node x 2 ranks: only mpi mode takes it")
    launch(ens, "mpi", "waits")
    assert show(ens, task)["waits"] is None
    assert "waits" not in ens("show", str(task)).split("history")[0].replace("waits\n", "")


def test_more_gpus_than_any_node_had_is_a_warning(ens, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    launch(ens, "mpi", "nothing", nodes=1)
    done = ens.full("add", "--gpus-per-rank", "3", "--", "true")
    assert (done.status, len(done.ids)) == (0, 1)
    assert done.err == (
        "warning: GPUs per node: 3 asked for, and no launcher of the last 30 days told of a node "
        "with more than 2\n"
    )
    assert ens.full("add", "--gpus-per-rank", "2", "--", "true").err == ""
    assert "needs 3 GPUs per node" in show(ens, done.ids[0])["waits"]
    ens("kill", "--state", "PREPROCESSED", "--yes")


# ---------------------------------------------------------------------------- work directories


def test_work_directories_may_lie_in_one(ens):
    file = ens.site / "ensemble.toml"
    before = file.read_text()
    sharded = ens.add("--name", "n", "--workflow", "flat", "--", "pwd")
    try:
        file.write_text(f'workdirs = "flat"\n{before}')
        flat = ens.add("--name", "n", "--workflow", "flat", "--", "pwd")
        launch(ens, "mpi", "flat")
        file.write_text(f'workdirs = "round"\n{before}')
        ens.fails(2, "known: sharded, flat", "ls")
    finally:
        file.write_text(before)
    assert ens("log", str(flat)) == f"{ens.site}/data/n_{flat}\n"
    assert ens("log", str(sharded)) == f"{ens.site}/data/{sharded // 1000}/n_{sharded}\n"
