"""The checker is tested too: planted bugs must be found, and a right world must be clean.

The whole table, with the engine's bugs, is made by `python -m tests.sim --plants`
(docs/simulator.md); here are those of the control plane that show soon.
"""

from __future__ import annotations

import pytest

from tests.sim.checker import Checker, Violation
from tests.sim.world import World

SEEDS = 120


@pytest.mark.parametrize(
    "plant",
    [
        "sent_before_persisted",
        "newcomer_active_one_round_early",
        "survivors_value_not_in_the_plan",
        "stable_round_forgotten",
        "version_counts_what_was_handed_out",
        "suspects_not_asked_again",
        "install_not_repeated",
        "record_not_fsynced",
        "epoch_restarts_at_zero",
    ],
)
def test_a_planted_bug_is_found(plant: str) -> None:
    for seed in range(SEEDS):
        try:
            World(seed, plant).run()
        except Violation:
            return
    pytest.fail(f"nobody noticed {plant} in {SEEDS} histories")


def view(number: int, *peers: int) -> dict[str, object]:
    members = [[peer, slot, True] for slot, peer in enumerate(peers)]
    return {"view": number, "generation": 0, "members": members}


def returned(peer: int, number: int, seq: int, digest: int) -> dict[str, object]:
    return {
        "ev": "return", "peer": peer, "view": number, "generation": 0, "tag": 0, "seq": seq,
        "digest": digest, "chunks": [],
    }  # fmt: skip


def state(peer: int, version: int, seq: int | None) -> dict[str, object]:
    return {
        "ev": "state", "peer": peer, "view": 2, "generation": 0, "tag": 0, "version": version,
        "digest": version, "seq": seq,
    }  # fmt: skip


def test_the_checker_alone() -> None:
    """What agreement means: among the members of the newest view concerned, and no others."""
    checker = Checker(check_persist=False)
    for peer in (1, 2, 3):
        checker.take({"ev": "install", "peer": peer, "held": {}, **view(1, 1, 2, 3)})
    checker.take(returned(1, 1, 0, 77))
    checker.take(returned(2, 1, 0, 77))
    for peer in (2, 3):
        checker.take({"ev": "install", "peer": peer, "held": {}, **view(2, 2, 3)})
    checker.take(returned(3, 2, 0, 77))
    checker.take(returned(1, 1, 1, 5))  # its last word: it is not in view 2
    checker.take(returned(2, 2, 1, 6))
    with pytest.raises(Violation, match="agreement"):
        checker.take(returned(3, 2, 1, 5))
    with pytest.raises(Violation, match="drops round 0/0 at version 0"):
        checker.take({"ev": "passed", "peer": 2, "tag": 0, "seq": 0, "excused": True})
    with pytest.raises(Violation, match="drops round 0/3 at version 0"):
        checker.take({"ev": "passed", "peer": 2, "tag": 0, "seq": 3, "excused": False})
    checker.take({"ev": "passed", "peer": 2, "tag": 0, "seq": 3, "excused": True})
    checker.take(state(2, 4, None))
    checker.take(state(2, 5, 4))
    with pytest.raises(Violation, match="applies round 0/5 to version 5 and has version 7"):
        checker.take(state(2, 7, 5))
    with pytest.raises(Violation, match="applies round 0/6 to version 5"):
        checker.take(state(2, 7, 6))
    with pytest.raises(Violation, match="two memberships"):
        checker.take({"ev": "install", "peer": 3, "held": {}, **view(2, 3)})
    with pytest.raises(Violation, match="went back"):
        checker.take({"ev": "install", "peer": 2, "held": {}, **view(1, 1, 2, 3)})


@pytest.mark.parametrize("fast_too", [False, True])
def test_what_a_slow_peer_alone_held_may_be_made_again(fast_too: bool) -> None:
    """By nobody who holds it then, and the slow peer must drop it when it hears of the view."""
    checker = Checker()

    def take(peer: int, number: int, digest: str) -> None:
        where = {"view": number, "generation": 0, "tag": 0, "seq": 4, "chunk": 2}
        checker.take({"ev": "value", "peer": peer, "digest": digest, **where})

    checker.take({"ev": "persist", **view(1, 1, 2, 3)})
    take(3, 1, "old")
    if fast_too:
        take(2, 1, "old")
    later = view(2, 1, 2, 3)
    later["members"] = [[1, 0, True], [2, 1, True], [3, 2, False]]
    checker.take({"ev": "persist", "slow": [3], **later})
    if fast_too:
        with pytest.raises(Violation, match="one-value"):
            take(1, 2, "new")
        return
    take(1, 2, "new")
    take(3, 1, "old")  # it has not installed view 2
    with pytest.raises(Violation, match="one-value"):
        take(3, 2, "old")
