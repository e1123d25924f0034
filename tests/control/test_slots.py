"""Who comes back from a checkpoint gets the slot it had, if nobody else has it."""

from __future__ import annotations

import msgpack
import pytest

from decotrain.control import messages as m
from decotrain.control.maps import SLOTS
from decotrain.control.slots import give_slots
from decotrain.errors import ConfigError, MessageError
from decotrain.joining import ask
from tests.control.fakes import World, three
from tests.control.test_messages import HELLO


def slots_of(world: World) -> dict[int, int]:
    """Peer -> slot in the record; every peer has installed the same."""
    assert world.record is not None
    found = {member.peer: member.slot for member in world.record.members}
    assert world.agreed() == tuple(sorted(found, key=lambda key: found[key]))
    return found


@pytest.mark.parametrize(
    ("wishes", "taken", "used", "given"),
    [
        ({7: None, 8: None}, 0, (), {7: 0, 8: 1}),
        ({7: 1, 8: 0}, 0, (), {7: 1, 8: 0}),
        ({7: None, 8: 0, 9: None, 10: 2}, 0, (), {8: 0, 10: 2, 7: 1, 9: 3}),
        ({7: 1, 8: 1, 9: None}, 0, (), {7: 1, 8: 0, 9: 2}),  # the first to come is served
        ({7: 0, 8: None}, 0b11, (), {7: 2, 8: 3}),  # taken
        ({7: 64, 8: -1, 9: 1 << 80}, 0, (), {7: 0, 8: 1, 9: 2}),  # no slots at all
        ({7: None, 8: 1}, 0, (0, 1), {8: 1, 7: 2}),  # least recently used first, as ever
        ({7: 5, 8: None, 9: 5}, 2**SLOTS - 1 - (1 << 5), (), {7: 5}),  # the others wait
    ],
)
def test_wishes_come_first(
    wishes: dict[int, int | None], taken: int, used: tuple[int, ...], given: dict[int, int]
) -> None:
    assert give_slots(wishes, taken, used) == given


def test_peers_get_the_slots_they_ask_for_whatever_order_they_join_in() -> None:
    world = World(min_peers=4)
    for peer, slot in ((4, None), (3, 2), (1, 1), (2, 0)):
        world.add(peer, slot=slot)
        world.run(0.3)
    world.run(1.0)
    assert slots_of(world) == {1: 1, 2: 0, 3: 2, 4: 3}
    before = world.record
    world.kill_coordinator()
    world.start()  # from its record
    world.run(2.0)
    assert slots_of(world) == {1: 1, 2: 0, 3: 2, 4: 3}
    assert world.record.view > before.view  # type: ignore[union-attr]


def test_of_two_that_ask_for_the_same_slot_the_first_gets_it() -> None:
    world = World(min_peers=3)
    for peer in (9, 5, 7):  # neither the lowest id nor the last to come
        world.add(peer, slot=1)
        world.run(0.3)
    world.run(1.0)
    assert slots_of(world) == {9: 1, 5: 0, 7: 2}


def test_a_slot_that_a_member_has_is_not_given_away() -> None:
    world = three()
    world.add(4, slot=1)
    world.add(5, slot=9)
    world.run(2.0)
    assert slots_of(world) == {1: 0, 2: 1, 3: 2, 4: 3, 5: 9}


def test_who_was_left_out_comes_back_without_a_wish() -> None:
    """Its place in the run was another peer's to go on with."""
    world = World(min_peers=1)
    world.add(1, slot=5, void=True)
    world.run(1.0)
    assert slots_of(world) == {1: 0}


@pytest.mark.parametrize("slot", [64, -1, 1 << 70, True, 1.0, "1", b"\1", [1]])
def test_a_wish_that_is_no_slot_is_no_message(slot: object) -> None:
    try:
        data = msgpack.packb({**HELLO, "slot": slot})
    except OverflowError:
        return  # not even msgpack
    with pytest.raises(MessageError, match=r"hello: slot: expected an integer in 0\.\.63"):
        m.decode(data)


def test_peers_from_before_the_field_understand_and_are_understood() -> None:
    old = m.decode(msgpack.packb(HELLO))
    assert old.slot is None
    assert msgpack.unpackb(m.encode(old)) == HELLO, "a key that they refuse"
    asks = m.decode(msgpack.packb({**HELLO, "slot": 63}))
    assert asks.slot == 63
    assert m.decode(m.encode(asks)) == asks


def test_join_names_a_slot_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="slot=64: a run has the slots 0 to 63"):
        ask("local", None, None, None, None, None, None, slot=64)
