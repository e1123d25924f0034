"""The run's token: the one secret of a run, its file, and every key that follows from it.

A token is 32 random bytes, written as `dtk1-` and base32 with a checksum, in a file that only its
owner can read. All keys are keyed BLAKE2b of the token with a label of their own, so none of them
says anything about another or about the token. Nothing here prints, logs or sends a secret.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decotrain.errors import ConfigError

SECRET_BYTES = 32
CHECK_BYTES = 3  # 35 bytes are 56 letters, without padding
PREFIX = "dtk1-"
FILE_BYTES_MAX = 4096
VARIABLE = "DECOTRAIN_TOKEN_FILE"


@dataclass(frozen=True)
class Token:
    secret: bytes = field(repr=False)

    @staticmethod
    def new() -> Token:
        return Token(secrets.token_bytes(SECRET_BYTES))

    @property
    def text(self) -> str:
        body = self.secret + _check(self.secret)
        return PREFIX + base64.b32encode(body).decode().lower()

    def derive(self, label: str, run: str = "", size: int = 32) -> bytes:
        """The key of this label: at most 16 bytes of label, any run."""
        return hashlib.blake2b(
            run.encode(), key=self.secret, person=label.encode(), digest_size=size
        ).digest()

    @functools.cached_property
    def server_keys(self) -> tuple[bytes, bytes]:
        """CURVE keys of the coordinator: public, secret (Z85)."""
        return _curve_keys(self.derive("curve server"))

    @functools.cached_property
    def client_keys(self) -> tuple[bytes, bytes]:
        """CURVE keys that whoever talks to the coordinator shows: public, secret (Z85)."""
        return _curve_keys(self.derive("curve client"))

    def data_key(self, run: str) -> bytes:
        """The pre-shared key of TLS between peers of this run."""
        return self.derive("data tls psk", run)

    def fingerprint(self, run: str) -> int:
        """What peers of one run have in common; says nothing about the token."""
        return int.from_bytes(self.derive("fingerprint", run, 8), "big")

    def record_mark(self) -> bytes:
        """Tells the coordinator's record whether it was made with this token."""
        return self.derive("record", size=16)


def parse(text: str) -> Token:
    """The token that `text` writes. A ValueError says what is wrong, never what is there."""
    text = text.strip()
    if not text.startswith(PREFIX):
        raise ValueError(f"it does not begin with {PREFIX}")
    try:
        body = base64.b32decode(text[len(PREFIX) :].upper().encode())
    except (binascii.Error, UnicodeEncodeError):
        raise ValueError("letters are missing or foreign") from None
    secret, check = body[:SECRET_BYTES], body[SECRET_BYTES:]
    if len(body) != SECRET_BYTES + CHECK_BYTES or check != _check(secret):
        raise ValueError("its checksum is wrong: letters are missing or changed")
    return Token(secret)


def write(token: Token, path: str | Path) -> None:
    """A new file that only we can read. Never replaces one: that would end a run's trust."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise ConfigError(
            f"{path} exists and is not overwritten, a run may need it: remove it or name another"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot write the token file {path}: {error.strerror}") from None
    with open(descriptor, "w", encoding="ascii") as file:
        os.fchmod(descriptor, 0o600)  # whatever the umask says
        file.write(token.text + "\n")


def read(path: str | Path) -> Token:
    """The token of a file that nobody but its owner can read."""
    try:
        with open(path, "rb") as file:
            facts = os.fstat(file.fileno())
            text = file.read(FILE_BYTES_MAX) if stat.S_ISREG(facts.st_mode) else b""
    except OSError as error:
        raise ConfigError(
            f"cannot read the token file {path}: {error.strerror}; copy it from the machine of the"
            " coordinator, or make one for a new run with `decotrain token new`"
        ) from None
    if facts.st_mode & 0o077:
        raise ConfigError(
            f"others can read the token file {path} (mode {stat.S_IMODE(facts.st_mode):04o}):"
            f" chmod 600 {path}"
        )
    try:
        return parse(text.decode("ascii", errors="replace"))
    except ValueError as error:
        raise ConfigError(
            f"{path} holds no token: {error}; copy it again, or make one for a new run with"
            " `decotrain token new`"
        ) from None


def find(path: str | Path | None = None) -> Token | None:
    """The token of the file named here or by the environment; None when no file is named."""
    path = path or os.environ.get(VARIABLE)
    return read(path) if path else None


def _check(secret: bytes) -> bytes:
    return hashlib.blake2b(secret, person=b"token check", digest_size=CHECK_BYTES).digest()


def _curve_keys(secret: bytes) -> tuple[bytes, bytes]:
    import zmq
    from zmq.utils import z85

    written: Any = z85.encode(secret)
    return zmq.curve_public(written), written
