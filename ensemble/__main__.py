"""The command `ensemble`: every error becomes one line and an exit status."""

from __future__ import annotations

import os
import sys
import traceback

import click

from ensemble.cli import group
from ensemble.cli.session import Session
from ensemble.errors import EnsembleError

INTERRUPTED = 130
#: What a shell shows for a program that SIGPIPE ended: `ensemble ls | head` is no failure.
PIPE_CLOSED = 141
#: Set by the shell's completion of `ensemble`, as click has it.
COMPLETION = "_ENSEMBLE_COMPLETE"


def main(argv: list[str] | None = None) -> int:
    """Run one command line; return the exit status.

    0 done, 1 failed, 2 usage, 3 not found, 4 store unreachable, 130 interrupted.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        # A locale without a character must not end a listing half-way.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    session = Session()
    try:
        status = _invoke(sys.argv[1:] if argv is None else argv, session)
        sys.stdout.flush()
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except click.ClickException as error:
        return _refuse_usage(error)
    except Exception as error:  # the last resort: whatever it is, the user gets one line
        if isinstance(_first_cause(error), BrokenPipeError):
            return _pipe_closed()
        return _report(error, session.is_debug)
    finally:
        _let_go_of_errors()
    return status


def _let_go_of_errors() -> None:
    """Lead standard error to nowhere if nobody reads it: for what is left in it Python exits with 120."""
    try:
        sys.stderr.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _open_closed_streams() -> None:
    """Lead standard streams that the caller closed (`<&-`) to nowhere, here and in children.

    Else the next file or socket that is opened takes their number, and uvloop aborts on closing it.
    """
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest: fd
            setattr(sys, name, open(fd, mode, closefd=False))  # noqa: SIM115 - for good


def _invoke(argv: list[str], session: Session) -> int:
    """Do what click's own `main` does, except to deal with a closed pipe, which it calls a failure."""
    instruction = os.environ.get(COMPLETION)
    if instruction:
        from click.shell_completion import shell_complete

        return shell_complete(group, {"obj": session}, "ensemble", COMPLETION, instruction)
    try:
        with group.make_context("ensemble", argv, obj=session) as context:
            group.invoke(context)
    except click.exceptions.Exit as done:
        return done.exit_code
    return 0


def _refuse_usage(error: click.ClickException) -> int:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return error.exit_code
    context = getattr(error, "ctx", None)
    hint = f" ({context.command_path} --help)" if context is not None else ""
    click.echo(f"error: {_one_line(error.format_message())}{hint}", err=True)
    return error.exit_code


def _report(error: Exception, is_debug: bool) -> int:
    cause = _first_cause(error)
    if is_debug:
        from ensemble.render.text import clean_lines

        for line in clean_lines("".join(traceback.format_exception(error))):
            click.echo(line, err=True)
    if isinstance(cause, EnsembleError):
        click.echo(f"error: {_one_line(str(cause))}", err=True)
        return cause.exit_code
    detail = _one_line(f"{type(cause).__name__}: {cause}")
    click.echo(f"error: {detail} (unexpected; ensemble --debug … shows where)", err=True)
    return 1


def _first_cause(error: BaseException) -> BaseException:
    """Return what a task group wrapped: ours before anybody else's."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [_first_cause(inner) for inner in error.exceptions]
    return next((leaf for leaf in leaves if isinstance(leaf, EnsembleError)), leaves[0])


def _one_line(text: str) -> str:
    from ensemble.render.text import clean

    return clean(" ".join(text.split("\n")))


def _pipe_closed() -> int:
    # The interpreter flushes once more when it leaves: let that go nowhere.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return PIPE_CLOSED


if __name__ == "__main__":
    sys.exit(main())
