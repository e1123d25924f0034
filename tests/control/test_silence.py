"""Who is silent is left out, unless it is the coordinator that hears nobody."""

from __future__ import annotations

from decotrain.control.member import Link
from tests.control.fakes import World, empty_report, three


def one_holder() -> World:
    """Peer 1 is active and holds rounds that peer 2, which observes, has not got."""
    world = World(min_peers=1)
    world.add(1)
    world.run(1.0)
    stable = {"tag": 0, "state": True, "covered": 3, "stable": []}
    world.peers[1].report = {**empty_report(0), "declared": True, "tags": [stable]}
    world.add(2)
    world.run(1.0)
    return world


def test_a_silent_peer_is_left_out_within_the_bound() -> None:
    world = three()
    world.peers[3].alive = False
    world.run(2.0)
    assert world.agreed() == (1, 2, 3)
    world.run(1.8)
    assert world.agreed() == (1, 2)


def test_a_silent_peer_whose_links_are_dead_is_left_out_sooner() -> None:
    world = three()
    world.peers[3].alive = False
    for other in (1, 2):
        world.step(world.peers[other], Link(3, up=False))
    world.run(0.8)  # a message takes 0.05 s here, and nobody was silent for long
    assert world.agreed() == (1, 2)


def test_a_live_peer_whose_links_are_dead_answers_and_stays() -> None:
    world = three()
    for other in (1, 2):
        world.step(world.peers[other], Link(3, up=False))
    world.run(1.5)
    assert world.agreed() == (1, 2, 3)
    assert not [log for log in world.log if log.kind == "suspected"]


def test_one_peer_alone_cannot_have_another_doubted() -> None:
    world = three()
    world.step(world.peers[1], Link(3, up=False))
    world.peers[3].alive = False
    world.run(0.8)
    assert world.agreed() == (1, 2, 3)


def test_the_only_active_peer_falsely_suspected_is_asked_again() -> None:
    world = one_holder()
    assert world.agreed() == (1, 2)
    world.cut.add(1)
    world.run(4.0)
    world.cut.clear()
    world.run(4.0)
    assert world.agreed() == (1, 2)
    assert world.record.generation == 0
    assert world.peers[1].member.active
    assert not world.peers[2].member.active


def test_a_coordinator_cut_off_from_everybody_suspects_itself() -> None:
    world = three()
    assert world.record is not None
    view, term = world.record.view, world.record.term
    world.cut = {1, 2, 3}
    world.run(10.0)
    world.cut = {2, 3}  # their connections come back one after the other
    world.run(2.5)
    world.cut = {3}
    world.run(2.0)
    world.cut = set()
    world.run(6.0)
    assert (world.record.view, world.record.term) == (view, term)
    assert world.agreed() == (1, 2, 3)
    assert not world.texts("suspected")
    assert len(world.texts("dark")) == 1


def test_who_died_while_nobody_was_heard_is_left_out_after() -> None:
    world = three()
    world.cut = {1, 2, 3}
    world.run(10.0)
    world.peers[3].alive = False
    world.cut = set()
    world.run(4.0)
    assert len(world.peers[1].member.members) == 3
    world.run(2.5)
    assert world.agreed() == (1, 2)
    assert world.record.generation == 0


def test_a_coordinator_cut_off_between_freeze_and_reports_waits_for_them() -> None:
    world = three()
    world.add(4)
    assert world.coordinator is not None
    while not world.coordinator.changes.busy():
        world.tick()
    world.cut = {1, 2, 3, 4}
    world.run(20.0)
    world.cut = {2, 3, 4}
    world.run(2.0)
    world.cut = set()
    world.run(2.0)
    assert world.agreed() == (1, 2, 3, 4)
    assert world.record.generation == 0
    assert not world.texts("suspected")


def test_an_active_peer_that_never_answers_costs_a_generation() -> None:
    world = one_holder()
    world.peers[1].alive = False
    world.run(15.0)
    assert world.agreed() == (2,)
    assert world.record.generation == 1
    assert world.peers[2].member.active


def test_a_stalled_coordinator_does_not_suspect_everybody() -> None:
    world = three()
    epoch = world.record.epoch
    world.now += 30.0
    world.run(2.0)
    assert world.record.epoch == epoch


def test_a_generation_is_none_that_a_peer_was_in_though_the_record_was_lost() -> None:
    """Else a peer of that number takes the new one for its own and goes on with what it holds
    (simulator seed 820036)."""
    world = one_holder()
    world.peers[2].member.generation = 3
    world.peers[1].alive = False
    world.run(15.0)
    assert world.agreed() == (2,)
    assert world.record.generation == 4


def test_what_was_in_a_view_of_no_record_is_not_admitted_on_an_old_hello() -> None:
    """Its report speaks of slots of that view: with another slot what it gave would count twice
    (simulator seed 669). It is asked who it is, and comes back as a newcomer."""
    world = World(min_peers=1)
    world.add(1)
    world.peers[1].member.view = 5  # its hello is under way, and says that it was in none
    world.run(3.0)
    assert world.record is None or not world.record.view
    assert world.coordinator is not None
    gone = world.coordinator.gone.get(1)
    assert gone is not None
    assert "gone on without it" in gone[0]
