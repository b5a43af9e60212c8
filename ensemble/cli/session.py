"""What all commands share: which site, and how to talk to its store."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from datetime import datetime

    from ensemble.api import Client
    from ensemble.site import Site

T = TypeVar("T")


@dataclass(slots=True)
class Session:
    """One run of the command line, with its global options."""

    named: str | None = None
    is_debug: bool = False

    def site(self) -> Site:
        """Return the site that is meant.

        Raises:
            NotFoundError: There is none.
        """
        from ensemble.errors import NotFoundError
        from ensemble.site import Site

        try:
            return Site.find(self.named)
        except FileNotFoundError as error:
            raise NotFoundError("the current directory was removed: cd to another one") from error

    def run(self, work: Callable[[Client], Coroutine[Any, Any, T]]) -> T:
        """Connect to the site's store, do *work*, disconnect; return what it returned."""
        from ensemble import api

        site = self.site()

        async def connected() -> T:
            async with api.connect(site) as client:
                return await work(client)

        return self.run_alone(connected())

    def run_alone(self, work: Coroutine[Any, Any, T]) -> T:
        """Run *work* in an event loop, with warnings on standard error."""
        import asyncio

        from ensemble import log

        log.configure(as_json=False, debug=self.is_debug)
        return asyncio.run(work)


def now() -> datetime:
    """Return the time for ages in listings."""
    import time
    from datetime import UTC, datetime

    return datetime.fromtimestamp(time.time(), UTC)
