"""Who runs a round with another specification goes: what the reports show decides, not a word."""

from __future__ import annotations

from typing import Any

import pytest

from decotrain.control.maps import NO_SLOT
from decotrain.control.member import Doubt
from decotrain.control.misfits import REASON, WAIT_S, Voter, odd_ones, stands
from decotrain.control.plan import Candidate, make_plan
from tests.control.fakes import World, empty_report, three

LONG_S = WAIT_S + 0.6


def entry(spec: bytes, begun: bool = True, chunks: int = 1, seq: int = 4) -> dict[str, Any]:
    words = bytes(8 * chunks)
    return {
        "tag": 0, "seq": seq, "spec": spec, "begun": begun, "skipped": 0,
        "owner": bytes(chunks), "received": words, "born": words, "digest": words,
        "contributors": words,
    }  # fmt: skip


def running(spec: bytes, **more: Any) -> dict[str, Any]:
    return {**empty_report(1), "rounds": [entry(spec, **more)]}


def begin(world: World, specs: dict[int, bytes]) -> None:
    for peer, spec in specs.items():
        world.peers[peer].report = running(spec)


def told(world: World, peer: int) -> tuple[str, bool]:
    last = world.peers[peer].told[-1]
    return last.kind, last.again


# --- the vote


def voters(*active: bool) -> dict[int, Voter]:
    return {100 + slot: Voter(100 + slot, slot, here) for slot, here in enumerate(active)}


@pytest.mark.parametrize(
    ("specs", "active", "best", "lead"),
    [
        ("abbb", (True,) * 4, "b", 2),  # not the lowest slot alone
        ("ab", (True,) * 2, "a", 0),  # a tie: the lowest slot
        ("aab", (False, False, True), "b", 1),  # observers do not outvote who is active
        ("ab", (False, False), "a", 0),
        ("ba", (False, True), "a", 1),
        ("aa", (True,) * 2, "a", 2),
    ],
)
def test_most_active_peers_stand(
    specs: str, active: tuple[bool, ...], best: str, lead: int
) -> None:
    here = voters(*active).values()
    votes = [(one, (spec.encode(), 1)) for one, spec in zip(here, specs, strict=True)]
    assert stands(votes) == ((best.encode(), 1), lead)
    assert stands(votes[::-1]) == ((best.encode(), 1), lead)


@pytest.mark.parametrize(
    ("specs", "odd", "sure"),
    [
        ("abbb", {100}, True),
        ("ab..", {101}, False),  # two have not begun: they may turn it
        ("abb.", {100}, False),
        ("abbbb.", {100}, True),
        ("bb", set(), True),
        ("..", set(), True),
        ("ab", {101}, True),  # nobody is left to ask
    ],
)
def test_who_is_odd_and_whether_others_may_turn_it(specs: str, odd: set[int], sure: bool) -> None:
    here = voters(*(True,) * len(specs))
    reports = {
        peer: running(spec.encode()) if spec != "." else running(b"z", begun=False)
        for peer, spec in zip(here, specs, strict=True)
    }
    found, certain = odd_ones(here, reports)
    assert (set(found), certain) == (odd, sure)
    assert all(place[:2] == (0, 4) for place in found.values())


def test_another_number_of_chunks_is_another_specification() -> None:
    reports = {100: running(b"s"), 101: running(b"s"), 102: running(b"s", chunks=2)}
    assert set(odd_ones(voters(True, True, True), reports)[0]) == {102}


def test_the_plan_runs_what_most_active_peers_run() -> None:
    """Also before anybody has said a word: the round of an observer in the lowest slot waits."""
    reports = {
        peer: {**running(b"odd" if peer == 100 else b"good"), "names": [[slot, peer]]}
        for slot, peer in enumerate((100, 101, 102))
    }
    for report in reports.values():  # V2: only a view that all have installed gives owners
        report |= {"installed": 8, "tags": [{"tag": 0, "state": True, "covered": 3, "stable": []}]}
        report["rounds"][0]["owner"] = bytes([1])
    candidates = [Candidate(peer, peer - 100, 1.0, peer != 100, True) for peer in reports]
    plan = make_plan(9, (1, 1), candidates, reports, set(reports))
    assert [one["spec"] for one in plan.install["rounds"]] == [b"good"]
    assert plan.install["rounds"][0]["owner"] != bytes([NO_SLOT])


