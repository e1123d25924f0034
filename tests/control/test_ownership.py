"""Shares follow what peers can send: the closed form, its corners, and when a view is worth it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decotrain.control.measures import UNDIALLED_LOOKS, Meter
from decotrain.control.ownership import ALIKE, REBALANCE_GAIN, alike, round_s, shares, unbalanced

RATES = st.lists(st.floats(1e5, 1e10), min_size=3, max_size=16)


def equal(rates: dict[int, float]) -> dict[int, float]:
    return dict.fromkeys(rates, 1.0)


def test_one_slow_peer_of_eight() -> None:
    rates = dict.fromkeys(range(8), 1e8) | {3: 0.25e8}
    parts = shares(rates, equal(rates))
    assert parts[3] == 0
    assert parts[0] == pytest.approx(8 / 7, abs=1e-3)
    # 7 S/b with equal parts, 4 S/b at best: the slow one has to send its contribution.
    assert round_s(rates, equal(rates)) == pytest.approx(7 / 1e8)
    assert round_s(rates, parts) == pytest.approx(4 / 1e8)
    assert unbalanced(equal(rates), rates, equal(rates))
    assert not unbalanced(parts, rates, equal(rates))


@given(RATES)
def test_a_round_takes_the_least_time_there_is(values: list[float]) -> None:
    rates = dict(enumerate(values))
    parts = shares(rates, equal(rates))
    best = max(1 / min(values), 2 * (len(values) - 1) / sum(values))
    assert round_s(rates, parts) <= best * 1.02 + 1e-12  # shares are rounded
    assert best <= round_s(rates, equal(rates)) * 1.000001


def test_nothing_measured_and_two_peers_mean_equal_parts() -> None:
    assert shares({1: 0.0, 2: 0.0, 3: 0.0}, equal({1: 0, 2: 0, 3: 0})) == {1: 1.0, 2: 1.0, 3: 1.0}
    assert shares({1: 1e6, 2: 1e9}, {1: 1.0, 2: 1.0}) == {1: 1.0, 2: 1.0}
    assert not unbalanced({1: 1, 2: 1, 3: 1}, {1: 1e6, 2: 0, 3: 0}, {1: 1.0, 2: 1.0, 3: 1.0})


def test_what_measuring_adds_moves_no_shares() -> None:
    """Figures of eight equal lines of 20 Mbit/s; following them made rounds 1.5 times longer."""
    measured = dict(enumerate([1.09, 0.7, 1.45, 0.81, 0.97, 0.86, 1.26, 0.84]))
    seen = alike(measured)
    assert not unbalanced(equal(seen), seen, equal(seen))
    assert set(shares(seen, equal(seen)).values()) == {1.0}
    uneven = alike({0: 19.0, 1: 41.0, 2: 58.0, 3: 0.0, 4: 50.0})
    assert uneven == {0: 19.0, 1: 45.5, 2: 45.5, 3: 0.0, 4: 45.5}
    assert alike({}) == {}
    assert alike({1: 0.0}) == {1: 0.0}
    assert ALIKE > 1


def test_who_cannot_be_dialled_owns_nothing() -> None:
    rates = dict.fromkeys(range(4), 1e8)
    parts = shares(rates, equal(rates) | {2: 0.0})
    assert parts[2] == 0
    assert parts[0] == pytest.approx(4 / 3, abs=1e-3)
    assert shares(rates, dict.fromkeys(rates, 0.0)) == dict.fromkeys(rates, 0.0)
    assert REBALANCE_GAIN > 1


def link(peer: int, ours: bool, unix: bool = False, sent: int = 0) -> dict[str, object]:
    return {"peer": peer, "up": True, "ours": ours, "unix": unix, "sent_bytes": sent,
            "received_bytes": 0, "rtt_s": 0.01, "shared": unix, "pace_bps": 2e6,
            "congestion": "bbr"}  # fmt: skip


@pytest.mark.parametrize(
    ("links", "share"),
    [
        ([link(1, True), link(9, True)], 0.0),  # 1 should have dialled us, and could not
        ([link(1, True), link(2, False)], 1.0),  # somebody can
        ([link(9, True)], 1.0),  # our turn: says nothing
        ([link(1, True, unix=True)], 1.0),  # a neighbour says nothing
        ([], 1.0),
    ],
)
def test_a_peer_finds_out_that_nobody_can_dial_it(
    links: list[dict[str, object]], share: float
) -> None:
    meter = Meter(5, 1.0)
    nothing = {"uplink_bps": 0.0, "held_up_s": {}}
    seen = [meter.read(links, nothing, float(at)).share for at in range(UNDIALLED_LOOKS)]
    assert seen == [1.0] * (UNDIALLED_LOOKS - 1) + [share]


def test_rates_of_links_are_differences() -> None:
    meter = Meter(5, 1.0)
    nothing = {"uplink_bps": 7.0, "held_up_s": {1: 2.0}}
    assert meter.due(10.0)
    meter.read([link(1, False, sent=1000)], nothing, 10.0)
    assert not meter.due(10.5)
    seen = meter.read([link(1, False, sent=5000)], nothing, 12.0)
    assert seen.links == [[1, 16000, 0, 0.01, False, False, 2e6, "bbr"]]
    assert (seen.uplink_bps, seen.held_up) == (7.0, [[1, 2.0]])
