"""Peers that do not fit: the one that differs is told so and ends, and the others go on."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from decotrain.communicator import Communicator, join
from decotrain.control.coordinator import Options
from decotrain.control.server import ServerThread
from decotrain.errors import LeftError

WAIT_S = 60.0


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
        assert [member.peer for member in first.members] == [first.peer]
