"""A run whose last peer died does not look like one that trains: in status, metrics and doctor."""

from __future__ import annotations

from typing import Any

from decotrain import doctor
from decotrain.control.status import prometheus, status
from decotrain.screen import lines_of
from tests.control.fakes import World, three


def known_of(world: World) -> dict[str, Any]:
    assert world.coordinator is not None
    return status(world.coordinator, world.now)


def one() -> World:
    world = World(min_peers=1)
    world.add(1)
    world.run(2.0)
    known = known_of(world)
    assert (known["phase"], known["peers"][0]["state"]) == ("steady", "here")
    assert 'decotrain_peers_heard{run="default"} 1' in prometheus(known)
    return world


def test_the_only_peer_dies() -> None:
    world = one()
    world.peers[1].alive = False
    world.run(2.0)
    assert known_of(world)["phase"] == "steady"  # a peer may be slow
    world.run(24.0)
    known = known_of(world)
    head, _, line, *_ = lines_of(known, "h:1")
    assert "hears nobody for 26 s, 1 of 1 peers active, 0 heard" in head
    assert line.startswith("! 0 peer1")
    assert "silent" in line
    assert 'decotrain_peers_heard{run="default"} 0' in prometheus(known)
    finding = doctor._peer(known["peers"][0])
    assert "silent for 26 s" in finding.seen
    assert "start it again" in finding.remedy


def test_it_was_only_cut_off() -> None:
    world = one()
    world.cut.add(1)
    world.run(10.0)
    assert known_of(world)["phase"] == "hears nobody"
    world.cut.clear()
    world.run(2.0)
    known = known_of(world)
    assert (known["phase"], known["peers"][0]["heard"]) == ("steady", True)
    assert "heard" not in lines_of(known, "h:1")[0]


def test_nobody_comes_back_to_a_coordinator_that_was_started_again() -> None:
    world = one()
    world.peers[1].alive = False
    world.start()
    world.run(1.0)
    assert known_of(world)["phase"] == "recovering"
    world.run(19.0)
    known = known_of(world)
    assert "hears nobody for 20 s" in lines_of(known, "h:1")[0]
    assert lines_of(known, "h:1")[2].startswith("! 0 peer1")
    assert "away since the coordinator started" in doctor._peer(known["peers"][0]).seen


def test_one_of_three_is_left_out_and_nothing_else_is_said() -> None:
    world = three()
    world.peers[2].alive = False
    world.run(10.0)
    known = known_of(world)
    assert known["phase"] == "steady"
    assert [peer["heard"] for peer in known["peers"]] == [True, True]


def test_a_run_that_waits_for_its_first_peers_misses_nobody() -> None:
    world = World(min_peers=2)
    world.run(10.0)
    assert known_of(world)["phase"] == "waiting"
