"""The run's token and the keys of single peers: their files, and every key that follows from them.

A token is 32 random bytes, written as `dtk1-` and base32 with a checksum, in a file that only its
owner can read. All keys are keyed BLAKE2b of the token with a label of their own, so none of them
says anything about another or about the token. A peer's own key (`dtp1-`) opens the run for one
peer only, until it is taken away (peer_list.py): the token does not follow from it. Nothing here
prints, logs or sends a secret.
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
PEER_PREFIX = "dtp1-"
PEER_CHECK_BYTES = 4  # 3 x 32 + 4 bytes are 160 letters, without padding
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

    @property
    def server_public(self) -> bytes:
        """What whoever dials the coordinator must know of it (Z85)."""
        return self.server_keys[0]

    def data_key(self, run: str) -> bytes:
        """The pre-shared key of TLS between peers that hold this token."""
        return self.derive("data tls psk", run)

    def pair_key(self, run: str, one: int, other: int) -> bytes:
        """The pre-shared key of TLS between two peers, by their ids, when peers have own keys."""
        low, high = sorted((one, other))
        pair = low.to_bytes(8, "big") + high.to_bytes(8, "big")
        return hashlib.blake2b(pair, key=self.derive("data tls pair", run), digest_size=32).digest()

    @property
    def mark(self) -> bytes:
        """What all who are let in have in common, peers with keys of their own too."""
        return self.derive("fingerprint")

    def fingerprint(self, run: str) -> int:
        """What peers of one run have in common; says nothing about the token."""
        return _fingerprint(self.mark, run)

    def peer_key(self) -> PeerKey:
        """A new key for one peer."""
        from zmq.utils import z85

        server: bytes = z85.decode(self.server_public)
        return PeerKey(secrets.token_bytes(SECRET_BYTES), server, self.mark)

    def record_mark(self) -> bytes:
        """Tells the coordinator's record whether it was made with this token."""
        return self.derive("record", size=16)


@dataclass(frozen=True)
class PeerKey:
    """What one peer holds instead of the run's token."""

    secret: bytes = field(repr=False)  # of CURVE
    server: bytes = field(repr=False)  # public key of the coordinator, raw
    mark: bytes = field(repr=False)  # what all have in common; the fingerprint of a run follows

    @property
    def text(self) -> str:
        body = self.secret + self.server + self.mark
        body += _check(body, PEER_CHECK_BYTES)
        return PEER_PREFIX + base64.b32encode(body).decode().lower()

    @functools.cached_property
    def client_keys(self) -> tuple[bytes, bytes]:
        """CURVE keys that it shows to the coordinator: public, secret (Z85)."""
        return _curve_keys(self.secret)

    @property
    def server_public(self) -> bytes:
        from zmq.utils import z85

        written: bytes = z85.encode(self.server)
        return written

    def data_key(self, run: str) -> bytes:
        """None: the coordinator says which key it shares with whom."""
        return b""

    def fingerprint(self, run: str) -> int:
        return _fingerprint(self.mark, run)


Secret = Token | PeerKey


def parse(text: str) -> Secret:
    """The token that `text` writes. A ValueError says what is wrong, never what is there."""
    text = text.strip()
    single = text.startswith(PEER_PREFIX)
    if not single and not text.startswith(PREFIX):
        raise ValueError(f"it does not begin with {PREFIX} or {PEER_PREFIX}")
    try:
        data = base64.b32decode(text[len(PREFIX) :].upper().encode())
    except (binascii.Error, UnicodeEncodeError):
        raise ValueError("letters are missing or foreign") from None
    secrets_, check_bytes = (3, PEER_CHECK_BYTES) if single else (1, CHECK_BYTES)
    size = secrets_ * SECRET_BYTES
    body, check = data[:size], data[size:]
    if len(data) != size + check_bytes or check != _check(body, check_bytes):
        raise ValueError("its checksum is wrong: letters are missing or changed")
    if single:
        return PeerKey(*(body[i : i + SECRET_BYTES] for i in range(0, size, SECRET_BYTES)))
    return Token(body)


def write(token: Secret, path: str | Path) -> None:
    """A new file that only we can read. Never replaces one: that would end a run's trust."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise ConfigError(
            f"{path} exists and is not overwritten, a run may need it: remove it or name another"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot write the token file {path}: {error.strerror}") from None
    try:
        with open(descriptor, "w", encoding="ascii") as file:
            os.fchmod(descriptor, 0o600)  # whatever the umask says
            file.write(token.text + "\n")
    except OSError as error:
        Path(path).unlink(missing_ok=True)
        raise ConfigError(
            f"cannot write the token file {path}: {error.strerror}; make room there"
        ) from None


def read(path: str | Path) -> Secret:
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


def find(path: str | Path | None = None) -> Secret | None:
    """The token of the file named here or by the environment; None when no file is named."""
    path = place(path)
    return read(path) if path else None


def place(path: str | Path | None = None) -> str | Path | None:
    """The file that `find` reads."""
    return path or os.environ.get(VARIABLE)


def probe_key(token: Secret | None) -> bytes:
    """What two doctors show each other; empty without a token."""
    if token is None:
        return b""
    return hashlib.blake2b(b"probe", key=token.mark, digest_size=32).digest()


def whole(token: Secret | None, path: str | Path | None = None) -> Token | None:
    """What decides about a run needs its token, and not a key of one peer."""
    if isinstance(token, PeerKey):
        raise ConfigError(
            f"{place(path)} is the key of one peer, and this needs the token of the run: name its"
            " file with --token-file"
        )
    return token


def _check(secret: bytes, size: int = CHECK_BYTES) -> bytes:
    return hashlib.blake2b(secret, person=b"token check", digest_size=size).digest()


def _fingerprint(mark: bytes, run: str) -> int:
    return int.from_bytes(hashlib.blake2b(run.encode(), key=mark, digest_size=8).digest(), "big")


def _curve_keys(secret: bytes) -> tuple[bytes, bytes]:
    import zmq
    from zmq.utils import z85

    written: Any = z85.encode(secret)
    return zmq.curve_public(written), written
