"""Error feedback in rounds: what is refused changes nothing; residuals outlive views and stops."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from decotrain import checkpoint
from decotrain.communicator import Communicator, join
from decotrain.control.coordinator import Options
from decotrain.control.server import ServerThread
from decotrain.errors import ConfigError, Error, LeftError, NotFiniteError, RoundError
from decotrain.outer import make
from decotrain.outer.codec import Codec, CodecChoice, Contribution, TopK
from decotrain.rounds import Result, Work
from tests.outer_naive import deep
from tests.outer_runs import take_steps
from tests.test_communicator import WAIT_S, together


@pytest.fixture
def coordinator() -> Iterator[ServerThread]:
    server = ServerThread(Options(min_peers=2))
    yield server
    server.stop()


def values(elements: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_t(4, elements).astype(np.float32))


CHOICES: dict[str, Codec] = {
    "e2m1": CodecChoice("e2m1", "int8", True),
    "decay": CodecChoice("int2", "int8", True, decay=0.9),
    "bf16": CodecChoice("e3m0", "e3m0", True, residual="bf16"),
    "topk": TopK(64),
}


@pytest.mark.parametrize("codec", CHOICES.values(), ids=CHOICES.keys())
def test_a_poisoned_contribution_leaves_the_residual(codec: Codec) -> None:
    """The NaN is in the last of many chunks."""
    with join("local") as comm:
        given = values(50_000, 1)
        residual = codec.new_residual(given)
        assert residual is not None
        codec.begin(comm, 0, Contribution(given, 1.0, given, residual)).wait(WAIT_S)
        assert residual.any()
        kept = residual.clone()
        poisoned = values(50_000, 2)
        poisoned[-1] = float("inf")
        with pytest.raises(NotFiniteError):
            codec.begin(comm, 0, Contribution(poisoned, 1.0, poisoned, residual))
        assert torch.equal(residual, kept)
        codec.begin(comm, 0, Contribution(values(50_000, 3), 1.0, given, residual)).wait(WAIT_S)
        assert residual.isfinite().all()


@pytest.mark.parametrize("codec", CHOICES.values(), ids=CHOICES.keys())
def test_a_round_that_takes_nothing_leaves_the_residual(codec: Codec) -> None:
    """After a NaN our state lacks a round, which comes as a missed one; then there is no run."""
    given, out = values(50_000, 1), torch.empty(50_000)
    residual = codec.new_residual(given)
    assert residual is not None

    def begin(comm: Communicator, seed: int) -> Work:
        return codec.begin(comm, 0, Contribution(values(50_000, seed), 1.0, out, residual))

    def apply(result: Result) -> None:
        with comm.updating(0):
            applied.append(result.seq)

    applied: list[int] = []
    with join("local") as comm:
        comm.register_state(0, {"w": np.zeros(4, np.float32)})
        apply(begin(comm, 1).wait(WAIT_S))
        assert residual.any()
        kept = residual.clone()
        poisoned = Contribution(torch.full((50_000,), float("nan")), 1.0, out, residual)
        with pytest.raises(NotFiniteError):
            codec.begin(comm, 0, poisoned)
        for late in (Contribution(given, 1.0, out, residual), poisoned):
            assert codec.begin(comm, 0, late).wait(WAIT_S).outcome == "lost"
        assert torch.equal(residual, kept)
        assert comm.catch_up(0, apply, wait=True, timeout_s=WAIT_S) == 2
        assert applied == [0, 1]
        apply(begin(comm, 2).wait(WAIT_S))
        assert not torch.equal(residual, kept)
        kept = residual.clone()
    with pytest.raises(LeftError):
        begin(comm, 3)
    assert torch.equal(residual, kept)


def test_options_that_make_no_sense_leave_the_residual() -> None:
    with join("local") as comm:
        residual = torch.full((5000,), 0.25)
        wrong: list[dict[str, Any]] = [
            {"rule_parameter": float("nan")},
            {"chunk_elements": 1 << 31},
            {"op": "median"},
            {"codec": "int9"},
        ]
        for options in wrong:
            with pytest.raises(Error):
                comm.all_reduce(values(5000, 1), residual=residual, **({"codec": "e2m1"} | options))
            assert (residual == 0.25).all(), options
        with pytest.raises(RoundError, match="another number of elements"):
            comm.all_reduce(values(4000, 1), residual=residual)
        comm.close()
        with pytest.raises(Error):
            comm.all_reduce(values(5000, 1), residual=residual)
        assert (residual == 0.25).all()


def test_the_residual_outlives_changes_of_the_view(coordinator: ServerThread) -> None:
    """All that one peer meant has been sent, but for the residual, while others come and go."""
    residual, meant, done = torch.zeros(20_000), np.zeros(20_000), threading.Event()
    got: list[np.ndarray[Any, Any]] = []

    def steady(comm: Communicator) -> None:
        while not done.is_set() or len(got) < 12:
            given = values(20_000, len(got) % 20)
            out = torch.empty(20_000)
            work = comm.all_reduce(given, codec="int2+f32", out=out, residual=residual)
            result = work.wait(WAIT_S)
            assert result.contributors == (comm.peer,)
            meant[:] += given.double().numpy()
            got.append(out.double().numpy())

    def guest(comm: Communicator) -> None:
        zeros = torch.zeros(20_000)
        for _ in range(3):
            comm.all_reduce(zeros, codec="int2+f32", weight=0.0).wait(WAIT_S)
        comm.leave()

    with join(coordinator.address) as comm:

        def guests() -> None:
            for _ in range(3):
                with join(coordinator.address) as other:
                    guest(other)
            done.set()

        together(lambda: steady(comm), guests)
        assert comm.view[1] > 3
    assert residual.any()
    error = np.abs(np.sum(got, axis=0) + residual.double().numpy() - meant).max()
    assert error < 1e-5 * len(got)


@pytest.mark.parametrize("kept", ["f32", "bf16"])
def test_a_residual_is_saved_in_its_own_type(kept: str, tmp_path: Path) -> None:
    def begin(comm: Communicator, state: Any = None) -> tuple[Any, Any, Any]:
        model = deep(1)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        options = {"codec": "e2m1+int8", "error_feedback": True, "residual": kept}
        outer = make("diloco", model, inner, comm, sync_every=2, state=state, **options)
        return model, inner, outer

    with join("local") as comm:
        model, inner, outer = begin(comm)
        take_steps(model, inner, outer, 6)
        state = outer.state_dict()
        residual = outer.residuals[0]
        assert residual.any()
    wanted = {"f32": torch.float32, "bf16": torch.bfloat16}[kept]
    assert residual.dtype == wanted
    checkpoint.write(tmp_path, 3, state["shared"], state["private"], {"facts": state["facts"]})
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.state["0.residual"].dtype == wanted
    with join("local") as comm:
        resumed = begin(comm, {**state, "private": dict(found.state)})[2]
        assert torch.equal(resumed.residuals[0], residual)
        assert resumed.residuals[0].dtype == wanted


def test_a_residual_has_one_of_two_types() -> None:
    with pytest.raises(ConfigError, match="f32 or bf16"):
        CodecChoice("e2m1", "int8", True, residual="f16")
