"""The benchmarks of churn: their judge finds wrong sums, and each suite runs on real processes."""

from __future__ import annotations

from typing import Any

import pytest

from bench import join, kills, recovery
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
