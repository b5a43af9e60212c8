from __future__ import annotations

import base64
import hashlib
import hmac
import ssl
import string
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509

from ensemble.drivers.pg import certificates, passwords

NOW = datetime(2026, 5, 4, tzinfo=UTC)


@pytest.fixture(scope="module")
def authority():
    return certificates.make_authority("site " + "x" * 100, now=NOW)


def test_the_server_certificate_is_signed_by_the_site(authority):
    pair = certificates.issue_server(authority, ["login1", "127.0.0.1", "127.0.0.1"], now=NOW)
    server = x509.load_pem_x509_certificate(pair.certificate)
    server.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.certificate))
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["login1"]
    assert [str(each) for each in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("x" * 100, "x" * 50),
        ("Исследование-белковых-структур-2026", "Исследование-белковых-стру"),
        ("x" + "Ж" * 40, "x" + "Ж" * 24),
        ("caf\udce9", "caf?"),
    ],
)
def test_a_certificate_names_any_directory_as_far_as_it_may(name, shown):
    made = certificates.make_authority(name, now=NOW)
    subject = x509.load_pem_x509_certificate(made.certificate).subject
    (found,) = subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    assert found.value == f"Ensemble site {shown}"


def test_a_client_that_pins_the_site_accepts_only_its_server(authority, tmp_path):
    other = certificates.make_authority("other", now=datetime.now(UTC))
    mine = certificates.make_authority("mine", now=datetime.now(UTC))
    pair = certificates.issue_server(mine, ["localhost"], now=datetime.now(UTC))
    (tmp_path / "crt").write_bytes(pair.certificate)
    (tmp_path / "key").write_bytes(pair.key)
    assert shake_hands(tmp_path, mine)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(tmp_path, other)


def shake_hands(folder, pinned):
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "crt", folder / "key")
    client = ssl.create_default_context(cadata=pinned.certificate.decode())
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(back, there), server.wrap_bio(there, back, server_side=True)]
    for _ in range(3):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return ends[0].version() == "TLSv1.3"


def test_a_certificate_is_renewed_for_a_new_address_and_before_its_end(authority):
    pair = certificates.issue_server(authority, ["login1", "10.0.0.1"], now=NOW)
    end = NOW + certificates.SERVER_LIFE
    assert certificates.covers(pair.certificate, ["10.0.0.1"], now=NOW)
    assert not certificates.covers(pair.certificate, ["10.0.0.2"], now=NOW)
    assert not certificates.covers(pair.certificate, ["10.0.0.1"], now=end - timedelta(days=1))


def test_keys_and_passwords_do_not_show_in_reprs(authority):
    assert "PRIVATE" not in repr(authority)


def test_passwords_are_long_and_need_no_quoting():
    first, second = passwords.make_password(), passwords.make_password()
    assert first != second
    assert len(first) >= 43
    assert set(first) <= set(string.ascii_letters + string.digits + "-_")


def test_the_verifier_agrees_with_the_example_of_rfc_7677():
    salt = base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ==")
    verifier = passwords.scram_verifier("pencil", salt=salt)
    method, iterations_salt, keys = verifier.split("$")
    stored_key, server_key = (base64.b64decode(key) for key in keys.split(":"))
    nonce = "rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
    message = (
        f"n=user,r=rOprNGfwEbeRWgbNEkqO,r={nonce},s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096,c=biws,r={nonce}"
    ).encode()
    proof = base64.b64decode("dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=")
    signature = hmac.digest(stored_key, message, "sha256")
    client_key = bytes(a ^ b for a, b in zip(proof, signature, strict=True))
    assert (method, iterations_salt) == ("SCRAM-SHA-256", "4096:W22ZaJ0SNY7soEsUEjb6gQ==")
    assert hashlib.sha256(client_key).digest() == stored_key
    assert hmac.digest(server_key, message, "sha256") == base64.b64decode(
        "6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="
    )
