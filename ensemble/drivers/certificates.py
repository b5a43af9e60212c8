"""The secrets of a site's database: its certificate authority, its server certificate, its passwords.

Nothing here reads a clock or a file: `now` comes in, bytes go out.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ensemble.errors import ClusterError

#: Clocks of login and compute nodes differ; a certificate is valid from this long before now.
CLOCK_SKEW = timedelta(days=1)
AUTHORITY_LIFE = timedelta(days=30 * 365)
SERVER_LIFE = timedelta(days=5 * 365)
#: A server certificate with less than this left is issued anew at the next start.
RENEW_BEFORE = timedelta(days=90)

#: PostgreSQL's default for `scram_iterations`.
SCRAM_ITERATIONS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPair:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes = field(repr=False)


def make_authority(name: str, *, now: datetime) -> KeyPair:
    """Return a new certificate authority that may sign end certificates only."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name(f"Ensemble site {name}")
    certificate = (
        _builder(subject, subject, key.public_key(), now=now, life=AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(is_authority=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return _pem(certificate, key)


def issue_server(authority: KeyPair, names: Iterable[str], *, now: datetime) -> KeyPair:
    """Return a server certificate signed by *authority* for the host names and addresses *names*."""
    issuer = x509.load_pem_x509_certificate(authority.certificate)
    issuer_key = serialization.load_pem_private_key(authority.key, password=None)
    if not isinstance(issuer_key, ec.EllipticCurvePrivateKey):
        raise ClusterError("the site's ca.key is not an elliptic-curve key; it is not Ensemble's")
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(
        _name("Ensemble database"), issuer.subject, key.public_key(), now=now, life=SERVER_LIFE
    )
    certificate = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(is_authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
        .add_extension(
            x509.SubjectAlternativeName([_alternative(each) for each in dict.fromkeys(names)]),
            critical=False,
        )
        .sign(issuer_key, hashes.SHA256())
    )
    return _pem(certificate, key)


def covers(certificate: bytes, names: Iterable[str], *, now: datetime) -> bool:
    """Return whether a server certificate is good for all of *names*, and for a while yet."""
    parsed = x509.load_pem_x509_certificate(certificate)
    if parsed.not_valid_after_utc - now < RENEW_BEFORE:
        return False
    have = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {_alternative(each) for each in names} <= set(have)


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


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    *,
    now: datetime,
    life: timedelta,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _name(common_name: str) -> x509.Name:
    # X.520 ends a common name at 64 characters; site names may be longer.
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _usage(*, is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> KeyPair:
    return KeyPair(
        certificate=certificate.public_bytes(serialization.Encoding.PEM),
        key=key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
