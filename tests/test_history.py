"""A newcomer's history: what is believed, what is dropped, and that it replaces the parameters."""

from __future__ import annotations

import copy
import random

import numpy as np
import torch
from torch import nn

from decotrain.spsa import SPSA, history
from decotrain.spsa.history import History, records_from
from decotrain.spsa.record import Record
from tests.test_spsa_real import LEVELS, Fleet, check, fleet  # noqa: F401 - a fixture

ROOT = history.root("test")


def filled(steps: int, size: int = 4096) -> tuple[History, list[Record]]:
    dice = random.Random(3)
    made = History(size, 0, ROOT)
    records = []
    for step in range(steps):
        slots = sorted(dice.sample(range(8), dice.randrange(0, 4)))
        records.append(Record(step, {slot: dice.randbytes(3) for slot in slots}))
        made.append(records[-1])
    return made, records


def test_whoever_is_on_the_way_gets_the_rest() -> None:
    served, records = filled(60)
    for start in (0, 1, 37, 60):
        ours, _ = filled(start)
        assert records_from(served.buffer, start, ours.chain) == records[start:]


def test_another_past_or_one_that_is_not_there_is_refused() -> None:
    served, _ = filled(60)
    assert records_from(served.buffer, 0, history.root("another base")) is None
    assert records_from(served.buffer, 61, served.chain) is None
    later = History(4096, 50, served.chain)
    assert records_from(later.buffer, 49, served.chain) is None
    assert records_from(later.buffer, 50, served.chain) == []


def test_old_records_make_room_and_the_rest_still_follows() -> None:
    served, records = filled(900, size=2048)
    assert 0 < served.first < 900
    before, _ = filled(served.first, size=2048)
    assert records_from(served.buffer, served.first, before.chain) == records[served.first :]
    assert records_from(served.buffer, served.first - 1, before.chain) is None
    assert 900 - served.first > 100


def test_no_byte_of_it_is_believed_unchecked() -> None:
    """Any changed byte, any cut: nothing, or what it was; never an error, never else."""
    served, records = filled(40)
    dice = random.Random(4)
    for _ in range(600):
        data = served.buffer.copy()
        at = dice.randrange(history.HEAD.size + 400)
        data[at] ^= dice.randrange(1, 256)
        if dice.random() < 0.2:
            data = data[: dice.randrange(len(data))]
        found = records_from(data, 0, ROOT)
        assert found is None or found == records
    assert records_from(np.full(4096, 255, dtype=np.uint8), 0, ROOT) is None


def test_a_newcomer_replays_and_its_log_begins_with_the_base(
    fleet: Fleet,  # noqa: F811
) -> None:
    """A small model, a short history: no parameters travel, and the newcomer's log is whole."""
    for number in range(3):
        fleet.start(f"p{number}")
    fleet.wait_for(lambda: len(fleet.held("p0")) >= 12)
    fleet.start("late")
    fleet.wait_for(lambda: len(fleet.held("late")) >= 3)
    until = max(fleet.held("p0")) + 20
    fleet.stop_at(until)
    for name in ("p0", "p1", "p2", "late"):
        fleet.finish(name)
    check(fleet, "p0", until)
    check(fleet, "late", until)
    lines = (fleet.folder / "late.txt").read_text().splitlines()
    assert lines[-2] == "fetches 0"
    assert int(lines[-1].removeprefix("shortcuts ")) >= 1


def test_records_that_a_fetch_brought_are_not_replayed_again() -> None:
    """The parameters come whole, the others are further already, and their history is looked at."""
    torch.manual_seed(1)
    base = nn.Linear(4, 3)
    ahead, late = (SPSA(copy.deepcopy(base), lr=0.1, samples=2) for _ in range(2))
    for spsa, steps in ((ahead, 5), (late, 3)):
        for _ in range(steps):
            spsa.step(lambda spsa=spsa: spsa.model(torch.ones(2, 4)).square().mean())
        assert spsa.version == steps
    fetched = SPSA(copy.deepcopy(base), lr=0.1, samples=2)
    for _ in range(4):
        fetched.step(lambda: fetched.model(torch.ones(2, 4)).square().mean())
    for name, tensor in fetched._shared_state().items():
        late._shared_state()[name].copy_(tensor)
    late._applied = 4
    assert late._replay(ahead.history.buffer, 0.001) == 5
    assert late.digest() == ahead.digest()
    assert late.history.chain == ahead.history.chain
