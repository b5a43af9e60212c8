"""What is written into a site's database directory: configuration, access rules, roles, secrets."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path

from ensemble.drivers.pg.passwords import scram_verifier
from ensemble.errors import ClusterError

DATABASE = "ensemble"


class Role(StrEnum):
    """The accounts of the database; its superuser is none of them and cannot connect."""

    #: Owns the database and migrates its schema.
    OWNER = "ensemble_owner"
    #: The command line, launchers and the service.
    USER = "ensemble_user"
    #: The API inside running tasks, of which there may be very many.
    TASK = "ensemble_task"


#: Included at the end of initdb's postgresql.conf.
_CONFIGURATION = """\
# Written by Ensemble at each start of the server; put your own settings into local.conf.
cluster_name = 'ensemble'
listen_addresses = '{listen}'
port = {port}
unix_socket_directories = ''
max_connections = 300
shared_buffers = 128MB
jit = off
timezone = 'UTC'

ssl = {ssl}
ssl_cert_file = '../server.crt'
ssl_key_file = '../server.key'
ssl_min_protocol_version = 'TLSv1.2'
password_encryption = 'scram-sha-256'

fsync = on
full_page_writes = on
max_wal_size = 2GB
checkpoint_timeout = 15min

# A queue's rows are updated many times over: clean up often, or every claim wades through the dead.
autovacuum = on
autovacuum_naptime = 15s
autovacuum_vacuum_scale_factor = 0.05
autovacuum_analyze_scale_factor = 0.05
autovacuum_vacuum_cost_delay = 1ms

# A vanished node must not hold locks until TCP gives up after two hours.
idle_in_transaction_session_timeout = 5min
tcp_keepalives_idle = 60
tcp_keepalives_interval = 15
tcp_keepalives_count = 4
tcp_user_timeout = 120s
client_connection_check_interval = 15s

log_destination = 'stderr'
logging_collector = off
log_timezone = 'UTC'
log_line_prefix = '%m [%p] %q%u %a %h '
# Statements carry the arguments of tasks; the log is for the server's own troubles.
log_min_error_statement = panic
include_if_exists = 'local.conf'
"""
LOCAL_CONFIGURATION = "# Your own settings; read last, and never changed by Ensemble.\n"


def configuration(*, port: int, listen: Sequence[str], has_tls: bool) -> str:
    """Return the text of ensemble.conf; *listen* are addresses besides 127.0.0.1."""
    return _CONFIGURATION.format(
        listen=",".join(("127.0.0.1", *listen)), port=port, ssl="on" if has_tls else "off"
    )


def access_rules(*, networks: Sequence[str], has_tls: bool) -> str:
    """Return the text of pg_hba.conf: our roles, our database, SCRAM, and nothing else."""
    kind = "hostssl" if has_tls else "host"
    roles = ",".join(Role)
    lines = [
        f"{kind} {DATABASE} {roles} {network} scram-sha-256"
        for network in dict.fromkeys(("127.0.0.1/32", *networks))
    ]
    return "\n".join(("# Written by Ensemble at each start of the server.", *lines, ""))


def setup_statements(passwords: Mapping[Role, str]) -> str:
    """Return what makes roles and database, for `postgres --single template1`: one a line."""
    limits = {Role.TASK: " CONNECTION LIMIT 100"}
    create = [
        f"CREATE ROLE {role} LOGIN{limits.get(role, '')} PASSWORD '{scram_verifier(passwords[role])}';"
        for role in Role
    ]
    return "\n".join(
        (
            *create,
            # The new database is a copy of template1; before version 15 all may create in public.
            "REVOKE ALL ON SCHEMA public FROM PUBLIC;",
            f"CREATE DATABASE {DATABASE} OWNER {Role.OWNER};",
            f"REVOKE ALL ON DATABASE {DATABASE} FROM PUBLIC;",
            f"GRANT CONNECT ON DATABASE {DATABASE} TO {Role.USER}, {Role.TASK};",
            f"ALTER DATABASE {DATABASE} SET search_path = ensemble, public;",
            "",
        )
    )


def write_private(
    path: Path,
    content: str | bytes,
    *,
    staging: Path | None = None,
    owner: tuple[int, int] | None = None,
) -> None:
    """Replace *path* by a 0600 file with *content*, whole or not at all.

    Args:
        staging: Where it is written first, when *path*'s directory is not only ours to write.
        owner: The uid and gid it is given to.

    Raises:
        ClusterError: It cannot be written; the file that was there is untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        _replace(path, data, staging or path.parent, owner)
    except OSError as error:
        raise ClusterError(f"cannot write {path}: {error.strerror or error}") from error


def _replace(path: Path, data: bytes, staging: Path, owner: tuple[int, int] | None) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=".", dir=staging)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if owner is not None:
                os.fchown(file.fileno(), *owner)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def complaint(
    log_file: Path, *, after: int = 0, words: Sequence[str] = ("PANIC:  ", "FATAL:  ")
) -> str:
    """Return the last line past byte *after* of a server's log that has one of *words*, or ``""``."""
    try:
        text = log_file.read_bytes()[after:].decode("utf-8", "replace")
    except OSError:
        return ""
    telling = [line for line in text.splitlines() if any(word in line for word in words)]
    return telling[-1].strip() if telling else ""
