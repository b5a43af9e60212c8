"""What the README tells to type, typed: its marked blocks run in order, in one shell."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: A fenced block under its mark; a block with a file's name is saved under it, all others are run.
MARKED = re.compile(
    r"^<!-- test: readme(?: file=(?P<file>\S+))? -->\n```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
TIMEOUT_S = 110
SITE = "sweep"
BATCH_SITE = "batch"


@dataclass(frozen=True)
class Block:
    language: str
    #: Where to save it; None for what is typed.
    file: str | None
    text: str


def blocks() -> list[Block]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [Block(m["language"], m["file"], m["text"]) for m in MARKED.finditer(text)]


def script() -> str:
    """Return all blocks as one script that ends at the first command that fails."""
    lines = ["set -eu"]
    for block in blocks():
        if block.file is None:
            lines.append(block.text)
        else:
            # The shell is in the site's directory by then, as README has it.
            lines.append(f"cat > {block.file} <<'END OF FILE'\n{block.text}END OF FILE")
    return "\n".join(lines)


def environ() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VIRTUAL_")}
    return {**kept, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def end_group(process: subprocess.Popen[str]) -> None:
    """Let the shell's launcher leave in good order, then end whatever is left."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=10)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for site in (tmp_path / SITE, tmp_path / BATCH_SITE):
        if (site / "ensemble.toml").exists():
            subprocess.run(
                [sys.executable, "-m", "ensemble", "--site", str(site), "db", "stop"],
                stdout=subprocess.DEVNULL,
                timeout=30,
                check=True,
            )
    shutil.rmtree(tmp_path)


def test_each_mark_is_above_a_block():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(blocks()) == text.count("<!-- test:")
    assert {block.language for block in blocks() if block.file is None} == {"shell"}
    assert "squares.py" in {block.file for block in blocks()}


@pytest.mark.mpi
@pytest.mark.skipif(
    not (Path(sys.executable).parent / "ensemble").exists(), reason="ensemble is not installed"
)
def test_the_commands_of_the_readme_do_what_it_says(folder):
    pytest.importorskip("mpi4py")
    shell = subprocess.Popen(
        ["bash", "-c", script()],
        cwd=folder,
        env=environ(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = shell.communicate(timeout=TIMEOUT_S)
    finally:
        end_group(shell)
    assert shell.returncode == 0, (out, err)
    assert "Traceback" not in err
    lines = out.splitlines()
    # The ids that add prints, in the one site and in the other.
    assert [line for line in lines if line.isdecimal()] == ["1", "2", "3", "1"]
    assert "from a batch job" in lines
    assert sum(line.startswith("time for 1 loops = ") for line in lines) == 1  # ensemble log 2
    assert re.search(r"^state +JOB_FINISHED, attempt 1$", out, re.MULTILINE)  # ensemble show 3
    squares = [line.split() for line in lines if re.fullmatch(r"\d+ JOB_FINISHED \d+", line)]
    assert [int(square) for _, _, square in squares] == [x**2 for x in range(8)]
    output = folder / SITE / "data" / "0" / "last_3" / "last.out"
    assert output.read_text() == "both have finished\n"
    assert lines[-1].startswith("the database is stopped")
