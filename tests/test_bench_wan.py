"""The benchmarks over the lab's links run, and what they say is what the links make of it."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.common import Settings
from bench.wan import churn, home, join, recovery, utilisation
from bench.wan.sleeper import Clock, Model
from bench.wan.utilisation import CASES, Case
from decotrain.outer.schedule import Staggered

lab_needed = [pytest.mark.net, pytest.mark.timeout(300)]


def test_a_slept_step_is_a_real_backward_pass() -> None:
    """Gradients come layer by layer, last layer first, when their part of the step is over."""
    clock = Clock(0.12)
    clock.outer = SimpleNamespace(sync_s=0.0)
    model = Model(600, 3, clock, seed=1)
    came: list[tuple[str, float]] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _, name=name: came.append((name, time.perf_counter()))
        )
    clock.begin()
    start_s = time.perf_counter()
    model(torch.zeros((), requires_grad=True)).backward()
    assert [name for name, _ in came] == [f"blocks.{n}.weight" for n in (2, 1, 0)]
    parts = zip(came, (0.5, 0.7, 0.9), strict=True)
    assert all(at_s - start_s >= 0.99 * part * 0.12 for (_, at_s), part in parts)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_waiting_is_not_computing() -> None:
    clock = Clock(0.05)
    clock.outer = SimpleNamespace(sync_s=0.0)
    clock.begin()
    start_s = time.perf_counter()
    threading.Event().wait(0.1)
    clock.outer.sync_s += 0.1
    clock.until(1.0)
    assert time.perf_counter() - start_s >= 0.15


@pytest.mark.parametrize("case", [*CASES, *home.CASES], ids=lambda case: case.name)
def test_cases_are_run_as_they_are_planned(case: Case) -> None:
    """What the plan is asked for is what the outer optimizer gets."""
    assert case.choice().sync_every == case.sync_every
    if case.preset != "streaming":
        return
    names = [f"blocks.{layer}.weight" for layer in range(utilisation.LAYERS)]
    asked: dict[str, Any] = case.options()
    schedule = Staggered(asked["sync_every"], asked["layers"], overlap=asked["overlap"])
    parts = schedule.fragments(names)
    assert len(parts) == case.fragments
    assert len({len(part) for part in parts}) == 1


class TestLab:
    pytestmark = lab_needed

    def test_utilisation_is_near_what_the_plan_says(self) -> None:
        """Within wide bounds: a busy machine waits longer."""
        options = {"cases": "diloco,eager", "mbps": "20", "parameters": "4e5", "step_ms": "100"}
        rows = utilisation.run(Settings(quick=True, options=options)).rows
        found = {row["case"]["preset"]: row["metrics"] for row in rows}
        assert 20 < found["diloco"]["measured_percent"]["median"] < 65
        assert 30 < found["diloco"]["predicted_percent"]["median"] < 65
        sent = found["diloco"]["sent_mb_per_step"]["median"]
        assert sent == pytest.approx(4e5 * 8 / 2 / 6 / 1e6, rel=0.15)

    def test_home(self) -> None:
        rows = home.run(Settings(quick=True)).rows
        assert [row["case"]["preset"] for row in rows] == ["streaming e2m1+int8", "ddp"]
        assert all(row["metrics"]["measured_percent"]["median"] > 0 for row in rows)

    def test_churn(self) -> None:
        metrics = churn.run(Settings(quick=True)).rows[0]["metrics"]
        assert metrics["rounds"]["median"] > 3
        assert metrics["lost_percent"]["median"] > 0.3
        assert metrics["cuts"]["median"] >= 1

    def test_recovery_and_join(self) -> None:
        metrics = recovery.run(Settings(quick=True, repeats=1)).rows[0]["metrics"]
        assert metrics["redo_ms"]["median"] > metrics["view_ms"]["median"] > 0
        metrics = join.run(Settings(quick=True, repeats=1)).rows[0]["metrics"]
        assert metrics["fetch_s"]["median"] > 0
        assert 0 < metrics["link_share"]["median"] < 1
