"""Job scripts: rendered from a site's templates, and the templates that come along.

A template is a shell script with values in it (jinja.py says what else); contrib/templates/README.md is for
those who write one.
"""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import jinja2

from ensemble.drivers.jinja import Environment, Raw as Raw, mode_of, quote
from ensemble.errors import EnsembleError, TemplateError, UsageError

#: What a template gets.
VARIABLES: Mapping[str, str] = {
    "id": "the batch job's number in Ensemble",
    "name": "the batch job's name, `ens-…`; the submit command is given it already",
    "site": "the site's directory",
    "project": "the project or account to charge, or none",
    "queue": "the queue, or none",
    "nodes": "how many nodes",
    "minutes": "how many minutes: `{{ minutes|hms }}` is HH:MM:SS, `{{ minutes|hm }}` HH:MM",
    "job_mode": "`mpi` or `serial`",
    "wf_filter": "which workflows the launcher takes, or none for all",
    "slots_per_node": "how many tasks share a node at least (serial mode)",
    "output": "the file of the job's output; the submit command is given it already",
    "launch": "the launcher's whole command line, quoted already",
    "path": "the directory of the Python that runs Ensemble",
}

#: Where the templates that come along are.
FOLDER = Path(__file__).parents[1] / "templates"
#: What a site's template is called unless its settings say otherwise.
DEFAULT = "job.sh"

#: Unicode's control characters, halves of surrogate pairs, and line and paragraph separators: what may end a
#: line for somebody who reads the script, or cannot be written to it.
_FORBIDDEN = frozenset({"Cc", "Cs", "Zl", "Zp"})


def render(path: Path, values: Mapping[str, object]) -> str:
    """Return the job script that a template makes of some values.

    Args:
        path: The template; it may include files of its own directory.
        values: Texts, numbers or None by name (see VARIABLES), `launch` among them.

    Raises:
        UsageError: A value does not fit into a line of a script; names it.
        TemplateError: The template is missing or wrong; names the file and the line.
        EnsembleError: It cannot be read now.
    """
    given = {name: _check_value(name, value) for name, value in values.items()}
    environment = Environment(path.parent, known=given)
    try:
        script = environment.get_template(path.name).render(given)
    except EnsembleError:
        raise
    except Exception as error:  # whatever Jinja and Python find in a file
        raise TemplateError(_explain(error, path)) from error
    _check_script(path, script, launch=quote(given["launch"]))
    return script


def find(name: str, site: Path) -> Path:
    """Return a template of a site; one that comes along if the site has none of that name.

    Args:
        name: A file of its `templates/`, or of those that come along.
        site: The site's directory.

    Raises:
        TemplateError: There is none; lists those there are.
        EnsembleError: Whether the site has one, cannot be told now.
    """
    folder = site / "templates"
    if name in {"", ".", ".."} or Path(name).name != name:
        raise TemplateError(f"template {name!r}: expected the name of a file in {folder}")
    for place in (folder, FOLDER) if name.endswith(".sh") else (folder,):
        if stat.S_ISREG(mode_of(place / name)):
            return place / name
    there = ", ".join(_list_files(folder)) or "none"
    raise TemplateError(
        f"there is no template {name!r} in {folder} (there are: {there}; and those that come along: "
        f"{', '.join(f'{other}.sh' for other in builtin())})"
    )


def builtin() -> dict[str, Path]:
    """Return the templates that come along, by name: those of schedulers, and those of known sites."""
    names = [name for name in _list_files(FOLDER) if name.endswith(".sh")]
    return {name.removesuffix(".sh"): FOLDER / name for name in names}


def install(name: str, site: Path) -> bool:
    """Copy a template that comes along to a site's `templates/job.sh`.

    Returns:
        Whether it was copied: what is there already is left as it is.

    Raises:
        TemplateError: There is no such template, or it cannot be written.
    """
    known = builtin()
    if name not in known:
        raise TemplateError(f"there is no template {name!r} among {', '.join(known)}")
    target = site / "templates" / DEFAULT
    text = known[name].read_bytes()
    try:
        target.parent.mkdir(exist_ok=True)
        with target.open("xb") as file:
            file.write(text)
    except FileExistsError:
        return False
    except OSError as error:
        raise TemplateError(f"cannot write {target}: {error.strerror or error}") from error
    return True


