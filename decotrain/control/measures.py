"""What a peer measures of itself and its links, for heartbeats: rates, shares, who holds us up.

`Meter` turns the node's counters into rates; it reads no clock and asks no node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PERIOD_S = 1.0  # between two looks at the node's counters
UNDIALLED_LOOKS = 3  # in a row, before a peer says that nobody can dial it


@dataclass
class Measures:
    """Rows are those of messages.Heartbeat."""

    share: float = 1.0  # 0: owns nothing, as it cannot be dialled
    uplink_bps: float = 0.0  # 0: not measured
    links: list[list[Any]] = field(default_factory=list)
    held_up: list[list[Any]] = field(default_factory=list)  # peer, seconds that we waited for it


class Meter:
    def __init__(self, peer: int, share: float) -> None:
        self.peer, self.share = peer, share
        self.at_s: float | None = None
        self.bytes: dict[int, tuple[int, int]] = {}
        self.undialled = 0

    def due(self, now: float) -> bool:
        return self.at_s is None or now - self.at_s >= PERIOD_S

    def read(
        self, links: Sequence[Mapping[str, Any]], measures: Mapping[str, Any], now: float
    ) -> Measures:
        """What the counters have become since the last look."""
        passed_s = now - self.at_s if self.at_s is not None else 0.0
        self.at_s = now
        rows = []
        for link in links:
            sent, received = link["sent_bytes"], link["received_bytes"]
            before = self.bytes.get(link["peer"], (sent, received))
            self.bytes[link["peer"]] = (sent, received)
            rates = [
                int(8 * max(0, one - old) / passed_s) if passed_s > 0 else 0
                for one, old in zip((sent, received), before, strict=True)
            ]
            if link["up"]:
                rows.append([link["peer"], *rates, float(link["rtt_s"]), *_kind(link)])
        self.undialled = self.undialled + 1 if self._nobody_dials(links) else 0
        return Measures(
            share=0.0 if self.undialled >= UNDIALLED_LOOKS else self.share,
            uplink_bps=float(measures["uplink_bps"]),
            links=rows,
            held_up=[[peer, float(s)] for peer, s in sorted(measures["held_up_s"].items())],
        )

    def _nobody_dials(self, links: Sequence[Mapping[str, Any]]) -> bool:
        """The smaller id dials. Where we had to, though it was the other's turn, it could not."""
        over_tcp = [link for link in links if link["up"] and not link["unix"]]
        their_turn = any(link["ours"] and link["peer"] < self.peer for link in over_tcp)
        return their_turn and all(link["ours"] for link in over_tcp)


def _kind(link: Mapping[str, Any]) -> list[Any]:
    """How bytes travel: what a row says after its rates."""
    pace_bps, control = float(link["pace_bps"]), str(link["congestion"])[:16]
    return [bool(link["unix"]), bool(link["shared"]), pace_bps, control]
