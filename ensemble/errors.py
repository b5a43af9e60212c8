"""Every error that Ensemble raises on purpose, named by what the reader can do about it.

A message is one line: the thing, what was expected, and the next step.
"""

from __future__ import annotations

from enum import StrEnum


class EnsembleError(Exception):
    """Something that Ensemble refuses or cannot do, in one line for the user."""

    #: Exit status of the command line when this error ends it.
    exit_code = 1


class UsageError(EnsembleError):
    """The request itself is wrong: an option, a value, a line of a file."""

    exit_code = 2


class ConfigError(UsageError):
    """A setting is unknown, malformed or contradicts another."""


class NotFoundError(EnsembleError):
    """The named site, task, app or launcher does not exist."""

    exit_code = 3


class StoreUnavailableError(EnsembleError):
    """The database cannot be reached now; nothing is known to be wrong with the request."""

    exit_code = 4


class OutcomeUnknownError(StoreUnavailableError):
    """The connection was lost after a write was sent: it may have been applied. Re-read, then decide."""


class StoreFullError(StoreUnavailableError):
    """The database's disk is full: nothing was written; free some space and repeat."""


class SchemaError(EnsembleError):
    """The database's schema does not suit this program: newer, missing or edited."""


class IllegalMoveError(EnsembleError):
    """A task cannot move from its state to the wanted one."""


class LeaseLostError(EnsembleError):
    """The lease was closed by a reaper: this launcher owns no task any more."""


class ClusterError(EnsembleError):
    """A PostgreSQL cluster cannot be created, started or stopped."""


class AllocationError(EnsembleError):
    """The nodes of this allocation cannot be told, or are not free."""


class LaunchError(EnsembleError):
    """A program could not be started."""


class WireError(EnsembleError):
    """A pilot or a launcher said what the other end cannot understand."""


class TakenError(EnsembleError):
    """Another process holds what only one may hold."""

    def __init__(self, message: str, *, host: str | None, pid: int | None) -> None:
        """Keep who it is."""
        super().__init__(message)
        self.host = host
        self.pid = pid


class Trouble(StrEnum):
    """What is to be done after a scheduler's command failed."""

    #: It did not take effect; the same again later may work.
    RETRY = "retry"
    #: Nobody knows whether it took effect: look, then decide.
    UNSURE = "unsure"
    #: No more is admitted for now: wait until some jobs have ended.
    CAPACITY = "capacity"
    #: It will never work this way: a human has to change something.
    PERMANENT = "permanent"


class SchedulerError(EnsembleError):
    """A batch scheduler refused, failed or did not answer."""

    def __init__(self, message: str, *, trouble: Trouble, output: str = "") -> None:
        """Keep what is to be done about it, and everything that was printed."""
        super().__init__(message)
        self.trouble = trouble
        self.output = output


class TemplateError(UsageError):
    """A job template is missing, malformed, or uses a variable that there is not."""
