"""Membership under a virtual clock: who is in the view, after what, and how soon."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from decotrain.control import messages as m
from decotrain.control.effects import Received, Send, identity
from decotrain.control.maps import pack_words
from decotrain.control.member import AskLeave, Current, Doubt, Identity, Link, Member
from decotrain.control.roster import meant, settle_s
from tests.control.fakes import World, empty_report, three


def test_the_first_view_waits_for_min_peers() -> None:
    world = World(min_peers=3)
    world.add(1)
    world.add(2)
    world.run(3.0)
    assert all(view == 0 for view, _ in world.views().values())
    world.add(3)
    world.run(0.5)
    assert world.agreed() == (1, 2, 3)
    assert all(row[2] for row in world.peers[1].member.members)
    assert [row[1] for row in world.peers[1].member.members] == [0, 1, 2]


def test_a_process_exit_seen_by_a_launcher_is_acted_on_at_once() -> None:
    world = three()
    world.peers[2].alive = False
    world.ask(m.Exited("default", 2, "", "", "exit code -9"))
    world.run(0.4)
    assert world.agreed() == (1, 3)
    assert world.answers == [m.Done(True, "1 peers left out")]


def test_a_clean_leave_takes_no_timeout() -> None:
    world = three()
    world.step(world.peers[1], AskLeave())
    world.run(0.4)
    assert world.agreed() == (2, 3)
    assert [told.kind for told in world.peers[1].told][-1] == "evicted"
    assert not world.peers[1].told[-1].again


def test_a_newcomer_observes_until_its_report_covers_what_is_stable() -> None:
    world = three()
    stable = {"tag": 5, "state": True, "covered": 7, "stable": [[7, 99]]}
    for peer in world.peers.values():
        peer.report = {**empty_report(0), "declared": True, "tags": [stable]}
    late = world.add(4)
    world.run(1.0)
    assert world.agreed() == (1, 2, 3, 4)
    assert not late.member.active
    world.step(late, Current(True))  # claims without holding it: the report decides (V4)
    world.run(3.0)
    assert not late.member.active
    late.report = world.peers[1].report
    world.step(late, Current(True))
    world.run(3.0)
    assert late.member.active


def test_joins_that_come_together_share_a_view() -> None:
    world = three()
    epoch = world.record.epoch
    for peer in (4, 5, 6):
        world.add(peer)
    world.run(2.0)
    assert world.agreed() == (1, 2, 3, 4, 5, 6)
    assert world.record.epoch <= epoch + 2


def test_a_coordinator_restart_raises_the_term_and_freezes_first() -> None:
    world = three()
    term, view = world.record.term, world.record.view
    world.kill_coordinator()
    world.run(2.0)
    world.start()
    world.run(2.0)
    assert world.record.term == term + 1
    assert world.agreed() == (1, 2, 3)
    assert world.record.view > view
    assert world.record.view >> 32 == term + 1


def test_a_lost_record_is_rebuilt_from_the_peers() -> None:
    world = three()
    term = world.record.term
    world.kill_coordinator()
    world.record = None
    world.start()
    world.run(3.0)
    assert world.agreed() == (1, 2, 3)
    assert world.record.term > term
    assert [member.slot for member in world.record.members] == [0, 1, 2]


def test_a_lost_record_is_not_rebuilt_from_a_minority_unless_told_so() -> None:
    for minority in (False, True):
        world = three(recover_minority=minority)
        before = world.record.view
        world.kill_coordinator()
        world.record = None
        world.peers[1].alive = world.peers[2].alive = False
        world.start()
        world.run(20.0)
        assert world.peers[3].member.view > before if minority else (
            world.peers[3].member.view == before
        )  # fmt: skip


def test_an_older_record_takes_the_term_and_view_of_the_peers() -> None:
    world = three()
    old = world.record
    world.peers[1].alive = False
    world.run(5.0)
    world.kill_coordinator()
    world.start()
    world.run(3.0)
    newest = world.record
    world.kill_coordinator()
    world.record = old
    world.start()
    world.run(10.0)
    assert world.record.term > newest.term
    assert world.agreed() == (2, 3)


def test_two_coordinators_the_one_with_the_lower_term_stops() -> None:
    world = three()
    assert world.coordinator is not None
    old = world.coordinator
    world.kill_coordinator()
    world.start()
    world.run(3.0)
    world.coordinator = old
    world.run(2.0)
    assert world.coordinator is None


def test_all_dead_and_new_ones_come_opens_a_generation() -> None:
    world = three()
    for key in (1, 2, 3):
        world.peers[key].alive = False
    for key in (11, 12):
        world.add(key)
    world.run(20.0)
    assert world.record.generation == 0, "fewer than min_peers newcomers do not resume a run"
    world.add(13)
    world.run(5.0)
    assert world.record.generation == 1
    assert world.agreed() == (11, 12, 13)


def test_a_slow_peer_is_demoted_and_comes_back() -> None:
    world = three()
    world.step(world.peers[1], Doubt("late_done", 3, 0, 4, (), ""))
    world.run(0.6)
    assert world.agreed() == (1, 2, 3)
    assert not world.peers[3].member.active
    world.step(world.peers[3], Current(True))
    world.run(3.0)
    assert world.peers[3].member.active


def test_what_only_a_slow_peer_holds_is_made_anew_until_it_is_active_again() -> None:
    """Also in later views: the report that names it may be older than the view that dropped it."""
    world = three()

    def report(born: int, covered: int) -> dict[str, Any]:
        columns = {"born": born, "digest": 7, "contributors": 4, "received": 0}
        entry = {"tag": 0, "seq": 1, "spec": b"s", "begun": True, "skipped": 0, "owner": b"\2"}
        entry |= {name: pack_words([value if born else 0]) for name, value in columns.items()}
        tags = [{"tag": 0, "state": True, "covered": covered, "stable": []}]
        return {"declared": True, "tags": tags, "rounds": [entry], "names": []}

    for key, peer in world.peers.items():
        peer.report = report(peer.member.view if key == 3 else 0, 0)

    def kind() -> int:
        return int(world.peers[1].installs[-1]["rounds"][0]["kind"][0])

    world.add(4)  # another reason for a view: nobody is late yet
    world.run(2.0)
    assert kind() == 1
    world.step(world.peers[1], Doubt("late_done", 3, 0, 0, (), ""))
    world.run(0.6)
    assert kind() == 0
    held = world.peers[3].report
    assert held is not None
    world.peers[3].report = {**held, "tags": report(0, -1)["tags"]}  # it lacks a round
    for key in (5, 6):
        world.add(key)
        world.run(2.0)
        assert not world.peers[3].member.active
        assert kind() == 0
    world.peers[3].report = held
    world.step(world.peers[3], Current(True))
    world.run(3.0)
    assert world.peers[3].member.active
    world.add(7)
    world.run(2.0)
    assert kind() == 1


def test_the_last_active_peer_is_never_demoted() -> None:
    world = three()
    for accuser, accused in ((1, 2), (1, 3), (2, 1), (3, 1)):
        world.step(world.peers[accuser], Doubt("late_done", accused, 0, 4, (), ""))
    world.run(0.6)
    assert any(peer.member.active for peer in world.peers.values())


@pytest.mark.parametrize(
    ("digests", "gone"),
    [(((0, 7), (1, 8), (2, 7)), 2), (((0, 8), (1, 7), (2, 7)), 1), (((0, 8), (1, 7)), 2)],
)
def test_a_diverged_minority_is_left_out(digests: tuple[tuple[int, int]], gone: int) -> None:
    world = three()
    world.step(world.peers[3], Doubt("diverged", 0, 0, 4, digests, ""))
    world.run(0.6)
    assert world.agreed() == tuple(peer for peer in (1, 2, 3) if peer != gone)
    assert world.peers[gone].told[-1].kind == "evicted"
    assert world.peers[gone].told[-1].again
    assert "diverged" in world.peers[gone].told[-1].detail


@pytest.mark.parametrize(("kind", "here"), [("refused", (1, 2, 3)), ("void", (1, 2))])
def test_what_a_peer_says_of_itself(kind: str, here: tuple[int, ...]) -> None:
    """A NaN found in its own chunk costs it that contribution; a void state its place."""
    world = three()
    world.step(world.peers[3], Doubt(kind, 3, 0, 4, (), "chunk 15 is not finite"))
    world.run(0.6)
    assert world.agreed() == here


def test_a_broken_link_is_relayed_and_nobody_is_left_out() -> None:
    world = three()
    for one, other in ((1, 2), (2, 1)):
        world.step(world.peers[one], Link(other, up=False))
    world.run(8.0)
    assert world.agreed() == (1, 2, 3)
    assert world.peers[1].routes == {2: 3}
    assert world.peers[2].routes == {1: 3}
    assert world.peers[3].routes == {}
    world.ask(m.AskStatus("", 0))
    world.run(0.2)
    named = [peer["links_down"] for peer in world.answers[0].status["peers"]]
    assert named == [[f"{2:016x}"], [f"{1:016x}"], []]
    for one, other in ((1, 2), (2, 1)):
        world.step(world.peers[one], Link(other, up=True))
    world.run(1.5)
    assert world.peers[1].routes == {}


def test_a_broken_link_without_third_leaves_one_out() -> None:
    world = World(min_peers=2)
    world.add(1)
    world.add(2)
    world.run(1.0)
    world.step(world.peers[1], Link(2, up=False))
    world.run(5.0)
    assert world.agreed() == (1,)


def test_the_process_that_comes_back_ends_its_old_incarnation() -> None:
    world = World(min_peers=2)
    world.add(1, host="h", launch="worker 0")
    world.add(2, host="h", launch="worker 1")
    world.run(1.0)
    world.peers[2].alive = False
    world.add(3, host="h", launch="worker 1")
    world.run(1.0)
    assert world.agreed() == (1, 3)


def test_a_late_hello_of_an_old_incarnation_does_not_end_the_only_holder() -> None:
    world = World(min_peers=1)
    holder = world.add(1, host="h", launch="worker 0")
    world.run(1.0)
    old = Member(Identity(run="default", peer=9, name="old", host="h", launch="worker 0"),
                 random.Random(0))  # fmt: skip
    old.ready = True
    world.wire.append((identity(9), b"c", m.encode(old._hello())))
    world.run(5.0)
    assert world.texts("suspected") == [
        "peer1 (0000000000000001): replaced by a new incarnation",
        "old (0000000000000009): not heard for 3.0 s",
    ]
    world.add(2)
    world.run(1.0)
    assert world.agreed() == (1, 2)
    assert holder.told[-1].kind == "view"
    assert not world.texts("generation")


def test_misfits_are_refused_with_both_values() -> None:
    world = World(min_peers=1, config={"model": {"width": 64}})
    other = world.add(1, config={"model": {"width": 32}})
    fits = world.add(2, config={"model": {"width": 64}})
    nothing = world.add(3)
    stranger = world.add(4, run="another")
    world.run(1.0)
    assert other.told[-1].kind == "refused"
    assert "model.width: the run has 64, this peer 32" in other.told[-1].detail
    assert fits.member.view
    assert nothing.told[0].config == {"model": {"width": 64}}
    assert "default" in stranger.told[-1].detail


def test_another_protocol_version_is_refused_naming_both() -> None:
    world = World()
    member = Member(Identity(run="default", peer=9, name="old"), random.Random(0))
    hello = m.decode(m.encode(replace(member._hello(), protocol=77)))
    assert world.coordinator is not None
    effects = world.coordinator.step(Received(identity(9), hello), 1.0)
    refusal = next(e.message for e in effects if isinstance(getattr(e, "message", 0), m.Refuse))
    assert "77" in refusal.reason
    assert str(m.PROTOCOL) in refusal.reason


def test_a_message_under_a_false_name_is_ignored() -> None:
    world = three()
    world.wire.append((b"operator", b"c", m.encode(m.Leave("default", 1))))
    world.run(1.0)
    assert world.agreed() == (1, 2, 3)


def test_status_names_everybody() -> None:
    world = three()
    world.peers[1].member.figures = {"step": 12, "loss": 3.5}
    world.run(1.0)
    world.ask(m.AskStatus("", 0))
    world.run(0.2)
    status = world.answers[0].status
    assert [peer["name"] for peer in status["peers"]] == ["peer1", "peer2", "peer3"]
    assert status["peers"][0]["figures"] == {"step": 12, "loss": 3.5}
    assert status["phase"] == "steady"
    assert {event["kind"] for event in status["events"]} >= {"joined", "view"}


def test_a_peer_that_left_everybody_alone_can_be_followed_by_a_new_run() -> None:
    world = World(min_peers=1)
    world.add(1)
    world.run(1.0)
    world.step(world.peers[1], AskLeave())
    world.run(1.0)
    assert world.record.members == ()
    world.add(2)
    world.run(2.0)
    assert world.agreed() == (2,)


def test_what_is_started_in_the_place_of_a_kicked_peer_stays_out() -> None:
    world = World(min_peers=3)
    for peer in (1, 2, 3):
        world.add(peer, host="h", launch=f"launch {peer}")
    world.run(1.0)
    world.ask(m.Kick("default", 3, "", False, ""))
    world.run(1.0)
    assert world.agreed() == (1, 2)
    world.add(4, host="h", launch="launch 3")
    world.run(1.0)
    assert world.agreed() == (1, 2)
    assert world.peers[4].member.over
    world.add(5, host="h", launch="launch 5")  # started by hand: a newcomer like others
    world.run(1.0)
    assert world.agreed() == (1, 2, 5)


def test_a_kick_says_why_to_a_peer_whose_key_is_barred_with_it() -> None:
    key = b"k" * 32
    world = three()
    assert world.coordinator is not None
    known = world.coordinator.peers[3]
    known.hello = replace(known.hello, key=key)  # as it showed
    world.ask(m.Kick("", 3, "", False, "too slow"))  # an empty name: whatever runs there
    world.tick()
    world.tick()
    for moment in ("before the view", "after it"):
        said = world.coordinator.step(Received(identity(3), m.Leave("default", 3), key), world.now)
        told = [one.message for one in said if isinstance(one, Send)]
        assert any("too slow" in getattr(one, "reason", "") for one in told), moment
        world.run(1.0)
    assert world.agreed() == (1, 2)


def test_a_newcomer_that_falls_silent_is_told_of() -> None:
    world = World(min_peers=3)
    for peer in (1, 2):
        world.add(peer)
    world.run(1.0)
    world.cut.add(2)
    world.run(8.0)
    assert any("peer2" in text for text in world.texts("suspected"))


def test_who_was_asked_to_leave_may_come_back() -> None:
    world = World(min_peers=2)
    for peer in (1, 2):
        world.add(peer, host="h", launch=f"launch {peer}")
    world.run(1.0)
    world.ask(m.Kick("default", 2, "", True, ""))
    world.run(1.0)
    assert world.agreed() == (1,)
    world.add(3, host="h", launch="launch 2")
    world.run(1.0)
    assert world.agreed() == (1, 3)


def test_an_observer_that_was_late_gets_more_time() -> None:
    world = three()
    stable = {"tag": 5, "state": True, "covered": 7, "stable": [[7, 99]]}
    for peer in world.peers.values():
        peer.report = {**empty_report(0), "declared": True, "tags": [stable]}
    late = world.add(4)
    world.run(1.0)
    known = world.coordinator.peers[4]
    waits = []
    for _ in range(4):
        world.step(late, Current(True))  # what is stable never reaches it in time
        world.run(2.0)
        waits.append(settle_s([known]))
    assert waits == sorted(set(waits)), "each failure is answered with more patience"
    late.report = world.peers[1].report
    world.step(late, Current(True))
    world.run(3.0)
    assert late.member.active
    assert settle_s([known]) < waits[0]


@pytest.mark.parametrize(
    ("peer", "word", "found"),
    [
        (0, "gpu1", [1]),
        (0, "gpu10", [0xABCDEF << 40]),
        (0, "gpu", [1, 2, 0xABCDEF << 40]),
        (0, "gpu2", [2]),  # away: the name is followed by its id
        (0, "abcdef", [0xABCDEF << 40]),
        (0, "abcde", []),
        (0, "gpu1 (", []),
        (2, "", [2]),
        (3, "", []),
        (0, "", []),
    ],
)
def test_whom_an_operator_means(peer: int, word: str, found: list[int]) -> None:
    names = {1: "gpu1", 2: f"gpu2 ({2:016x})", 0xABCDEF << 40: "gpu10"}
    assert meant(peer, word, names) == found
