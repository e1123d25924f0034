"""The benchmarks of churn: their judge finds wrong sums, and each suite runs on real processes."""

from __future__ import annotations

from typing import Any

import pytest

from bench import coordinator_down, join, kills, link_drop, memory, recovery, starts, storm
from bench.common import Settings

GIVEN = {11: 1, 12: 2, 13: 4, 14: 8}
SURVIVORS = [11, 12, 13]


def answer(**changes: Any) -> dict[str, Any]:
    good = {"outcome": "stable", "begun": True, "seq": 3, "contributors": [11, 12, 13, 14],
            "partial": True, "digest": 7, "values": [7.0, 15.0], "crc": 1}  # fmt: skip
    return {**good, **changes}


def test_the_judge_accepts_a_sum_with_the_dead_peer_in_some_chunks() -> None:
    assert kills.judge([answer(), answer(), answer()], GIVEN, SURVIVORS) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"values": [7.0, 16.0]},  # another round's contribution
        {"values": [7.0, 17.0]},  # counted twice, or another round's
        {"values": [7.0, 11.0, 15.0]},  # a survivor is missing
        {"values": [7.0], "partial": False},  # names a contributor that is nowhere
        {"values": [7.0, 15.0], "contributors": [11, 12, 13]},
        {"values": [15.0]},  # nothing is partial
        {"values": [6.5, 15.0]},
        {"crc": 2},
        {"digest": 8},
        {"outcome": "lost"},
    ],
)
def test_the_judge_finds_what_is_wrong(changes: dict[str, Any]) -> None:
    assert kills.judge([answer(), answer(**changes), answer()], GIVEN, SURVIVORS)


def test_kills() -> None:
    report = kills.run(Settings(quick=True, options={"trials": "4", "mib": "1"}))
    counts = {name: stats["median"] for name, stats in report.rows[0]["metrics"].items()}
    assert counts["trials"] == 4
    assert counts["wrong"] == counts["hangs"] == counts["broken_groups"] == 0, report.notes


def test_recovery() -> None:
    report = recovery.run(Settings(quick=True, repeats=1, options={"mib": "8", "stops": "0"}))
    metrics = report.rows[0]["metrics"]
    assert metrics["view_ms"]["median"] < 3000  # the launcher's word, not the coordinator's bound
    assert metrics["redo_ms"]["median"] > metrics["view_ms"]["median"]


def test_join() -> None:
    report = join.run(Settings(quick=True, repeats=1, options={"mib": "4", "round_mib": "0.25"}))
    assert [row["case"]["others"] for row in report.rows] == [
        "idle",
        "in rounds",
        "moving the state",
    ]
    assert all(row["metrics"]["fetch_s"]["median"] > 0 for row in report.rows)


def test_storm() -> None:
    options = {"seconds": "4", "calm": "1", "coordinator": "2", "mean": "0.7"}
    metrics = storm.run(Settings(quick=True, options=options)).rows[0]["metrics"]
    assert metrics["faults"]["median"] > 0
    assert metrics["descriptors_last"]["median"] > 10


def test_memory() -> None:
    report = memory.run(Settings(quick=True, options={"rounds": "2"}))
    peers = 3
    for row in report.rows:
        held = row["metrics"]["buffers_times_encoded"]["median"]
        snapshot = 0.0 if "borrowed" in row["case"]["variant"] else 1.0
        # Results, if they are not in shared memory, and at the very most what the others contribute
        # to our chunks. The pool's classes are at most an eighth larger than what is asked for.
        least = 0.0 if "shared" in row["case"]["variant"] else 0.9
        assert least <= held <= (1 + snapshot + (peers - 1) / peers) * 9 / 8, row
        assert row["metrics"]["left_mib"]["median"] < 0.5, row  # nothing is held after wait()


def test_starts() -> None:
    report = starts.run(Settings(quick=True, options={"starts": "2"}))
    assert report.rows[0]["metrics"]["complete"]["median"] == 2


def test_coordinator_down() -> None:
    report = coordinator_down.run(Settings(quick=True, options={"seconds": "1.5"}))
    metrics = {name: stats["median"] for name, stats in report.rows[0]["metrics"].items()}
    assert metrics["rounds_away_per_s"] > 0
    assert metrics["lost_rounds"] == metrics["peers_lost"] == 0


@pytest.mark.net
def test_link_drop() -> None:
    report = link_drop.run(Settings(quick=True, options={"seconds": "8", "before": "2"}))
    metrics = {name: stats["median"] for name, stats in report.rows[0]["metrics"].items()}
    assert metrics["longer_than_1_s"] == 1  # the drop was noticed, once
    assert metrics["lost_rounds"] == metrics["peers_lost"] == 0
