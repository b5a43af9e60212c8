"""The passwords of a site's database roles."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets

#: PostgreSQL's default for `scram_iterations`.
SCRAM_ITERATIONS = 4096


def make_password() -> str:
    """Return a random password of 32 bytes, in characters that need no quoting anywhere."""
    return secrets.token_urlsafe(32)


def scram_verifier(password: str, *, salt: bytes | None = None) -> str:
    """Return what PostgreSQL stores for *password*, so that the password itself is never sent.

    RFC 5803's form, as PostgreSQL's `CREATE ROLE … PASSWORD` accepts it. ASCII only: SASLprep
    leaves such passwords as they are.
    """
    salt = secrets.token_bytes(16) if salt is None else salt
    salted = hashlib.pbkdf2_hmac("sha256", password.encode("ascii"), salt, SCRAM_ITERATIONS)
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    stored_key = hashlib.sha256(client_key).digest()
    server_key = hmac.digest(salted, b"Server Key", "sha256")
    return (
        f"SCRAM-SHA-256${SCRAM_ITERATIONS}:{_base64(salt)}"
        f"${_base64(stored_key)}:{_base64(server_key)}"
    )


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
