"""A site's certificate authority and its server certificate.

Nothing here reads a clock or a file: `now` comes in, bytes go out.
"""

from __future__ import annotations

import ipaddress
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
    # X.520 ends a common name at 64 characters, and OpenSSL at 64 bytes; site names may be longer, and no text.
    cut = common_name.encode(errors="replace")[:64].decode(errors="ignore")
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, cut)])


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
