"""Peers with keys of their own: a list beside the run's token, one line for each, NAME and KEY.

`decotrain token new --peer` adds a line; who deletes one takes that key away. The coordinator looks
again whenever somebody shows a key, so no restart is needed. Only public keys stand in the list: it
is no secret, but whoever can write to it decides who is in the run.
"""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

from zmq.utils import z85

from decotrain.control.token import PeerKey
from decotrain.errors import ConfigError

SUFFIX = ".peers"
BYTES_MAX = 1 << 20
NAME_MAX = 64
KEY_LETTERS = 64

logger = logging.getLogger("decotrain.coordinator")


def public_of(key: PeerKey) -> bytes:
    """How a key is written in the list, in the record and in messages: it is public."""
    raw: bytes = z85.decode(key.client_keys[0])
    return raw.hex().encode()


class PeerList:
    """The list beside the token file; no file is an empty list."""

    def __init__(self, token_file: str | Path) -> None:
        self.path = Path(f"{token_file}{SUFFIX}")
        self.names: dict[bytes, str] = {}  # by public key
        self.seen: tuple[int, int] | None = None  # when and how large it was
        self._read()

    def name_of(self, public: bytes) -> str | None:
        """Whose key it is; None: nobody's. A list that became unreadable stays as it was."""
        self.refresh()
        return self.names.get(public)

    def refresh(self) -> None:
        try:
            self._read()
        except ConfigError as error:
            logger.error("%s; the keys known before stand", error)

    def check(self, name: str) -> None:
        """May a key be made for it?"""
        if not 1 <= len(name) <= NAME_MAX or not name.isprintable() or " " in name or "#" in name:
            raise ConfigError(
                f"{name!r} is no name for a peer: 1 to {NAME_MAX} letters without blanks"
            )
        if name in self.names.values():
            raise ConfigError(
                f"{name} has a key already: take another name, or delete its line in {self.path}"
            )

    def add(self, name: str, key: PeerKey) -> None:
        """A line for a new key."""
        self.check(name)
        try:
            descriptor = os.open(
                self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
            )
            with open(descriptor, "wb") as file:
                file.write(name.encode() + b" " + public_of(key) + b"\n")
        except OSError as error:
            raise ConfigError(f"cannot write the list {self.path}: {error.strerror}") from None

    def _read(self) -> None:
        try:
            with open(self.path, "rb") as file:
                facts = os.fstat(file.fileno())
                now = (facts.st_mtime_ns, facts.st_size)
                if now == self.seen:
                    return
                data = file.read(BYTES_MAX + 1)
        except FileNotFoundError:
            self.names, self.seen = {}, None
            return
        except OSError as error:
            raise ConfigError(f"cannot read the list {self.path}: {error.strerror}") from None
        self.seen = now
        if facts.st_mode & 0o022:
            mode = stat.S_IMODE(facts.st_mode)
            raise ConfigError(
                f"others can write to the list {self.path} (mode {mode:04o}): chmod 600 {self.path}"
            )
        self.names = _parse(data, self.path)


def _parse(data: bytes, path: Path) -> dict[bytes, str]:
    names: dict[bytes, str] = {}
    text = data[:BYTES_MAX].decode("utf-8", errors="replace")
    if len(data) > BYTES_MAX:
        raise ConfigError(f"{path} is too large for a list of peers")
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        letters = words[-1]
        if len(words) != 2 or len(letters) != KEY_LETTERS or set(letters) - set("0123456789abcdef"):
            raise ConfigError(
                f"{path}, line {number} is no NAME and KEY: remove it, and make the key again with"
                " `decotrain token new --peer NAME`"
            )
        names[letters.encode()] = words[0]
    return names
