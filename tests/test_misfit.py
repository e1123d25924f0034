"""A newcomer with another model than the run's: one error that says so, and the run goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from decotrain.communicator import Communicator, join
from decotrain.control.coordinator import Options
from decotrain.control.server import ServerThread
from decotrain.errors import StateError
from decotrain.outer import make
from tests.test_communicator import WAIT_S, together


def newcomer_to(
    run: Callable[[Communicator], Callable[[], Any]], newcomer: Callable[[Communicator], Any]
) -> Any:
    """What the newcomer's action gives, while the run, one peer, makes rounds."""
    server, begun, over = ServerThread(Options()), threading.Event(), threading.Event()

    def enter() -> Communicator:
        return join(server.address, insecure=True, listen="127.0.0.1")

    def first() -> int:
        with enter() as comm:
            make_round, rounds = run(comm), 0
            while not over.is_set() or rounds < 3:
                make_round()
                rounds += 1
                begun.set()
            return rounds

    def second() -> Any:
        try:
            assert begun.wait(WAIT_S)
            with enter() as comm:
                return newcomer(comm)
        finally:
            over.set()

    rounds, given = together(first, second)
    server.stop()
    assert rounds >= 3
    return given


def rounds_of(shape: tuple[int, ...]) -> Callable[[Communicator], Callable[[], Any]]:
    def run(comm: Communicator) -> Callable[[], Any]:
        state = np.zeros(shape, np.float32)
        comm.register_state(0, {"weights": state})
        given = np.ones(16, np.float32)

        def one() -> None:
            comm.all_reduce(given.copy()).wait(WAIT_S)
            with comm.updating(0):
                state[...] += 1

        return one

    return run


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((8, 9), "the state of tag 0 has 256 bytes, and here 288"),
        ((4, 16), "the 256 bytes of tag 0 are tensors of other shapes"),
    ],
)
def test_another_shape_is_named(shape: tuple[int, ...], message: str) -> None:
    def newcomer(comm: Communicator) -> str:
        comm.register_state(0, {"weights": np.zeros(shape, np.float32)})
        with pytest.raises(StateError) as error:
            comm.catch_up(0, None, wait=True, timeout_s=WAIT_S)
        return str(error.value)

    said = newcomer_to(rounds_of((8, 8)), newcomer)
    assert said.startswith("this is not the run's model: there " + message)


def test_another_name_for_the_same_fits() -> None:
    def newcomer(comm: Communicator) -> float:
        state = np.full((8, 8), -1, np.float32)
        comm.register_state(0, {"_orig_mod.weights": state})
        comm.catch_up(0, None, wait=True, timeout_s=WAIT_S)
        return float(state.min())

    assert newcomer_to(rounds_of((8, 8)), newcomer) >= 1


@pytest.mark.parametrize("other", ["as many parameters", "more parameters"])
def test_another_model_is_named_by_outer_make(other: str) -> None:
    def trained(model: nn.Module, comm: Communicator) -> Callable[[], Any]:
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        outer = make("diloco", model, inner, comm, sync_every=1)

        def step() -> None:
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            inner.step()
            outer.step()

        return step

    def newcomer(comm: Communicator) -> str:
        more = nn.Linear(161, 1)
        same = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 1))
        with pytest.raises(StateError, match="this is not the run's model") as error:
            trained(same if other == "as many parameters" else more, comm)
        return str(error.value)

    said = newcomer_to(lambda comm: trained(nn.Linear(160, 1), comm), newcomer)
    assert ("of other shapes" in said) == (other == "as many parameters")
