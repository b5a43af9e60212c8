"""Every error that Ensemble raises on purpose, named by what the reader can do about it.

A message is one line: the thing, what was expected, and the next step.
"""

from __future__ import annotations


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
