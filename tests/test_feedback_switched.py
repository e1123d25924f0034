"""Error feedback, the senders' and the owners', switched on and off by a resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from decotrain.communicator import Communicator, join
from decotrain.errors import StateError
from decotrain.outer import make
from tests.fake_comm import FakeRun
from tests.outer_naive import deep
from tests.outer_runs import run_peers, take_steps

OFF: dict[str, Any] = {"codec": "int8+e3m0"}
ON: dict[str, Any] = {"codec": "e2m1+e3m0", "error_feedback": True, "owner_feedback": True}
PRESETS: dict[str, dict[str, Any]] = {
    "diloco": {"sync_every": 2},
    "streaming": {"sync_every": 6, "layers": 2, "overlap": 1},  # several fragments
    "eager": {"sync_every": 2},  # a round is always under way
    "ddp": {"bucket_elements": 60},
}


def begin(comm: Communicator, preset: str, state: Any, options: Any) -> tuple[Any, Any, Any]:
    model = deep(1)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    outer = make(preset, model, inner, comm, state=state, **PRESETS[preset], **options)
    return model, inner, outer


def trained(preset: str, options: Any) -> dict[str, Any]:
    """The state of a run of one that was stopped."""
    with join("local") as comm:
        model, inner, outer = begin(comm, preset, None, options)
        take_steps(model, inner, outer, 8)
        state: dict[str, Any] = outer.state_dict()
        return state


@pytest.mark.parametrize("preset", PRESETS)
def test_switched_on_it_has_lost_nothing_yet(preset: str, caplog: pytest.LogCaptureFixture) -> None:
    state = trained(preset, OFF)
    with join("local") as comm:
        model, inner, outer = begin(comm, preset, state, ON)
        kept = [*outer.residuals.values(), *outer.owner_residuals.values()]
        assert len(kept) == 2 * len(state["facts"]["versions"])
        assert not any(one.any() for one in kept)
        take_steps(model, inner, outer, 8)
        outer.finish()
        assert all(one.any() for one in kept), "it is not used"
    assert not caplog.records


def test_one_of_both_may_be_switched_on_alone() -> None:
    state = trained("diloco", {**ON, "owner_feedback": False})
    with join("local") as comm:
        outer = begin(comm, "diloco", state, ON)[2]
        assert torch.equal(outer.residuals[0], state["private"]["0.residual"])
        assert outer.residuals[0].any()
        assert not outer.owner_residuals[0].any()


@pytest.mark.parametrize("preset", PRESETS)
def test_switched_off_it_is_said_once_what_is_dropped(
    preset: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = trained(preset, ON)
    elements = sum(p.numel() for p in deep().parameters())
    with join("local") as comm:
        model, inner, outer = begin(comm, preset, state, OFF)
        assert not outer.residuals
        assert not outer.owner_residuals
        take_steps(model, inner, outer, 8)
        outer.finish()
        assert not any("residual" in key for key in outer.state_dict()["private"])
    said = [(one.levelname, one.getMessage()) for one in caplog.records]
    assert said == [
        ("WARNING", f"{feedback} feedback is off here and was on in the saved state: what {whose}"
         f" of {elements} values have lost is dropped, and comes with no later round")
        for feedback, whose in (("error", "contributions"), ("owner", "results"))
    ]  # fmt: skip


def test_a_round_under_way_that_did_not_count_gives_back_no_residual_that_is_off() -> None:
    state = trained("eager", ON)
    assert state["private"]["0.residual_before"].any()
    state["facts"]["flights"]["0"]["counted"] = False
    with join("local") as comm:
        model, inner, outer = begin(comm, "eager", state, OFF)
        take_steps(model, inner, outer, 4)
        outer.finish()
        assert outer.rounds() > 4


def test_a_residual_of_another_shape_is_still_refused() -> None:
    state = trained("diloco", ON)
    state["private"]["0.residual"] = torch.zeros(3)
    with (
        join("local") as comm,
        pytest.raises(StateError, match=r"shape \(3,\) for 0\.residual.*resume with the options"),
    ):
        begin(comm, "diloco", state, ON)


@pytest.mark.parametrize("how", ["waived", "lost"])
def test_ddp_puts_back_the_residual_of_gradients_that_did_not_count(how: str) -> None:
    """Its error is in bytes that nobody uses: it comes with the step that is made again."""
    run = FakeRun(2)
    comms: dict[int, Any] = {peer: run.comm(peer) for peer in (1, 2)}
    getattr(run, how).add((2, 3))  # peer 2, its third step

    def encoding(comm: Any) -> None:
        begin = comm.all_reduce

        def all_reduce(values: torch.Tensor, *, residual: torch.Tensor, **options: Any) -> Any:
            residual += 1.0  # whatever encoding lost
            return begin(values, **options)

        comm.all_reduce = all_reduce

    def body(peer: int) -> list[float]:
        model = deep(peer)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        outer = make("ddp", model, inner, comms[peer], codec="e2m1", error_feedback=True)
        encoding(comms[peer])
        kept = []
        for _ in range(4):
            take_steps(model, inner, outer, 1)
            kept.append(float(outer.residuals[0][0]))
        return kept

    told = run_peers(run, [1, 2], body)
    assert told[1] == [1.0, 2.0, 3.0, 4.0]
    assert told[2] == [1.0, 2.0, 2.0, 3.0]
