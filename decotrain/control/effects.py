"""What goes in and out of the pure Coordinator and Member. Effects are carried out in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from decotrain.control.record import Record


@dataclass(frozen=True)
class Received:
    """A checked message and where answers go."""

    source: bytes  # routing identity; a peer's is identity(peer)
    message: Any
    key: bytes = b""  # the peer's own key that was shown for it; empty: the run's token, or none


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True)
class Send:
    to: bytes
    message: Any


@dataclass(frozen=True)
class Persist:
    """Must be durable before any later effect is carried out (V8)."""

    record: Record


@dataclass(frozen=True)
class Log:
    kind: str  # joined, left, suspected, view, link, generation, refused ...
    text: str


@dataclass(frozen=True)
class Stop:
    """This coordinator must not go on: another one holds a higher term."""

    reason: str


def identity(peer: int) -> bytes:
    """The routing identity of a peer."""
    return b"p" + peer.to_bytes(8, "big")
