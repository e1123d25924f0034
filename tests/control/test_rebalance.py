"""Chunks go where the bandwidth is: what peers measure becomes shares of a view (launcher.md)."""

from __future__ import annotations

from decotrain.control.coordinator import Options
from decotrain.control.measures import Measures
from decotrain.control.record import Record
from tests.control.fakes import World

PEERS = range(1, 9)
LOOK_S = Options().rebalance_s
FAST_BPS, SLOW_BPS = 1e8, 0.25e8
SLOW, HIDDEN = 4, 7


def eight() -> World:
    world = World(min_peers=8)
    for peer in PEERS:
        world.add(peer)
    world.run(2.0)
    assert world.agreed() == tuple(PEERS)
    return world


def measure(world: World, rates_bps: dict[int, float], hidden: int = 0) -> None:
    """What the agent does each second; member.py sends it with the next heartbeats."""
    for peer, rate in rates_bps.items():
        share = 0.0 if peer == hidden else 1.0
        world.peers[peer].member.measures = Measures(share=share, uplink_bps=rate)


def recorded(world: World) -> Record:
    assert world.record is not None
    return world.record


def recorded_shares(world: World) -> dict[int, float]:
    return {member.peer: member.share for member in recorded(world).members}


def test_one_new_view_takes_the_chunks_of_who_is_slow() -> None:
    world = eight()
    equal, epoch = recorded_shares(world), recorded(world).epoch
    assert equal == dict.fromkeys(PEERS, 1.0)
    measure(world, dict.fromkeys(PEERS, FAST_BPS) | {SLOW: SLOW_BPS})
    world.run(LOOK_S + 5.0)
    assert recorded_shares(world) == dict.fromkeys(PEERS, 1.143) | {SLOW: 0.0}
    assert recorded(world).epoch == epoch + 1
    for peer in world.peers.values():  # and each engine was told so
        rows = peer.installs[-1]["view"]["members"]
        assert {row[0]: row[3] for row in rows} == recorded_shares(world)
    world.run(3 * LOOK_S)  # as good as it gets: no further view
    assert recorded(world).epoch == epoch + 1
    assert world.agreed() == tuple(PEERS)


def test_who_dials_out_only_owns_nothing_and_the_others_as_much_as_they_can_send() -> None:
    world = eight()
    epoch = recorded(world).epoch
    measure(world, dict.fromkeys(PEERS, FAST_BPS) | {SLOW: SLOW_BPS}, hidden=HIDDEN)
    world.run(LOOK_S + 5.0)
    assert recorded_shares(world) == dict.fromkeys(PEERS, 1.333) | {SLOW: 0.0, HIDDEN: 0.0}
    assert recorded(world).epoch == epoch + 1


def test_equal_lines_never_move_a_chunk() -> None:
    world = eight()
    before = recorded(world)
    measured = [1.09, 0.7, 1.45, 0.81, 0.97, 0.86, 1.26, 0.84]  # as in test_ownership.py
    measure(world, {peer: FAST_BPS * one for peer, one in zip(PEERS, measured, strict=True)})
    world.run(3 * LOOK_S)
    assert recorded(world) == before
