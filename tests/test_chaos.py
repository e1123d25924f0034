"""Real processes under faults: a short storm always, a minute of them when asked for."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from scripts import chaos
from tests.sim.checker import Violation


@pytest.mark.chaos
def test_a_storm_and_histories_that_are_wrong(tmp_path: Path) -> None:
    """The same histories are found wrong when one event in them is."""
    chaos.storm(12.0, 1, 4, 256, 1.5, tmp_path)
    counts = chaos.judge(tmp_path)
    assert counts["rounds"] > 10
    assert counts["install"] > 4
    path = max(tmp_path.glob("*.jsonl"), key=lambda one: one.stat().st_size)
    history = list(chaos.events(path))
    broken = {"return": ("digest", "chunks"), "state": ("digest",), "begin": ("give",)}
    for ev, keys in broken.items():
        where = max(n for n, event in enumerate(history) if event["ev"] == ev)
        if ev == "begin":  # the last one may have come to nothing
            where = next(n for n, event in enumerate(history) if event["ev"] == ev)
        for key in keys:
            lines = copy.deepcopy(history)
            lines[where][key] = [[[1], 5]] if key == "chunks" else lines[where][key] + 1
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
            with pytest.raises(Violation):
                chaos.judge(tmp_path)


@pytest.mark.chaos
@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_minute_of_storm(seed: int, tmp_path: Path) -> None:
    chaos.storm(60.0, seed, 5, 1024, 2.0, tmp_path)
