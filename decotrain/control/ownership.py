"""Who owns how much of a round: shares that follow what each peer can send.

With n peers, peer i sends its own contribution and, as owner of the fraction f of the chunks,
results to all others: (1 + (n - 2) f) times the round's bytes, and receives as much. A round takes
as long as its slowest peer, so f grows with the peer's rate until all need the same time.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from decotrain.control.plan import Candidate

if TYPE_CHECKING:
    from decotrain.control.coordinator import Coordinator

REBALANCE_GAIN = 1.25  # a new view for the sake of shares alone has to make rounds so much faster
# Rates within this factor of the median are taken for the median: what peers with equal links
# measure differs by up to 1.6 (slow starts, what the kernel buffers), and shares that follow such
# differences make a round of 8 peers at 20 Mbit/s 1.5 times slower.
ALIKE = 1.6
KNOWN_MIN = 2  # rates; one alone says nothing about differences


class Ownership:
    """Shares of the next view, from what peers have measured; reads the coordinator's peers."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.c = coordinator
        self.look_s = 0.0  # not before

    def give(self, candidates: list[Candidate]) -> list[Candidate]:
        """The candidates with their shares."""
        parts = shares(*self._rates(one.peer for one in candidates))
        return [replace(one, share=parts[one.peer]) for one in candidates]

    def due(self, now: float) -> bool:
        """Rounds would be faster with other shares, and it is not long since we looked."""
        if now < self.look_s:
            return False
        self.look_s = now + self.c.options.rebalance_s
        active = {one.peer: one.share for one in self.c.record.members if one.active}
        return active.keys() <= self.c.peers.keys() and unbalanced(active, *self._rates(active))

    def _rates(self, keys: Iterable[int]) -> tuple[dict[int, float], dict[int, float]]:
        """What each peer can send, and how much of its part it is willing to own."""
        known = {key: self.c.peers[key].measures for key in keys}
        wishes = {key: one.share for key, one in known.items()}
        return alike({key: one.uplink_bps for key, one in known.items()}), wishes


def alike(rates_bps: Mapping[int, float]) -> dict[int, float]:
    """The rates without the differences that measuring makes."""
    usual = statistics.median([rate for rate in rates_bps.values() if rate > 0] or [0.0])
    return {
        peer: usual if usual / ALIKE <= rate <= usual * ALIKE else rate
        for peer, rate in rates_bps.items()
    }


def shares(rates_bps: Mapping[int, float], wishes: Mapping[int, float]) -> dict[int, float]:
    """Peer -> its share, of all peers named; 1 is an equal part. Rate 0: not measured.

    Who wishes 0 owns nothing (when all do, nobody has a share and all own the same).
    """
    rates = _filled(rates_bps)
    able = sorted(peer for peer in rates if wishes[peer] > 0)
    if not able or len(rates) <= 2:  # two send one contribution and one result, whoever owns
        return {peer: wishes[peer] for peer in rates}
    count = len(rates)
    total = sum(rates[peer] for peer in able)
    time_s = max((count - 2 + len(able)) / total, 1.0 / min(rates.values()))
    parts = {peer: wishes[peer] * max(0.0, time_s * rates[peer] - 1.0) for peer in able}
    whole = sum(parts.values())
    return {peer: round(count * parts.get(peer, 0.0) / whole, 3) for peer in rates}


def round_s(rates_bps: Mapping[int, float], parts: Mapping[int, float]) -> float:
    """How long a round of one bit takes with these shares."""
    rates = _filled(rates_bps)
    whole = sum(parts[peer] for peer in rates)
    others = len(rates) - 2
    return max(
        (1.0 + others * (parts[peer] / whole if whole else 1.0 / len(rates))) / rate
        for peer, rate in rates.items()
    )


def unbalanced(
    parts: Mapping[int, float], rates_bps: Mapping[int, float], wishes: Mapping[int, float]
) -> bool:
    """Would a new view make rounds so much faster that it is worth one?"""
    if sum(rate > 0 for rate in rates_bps.values()) < KNOWN_MIN:
        return False
    best_s = round_s(rates_bps, shares(rates_bps, wishes))
    return round_s(rates_bps, parts) > REBALANCE_GAIN * best_s


def _filled(rates_bps: Mapping[int, float]) -> dict[int, float]:
    """Peers in order, with the median for those not measured; all alike when none is."""
    known = [rate for rate in rates_bps.values() if rate > 0]
    usual = statistics.median(known) if known else 1.0
    return {peer: rate if rate > 0 else usual for peer, rate in sorted(rates_bps.items())}