# Which template suits this machine

#: Template, scheduler, variable of the environment (the host's name if empty), and what it says on login nodes.
_MACHINES: tuple[tuple[str, str, str, str], ...] = (
    # NERSC's documentation, "Environment": NERSC_HOST tells the machine. Whether for CPU or GPU nodes, nobody can tell.
    ("perlmutter-cpu", "slurm", "NERSC_HOST", r"perlmutter"),
    # OLCF sets Lmod's own variable for homes that are shared between machines (Lmod's manual).
    ("frontier", "slurm", "LMOD_SYSTEM_NAME", r"frontier"),
    # Set by the LUMI modules (LUMI-SoftwareStack); those who use others choose by hand.
    ("lumi-c", "slurm", "LUMI_STACK_NAME", r"LUMI"),
    # Login nodes as ALCF's user guides show them.
    ("polaris", "pbs", "", r"polaris-login-\d+(\..*)?"),
    ("aurora", "pbs", "", r"aurora-uan-\d+(\..*)?"),
)


def choose(environ: Mapping[str, str], schedulers: Sequence[str], hostname: str) -> str:
    """Return which of the templates that come along suits a machine.

    Args:
        environ: The environment on its login node.
        schedulers: Those whose commands are there, the likeliest first.
        hostname: The login node's name.
    """
    for name, scheduler, variable, pattern in _MACHINES:
        seen = environ.get(variable, "") if variable else hostname
        if scheduler in schedulers and re.fullmatch(pattern, seen):
            return name
    known = builtin()
    return next((name for name in schedulers if name in known), "local")


# Checks


def _check_value(name: str, value: object) -> str | float | None:
    if value is None or isinstance(value, int | float):
        return value
    if not isinstance(value, str | Path):
        raise UsageError(
            f"{name} is a {type(value).__name__}: a job script takes texts and numbers"
        )
    text = value if isinstance(value, str) else str(value)
    found = next((c for c in text if unicodedata.category(c) in _FORBIDDEN), None)
    if found is not None:
        raise UsageError(
            f"{name} has the character {found!a}, which a line of a job script cannot hold: "
            f"{text[:80]!a}"
        )
    return text


def _check_script(path: Path, script: str, *, launch: str) -> None:
    if not script.startswith("#!"):
        first = script.partition("\n")[0][:80]
        raise TemplateError(f"{path}: the script begins with {first!r}, not with #! and a shell")
    for number, line in enumerate(script.split("\n"), start=1):
        found = next((c for c in line if c != "\t" and unicodedata.category(c) in _FORBIDDEN), None)
        if found is not None:
            raise TemplateError(f"{path}: line {number} of the script has {found!a} in it")
    if f"exec {launch}" not in (line.strip() for line in script.split("\n")):
        raise TemplateError(
            f"{path}: the script has no line `exec {{{{ launch }}}}`: a launcher that the shell does not "
            "turn into is not signalled, and could not leave in good order"
        )


# Messages


def _explain(error: Exception, path: Path) -> str:
    """Put whatever was raised into one line: the file, the line, what is wrong."""
    if isinstance(error, jinja2.TemplateNotFound) and error.name == path.name:
        return f"{path}: there is no such template"
    if isinstance(error, jinja2.TemplateSyntaxError):
        where = f"{error.filename or path}:{error.lineno}"
        return f"{where}: {_one_line(error.message or 'not a template')}"
    if isinstance(error, RecursionError | MemoryError):
        return f"{path}: nested too deeply"
    return f"{_place(error.__traceback__, path)}: {_one_line(str(error) or type(error).__name__)}"


def _place(trace: TracebackType | None, path: Path) -> str:
    """Return the file and line of the template that was being rendered."""
    place = str(path)
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if Path(file).parent == path.parent and file.endswith(path.suffix):
            place = f"{file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]


def _list_files(folder: Path) -> list[str]:
    try:
        names = [name for name in os.listdir(folder) if name.isprintable()]
        return sorted(name for name in names if os.path.isfile(folder / name))
    except OSError:
        return []
