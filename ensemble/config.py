"""Settings: ensemble.toml of the site < ENSEMBLE_* of the environment < the command's flags.

The classes below are the documentation: every field has its default and its unit.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import parse_qsl

import msgspec

from ensemble.errors import ConfigError, NotFoundError

SITE_FILE = "ensemble.toml"

#: More seconds than any time lasts: with endless ones nobody can reckon.
_LONGEST = 1e9
#: A time that may not be 0: a loop that waits for it would spin.
Period = Annotated[float, msgspec.Meta(gt=0, le=_LONGEST)]
#: A time that may be 0.
Delay = Annotated[float, msgspec.Meta(ge=0, le=_LONGEST)]


class StoreSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the database is."""

    #: An external database: `postgresql://user@host:port/name`. None is the site's own cluster.
    #: Passwords belong in ~/.pgpass or a service file, never here.
    dsn: str | None = None
    #: Where PostgreSQL's programs are, when not where they are usually found.
    bin_dir: str | None = None
    #: Addresses or interface names the site's own cluster listens on besides 127.0.0.1.
    listen: list[str] = msgspec.field(default_factory=list)
    #: Networks (CIDR) that may connect when `listen` is set.
    allow: list[str] = msgspec.field(default_factory=list)
    #: Accept a data directory on a network file system.
    allow_network_fs: bool = False
    connect_timeout_s: Period = 10.0
    #: How long one statement may take before the connection is given up.
    command_timeout_s: Period = 30.0


class LauncherSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How launchers behave."""

    heartbeat_s: Period = 15.0
    #: Silence after which anybody may take a launcher's tasks over.
    lease_ttl_s: Period = 3600.0
    #: Between TERM and KILL when a task is ended.
    grace_s: Delay = 10.0
    #: How long before the allocation's end a launcher begins to leave.
    margin_s: Delay = 120.0
    #: Tasks without an estimate are not started with less than this left.
    min_useful_s: Delay = 60.0
    #: A launcher leaves after so long with nothing to do.
    idle_timeout_s: Delay = 60.0
    #: The safety net: how often a launcher looks for work and kills without having been rung.
    poll_s: Period = 10.0
    #: How often held tasks are compared with the store's.
    reconcile_s: Period = 180.0
    #: An exit by signal waits so long for the scheduler's own signal before it is an error.
    signal_hold_s: Delay = 2.0
    #: MPI launches that may be starting or running at the same time.
    max_launches: Annotated[int, msgspec.Meta(ge=1)] = 1000
    #: MPI launches started per second; None is no limit.
    launches_per_s: Period | None = None
    #: Whether tasks that share a node are bound to the cores they were given.
    pin_cpus: bool = True
    #: How long pilots may take to join their launcher.
    pilot_join_s: Period = 120.0
    #: How long a pilot and its launcher wait for a word of each other; then the node's tasks are ended.
    pilot_patience_s: Period = 60.0
    #: How much of a failed task's output is kept in the store.
    error_tail_lines: Annotated[int, msgspec.Meta(ge=0)] = 20


MpiFlavor = Literal[
    "auto", "openmpi4", "openmpi5", "mpich", "intel", "srun", "pals", "aprun", "jsrun", "flux"
]


class MpiSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which MPI launcher to use, and how."""

    #: `auto` asks the command for its version.
    launcher: MpiFlavor = "auto"
    #: The command; None is the usual name of that launcher, looked up on PATH.
    command: str | None = None
    #: More flags for every launch, before the task's own.
    flags: list[str] = msgspec.field(default_factory=list)
    #: Whether one rank on this machine is run through the MPI launcher too.
    wrap_single_rank: bool = False


SchedulerName = Literal["auto", "slurm", "pbs", "cobalt", "lsf", "sge", "flux", "local"]


class SchedulerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which batch scheduler there is, and how to speak to it."""

    #: `auto` is the one whose commands are on PATH; `local` runs batch jobs as processes on this machine.
    kind: SchedulerName = "auto"
    #: How long one of its commands may take: a controller that is down is noticed after nine seconds or so.
    timeout_s: Period = 60.0
    #: The template that `ensemble submit-launch` renders, in `templates/`.
    template: str = "job.sh"
    #: Batch jobs of `local` that run at a time.
    max_running: Annotated[int, msgspec.Meta(ge=1)] = 1


class ServiceSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How `ensemble serve` behaves."""

    #: Between two looks at the scheduler; centres ask for a minute or so.
    period_s: Period = 60.0
    #: Submissions in any 60 seconds, all queues together.
    submissions_per_minute: Annotated[int, msgspec.Meta(ge=1)] = 10
    #: A batch job that the scheduler does not list is given up after so many looks in a row ...
    lost_looks: Annotated[int, msgspec.Meta(ge=1)] = 3
    #: ... and so long.
    lost_s: Delay = 120.0
    #: How long a task is taken to run that has no wall_time_minutes and none like it has run.
    assumed_minutes: Period = 10.0
    #: A queue is paused after so many batch jobs in a row that ended before their launcher had registered, or whose launcher failed with nothing done.
    max_failures: Annotated[int, msgspec.Meta(ge=1)] = 3
    #: After a failure a queue waits so long, doubled with each one more, an hour at most.
    retry_s: Delay = 30.0
    #: After the scheduler has admitted no more, a queue waits so long.
    capacity_retry_s: Delay = 300.0


class QueueSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One queue policy, `[queue.NAME]`: what the service may submit there."""

    #: Whether anything is submitted for it.
    enabled: bool = True
    #: The scheduler's name for the queue; NAME when left out.
    queue: str | None = None
    #: The project or account that is charged.
    project: str | None = None
    #: How its launchers run tasks: whole nodes each, or sharing nodes.
    job_mode: Literal["mpi", "serial"] = "mpi"
    #: Only workflows whose name contains it.
    wf_filter: str | None = None
    #: Batch jobs at a time, waiting or running.
    max_queued: Annotated[int, msgspec.Meta(ge=0)] = 1
    #: Never fewer nodes than this, even where there is less to do.
    min_nodes: Annotated[int, msgspec.Meta(ge=1)] = 1
    #: Never more; tasks that are wider are not submitted for.
    max_nodes: Annotated[int, msgspec.Meta(ge=1)] = 1
    #: Never a shorter walltime than this.
    min_minutes: Annotated[int, msgspec.Meta(ge=1)] = 10
    #: Never a longer one; tasks that take longer are not submitted for.
    max_minutes: Annotated[int, msgspec.Meta(ge=1)] = 60
    #: A file of `templates/`; that of `[scheduler]` when left out.
    template: str | None = None
    #: More words for the submit command; they override the template's directives.
    flags: list[str] = msgspec.field(default_factory=list)
    #: So many tasks share a node at least (serial mode).
    slots_per_node: Annotated[int, msgspec.Meta(ge=1)] = 1
    #: GPUs of each of its nodes; tasks that want more are not submitted for. None is unknown.
    node_gpus: Annotated[int, msgspec.Meta(ge=0)] | None = None
    #: Memory of each of its nodes, likewise.
    node_memory_mb: Annotated[int, msgspec.Meta(ge=1)] | None = None


Workdirs = Literal["sharded", "flat"]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that can be set for a site."""

    #: The site's name: in job names and logs.
    name: str = "site"
    #: How the work directories of new tasks are arranged below `data/`: `sharded`, a thousand to a
    #: directory (`data/12/NAME_12345`), or `flat`, all in one (`data/NAME_12345`).
    workdirs: Workdirs = "sharded"
    store: StoreSettings = msgspec.field(default_factory=StoreSettings)
    launcher: LauncherSettings = msgspec.field(default_factory=LauncherSettings)
    mpi: MpiSettings = msgspec.field(default_factory=MpiSettings)
    scheduler: SchedulerSettings = msgspec.field(default_factory=SchedulerSettings)
    service: ServiceSettings = msgspec.field(default_factory=ServiceSettings)
    #: The queue policies by name, in the order in which they are served.
    queue: dict[str, QueueSettings] = msgspec.field(default_factory=dict)


def find_site(start: Path, *, named: str | None = None, environ: Mapping[str, str]) -> Path:
    """Return the site's directory: *named*, else $ENSEMBLE_SITE, else the nearest parent with one.

    Raises:
        NotFoundError: There is none.
    """
    given = named or environ.get("ENSEMBLE_SITE")
    if given:
        site = Path(given).expanduser().absolute()
        if not _is_site(site):
            raise NotFoundError(
                f"{site} is not a site: it has no {SITE_FILE} (ensemble init {site})"
            )
        return site
    start = start.absolute()
    for folder in (start, *start.parents):
        if _is_site(folder):
            return folder
    raise NotFoundError(
        f"no site here: neither {start} nor a directory above it has an {SITE_FILE} "
        "(ensemble init DIR, or name one with --site or $ENSEMBLE_SITE)"
    )


def _is_site(folder: Path) -> bool:
    return os.path.isfile(folder / SITE_FILE)  # False, too, where we may not look


def load(site: Path, *, environ: Mapping[str, str] | None = None) -> Settings:
    """Read the site's settings, with ENSEMBLE_SECTION_KEY of the environment over them.

    Raises:
        ConfigError: A key is unknown or a value is not of its type; says which and what to write.
    """
    path = site / SITE_FILE
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"cannot read {path}: it is nested too deeply") from error
    return parse(_overlay(raw, os.environ if environ is None else environ), source=str(path))


