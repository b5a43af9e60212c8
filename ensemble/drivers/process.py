"""The only spawner and killer of processes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ensemble.errors import LaunchError


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """A command that ran to its end."""

    code: int
    stdout: str
    stderr: str


async def run(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    stdin: bytes | None = None,
    timeout_s: float = 60.0,
) -> Completed:
    """Run a command to its end and return what it printed.

    Args:
        env: The whole environment; this process's own when None.
        stdin: What it reads; /dev/null when None.
        timeout_s: Seconds after which it is killed.

    Raises:
        LaunchError: It could not be started, or did not end in time (it is dead by then).
    """
    try:
        process = await asyncio.create_subprocess_exec(  # noqa: TID251 - this is the one place
            *argv,
            env=env,
            cwd=cwd,
            stdin=asyncio.subprocess.DEVNULL if stdin is None else asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise LaunchError(f"cannot run {argv[0]}: {error.strerror or error}") from error
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await process.communicate(stdin)
    except BaseException as error:
        process.kill()
        await process.wait()
        if isinstance(error, TimeoutError):
            raise LaunchError(f"{argv[0]} did not end within {timeout_s:g} s") from error
        raise
    return Completed(
        code=process.returncode if process.returncode is not None else -1,
        stdout=out.decode(errors="replace"),
        stderr=err.decode(errors="replace"),
    )
