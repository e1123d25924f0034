"""The simulator's world, its faults chosen by hypothesis: a failure comes as the shortest history.

The seeded loop (test_sim.py) is for volume; this is for minimal counter-examples. The seed decides
sizes, speeds and what each fault meets; hypothesis decides which faults, in which order, and how
long after each other.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.sim.checker import Violation
from tests.sim.faults import strike
from tests.sim.options import FAULTS
from tests.sim.world import World

EXAMPLES = 60
STEPS = 12
PAUSES_S = (0.0, 0.003, 0.03, 0.3, 1.0)


class History(RuleBasedStateMachine):
    world: World | None = None

    @initialize(seed=st.integers(0, 9999))
    def begin(self, seed: int) -> None:
        self.world = World(seed)
        self.world.options.faults.clear()
        self.world.begin()
        self.world.run_until(0.5)

    @rule(kind=st.sampled_from([kind for kind, _ in FAULTS]), pause_s=st.sampled_from(PAUSES_S))
    def fault(self, kind: str, pause_s: float) -> None:
        assert self.world is not None
        strike(self.world, kind)
        self.world.run_until(self.world.now + pause_s)

    @rule(pause_s=st.sampled_from(PAUSES_S))
    def wait(self, pause_s: float) -> None:
        assert self.world is not None
        self.world.run_until(self.world.now + pause_s)

    def teardown(self) -> None:
        if self.world is not None:
            self.world.finish()


def check(machine: Any, examples: int, **options: Any) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=STEPS, deadline=None,
            suppress_health_check=list(HealthCheck), **options,
        ),
    )  # fmt: skip


def test_any_faults_in_any_order() -> None:
    """The same examples in every run; more of them: `check(History, 2000)`."""
    check(History, EXAMPLES, derandomize=True)


def test_a_broken_promise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a version is another state at every peer, the machine finds a history that shows it."""
    said = World.check

    def otherwise(self: World, **event: Any) -> None:
        if event["ev"] == "state" and event["version"] == 3:
            event["digest"] = f"{event['digest']}{event['peer']}"
        said(self, **event)

    monkeypatch.setattr(World, "check", otherwise)
    with pytest.raises(Violation, match="state"):
        check(History, EXAMPLES, report_multiple_bugs=False, phases=[Phase.generate])
