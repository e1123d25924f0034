"""P10 on real processes: failures are loud and local. Also a process that is short of memory.

One peer's state is changed by a bit, one contributes a NaN, one cannot have the memory of a round.
The right one is named, what is wrong goes no further, and the others go on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.fleet import Fleet
from tests import steady_peer as sp

PEERS = 3


def live(fleet: Fleet, elements: int, act: str) -> list[dict[str, Any]]:
    """All to the end; the last peer is the one that acts."""
    fleet.start(PEERS)
    for number, peer in enumerate(fleet.team):
        peer.ask(sp.live, elements, act if number == PEERS - 1 else "")
    return [peer.answer() for peer in fleet.team]


def test_a_flipped_bit_is_named_taken_out_and_healed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Fleet(PEERS, log=log) as fleet:
        *others, odd = live(fleet, 5000, "flip")
    assert len({(one["digest"], one["version"]) for one in [*others, odd]}) == 1
    assert odd["first"] != odd["id"]  # it came back as another, in the same process
    assert all(one["first"] == one["id"] for one in others)
    said = [line for line in log.read_text().splitlines() if "diverged" in line]
    assert said
    assert all(f"{odd['first']:016x}" in line.split("diverged")[0] for line in said)
    # What it gave before anybody knew may count, for all alike; after that nothing of it does.
    for one in others:
        assert [entry["seq"] for entry in one["rounds"]] == list(range(one["version"]))
        assert all(odd["first"] not in entry["peers"] for entry in one["rounds"][sp.ACT_AT + 1 :])
        assert odd["id"] in one["rounds"][-1]["peers"]


@pytest.mark.parametrize("elements", [5000, 1 << 20])  # looked through before it is sent, or not
def test_a_nan_is_named_everywhere_and_counted_nowhere(elements: int, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Fleet(PEERS, log=log) as fleet:
        *others, odd = live(fleet, elements, "nan")
    assert len({(one["digest"], one["version"]) for one in [*others, odd]}) == 1
    assert all(one["first"] == one["id"] for one in [*others, odd])  # nobody had to go
    assert len(odd["said"]) == 1
    assert "tensor 0 contains NaN" in odd["said"][0]
    small = elements == 5000
    for one in others:
        round_with_nan = one["rounds"][sp.ACT_AT]
        if small:
            assert odd["id"] not in round_with_nan["peers"]
        assert round_with_nan["partial"] is not small
        assert set(one["rounds"][sp.ACT_AT + 1]["peers"]) == {p["id"] for p in [*others, odd]}
    if not small:  # its owner saw it
        assert "refused" in log.read_text()
        assert f"{odd['id']:016x}" in next(
            line for line in log.read_text().splitlines() if "refused" in line
        )


# Without room for the snapshot it skips both rounds; without room for results it is out at once.
@pytest.mark.parametrize(("borrow", "rounds"), [(False, 2), (True, 4)])
def test_no_memory_is_an_error_for_one_and_the_others_go_on(borrow: bool, rounds: int) -> None:
    elements = 20 << 20  # more than an arena of malloc holds in reserve
    with Fleet(PEERS) as fleet:
        fleet.start(PEERS)
        *others, poor = fleet.team
        poor.ask(sp.short_of_memory, elements, borrow)
        for peer in others:
            peer.ask(sp.plenty, elements, rounds)
        said = poor.answer()
        counts = [peer.answer() for peer in others]
        assert poor.process.is_alive()
    assert all("memory" in text for text in said), said
    assert "the others go on without it" in said[-1]
    assert counts[0] == counts[1]
    assert counts[0][-1] == PEERS - 1
