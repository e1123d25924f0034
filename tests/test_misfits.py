"""Peers that do not fit: the one that differs is told so and ends, and the others go on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from decotrain.communicator import Communicator, Result, join
from decotrain.control.coordinator import Options
from decotrain.control.server import ServerThread
from decotrain.errors import LeftError

WAIT_S = 30.0


@pytest.fixture
def coordinator() -> Iterator[ServerThread]:
    server = ServerThread(Options(min_peers=2))
    yield server
    server.stop()


def rounds(comm: Communicator, codec: str, number: int) -> list[tuple[int, ...]]:
    """Rounds of one chunk: its owner alone sees another codec. Who contributed to each."""
    values = np.ones(8, np.float32)
    return [comm.all_reduce(values, codec=codec).wait(WAIT_S).contributors for _ in range(number)]


@pytest.mark.parametrize("odd", [0, 1], ids=["the first", "the second"])
def test_one_peer_with_another_codec_ends_and_the_run_goes_on(
    coordinator: ServerThread, odd: int
) -> None:
    with join(coordinator.address) as one, join(coordinator.address) as two:
        ready = threading.Thread(target=lambda: one.members)  # the view waits for both
        ready.start()
        first, second = sorted((two, one), key=lambda comm: comm.slot)
        ready.join(WAIT_S)
        done: list[list[tuple[int, ...]]] = []
        codecs = ["f32", "f32"]
        codecs[odd] = "int8"  # the run's is that of the lowest slot
        thread = threading.Thread(target=lambda: done.append(rounds(first, codecs[0], 3)))
        thread.start()
        with pytest.raises(LeftError, match="tensors, codec or options differ from the run's"):
            rounds(second, codecs[1], 3)
        thread.join(WAIT_S)
        assert done
        assert done[0][-1] == (first.peer,)
        assert first.wait_until(lambda: len(first.members) == 1, WAIT_S)


def run_each(comms: list[Communicator], odd: Communicator) -> dict[int, str]:
    """Three rounds of each in a thread; slot -> how many contributed at last, or the error."""
    ended: dict[int, str] = {}

    def run(comm: Communicator, slot: int) -> None:
        try:
            ended[slot] = str(len(rounds(comm, "int8" if comm is odd else "f32", 3)[-1]))
        except LeftError as error:
            ended[slot] = str(error)

    threads = [threading.Thread(target=run, args=(comm, comm.slot)) for comm in comms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    return ended


def all_here(comms: list[Communicator]) -> None:
    """Each says that it is ready: a view waits for all of them."""
    threads = [threading.Thread(target=lambda c=comm: c.members) for comm in comms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    count = len(comms)
    assert all(comm.wait_until(lambda c=comm: len(c.members) == count, WAIT_S) for comm in comms)


@pytest.mark.parametrize("odd", [0, 2])
def test_the_one_of_three_that_differs_goes_whatever_its_slot(odd: int) -> None:
    server = ServerThread(Options(min_peers=3))
    with ExitStack() as stack:
        comms = [stack.enter_context(join(server.address)) for _ in range(3)]
        all_here(comms)
        ended = run_each(comms, next(comm for comm in comms if comm.slot == odd))
        assert "tensors, codec or options differ from the run's" in ended.pop(odd)
        assert list(ended.values()) == ["2", "2"]
    server.stop()


def test_who_began_first_alone_is_no_majority() -> None:
    """A view that was made meanwhile runs the round as the odd one began it: the others wait."""
    server = ServerThread(Options(min_peers=3))
    with ExitStack() as stack:
        comms = [stack.enter_context(join(server.address)) for _ in range(3)]
        all_here(comms)
        odd = max(comms, key=lambda comm: comm.slot)
        begun = odd.all_reduce(np.ones(8, np.float32), codec="int8")
        assert odd.wait_until(lambda: begun.seq is not None, WAIT_S)
        comms.append(stack.enter_context(join(server.address)))
        all_here(comms)
        good = [comm for comm in comms if comm is not odd]
        assert list(run_each(good, odd).values()) == ["3", "3", "3"]
        with pytest.raises(LeftError, match="tensors, codec or options differ from the run's"):
            begun.wait(WAIT_S)
    server.stop()


def train(comm: Communicator, digest: int, stop: threading.Event) -> None:
    """Rounds on shared state until `stop`; `digest` stands for what its options make of it."""
    weights = np.zeros(8, np.float32)
    comm.register_state(0, {"w": weights})

    def apply(result: Result) -> None:
        with comm.updating(0):
            weights[:] += 1.0

    while not stop.is_set():
        comm.catch_up(0, apply, wait=True, timeout_s=WAIT_S)
        result = comm.all_reduce(np.ones(8, np.float32), state_digest=digest).wait(WAIT_S)
        if result.outcome == "stable":
            apply(result)


def test_who_diverges_again_and_again_ends_and_says_why(coordinator: ServerThread) -> None:
    """Another learning rate, say: each return would cost the others two views."""
    stop = threading.Event()
    ended: dict[str, str] = {}

    def run(comm: Communicator, digest: int) -> None:
        try:
            train(comm, digest, stop)
        except LeftError as error:
            ended[comm.name] = str(error)
            stop.set()

    with join(coordinator.address, name="1") as one, join(coordinator.address, name="2") as two:
        threads = [threading.Thread(target=run, args=(comm, int(comm.name))) for comm in (one, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        stop.set()
        (said,) = ended.values()
        assert "its bits diverged 3 times" in said
        assert "its options" in said
        (stays,) = [comm for comm in (one, two) if comm.name not in ended]
        assert stays.wait_until(lambda: len(stays.members) == 1, WAIT_S)
