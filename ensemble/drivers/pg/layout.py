"""Where the files of a site's database are, and whose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from ensemble.drivers.pg.account import Account
from ensemble.drivers.pg.files import Role, write_private
from ensemble.drivers.pg.owner import Owner
from ensemble.errors import ClusterError

T = TypeVar("T")

#: pg_ctl puts paths into a shell's double quotes, where these do not stay what they are.
_UNQUOTABLE = frozenset('"$`\\\n')


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of cluster.json: what was decided when the database was made."""

    account: Account
    #: Where the server's own files are when that is not the site's `db`.
    home: str | None = None
    version: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The files of one database."""

    #: The site's `db`: what is ours alone.
    folder: Path
    #: What the server reads and writes; the same directory unless another account runs the server.
    home: Path
    account: Account

    @classmethod
    def load(cls, folder: Path) -> Layout:
        """Read which files belong to the database in *folder*.

        Raises:
            ClusterError: There is no database, or its record cannot be read.
        """
        record = _read(folder / "cluster.json", Record)
        if record is None:
            raise ClusterError(f"there is no database in {folder} (ensemble init makes one)")
        return cls(
            folder=folder,
            home=folder if record.home is None else Path(record.home),
            account=record.account,
        )

    def save(self, version: str) -> None:
        """Write cluster.json."""
        home = None if self.home == self.folder else str(self.home)
        record = Record(account=self.account, home=home, version=version)
        _write(self.folder / "cluster.json", record)

    @property
    def data_dir(self) -> Path:
        """PostgreSQL's data directory."""
        return self.home / "pgdata"

    @property
    def log_file(self) -> Path:
        """The server's log."""
        return self.home / "postgres.log"

    @property
    def ca_file(self) -> Path:
        """The certificate that clients pin."""
        return self.folder / "ca.crt"

    @property
    def pgpass_file(self) -> Path:
        """The password file for psql."""
        return self.folder / "pgpass"

    def major(self) -> int:
        """Return the major version of PostgreSQL that made the data directory."""
        try:
            return int((self.data_dir / "PG_VERSION").read_text("ascii"))
        except (OSError, ValueError) as error:
            raise ClusterError(f"{self.data_dir} is not a data directory: {error}") from error

    def give(self, path: Path, content: str | bytes) -> None:
        """Replace a file of the server's: 0600 and the server's account's."""
        owner = self.account.ids() if self.account.kind == "account" else None
        write_private(path, content, staging=self.home, owner=owner)

    def owner(self) -> Owner | None:
        """Return who has the data directory, as recorded; None when it was never opened."""
        return _read(self.folder / "server.json", Owner)

    def set_owner(self, owner: Owner) -> None:
        """Record who has the data directory."""
        _write(self.folder / "server.json", owner)

    def password(self, role: Role) -> str:
        """Return the password of a role."""
        passwords = _read(self.folder / "secrets.json", dict[str, str]) or {}
        try:
            return passwords[role]
        except KeyError:
            raise ClusterError(
                f"{self.folder / 'secrets.json'} has no password of {role}"
            ) from None

    def save_passwords(self, passwords: Mapping[Role, str]) -> None:
        """Write secrets.json."""
        _write(self.folder / "secrets.json", {str(role): each for role, each in passwords.items()})

    def check(self) -> None:
        """Raise ClusterError when the data is somebody else's or its path cannot be passed on."""
        refuse_unquotable(self.home)
        uid, _ = self.account.ids()
        try:
            data_uid = self.data_dir.stat().st_uid
        except OSError as error:
            raise ClusterError(f"cannot open {self.data_dir}: {error.strerror}") from error
        if uid != data_uid:
            raise ClusterError(f"{self.data_dir} belongs to uid {data_uid}; run as that user")


def refuse_unquotable(path: Path) -> None:
    """Raise ClusterError when pg_ctl cannot be given *path*."""
    if _UNQUOTABLE & set(str(path)):
        raise ClusterError(
            f'{str(path)!r} holds one of " $ ` \\ or a newline, which pg_ctl cannot take; '
            "put the site elsewhere"
        )


def _read(path: Path, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, ValueError, RecursionError) as error:
        # Not what is in it: it may be a file of passwords.
        why = error.strerror if isinstance(error, OSError) else "it is damaged"
        raise ClusterError(f"cannot read {path}: {why}") from error


def _write(path: Path, value: msgspec.Struct | dict[str, str]) -> None:
    write_private(path, msgspec.json.format(msgspec.json.encode(value), indent=2))
