"""The server's own certificate, made when it is first needed and kept for this user.

Nobody signs it but itself, and it says nothing about the machine: clients know it by its fingerprint, which a key
vouches for (:mod:`sdrpc.key`). So it need not end, either.
"""

from __future__ import annotations

import ssl
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from ..errors import UsageError
from ..key import fingerprint
from ..storage import read_secret, state_folder, write_whole

MAX_BYTES = 1 << 14
_NAME = "sdrpc"
_FROM, _UNTIL = datetime(2000, 1, 1), datetime(9999, 12, 31)  # clocks of small machines are often wrong


class Identity(NamedTuple):
    """What the server shows of itself: ``context`` for its TLS connections, and the certificate's ``fingerprint``."""

    context: ssl.SSLContext
    fingerprint: bytes


def default_path() -> Path:
    """Where the certificate and its private key are kept for this user."""
    return state_folder() / "server.pem"


def load_identity(path: Path) -> Identity:
    """The identity in ``path``, a new one if there is none yet.

    Raises :class:`UsageError` where that can't be: it is damaged, others can read it, it can't be written.
    """
    pem = read_secret(path, MAX_BYTES)
    if pem is None:
        pem = _made(path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # nobody resumes a session
    try:
        context.load_cert_chain(path)
        text = pem.decode("ascii")
        certificate = ssl.PEM_cert_to_DER_cert(text[text.index("-----BEGIN CERTIFICATE-----") :])
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path}: not a certificate with its private key: move it away, and the server makes itself a new one "
            "(clients then need new keys)"
        ) from error
    return Identity(context, fingerprint(certificate))


def _made(path: Path) -> bytes:
    # it takes a while, and is needed once
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, _NAME)])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), _FROM, _UNTIL)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ) + certificate.public_bytes(serialization.Encoding.PEM)
    try:
        write_whole(path, pem)
    except OSError as error:
        raise UsageError(
            f"{path}: the server's certificate can't be kept there: {error.strerror or error}; set SDRPC_STATE to "
            "choose another place"
        ) from error
    return pem
