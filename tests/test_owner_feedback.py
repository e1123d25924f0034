"""Error feedback at the owner: results lose nothing over rounds, whoever comes and goes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from decotrain.communicator import Communicator, join
from decotrain.control.coordinator import Options
from decotrain.control.server import ServerThread
from decotrain.errors import ConfigError, NotFiniteError, RoundError
from decotrain.outer import make
from decotrain.outer.codec import CodecChoice
from decotrain.rounds import Result
from tests.outer_naive import deep
from tests.outer_runs import take_steps
from tests.test_communicator import WAIT_S, together

SIZE = 70_000  # more chunks than one


@pytest.fixture
def coordinator() -> Iterator[ServerThread]:
    server = ServerThread(Options(min_peers=2))
    yield server
    server.stop()


def values(seed: int) -> np.ndarray[Any, Any]:
    """With a common drift, so that what is lost each time adds up."""
    random = np.random.default_rng(seed)
    return (1.3 + random.standard_t(4, SIZE)).astype(np.float32)


class Sums:
    """What two peers meant, got and keep, in rounds of a codec that is coarse for results only."""

    def __init__(self, feedback: bool) -> None:
        self.feedback = feedback
        self.meant, self.got, self.kept = (np.zeros(SIZE) for _ in range(3))

    def peer(self, comm: Communicator, rounds: int, first: bool, lock: threading.Lock) -> None:
        residual = np.zeros(SIZE, np.float32) if self.feedback else None
        for number in range(rounds):
            given = values(1000 * number + first)
            meant = given.astype(np.float64)
            work = comm.all_reduce(given, codec="f32+e3m0", owner_residual=residual)
            result = work.wait(WAIT_S)
            assert comm.peer in result.contributors
            with lock:
                self.meant += meant / len(result.contributors)
                if first:
                    self.got += result.tensor
        if residual is not None:
            assert residual.any(), "every peer owns some chunks"
            with lock:
                self.kept += residual


@pytest.mark.parametrize("feedback", [True, False])
def test_what_results_lose_comes_with_later_ones(coordinator: ServerThread, feedback: bool) -> None:
    sums, lock, rounds = Sums(feedback), threading.Lock(), 12

    def peer(first: bool) -> None:
        with join(coordinator.address) as comm:
            sums.peer(comm, rounds, first, lock)

    together(lambda: peer(True), lambda: peer(False))
    off = np.abs(sums.got + sums.kept - sums.meant)
    if feedback:
        assert off.max() < 1e-4
    else:
        assert np.median(off) > 0.2, "without feedback this codec is meant to lose much"


def test_the_residual_outlives_changes_of_the_view(coordinator: ServerThread) -> None:
    """Guests own chunks too and go; who stays has all that its own results lost."""
    residual, done = np.zeros(SIZE, np.float32), threading.Event()
    meant, got, guests_kept = np.zeros(SIZE), np.zeros(SIZE), np.zeros(SIZE)

    def steady(comm: Communicator) -> None:
        number = 0
        while not done.is_set() or number < 8:
            given = values(number % 20)
            number += 1
            work = comm.all_reduce(given.copy(), codec="f32+e3m0", owner_residual=residual)
            result = work.wait(WAIT_S)
            assert result.contributors == (comm.peer,)
            meant[:] += given
            got[:] += result.tensor

    def guests() -> None:
        for _ in range(2):
            with join(coordinator.address) as other:
                kept = np.zeros(SIZE, np.float32)
                for _ in range(3):
                    other.all_reduce(
                        np.zeros(SIZE, np.float32), codec="f32+e3m0", weight=0.0,
                        owner_residual=kept,
                    ).wait(WAIT_S)  # fmt: skip
                guests_kept[:] += kept
                other.leave()
        done.set()

    with join(coordinator.address) as comm:
        together(lambda: steady(comm), guests)
        assert comm.view[1] > 2
    assert residual.any()
    assert guests_kept.any()
    assert np.abs(got + residual + guests_kept - meant).max() < 1e-3


def test_one_residual_is_in_one_round_at_a_time() -> None:
    with join("local") as comm:
        kept, state = np.zeros(SIZE, np.float32), np.zeros(SIZE, np.float32)
        comm.register_state(0, {"mean": state})

        def apply(result: Result) -> None:
            with comm.updating(0):
                state[:] = result.tensor

        first = comm.all_reduce(values(1), codec="f32+e3m0", owner_residual=kept)
        with pytest.raises(RoundError, match="has not written its owner_residual back: wait for"):
            comm.all_reduce(values(2), codec="f32+e3m0", owner_residual=kept)
        apply(first.wait(WAIT_S))
        after = kept.copy()
        assert after.any()
        given = values(2)
        work = comm.all_reduce(given.copy(), codec="f32+e3m0", owner_residual=kept)
        work.forgo()  # its result is missed, and what it lost is kept when that is taken
        comm.catch_up(0, apply, wait=True, timeout_s=WAIT_S)
        assert np.abs(state + kept - (given + after)).max() < 1e-5


def test_what_makes_no_sense_is_refused_and_changes_nothing() -> None:
    with join("local") as comm:
        given = values(1)
        kept = np.full(SIZE, 0.25, np.float32)
        for codec, residual, why in [
            ("f32", kept, r"results in f32 lose nothing.*codec\.owner_feedback=false"),
            ("e3m0", kept[:-1], "float32 tensor of the host with the round's 70000 values"),
            ("e3m0", kept.astype(np.float16), "of float16; it must be one contiguous float32"),
            ("e3m0", np.zeros((SIZE, 2), np.float32)[:, 0], "contiguous float32"),
            ("e3m0", np.full(SIZE, np.nan, np.float32), "residual is not finite"),
        ]:
            with pytest.raises((ConfigError, RoundError), match=why):
                comm.all_reduce(given, codec=codec, owner_residual=residual)
        poisoned = values(2)
        poisoned[-1] = np.inf
        with pytest.raises(NotFiniteError):
            comm.all_reduce(poisoned, codec="e3m0", owner_residual=kept)
        assert (kept == 0.25).all()
        comm.all_reduce(given.copy(), codec="e3m0", owner_residual=kept).wait(WAIT_S)
        assert (kept != 0.25).any()
    with pytest.raises(ConfigError, match="lose nothing"):
        CodecChoice.named("e2m1+f32", error_feedback=True, owner_feedback=True)


@pytest.mark.parametrize("preset", ["diloco", "ddp"])
def test_a_resumed_peer_has_its_residual(preset: str) -> None:
    options: dict[str, Any] = {
        "codec": "int8+e3m0", "error_feedback": True, "owner_feedback": True,
    }  # fmt: skip
    if preset == "diloco":
        options["sync_every"] = 2

    def begin(comm: Communicator, state: Any = None) -> tuple[Any, Any, Any]:
        model = deep(1)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, inner, make(preset, model, inner, comm, state=state, **options)

    with join("local") as comm:
        model, inner, outer = begin(comm)
        take_steps(model, inner, outer, 6)
        state = outer.state_dict()
        kept = {tag: one.clone() for tag, one in outer.owner_residuals.items()}
        assert all(one.any() for one in kept.values())
    with join("local") as comm:
        resumed = begin(comm, state)[2]
        for tag, one in kept.items():
            assert torch.equal(resumed.owner_residuals[tag], one)
