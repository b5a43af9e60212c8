"""Whatever others write, a parser returns a value or raises its own error: soon, and without much memory."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import json
import os
import shutil
import tempfile
import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, strategies as st

from ensemble import config
from ensemble.api import parse_ids
from ensemble.cli import records
from ensemble.config import SITE_FILE
from ensemble.core import backup, submission, wire
from ensemble.core.model import End, NewApp, NewTask, Outcome, Start
from ensemble.core.wire import FromLauncher, FromPilot
from ensemble.drivers import (
    batch,
    guard,
    hostlist,
    linkfile,
    localbatch,
    mpi,
    nodes,
    pbs,
    roll,
    taskenv,
    template,
    walltime,
)
from ensemble.drivers.pg import backup as backup_files
from ensemble.drivers.pg.layout import Layout
from ensemble.drivers.process import Completed
from ensemble.drivers.scheduler import Scheduler, Seen
from ensemble.errors import (
    AllocationError,
    ClusterError,
    ConfigError,
    EnsembleError,
    LaunchError,
    SchedulerError,
    TemplateError,
    UsageError,
    WireError,
)
from ensemble.service import spool
from ensemble.service.spool import SpoolError
from tests.security.mutations import damaged, damaged_bytes, quick, within

DATA = Path(__file__).resolve().parents[1] / "data"
#: Where parsers read that want files; gone with this process.
_SITE = tempfile.TemporaryDirectory(prefix="ens-fuzz-")
#: CPU seconds of one call; what is meant is "it ends".
SOON = 5.0


def recorded(folder: str, pattern: str) -> list[str]:
    """What real schedulers printed, without the line that says what was asked."""
    found = [path.read_text("utf-8") for path in sorted((DATA / folder).glob(pattern))]
    assert found
    return [text.partition("\n")[2] if text.startswith("$ ") else text for text in found]


# ---------------------------------------------------------------------------- batch schedulers

_COBALT = (
    f"{'JobID':<8}{'State':<12}{'WallTime':<10}{'StartTime':<40}JobName\n{'=' * 80}\n"
    f"{'1':<8}{'running':<12}{'01:00:00':<10}{'Thu Jan  1 00:01:00 1970 +0000 (UTC)':<40}ens-x-1\n"
)
_LSF = json.dumps(
    {"RECORDS": [{"JOBID": "930", "STAT": "EXIT", "JOB_NAME": "n", "EXIT_CODE": "3",
                  "EXIT_REASON": "TERM_RUNLIMIT: x", "KILL_REASON": ""}]}
)  # fmt: skip
_SGE = (
    "<?xml version='1.0'?>\n<job_info><queue_info><job_list state='running'><JB_job_number>7</JB_job_number>"
    "<JB_name>n</JB_name><state>r</state><JAT_start_time>2026-05-01T12:00:00</JAT_start_time></job_list>"
    "</queue_info><job_info></job_info></job_info>\n"
)
_FLUX = json.dumps(
    {"jobs": [{"id": 123456789, "state": "INACTIVE", "result": "FAILED", "name": "n", "returncode": 3,
               "t_run": 1.7e9, "t_inactive": 1.7e9, "expiration": 1.7e9, "urgency": 16,
               "exception": {"occurred": True, "type": "exec", "note": "x"},
               "annotations": {"sched": {"reason_pending": "x"}}}]}
)  # fmt: skip
_LOCAL = (
    json.dumps({"id": "1", "name": "n", "state": "FAILED", "reason": "r", "exit_code": 3,
                "started_at": 1.7e9, "ended_at": 1.7e9, "ends_at": None})
    + '\n{"listed": 1}\n'
)  # fmt: skip
_QACCT = (
    "==========\nqname all.q\njobname n\njobnumber 7\nstart_time 05/01/2026 12:00:00\n"
    "end_time -/-\nfailed 37 : qmaster enforced h_rt\nexit_status 137\n"
)
_BACCT = (
    "Job <930>, Job Name <n>, User <u>\nFri: Completed <exit>; TERM_OWNER: job killed by owner.\n"
)

#: What a status command, and one about the past, printed.
LISTINGS: dict[str, list[str]] = {
    "slurm": recorded("slurm", "squeue-*.txt"),
    "pbs": recorded("pbs", "qstat-*.json"),
    "cobalt": [_COBALT],
    "lsf": [_LSF],
    "sge": [_SGE],
    "flux": [_FLUX],
    "local": [_LOCAL],
}
PAST: dict[str, list[str]] = {
    "slurm": ["12|CANCELLED by 1000|0:9|1795382896|1795382896|None\n"],
    "pbs": LISTINGS["pbs"],
    "lsf": [_BACCT],
    "sge": [_QACCT],
}
ANSWERS: dict[str, list[str]] = {
    "slurm": recorded("slurm", "sbatch-*.txt"),
    "pbs": recorded("pbs", "qsub-*.txt"),
    "cobalt": ["12\n"],
    "lsf": ["Job <930> is submitted to default queue <normal>.\n"],
    "sge": ["7\n"],
    "flux": ["fuZZybuNNy\n"],
    "local": ["7\n"],
}
every = pytest.mark.parametrize("name", batch.SCHEDULERS)


def scheduler(name: str) -> Scheduler:
    return batch.get(name, directory=Path("/nowhere"), max_running=1)


def check_seen(found: list[Seen] | None) -> None:
    """Whoever believes it writes it into columns: text, int4, timestamptz."""
    for seen in found or []:
        for text in (seen.id, seen.name, seen.reason):
            assert isinstance(text, str)
        assert seen.id
        if seen.exit_code is not None:
            assert -(2**31) <= seen.exit_code < 2**31
        for at in (seen.started_at, seen.ended_at, seen.ends_at):
            assert at is None or datetime.fromtimestamp(at, UTC)


@every
def test_no_listing_breaks_its_reader_nor_what_is_done_with_it(name: str) -> None:
    parse = scheduler(name).parse_status
    if name == "pbs":
        parse = lambda answer: pbs.parse_jobs(answer, None)  # noqa: E731 - else all are of somebody else

    @quick
    @given(text=damaged(LISTINGS[name]), code=st.sampled_from([0, 0, 0, 1, 255, -9]))
    def judge(text: str, code: int) -> None:
        answer = Completed(code=code, stdout=text, stderr="")
        check_seen(within(SOON, lambda: parse(answer), SchedulerError))

    judge()


@pytest.mark.parametrize("name", PAST)
def test_no_history_breaks_its_reader(name: str) -> None:
    parse = scheduler(name).parse_history
    assert parse is not None

    @quick
    @given(text=damaged(PAST[name]), is_error=st.booleans())
    def judge(text: str, is_error: bool) -> None:
        out, err = ("", text) if is_error else (text, "")
        answer = Completed(code=0, stdout=out, stderr=err)
        check_seen(within(SOON, lambda: parse(answer), SchedulerError))

    judge()


@every
def test_no_answer_to_a_submission_breaks_its_reader_and_an_id_is_one_plain_word(name: str) -> None:
    parse = scheduler(name).parse_submit

    @quick
    @given(text=damaged(ANSWERS[name]))
    def judge(text: str) -> None:
        found = within(
            SOON, lambda: parse(Completed(code=0, stdout=text, stderr="")), SchedulerError
        )
        if found is not None:
            # It becomes a word of the next command line: it must not be an option.
            assert found[0].isascii()
            assert found[0].isalnum()

    judge()


#: The largest times and numbers that a listing may hold and that are still read.
HUGE = [
    ("flux", json.dumps({"jobs": [{"id": 1, "state": "RUN", "expiration": 2.0**39, "t_run": 2.0**39}]})),
    ("flux", json.dumps({"jobs": [{"id": 1, "state": "INACTIVE", "returncode": -(10**30)}]})),
    ("flux", json.dumps({"jobs": [{"id": 1, "state": "INACTIVE", "returncode": 10**30}]})),
    ("local", _LOCAL.replace("1700000000.0", "Infinity")),
    ("local", _LOCAL.replace("1700000000.0", "NaN")),
    ("local", _LOCAL.replace("1700000000.0", "1e300")),
    ("local", _LOCAL.replace('"exit_code": 3', '"exit_code": ' + "9" * 30)),
    ("cobalt", _COBALT.replace("01:00:00  ", "999999999:00:00 ")),
    ("cobalt", _COBALT.replace("1970", "9999")),
    ("pbs", json.dumps({"pbs_server": "x", "Jobs": {"1.x": {
        "job_state": "R", "stime": "Sun Nov 22 13:02:21 9999", "Job_Owner": "a@b",
        "Resource_List": {"walltime": "999999999:00:00"}}}}, indent=1)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), HUGE)
def test_a_time_that_no_calendar_has_is_none(name: str, text: str) -> None:
    parse = scheduler(name).parse_status
    if name == "pbs":
        parse = lambda answer: pbs.parse_jobs(answer, None)  # noqa: E731
    with contextlib.suppress(SchedulerError):
        found = parse(Completed(code=0, stdout=text, stderr=""))
        assert found
        check_seen(found)


# ---------------------------------------------------------------------------- allocations

_LISTS = [case["input"] for case in json.loads((DATA / "hostlist.json").read_text())["accept"]]
_NODE_LISTS: list[tuple[Callable[[str], Any], list[str]]] = [
    (hostlist.expand, _LISTS),
    (hostlist.counts, ["64(x2),32", "1"]),
    (nodes.parse_node_file, ["n1\nn2,n3\n"]),
    (nodes.parse_partition, ["1001-1005,1030"]),
    (nodes.parse_host_counts, ["hostA 4 hostB 8"]),
    (nodes.parse_pe_host_file, ["n1 4 all.q@n1 UNDEFINED\n"]),
]


@pytest.mark.parametrize(
    ("parse", "seeds"), _NODE_LISTS, ids=[parse.__name__ for parse, _ in _NODE_LISTS]
)
def test_no_host_list_breaks_its_reader(parse: Callable[[str], Any], seeds: list[str]) -> None:
    @quick
    @given(text=damaged(seeds))
    def judge(text: str) -> None:
        found = within(SOON, lambda: parse(text), AllocationError)
        assert found is None or len(found) <= max(hostlist.MAX_HOSTS, len(text))

    judge()


_END_READERS: list[tuple[Callable[[str], Any], list[str]]] = [
    (lambda text: walltime.parse_squeue(text, 1e9), ["1795382896|1-00:00:00\n", "N/A|59:59\n"]),
    (walltime.parse_qstat, recorded("pbs", "qstat-running.json")),
    (lambda text: walltime.parse_bjobs(text, 1e9), ["0:59 L", "120 second(s)"]),
    (lambda text: walltime.parse_timeleft(text, 1e9), ["3600.5\n"]),
]


@pytest.mark.parametrize(("parse", "seeds"), _END_READERS, ids=["squeue", "qstat", "bjobs", "flux"])
def test_no_end_of_an_allocation_breaks_its_reader(
    parse: Callable[[str], Any], seeds: list[str]
) -> None:
    @quick
    @given(text=damaged(seeds))
    def judge(text: str) -> None:
        found = within(SOON, lambda: parse(text))
        assert found is None or isinstance(found, int | float)

    judge()


_VARIABLES = [
    "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_CPUS_PER_NODE", "SLURM_CPUS_ON_NODE", "SLURM_RESTART_COUNT",
    "SLURM_JOB_END_TIME", "SLURM_GPUS_ON_NODE", "COBALT_JOBID", "COBALT_PARTNAME", "COBALT_ENDTIME", "LSB_JOBID",
    "LSB_MCPU_HOSTS", "LSB_HOSTS", "LSB_JOBINDEX", "JOB_ID", "SGE_TASK_ID", "RESTARTED", "ENSEMBLE_LOCAL_JOB_ID",
    "ENSEMBLE_LOCAL_JOB_NODES", "ENSEMBLE_LOCAL_JOB_END", "CUDA_VISIBLE_DEVICES",
]  # fmt: skip


@quick
@given(
    environ=st.dictionaries(
        st.sampled_from(_VARIABLES),
        damaged(["1", "12", "n[1-3]", "64(x2)", "hostA 4", "1001-1005", "1795382896", "0,1"]),
        max_size=6,
    )
)
def test_no_environment_breaks_the_search_for_an_allocation(environ: dict[str, str]) -> None:
    quiet = environ | {"PATH": "/nonexistent"}
    asked = nodes.find_allocation(quiet, virtual_nodes=None, now=1e9)
    within(SOON, lambda: asyncio.run(asked), AllocationError)


# ---------------------------------------------------------------------------- what users hand in

_CSV = b'num_nodes,workflow,args,tags,x\n2,wf,"a \'b c\'","{""k"": ""v""}",1\n'
_JSONL = (
    b'{"command": ["sh", "-c", "true"], "num_nodes": 2, "params": {"a": "b"}, "tags": {"k": "v"},'
    b' "parents": [1, "x"], "data": {"a": [1, 2.5, null]}, "time_limit_minutes": 1.5}\n'
)


@quick
@given(data=damaged_bytes([_CSV, _JSONL]), form=st.sampled_from(["csv", "jsonl"]))
def test_no_file_of_tasks_breaks_its_reader(data: bytes, form: records.Format) -> None:
    found = within(SOON, lambda: records.read(data, form, {"command": ["true"]}), UsageError)
    for record in found or []:
        within(SOON, lambda: submission.resolve(record.task, {}), UsageError)  # noqa: B023


@quick
@given(
    command=damaged(["sh -c 'echo {x}' {{}}", "a"]),
    params=st.dictionaries(st.text(max_size=3), st.text(max_size=9), max_size=2),
    name=damaged(["name"]) | st.none(),
    workflow=damaged(["wf"]),
)
def test_no_command_and_no_name_breaks_the_checks_and_no_name_leaves_its_directory(
    command: str, params: dict[str, str], name: str | None, workflow: str
) -> None:
    new = NewTask(command=command, params=params, name=name, workflow=workflow)
    found = within(SOON, lambda: submission.resolve(new, {}), UsageError)
    if found is not None:
        place = submission.workdir(12, found.name)
        assert os.path.normpath(place) == place
        assert len(Path(place).parts) == 3
        assert place.startswith("data/0/")
        assert len(os.fsencode(Path(place).name)) <= 255
        assert place.replace("\u2028", "").isprintable() or not set(place) & set("\0\n\x1b\x9b")
        assert not set(found.name) & {chr(c) for c in (*range(32), *range(127, 160))}
    app = NewApp(name=name or "a", command=command)
    within(SOON, lambda: submission.check_app(app), UsageError)


@quick
@given(text=damaged(["12", "3-9", "1-99999"]))
@example("0-9999999")
@example("0-9223372036854775807")
@example("9" * 19 + "-" + "9" * 19)
def test_no_selector_breaks_its_reader_and_none_takes_much_memory(text: str) -> None:
    found = within(SOON, lambda: parse_ids(text), UsageError)
    assert found is None or len(found) <= 10_000_000


_TOML = (
    'name = "site"\nworkdirs = "flat"\n[store]\nlisten = ["ib0"]\ncommand_timeout_s = 1.5\n[launcher]\n'
    'heartbeat_s = 3\n[scheduler]\nkind = "slurm"\n[queue.debug]\nmax_nodes = 4\nflags = ["-x"]\n'
)


@quick
@given(text=damaged([_TOML]))
@example("a = " + "[" * 100_000)
@example("x = {" + "a={" * 50_000)
@example("[launcher]\ngrace_s = nan\n")
@example("[launcher]\nheartbeat_s = inf\n")
@example("[launcher]\nlease_ttl_s = 1e308\n")
def test_no_settings_break_their_reader(text: str) -> None:
    def load() -> config.Settings:
        folder = Path(_SITE.name)
        (folder / SITE_FILE).write_bytes(text.encode("utf-8", "surrogatepass"))
        return config.load(folder, environ={})

    found = within(SOON, load, ConfigError)
    if found is not None:
        check_finite(msgspec.to_builtins(found))


def check_finite(value: Any) -> None:
    """No time is endless or none: loops and deadlines are reckoned with it."""
    if isinstance(value, dict):
        for each in value.values():
            check_finite(each)
    elif isinstance(value, float):
        assert abs(value) < 1e12


@quick
@given(
    environ=st.dictionaries(
        st.sampled_from(
            ["ENSEMBLE_STORE_LISTEN", "ENSEMBLE_LAUNCHER_GRACE_S", "ENSEMBLE_MPI_FLAGS", "ENSEMBLE_STORE_DSN"]
        ),
        damaged(["1.5", '["a"]', "true", "word", "postgresql://me@host/db"]),
        max_size=3,
    )
)  # fmt: skip
@example({"ENSEMBLE_MPI_FLAGS": "[" * 100_000})
@example({"ENSEMBLE_LAUNCHER_GRACE_S": "nan"})
def test_no_variable_breaks_the_settings(environ: dict[str, str]) -> None:
    folder = Path(_SITE.name)
    (folder / SITE_FILE).write_text("")
    found = within(SOON, lambda: config.load(folder, environ=environ), ConfigError)
    if found is not None:
        check_finite(msgspec.to_builtins(found))


_TEMPLATE = (
    "#!/bin/bash\n#SBATCH -N {{ nodes }}\n{% if queue %}#SBATCH -p {{ queue }}\n{% endif %}"
    "{% set a = nodes * 2 %}{% include 'b.sh' %}\nexec {{ launch }}\n"
)


@quick
@given(text=damaged([_TEMPLATE]))
@example("#!/bin/sh\n{{ " + "(" * 5000 + "nodes" + ")" * 5000 + " }}\nexec {{ launch }}\n")
@example("#!/bin/sh\n{{ 9 ** 9 ** 9 ** 9 }}\nexec {{ launch }}\n")
@example("#!/bin/sh\n{{ 'x' * 10 ** 12 }}\nexec {{ launch }}\n")
@example("#!/bin/sh\n{{ ''.__class__.__mro__ }}\nexec {{ launch }}\n")
def test_no_template_breaks_the_rendering(text: str) -> None:
    path = Path(_SITE.name) / "job.sh"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    values = {"nodes": 2, "queue": "debug", "launch": template.Raw("true")}
    within(SOON, lambda: template.render(path, values), TemplateError, UsageError)


@quick
@given(text=damaged(["#!/bin/bash\n#ENSEMBLE --nodes 2 --time=90.5 --grace 1\ntrue\n"]))
def test_no_script_breaks_the_local_scheduler(text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    within(SOON, lambda: localbatch.parse_directives(text, "x"), localbatch.Refused)


# ---------------------------------------------------------------------------- what our own programs tell each other

_FRAMES = [
    wire.encode(wire.Pulse(1.0)),
    wire.encode(wire.Hello(1, 0, 2, 0, "host", 7, [[0], [1]], ["0"], 1000)),
    wire.encode(
        wire.Report(1.0, [wire.Ran(1, 1, 1.0)], [wire.Done(1, 1, 1.0, 2.0, 0)], [], [(1, 1)])
    ),
    wire.encode(wire.Gone(0, 1)),
]


@quick
@given(data=damaged_bytes(_FRAMES), kind=st.sampled_from([FromPilot, FromLauncher]))
@example(b"\x00\x00\x00\x05\xdd\xff\xff\xff\xff", FromPilot)
@example(b"\x00\x00\x00\x06\xc6\xff\xff\xff\xff\x00", FromPilot)
def test_no_frame_breaks_the_link_and_none_takes_much_memory(data: bytes, kind: Any) -> None:
    decoder = wire.Decoder[Any](kind, limit=2**20)
    tracemalloc.start()
    try:
        within(SOON, lambda: [*decoder.feed(data)], WireError)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


_LINK = linkfile.make(["127.0.0.1"], 4711, 2, launcher_id=1).to_bytes()


@quick
@given(data=damaged_bytes([_LINK]))
@example(b"[" * 100_000)
@example(b'{"protocol": ' + b"9" * 5000 + b"}")
@example(_LINK.replace(b'"127.0.0.1"', b'"\xff"'))
def test_no_link_file_breaks_its_reader(data: bytes) -> None:
    found = within(SOON, lambda: linkfile.parse(data), LaunchError)
    if found is not None:
        within(SOON, found.client_context, LaunchError)


@quick
@given(
    data=damaged_bytes([b"marker-\njoined 1-0\njoined 1-1\ngone 1-1\n"]),
    names=st.lists(
        st.sampled_from(["gone-marker-1-0", "gone-", "gone-marker-x", "x"]), unique=True
    ),
)
def test_no_roll_breaks_its_reader(data: bytes, names: list[str]) -> None:
    folder = Path(_SITE.name) / "roll"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(0o700)
    (folder / "roll").write_bytes(data)
    (folder / "roll").chmod(0o600)
    for name in names:
        (folder / name).touch()
    found = within(SOON, lambda: roll.count_left(folder, "marker-"))
    assert found is None or found >= 0


_NOW = datetime(2026, 5, 1, tzinfo=UTC)
_SPOOL = b"\n".join(
    [
        msgspec.json.encode(spool.Head(mark="m", lease_id=7, launcher_id=1, reason="r", starts=1, ends=1)),
        msgspec.json.encode(Start(id=1, attempt=1, at=_NOW, nodes=("n",))),
        msgspec.json.encode(
            End(id=1, attempt=1, at=_NOW, nodes=("n",), started_at=_NOW, outcome=Outcome.DONE, exit_code=0)
        ),
        b"",
    ]
)  # fmt: skip


@quick
@given(data=damaged_bytes([_SPOOL]))
@example(b"[" * 100_000)
@example(_SPOOL.replace(b'"ends":1', b'"ends":' + b"9" * 4000))
def test_no_spool_breaks_its_reader(data: bytes) -> None:
    within(SOON, lambda: spool.parse(data), SpoolError)


_BACKUP = b"".join(
    [
        b"-- Ensemble backup 1\n",
        b'-- {"ensemble":"0.1.0","postgresql":"17","schema":1,"migrations":{},"at":"2026-05-01T00:00:00Z"}\n',
        b"COPY workflow (id, name) FROM stdin;\n1\tx\n\\.\n",
        b'-- {"rows":{"workflow":1},"used":{}}\n',
    ]
)


@quick
@given(data=damaged_bytes([_BACKUP]), is_packed=st.booleans())
def test_no_backup_breaks_its_reader(data: bytes, is_packed: bool) -> None:
    packed = gzip.compress(data, 1) if is_packed else data
    source = backup_files.Reader(io.BytesIO(packed), "x")
    head = within(SOON, lambda: asyncio.run(backup.verify(source)), EnsembleError)
    assert head is None or head.schema >= 1


@pytest.mark.parametrize(
    "data",
    [
        _BACKUP.replace(b'"schema":1', b'"schema":-5')
        .replace(b"COPY workflow (id, name) FROM stdin;\n1\tx\n\\.\n", b"")
        .replace(b'"workflow":1', b""),
        _BACKUP.replace(b'"0.1.0"', b'"\xff"'),
        b"-- Ensemble backup 1\n-- " + b'{"x":' * 12_000 + b"\n",
    ],
    ids=["a schema below zero", "no text", "too deep"],
)
def test_what_a_backup_says_about_itself_is_not_believed(data: bytes) -> None:
    source = backup_files.Reader(io.BytesIO(gzip.compress(data, 1)), "x")
    with pytest.raises(EnsembleError):
        asyncio.run(backup.verify(source))


def test_a_small_file_that_unpacks_to_a_row_without_an_end_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert backup_files.LONGEST_ROW == 2**30  # what PostgreSQL itself could make, is read
    monkeypatch.setattr(backup_files, "LONGEST_ROW", 2**24)
    head = _whole_head()
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) as file:
        file.write(head + b"COPY workflow (id, name) FROM stdin;\n")
        for _ in range(100):
            file.write(bytes(2**20))
    tracemalloc.start()
    try:
        packed.seek(0)
        source = backup_files.Reader(packed, "x")
        with pytest.raises(EnsembleError, match="a row without an end"):
            asyncio.run(backup.verify(source))
        assert tracemalloc.get_traced_memory()[1] < 80 * 2**20
    finally:
        tracemalloc.stop()


def _whole_head() -> bytes:
    """The first two lines of a backup of this release."""
    import hashlib

    from ensemble.core import migrations
    from ensemble.core.database import read_sql

    digests = {
        str(number): hashlib.sha256(read_sql(f"migrations/{name}").encode()).hexdigest()
        for number, name in migrations.files().items()
    }
    head = {"ensemble": "0.1.0", "postgresql": "17", "schema": migrations.latest(),
            "migrations": digests, "at": "2026-05-01T00:00:00Z"}  # fmt: skip
    return b"-- Ensemble backup 1\n-- " + json.dumps(head).encode() + b"\n"


@quick
@given(line=damaged(["deadline 12345.678", "lease 7", "bye"]))
@example("deadline -inf")
@example("deadline 1e400")
def test_no_line_of_its_child_breaks_a_guard(line: str) -> None:
    check_line(line)


def test_a_time_that_is_none_does_not_break_a_guard() -> None:
    check_line("deadline nan")


def check_line(line: str) -> None:
    watcher = guard.Guard(["true"], [])
    for fd in (watcher.wakeups, watcher.wakeup, watcher.lines, watcher.lines_end):
        os.close(fd)
    watcher.take_line(line)
    left = watcher.seconds_left()
    # What `watch` makes of it: a whole number of milliseconds.
    assert left is None or left <= 0 or int(1000 * min(left, guard.LOOK_S) + 1) >= 1


@quick
@given(data=damaged_bytes([b'{"ensemble_owner": "a", "ensemble_user": "b"}', b'{"port": 1}']))
@example(b"[" * 100_000)
@example(b'{"ensemble_user": "\xff"}')
def test_no_record_of_a_database_breaks_its_reader(data: bytes) -> None:
    folder = Path(_SITE.name) / "db"
    folder.mkdir(exist_ok=True)
    (folder / "cluster.json").write_bytes(b'{"account": {"kind": "self"}}')
    layout = Layout.load(folder)
    for name, read in (
        ("secrets.json", lambda: layout.password("ensemble_user")),  # type: ignore[arg-type]
        ("server.json", layout.owner),
        ("cluster.json", lambda: Layout.load(folder)),
    ):
        (folder / name).write_bytes(data)
        within(SOON, read, ClusterError)


@quick
@given(text=damaged(["mpirun (Open MPI) 5.0.3\n", "HYDRA build details:\n", "slurm 22.05\n"]))
def test_no_version_breaks_the_search_for_an_mpi_launcher(text: str) -> None:
    within(SOON, lambda: mpi.parse_version(text))
    within(SOON, lambda: mpi.parse_step(text, "x"))


@pytest.mark.parametrize(
    "script",
    [
        "exec head -c 100000000 /dev/zero",
        "printf 'A=1\\0no equals sign\\0=empty\\0\\377=\\377\\0'; exit 0",
        "export A=$'a\\nb' B=$'\\377' C='=x='",
        "env() { printf 'PATH=/hacked'; }; BASH_FUNC_x=1",
        "kill -KILL $$",
        "exit 3",
        "cat; echo '\x1b]0;title\x07' >&2; false",
        "\0",
    ],
)
async def test_no_environment_script_breaks_what_reads_its_environment(
    script: str, tmp_path: Path
) -> None:
    path = tmp_path / "env.sh"
    path.write_text(script)
    with contextlib.suppress(LaunchError):
        found = await taskenv.source(str(path), {"PATH": os.environ["PATH"]})
        assert all(isinstance(value, str) and "\0" not in value for value in found.values())
        assert all(found), "a name is empty"
        assert all("=" not in name for name in found)
