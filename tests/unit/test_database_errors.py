from __future__ import annotations

import asyncpg
import pytest

from ensemble.core.database import wrap, wrapped
from ensemble.errors import OutcomeUnknownError, StoreFullError, StoreUnavailableError


async def test_a_statement_into_the_servers_farewell_is_a_lost_connection_and_no_crash() -> None:
    # Seen when PostgreSQL was stopped under a launcher: neither PostgresError nor InterfaceError.
    error = asyncpg.InternalClientError(
        "cannot switch to state 12; another operation (2) is in progress"
    )
    with pytest.raises(OutcomeUnknownError, match="lost the database"):
        async with wrapped():
            raise error


def server_error(code: str) -> asyncpg.PostgresError:
    return asyncpg.PostgresError.new({"C": code, "M": "a message\nHINT:  none"})


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("53100", StoreFullError),
        ("58030", StoreFullError),
        ("25006", StoreUnavailableError),
        ("53300", StoreUnavailableError),
        ("XX000", StoreUnavailableError),
        ("57P01", OutcomeUnknownError),
    ],
)
def test_errors_of_the_server_are_one_line_and_say_whether_to_try_again(
    code: str, kind: type[Exception]
) -> None:
    wrapped_error = wrap(server_error(code))
    assert type(wrapped_error) is kind
    assert "\n" not in str(wrapped_error)