# --- the coordinator


@pytest.mark.parametrize(("accuser", "accused"), [(1, 2), (2, 1), (1, 3), (3, 1), (1, 1)])
def test_of_three_the_one_that_differs_goes_whoever_says_so(accuser: int, accused: int) -> None:
    """It has the lowest slot, and where a round is one chunk only its owner sees another's."""
    world = three()
    begin(world, {1: b"odd", 2: b"good", 3: b"good"})
    world.step(world.peers[accuser], Doubt("spec_mismatch", accused, 0, 4, (), "x" * 600))
    world.run(LONG_S)
    assert world.agreed() == (2, 3)
    assert told(world, 1) == ("evicted", False)
    detail = world.peers[1].told[-1].detail
    assert REASON in detail
    assert "peer2" in detail
    assert "round 0/4" in detail
    assert world.texts("misfit")


def test_of_two_specifications_the_lower_slot_stands() -> None:
    world = World(min_peers=2)
    for peer in (1, 2):
        world.add(peer)
    world.run(1.0)
    begin(world, {1: b"one", 2: b"two"})
    world.step(world.peers[1], Doubt("spec_mismatch", 2, 0, 4, (), "its frames name another"))
    world.run(LONG_S)
    assert world.agreed() == (1,)
    assert told(world, 2) == ("evicted", False)


def test_a_word_waits_for_more_to_begin() -> None:
    """The odd one and one other have begun; the third, which is busy, is the majority."""
    world = three()
    begin(world, {1: b"odd", 2: b"good"})
    world.step(world.peers[1], Doubt("spec_mismatch", 2, 0, 4, (), "its frames name another"))
    world.run(WAIT_S / 2)
    assert world.agreed() == (1, 2, 3)
    begin(world, {3: b"good"})
    world.run(LONG_S)
    assert world.agreed() == (2, 3)


def test_an_observer_with_another_specification_goes_whatever_its_slot() -> None:
    world = three()
    world.step(world.peers[2], Doubt("late_done", 1, 0, 4, (), ""))
    world.run(0.6)
    assert not world.peers[1].member.active
    begin(world, {1: b"odd", 2: b"good", 3: b"good"})
    world.step(world.peers[1], Doubt("spec_mismatch", 3, 0, 4, (), "its frames name another"))
    world.run(LONG_S)
    assert world.agreed() == (2, 3)
    assert told(world, 1) == ("evicted", False)


@pytest.mark.parametrize(("accused", "gone"), [(1, 2), (2, 2), (3, 3)])
def test_a_word_that_no_report_bears_out_costs_a_return_at_most(accused: int, gone: int) -> None:
    world = three()
    world.step(world.peers[2], Doubt("spec_mismatch", accused, 0, 4, (), "says somebody"))
    world.run(LONG_S)
    assert gone not in (world.agreed() or ())
    assert told(world, gone) == ("evicted", True)


def test_two_specifications_are_seen_in_any_view_change() -> None:
    world = three()
    begin(world, {1: b"odd", 2: b"good", 3: b"good"})
    world.add(4)
    world.run(0.6)
    assert set(world.agreed() or ()) == {2, 3, 4}


# --- what is said again and again


def test_refused_frames_leave_room_for_what_brings_a_view_about() -> None:
    world = three()
    for seq in range(40):
        world.step(world.peers[2], Doubt("refused", 1, 0, seq, (), "a wrong length"))
    begin(world, {1: b"good", 2: b"good", 3: b"odd"})
    world.step(world.peers[2], Doubt("spec_mismatch", 3, 0, 4, (), "its frames name another"))
    world.run(5.0)
    assert world.agreed() == (1, 2)
    assert 1 <= len(world.texts("refused")) <= 8
