"""Names, arguments, filters, reasons and the like are text, whatever they hold: for terminals, shells, SQL and paths."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest

from ensemble.core.batchjob import JobState
from ensemble.core.jobs import Jobs
from ensemble.core.model import NewApp, NewTask, Selector
from ensemble.core.states import State
from ensemble.core.store import Store
from ensemble.drivers import template
from ensemble.errors import EnsembleError, UsageError
from ensemble.render.text import clean
from ensemble.site import Site
from tests.integration.launching import WHEEL, Ensemble, sh
from tests.integration.serving import Serving
from tests.security import terminal

#: Sets a title, clears the screen, colours: by the old control characters, and by the newer ones.
OSC = "\x1b]0;pwned\x07\x1b[2J\x1b[31mred\x1b(0"
C1 = "\x9d0;pwned\x9c\x9b2J\x9b31m"
BIDI = "\u202egpj.exe\u2066\u200f\u061c"
LINES = "one\r\ntwo\ttab\x0b\x0c\x85\u2028three"
#: Together they are what a text column may hold.
EVIL = f"{OSC}|{C1}|{BIDI}|{LINES}|\x7f|'; DROP TABLE task; --|$(touch hacked)|[red]x[/red]|%s{{0}}"
#: What a name may hold: no control characters.
NAMES = [
    "'; DROP TABLE task; --",
    "$(touch hacked)",
    "`touch hacked`",
    "-rf",
    "--help",
    "a b",
    "*",
    "~",
    "%n%s",
    "{0}",
    "a;touch hacked",
    "a|b&c>d<e",
    "\\",
    '"',
    "#",
    BIDI,
    "ü€😀",
    "x" * 128,
    "...",
]
REFUSED_NAMES = [
    "",
    ".",
    "..",
    "../../x",
    "/etc/passwd",
    "a/b",
    "a\0b",
    "a\nb",
    OSC,
    C1,
    "x" * 129,
    "ü" * 110,
]


# ---------------------------------------------------------------------------- terminals


@pytest.fixture
async def evil(ens: Ensemble, owner: asyncpg.Connection[Any]) -> AsyncIterator[Site]:
    """A store in which every text that can be is hostile: as if somebody had written it with plain SQL."""
    await ens.store.add_app(NewApp(name="app", command="true"))
    (parent,) = await ens.store.add([NewTask(command=["true"], name="a", workflow="wf", app=None)])
    await ens.store.add(
        [NewTask(app="app", parents=[parent], args=[EVIL], tags={"k": EVIL}, data={EVIL: EVIL})]
    )
    await ens.store.kill([parent], reason=EVIL)
    (held,) = await ens.store.add([sh("printf '%s\\n' \"$1\"; exit 3", EVIL, name="prints")])
    launched = ens.launch("--idle-timeout=0")
    assert await ens.leave(launched) == 0, launched.log
    await ens.reach(State.FAILED, held)
    job = await owner.fetchval(
        "INSERT INTO batch_job (scheduler, num_nodes, wall_time_minutes, job_mode, state) "
        "VALUES ('local', 1, 1, 'mpi', 'FAILED') RETURNING id"
    )
    columns = await owner.fetch(
        "SELECT c.table_name AS t, c.column_name AS c, c.data_type = 'ARRAY' AS is_list"
        "  FROM information_schema.columns c JOIN information_schema.tables USING (table_schema, table_name)"
        " WHERE table_schema = 'ensemble' AND table_type = 'BASE TABLE' AND udt_name IN ('text', '_text')"
        "   AND c.table_name NOT IN ('move', 'schema_version', 'schema_script', 'service')"
        "   AND c.column_name NOT IN ('job_mode', 'from_state', 'to_state', 'cause', 'outcome')"
    )
    assert len(columns) > 30
    written = []
    for row in columns:
        value = "ARRAY[$1, $1]" if row["is_list"] else "$1"
        text = f"UPDATE {row['t']} SET {row['c']} = {value}::text"
        # What a constraint or a rule protects (states, modes, keys of a table with several rows) stays.
        try:
            async with owner.transaction():
                await owner.execute(text + ("[]" if row["is_list"] else ""), EVIL)
            written.append(f"{row['t']}.{row['c']}")
        except asyncpg.PostgresError:
            continue
    assert {"task_spec.name", "task.reason", "attempt.error", "launcher.host", "launcher.nodes", "batch_job.reason",
            "event.reason", "app.command", "task_spec.argv"} <= set(written), written  # fmt: skip
    await owner.execute("UPDATE workflow SET name = $1 WHERE name = 'wf'", EVIL)
    await owner.execute(
        "UPDATE batch_job SET spec = jsonb_build_object('output', $1::text, 'policy', $1::text) WHERE id = $2",
        EVIL,
        job,
    )
    await owner.execute(
        "UPDATE service SET host = $1, pid = 1, seen_at = now(), stopped_at = NULL", EVIL
    )
    kept = (ens.site.path / "ensemble.toml").read_bytes()
    yield ens.site
    (ens.site.path / "ensemble.toml").write_bytes(kept)
    await owner.execute(
        "DELETE FROM task_parent; DELETE FROM event; DELETE FROM attempt; DELETE FROM task"
    )


LOOKS = [
    ("ls",),
    ("ls", "--state", "FAILED"),
    ("ls", "apps"),
    ("ls", "workflows"),
    ("ls", "launchers"),
    ("ls", "batch"),
    ("show", "1"),
    ("show", "2"),
    ("show", "3"),
    ("status",),
    ("queue",),
    ("dir", "1"),
    ("app", "ls"),
    ("db", "check"),
]


@WHEEL
async def test_nothing_that_anybody_wrote_acts_on_a_terminal(evil: Site) -> None:
    for words, (status, shown) in (await _run_all(LOOKS, evil.path)).items():
        assert status == 0, (words, shown)
        assert terminal.acts(shown) == [], (words, shown)
        assert "Traceback" not in shown, (words, shown)
        assert words == ("db", "check") or "pwned" in shown or "red" in shown, (words, shown)


@WHEEL
async def test_json_holds_no_such_character_and_tells_the_text_as_it_is(evil: Site) -> None:
    looks = [(*words, "--json") for words in LOOKS if words[0] != "dir"]
    for words, (_, shown) in (await _run_all(looks, evil.path)).items():
        assert terminal.acts(shown) == [], (words, shown)
        assert words[:2] == ("db", "check") or EVIL in _texts(_json(shown)), (words, shown)


def _json(shown: str) -> Any:
    """Read the document on a terminal, where there may be a warning before or after it."""
    found = re.search(r"^[\[{]", shown, re.MULTILINE)
    assert found, shown
    return json.JSONDecoder().raw_decode(shown, found.start())[0]


def _texts(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value) | {text for each in value.values() for text in _texts(each)}
    if isinstance(value, list):
        return {text for each in value for text in _texts(each)}
    return {value} if isinstance(value, str) else set()


async def _run_all(
    lines: Sequence[tuple[str, ...]], folder: Path
) -> dict[tuple[str, ...], tuple[int, str]]:
    """Run commands on a terminal, two at a time, as there are cores."""
    gate = asyncio.Semaphore(2)

    async def one(words: tuple[str, ...]) -> tuple[int, str]:
        async with gate:
            return await asyncio.to_thread(terminal.run, *words, cwd=folder)

    async with asyncio.TaskGroup() as group:
        running = {words: group.create_task(one(words)) for words in lines}
    return {words: done.result() for words, done in running.items()}


ERRORS = [
    ("show", EVIL.replace("\0", "")),
    ("--site", OSC, "ls"),
    (EVIL,),
    ("ls", f"--{OSC}"),
    ("ls", "--state", C1),
    ("add", "--app", EVIL),
    ("add", "--name", EVIL, "--", "true"),
    ("add", "--workflow", C1, "--", "true"),
    ("add", "--from", EVIL),
    ("add", "--param", EVIL, "--", "true"),
    ("add", "--data", EVIL, "--", "true"),
    ("app", "add", EVIL, "--command", "true"),
    ("app", "rm", EVIL),
    ("queue", "pause", EVIL),
    ("queue", "resume", BIDI),
    ("submit-launch", "-n", "1", "-t", "1", "-q", EVIL),
    ("submit-launch", "-n", "1", "-t", "1", "--template", EVIL),
    ("submit-launch", "-n", EVIL, "-t", "1"),
    ("db", "restore", EVIL),
    ("db", "url", "--role", EVIL),
    ("launch", "--job-mode", EVIL),
    ("launch", "--nodes", C1),
]


@WHEEL
async def test_no_error_acts_on_a_terminal_nor_ends_in_a_traceback(ens: Ensemble) -> None:
    for words, (status, shown) in (await _run_all(ERRORS, ens.site.path)).items():
        assert status != 0, (words, shown)
        assert terminal.acts(shown) == [], (words, shown)
        assert "error: " in shown, (words, shown)
        assert "Traceback" not in shown, (words, shown)


@WHEEL
async def test_no_traceback_acts_on_a_terminal(ens: Ensemble) -> None:
    _, shown = await asyncio.to_thread(
        terminal.run, "db", "restore", EVIL, cwd=ens.site.path, is_debug=True
    )
    assert "Traceback" in shown
    assert terminal.acts(shown) == []


@pytest.mark.parametrize(
    "text",
    [
        '[store]\n"\\u001b]0;pwned\\u0007" = 1\n',
        '["\\u009b2J"]\nx = 1\n',
        'name = ["\\u202e"]\n',
        '[queue."\\u001b[2J"]\nmax_nodes = 1\n',
        '[scheduler]\nkind = "\\u009b2J"\n',
        '[scheduler]\nkind = "slurm"\ntemplate = "../../\\u001b[2J"\n',
        '[mpi]\nlauncher = "\\u001b[2J"\n',
    ],
)
def test_no_setting_acts_on_a_terminal(text: str, tmp_path: Path) -> None:
    (tmp_path / "ensemble.toml").write_text(text)
    for words in (("status",), ("submit-launch", "-n", "1", "-t", "1", "--dry-run")):
        status, shown = terminal.run(*words, cwd=tmp_path)
        assert status != 0
        assert terminal.acts(shown) == [], shown


def test_no_directory_acts_on_a_terminal(tmp_path: Path) -> None:
    folder = tmp_path / f"{OSC}{C1}{BIDI}".replace("/", "")
    folder.mkdir()
    (folder / "ensemble.toml").write_text("")
    for words in (("status",), ("init",), ("db", "start"), ("db", "status"), ("db", "url")):
        _, shown = terminal.run(*words, cwd=folder)
        assert terminal.acts(shown) == [], (words, shown)


@WHEEL
async def test_what_tasks_and_their_errors_say_does_not_act_in_a_launchers_log(
    ens: Ensemble, tmp_path: Path
) -> None:
    script = tmp_path / f"{OSC.replace('/', '')}.sh"
    script.write_text(f"printf '%s' '{OSC}{C1}' >&2; exit 3")
    await ens.store.add_app(NewApp(name="app", command="true", env_script=str(script)))
    for mode in ("mpi", "serial"):
        ids = await ens.store.add(
            [
                NewTask(command=[f"/nowhere/{OSC}{C1}{BIDI}"], name="no"),
                NewTask(app="app", name="env"),
                sh(f"printf '%s' '{OSC}{C1}'; exit 3"),
            ]
        )
        launched = ens.launch("--idle-timeout=0", "--debug", mode=mode)
        assert await ens.leave(launched) == 0, launched.log
        await ens.reach(State.FAILED, *ids)
        text = launched.log_path.read_bytes().decode("utf-8", "surrogateescape")
        assert terminal.acts(text) == [], terminal.acts(text)
        for task in await ens.tasks():
            # What the program wrote is kept without them; what names its file, is cleaned where it is shown.
            if task.name == "sh":
                assert not set(task.error or "") & set("\x1b\x07\x9b\x9d\x9c"), task.error


# ---------------------------------------------------------------------------- file names and shells


@pytest.mark.parametrize("mode", ["mpi", "serial"])
@WHEEL
async def test_hostile_names_are_directories_of_the_site_and_nothing_else(
    ens: Ensemble, mode: str
) -> None:
    before = _tree(ens.site.path)
    tasks = [sh('printf "%s" "$1"; pwd > where', name, name=name) for name in NAMES]
    # The name is the program's where none is given.
    tasks += [NewTask(command=["sh", "-c", "pwd > where"]), NewTask(command="/bin/../bin/true")]
    ids = await ens.run(*tasks, mode=mode)
    data = ens.site.path / "data"
    for task in await ens.tasks():
        assert task.state is State.JOB_FINISHED, task
        folder = ens.workdir(task)
        assert folder.parent.parent == data
        assert folder.is_dir()
        assert not folder.is_symlink()
        if task.id <= len(NAMES):
            assert ens.output(task) == task.name == NAMES[task.id - 1]
            assert Path((folder / "where").read_text().rstrip("\n")) == folder
    new = _tree(ens.site.path) - before
    assert {path.parts[0] for path in new} <= {"data", "log"}
    assert not [path for path in new if path.name == "hacked"]
    assert len(ids) == len(list((data / "0").iterdir()))
    await _still_there(ens.store, len(ids))


def _tree(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if "pgdata" not in path.parts}


async def _still_there(store: Store, tasks: int) -> None:
    """Nothing was dropped, and the books are right."""
    assert len(await store.task_states(Selector())) == tasks
    assert await store.check() == []


@pytest.mark.parametrize("name", REFUSED_NAMES)
@WHEEL
async def test_a_name_that_is_none_is_refused(store: Store, name: str) -> None:
    with pytest.raises(UsageError):
        await store.add([NewTask(command=["true"], name=name or "/")])
    with pytest.raises(UsageError):
        await store.add_app(NewApp(name=name, command="true"))
    assert await store.tasks(Selector(), limit=1) == []


@WHEEL
async def test_arguments_and_environments_pass_through_no_shell_and_nul_is_refused(
    ens: Ensemble,
) -> None:
    told = [EVIL, OSC, C1, LINES, "", "-n", "$HOME", "x" * 100_000]
    script = (
        "import sys, os, json; json.dump([sys.argv[1:], os.environ['EVIL']], open('told', 'w'))"
    )
    for mode in ("mpi", "serial"):
        (task_id,) = await ens.run(
            NewTask(
                command=[sys.executable, "-c", script, *told], name="t", environ={"EVIL": EVIL}
            ),
            mode=mode,
        )
        task = await ens.task(task_id)
        assert json.loads((ens.workdir(task) / "told").read_text()) == [told, EVIL]
    for bad in (
        NewTask(command=["true", "a\0b"]),
        NewTask(command="true", environ={"A": "\0"}),
        NewTask(command="true", environ={"A=B": "x"}),
        NewTask(command="true", environ={"": "x"}),
        NewTask(command="true", tags={"a": "\ud800"}),
        NewTask(command="true", workflow=OSC),
        NewTask(command="true", workflow="x" * 501),
    ):
        with pytest.raises(UsageError):
            await ens.store.add([bad])


@WHEEL
async def test_a_hostile_path_of_an_environment_script_is_one_word(
    ens: Ensemble, tmp_path: Path
) -> None:
    names = ["$(touch hacked).sh", "-x", "a b;touch hacked.sh", "'\"`id`"]
    for name in names:
        (tmp_path / name).write_text("export FOUND=$BASH_SOURCE\n")
        await ens.store.add_app(
            NewApp(
                name=f"app {name}", command="sh -c 'echo $FOUND'", env_script=str(tmp_path / name)
            )
        )
    await ens.run(*(NewTask(app=f"app {name}") for name in names))
    for name, task in zip(names, await ens.tasks(), strict=True):
        assert (task.state, ens.output(task)) == (State.JOB_FINISHED, f"{tmp_path / name}\n")
    assert not list(ens.site.path.rglob("hacked*"))
    assert not list(tmp_path.glob("hacked*"))


# ---------------------------------------------------------------------------- SQL and filters

FILTERS = [
    "%",
    "_",
    "\\",
    "'",
    "'; DROP TABLE task; --",
    "[a-z]*",
    ".*",
    "$1",
    "%s",
    "{0}",
    '"',
    BIDI,
]


@WHEEL
async def test_filters_find_what_has_them_in_it_and_nothing_else(store: Store) -> None:
    await store.add(
        [NewTask(command=["true"], name="plain", workflow="plain", tags={"k": "plain"})]
    )
    for text in FILTERS:
        (task_id,) = await store.add(
            [NewTask(command=["true"], name=f"n{text}n", workflow=f"w{text}w", tags={text: text})]
        )
        for selector in (
            Selector(workflow=text),
            Selector(name=text),
            Selector(tags={text: text}),
        ):
            found = await store.task_states(selector)
            wanted = {
                each.id
                for each in await store.tasks(Selector(), limit=100)
                if (selector.workflow is not None and text in each.workflow)
                or (selector.name is not None and text in each.name)
                or (selector.tags is not None and each.tags.get(text) == text)
            }
            assert set(found) == wanted, (text, selector)
            assert task_id in wanted
            assert 1 not in wanted
    await _still_there(store, len(FILTERS) + 1)


@pytest.mark.parametrize("mode", ["mpi", "serial"])
@WHEEL
async def test_a_launchers_filter_is_no_pattern(ens: Ensemble, mode: str) -> None:
    ids = await ens.store.add(
        [
            NewTask(command=["true"], workflow=each)
            for each in ("a%b", "axb", "a_b", "'; DROP", OSC[3:4])
        ]
    )
    for text, takes in (("%", {0}), ("'; DROP", {3})):
        launched = ens.launch("--idle-timeout=0", f"--wf-filter={text}", mode=mode, nodes=1)
        assert await ens.leave(launched) == 0, launched.log
        states = await ens.store.task_states(Selector())
        done = {place for place, id in enumerate(ids) if states[id] is State.JOB_FINISHED}
        assert takes <= done
        assert 1 not in done


@WHEEL
async def test_reasons_are_kept_as_they_are_and_shown_as_text(ens: Ensemble) -> None:
    (task_id,) = await ens.store.add([sh("sleep 600")])
    launched = ens.launch("--persistent", nodes=1)
    await ens.reach(State.RUNNING)
    status, shown = await asyncio.to_thread(
        terminal.run, "kill", str(task_id), "--reason", EVIL, cwd=ens.site.path
    )
    assert status == 0, shown
    await ens.gone()
    launched.signal(15)
    assert await ens.leave(launched) == 0, launched.log
    assert (await ens.task(task_id)).reason == EVIL
    status, shown = await asyncio.to_thread(terminal.run, "show", str(task_id), cwd=ens.site.path)
    assert clean(EVIL)[:60] in shown.replace("\n", "")
    assert terminal.acts(shown) == []
    await _still_there(ens.store, 1)


# ---------------------------------------------------------------------------- batch jobs

#: For a scheduler's options: what a shell would make something of, but no control characters.
OPTIONS = [
    "--comment='; touch hacked; '",
    "--comment=$(touch hacked)`touch hacked`",
    "-C",
    "a b|c",
    "--export=ALL,X=*",
    "",
    "-",
]


@WHEEL
async def test_hostile_queues_filters_and_options_reach_the_scheduler_as_words(
    serving: Serving,
) -> None:
    serving.write()
    evil = "'; touch hacked; $(touch hacked) `touch hacked` \" \\ %j * ~ #"
    words = [
        "submit-launch",
        "-n",
        "1",
        "-t",
        "5",
        "-q",
        evil,
        "-A",
        evil,
        f"--wf-filter={evil}",
        "--",
        *OPTIONS,
    ]
    await serving.run_beside(*words)
    (job,) = await serving.active()
    assert (job.queue, job.project, job.wf_filter) == (evil, evil, evil)
    argv = serving.fake.lines("argv")
    assert argv[-len(OPTIONS) - 1 : -1] == OPTIONS
    script = Path(argv[-1])
    assert script.parent == serving.path / "qsubmit"
    checked = await asyncio.to_thread(_words_of, script, serving.path)
    assert f"--wf-filter={evil}" in checked
    assert not list(serving.path.rglob("hacked"))


def _words_of(script: Path, folder: Path) -> list[str]:
    """Let bash read a job script whose last line prints its words instead of becoming the launcher."""
    import subprocess

    text = script.read_text()
    assert text.count("\nexec ") == 1
    told = subprocess.run(
        ["bash"],
        input=text.replace("\nexec ", "\nprintf '%s\\0' ").encode(),
        cwd=folder,
        capture_output=True,
        check=True,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert told.stderr == b""
    return told.stdout.decode().split("\0")


@pytest.mark.parametrize("name", sorted(template.builtin()))
@pytest.mark.parametrize("bad", [OSC, C1, LINES, "a\nb", "a\0b", "\u2028", "\ud800", "\r"])
def test_what_could_end_a_line_of_directives_is_refused_by_every_template(
    name: str, bad: str, tmp_path: Path
) -> None:
    values = dict.fromkeys(template.VARIABLES, "x") | {
        "nodes": 1,
        "minutes": 1,
        "slots_per_node": 1,
        "id": 1,
    }
    for variable in ("queue", "project", "wf_filter", "site", "path", "name", "output"):
        with pytest.raises(UsageError):
            template.render(template.builtin()[name], values | {variable: bad})


@pytest.mark.parametrize(
    "name", ["../ensemble.toml", "/etc/passwd", "..", ".", "", "a/../b", "a\0b", OSC, "x" * 300]
)
def test_no_template_outside_of_its_directory_is_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "templates").mkdir()
    with pytest.raises(EnsembleError):
        template.find(name, tmp_path)


@WHEEL
async def test_what_a_scheduler_says_is_shown_as_text(serving: Serving) -> None:
    serving.write()
    await serving.submit()
    name = serving.fake.live()[0]
    (serving.fake.state / "jobs").write_bytes(
        f"101|PENDING|{OSC}{C1}{BIDI}|{name}\n102|RUNNING|x|{OSC}\n".encode()
    )
    status, shown = await asyncio.to_thread(
        terminal.run, "queue", cwd=serving.path, environ={"PATH": serving.fake.path}
    )
    assert status == 0, shown
    assert "pwned" in shown
    assert terminal.acts(shown) == [], terminal.acts(shown)
    (job,) = await Jobs(serving.store.pool).active()
    assert job.state is JobState.QUEUED


def test_what_is_shown_is_clean_for_every_character() -> None:
    """The rule itself, over all of Unicode, by what Unicode says about each."""
    import unicodedata

    for code in range(0x110000):
        text = chr(code)
        if unicodedata.category(text) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
            assert clean(text).isascii(), hex(code)
            assert clean(text).isprintable(), hex(code)


def test_json_of_every_character_is_read_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    from ensemble.render import document

    text = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x10FFFF, 97))))
    document.write({"text": text})
    shown = capsys.readouterr().out
    assert terminal.acts(shown) == []
    assert msgspec.json.decode(shown) == {"text": text}
    assert os.linesep == "\n"
