"""One communicator under several threads of its user: no hang, and no error but ours.

Threads run rounds of their own tags, catch up, look at members and figures, while another one ends
the communicator at any moment. Each thread ends with what it wanted or with an error that says so.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from decotrain.communicator import Communicator, Result, join
from decotrain.control.coordinator import Options
from decotrain.control.server import ServerThread
from decotrain.errors import Error, LeftError

WAIT_S = 60.0
PEERS = 3
STATE_TAG, TAGS = 0, (1, 2, 3)
ROUNDS = 12


@pytest.fixture
def coordinator() -> Iterator[ServerThread]:
    server = ServerThread(Options(min_peers=PEERS))
    yield server
    server.stop()


class Threads:
    """Starts them, and finds out which of them hang or fail."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        self.errors: list[BaseException] = []  # that are not ours

    def start(self, action: Callable[..., Any], *arguments: Any) -> threading.Thread:
        def run() -> None:
            try:
                action(*arguments)
            except LeftError:
                pass  # the communicator was ended meanwhile
            except BaseException as error:
                self.errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        self.threads.append(thread)
        thread.start()
        return thread

    def finish(self) -> None:
        for thread in self.threads:
            thread.join(WAIT_S)
        hanging = [thread for thread in self.threads if thread.is_alive()]
        assert not hanging, f"{len(hanging)} threads hang"
        assert not self.errors, self.errors


def rounds(comm: Communicator, tag: int, count: int) -> None:
    buffer = np.zeros(2000, np.float32)
    for _ in range(count):
        buffer.fill(1.0)
        result = comm.all_reduce(buffer, tag=tag, op="sum").wait(WAIT_S)
        if result.outcome == "stable" and result.contributors:
            assert buffer[0] == buffer[-1] == len(result.contributors)


def stateful(comm: Communicator, state: Any, count: int) -> None:
    def apply(result: Result) -> None:
        with comm.updating(STATE_TAG, result.seq + 1):
            state[:] += result.tensor.reshape(-1)

    while comm.catch_up(STATE_TAG, apply, wait=True, timeout_s=WAIT_S) < count:
        result = comm.all_reduce(np.ones(500, np.float32), tag=STATE_TAG, op="sum").wait(WAIT_S)
        if result.outcome == "stable":
            apply(result)


def look(comm: Communicator, stop: threading.Event) -> None:
    while not stop.is_set():
        assert len({one.slot for one in comm.members}) == len(comm.members)
        comm.set_figures({"links": comm.figures()["links_up"]})
        assert comm.pending(STATE_TAG) in (True, False)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("end", ["close", "leave"])
def test_a_communicator_ended_while_its_threads_use_it(coordinator: ServerThread, end: str) -> None:
    draw = random.Random(end)
    comms = [join(coordinator.address, timeout_s=WAIT_S) for _ in range(PEERS)]
    threads, stop = Threads(), threading.Event()
    states = [np.zeros(500, np.float32) for _ in comms]
    for comm, state in zip(comms, states, strict=True):
        comm.register_state(STATE_TAG, {"w": state})
    for comm, state in zip(comms, states, strict=True):
        for tag in TAGS:
            threads.start(rounds, comm, tag, ROUNDS)
        threads.start(stateful, comm, state, ROUNDS)
        threads.start(look, comm, stop)
    ended = comms[-1]
    while ended.figures()["rounds"] < draw.randrange(2 * ROUNDS):
        threading.Event().wait(0.001)
    for _ in range(2):  # two at once
        threads.start(getattr(ended, end))
    for thread in threads.threads:
        if thread not in threads.threads[4::5]:  # those that look go on until they are told
            thread.join(WAIT_S)
    stop.set()
    threads.finish()
    assert np.array_equal(states[0], states[1])
    for comm in comms[:-1]:
        deadline_s = time.monotonic() + WAIT_S
        while ended.peer in {one.peer for one in comm.members}:  # they may hear of it later
            assert time.monotonic() < deadline_s
            threading.Event().wait(0.01)
        comm.leave()
    for call in (
        lambda: ended.all_reduce(np.ones(1, np.float32)),
        lambda: ended.catch_up(STATE_TAG, None),
        lambda: ended.members,
    ):
        with pytest.raises(LeftError):
            call()


@pytest.mark.timeout(240)
def test_rounds_begun_while_it_closes_end(coordinator: ServerThread) -> None:
    """Each begin is either refused or its wait() ends; and nothing is written to a descriptor
    that was closed and is somebody else's by now."""
    for turn in range(6):
        comms = [join(coordinator.address, timeout_s=WAIT_S) for _ in range(PEERS)]
        threads = Threads()
        for comm in comms:
            for tag in TAGS:
                threads.start(rounds, comm, tag, 1 << 30)
        while min(comm.figures()["rounds"] for comm in comms) < 1 + turn:
            threading.Event().wait(0.001)
        for comm in comms:
            threads.start(comm.close)
        threads.finish()
        reading, writing = os.pipe2(os.O_NONBLOCK)
        taken = [os.dup(writing) for _ in range(64)]  # the numbers that were closed just now
        for comm in comms:
            with suppress(Error):
                comm.set_figures({"turn": turn})
            comm.close()
        with pytest.raises(BlockingIOError):
            os.read(reading, 1)
        for descriptor in (reading, writing, *taken):
            os.close(descriptor)