def parse(raw: Mapping[str, Any], *, source: str) -> Settings:
    """Check *raw* against the settings' types.

    Raises:
        ConfigError: As for `load`.
    """
    policies = raw.get("queue", {})
    if not isinstance(policies, Mapping) or not all(
        isinstance(policy, Mapping) for policy in policies.values()
    ):
        raise ConfigError(
            f"{source}: queue policies are tables: write [queue.NAME] above their keys"
        )
    for name, policy in policies.items():
        _check_policy(name, policy, source)  # one by one: msgspec does not tell which it means
    try:
        settings = msgspec.convert(raw, Settings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {_explain(str(error))}") from error
    if settings.store.dsn is not None:
        check_dsn(settings.store.dsn, source=f"{source}: [store] dsn")
    return settings


def check_dsn(dsn: str, *, source: str) -> None:
    """Refuse an address of a database that is none, or that holds a password: it is shown, logged and passed on.

    Raises:
        ConfigError: Never says what the address is.
    """
    scheme, _, rest = dsn.partition("://")
    if scheme not in ("postgresql", "postgres") or not rest.isprintable():
        raise ConfigError(f"{source}: expected postgresql://USER@HOST:PORT/DATABASE")
    place, _, query = rest.partition("?")
    authority, _, database = place.partition("/")
    user, _, hosts = authority.rpartition("@")
    names = [name.lower() for name, _ in parse_qsl(query, keep_blank_values=True)]
    if ":" in user or any("password" in name for name in names):
        raise ConfigError(
            f"{source} holds a password, which others could read: "
            "put it into ~/.pgpass (mode 0600) and leave it out here"
        )
    # What stands after a colon and is no port may be a password with a slash in it.
    if "@" in database or not re.fullmatch(_HOSTS, hosts):
        raise ConfigError(
            f"{source}: expected postgresql://USER@HOST:PORT/DATABASE, with %40, %2F and %3A for @, / and : in names"
        )


#: Names or numbers of hosts, IPv6 ones in brackets, each with or without a port.
_HOSTS = r"(([^\[\]:,@]*|\[[0-9A-Fa-f:.%]+\])(:[0-9]{1,5})?(,|$))*"


def _check_policy(name: str, raw: Mapping[str, Any], source: str) -> None:
    where = f"{source}: [queue.{name}]"
    if not re.fullmatch(r"[\w.+-]{1,64}", name):
        raise ConfigError(
            f"{where}: the name of a queue policy is made of letters, digits and . + - _"
        )
    try:
        policy = msgspec.convert(raw, QueueSettings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where} {_explain(str(error), kind=QueueSettings)}") from error
    for low, high in (("min_nodes", "max_nodes"), ("min_minutes", "max_minutes")):
        least, most = getattr(policy, low), getattr(policy, high)
        if least > most:
            hint = "" if low in raw else f" ({low} is {least} unless you set it)"
            raise ConfigError(f"{where} {low} = {least} is more than {high} = {most}{hint}")
    if policy.slots_per_node > 1 and policy.job_mode != "serial":
        raise ConfigError(f'{where} slots_per_node is for job_mode = "serial"')


_SECTIONS: Mapping[str, type[msgspec.Struct]] = {
    "store": StoreSettings,
    "launcher": LauncherSettings,
    "mpi": MpiSettings,
    "scheduler": SchedulerSettings,
    "service": ServiceSettings,
}


def _overlay(raw: dict[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    for section, kind in _SECTIONS.items():
        for field in msgspec.structs.fields(kind):
            variable = f"ENSEMBLE_{section}_{field.name}".upper()
            if variable in environ:
                table = raw.setdefault(section, {})
                if isinstance(table, dict):  # what else it may be, `parse` refuses
                    table[field.name] = _from_environ(variable, environ[variable], field.type)
    return raw


def _from_environ(variable: str, text: str, kind: Any) -> Any:
    """Return *text* as its setting's type wants it: a word like `5` or `true` may be a string."""
    try:
        return msgspec.convert(_literal(text), kind)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        try:
            return msgspec.convert(text, kind)
        except (msgspec.ValidationError, UnicodeEncodeError):
            raise ConfigError(f"${variable} is {text[:200]!r}: {_explain(str(error))}") from error


def _literal(text: str) -> Any:
    """Read an environment value as TOML would, else as a plain string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text


#: The words that a setting may be, by its name.
_WORDS: Mapping[str, Any] = {
    "workdirs": Workdirs,
    "launcher": MpiFlavor,
    "kind": SchedulerName,
    "job_mode": Literal["mpi", "serial"],
}


def _explain(message: str, *, kind: type[msgspec.Struct] | None = None) -> str:
    """Turn msgspec's message into one that names the key and, for a typo, the likely one.

    Args:
        message: Its message.
        kind: What was converted; all settings when None.
    """
    unknown = re.search(r"unknown field `(.*?)`(?: - at `\$\.?([\w.]*)`)?$", message)
    if unknown is None:
        if message.startswith("Invalid enum value"):
            place = re.search(r"([a-z_]+)`$", message)
            words = get_args(_WORDS.get(place[1] if place else "", MpiFlavor))
            message += f"; known: {', '.join(words)}"
        return message.replace("$.", "")
    key, section = unknown[1], unknown[2] or ""
    known = kind or _SECTIONS.get(section, Settings)
    close = difflib.get_close_matches(key, known.__struct_fields__, n=1)
    hint = (
        f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known.__struct_fields__)}"
    )
    where = f"[{section}] " if section else ""
    return f"unknown setting {where}{key}{hint}"
