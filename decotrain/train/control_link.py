"""What the launcher asks and tells the coordinator. No answer is fine: nothing stops a run."""

from __future__ import annotations

import socket
from typing import Any

from decotrain.control import client
from decotrain.errors import Error

ASK_S = 0.5  # the coordinator is on this machine


def peers(address: str, run: str) -> list[dict[str, Any]]:
    """The coordinator's rows about peers; empty when it does not answer."""
    try:
        rows: list[dict[str, Any]] = client.status(address, run, timeout_s=ASK_S)["peers"]
    except Error:
        return []
    return rows


def exited(address: str, run: str, peer: int, launch: str, why: str) -> bool:
    """Says that a peer's process is gone, so that nobody has to wait for a timeout."""
    try:
        return client.exited(
            address, run, peer=peer, host=socket.gethostname(), launch=launch, detail=why[:500],
            timeout_s=ASK_S,
        )  # fmt: skip
    except Error:
        return False
