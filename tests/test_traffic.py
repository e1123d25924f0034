"""A peer's own counters of bytes, when the links they went over are no more."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from decotrain.communicator import join
from decotrain.control.coordinator import Options
from decotrain.control.server import ServerThread
from tests.test_communicator import WAIT_S, together


def test_bytes_are_counted_when_those_they_went_to_have_left() -> None:
    server = ServerThread(Options(min_peers=2))
    values, left = np.ones(1 << 18, np.float32), threading.Event()

    def stays() -> list[dict[str, Any]]:
        comm = join(server.address, insecure=True, listen="127.0.0.1")
        comm.all_reduce(values.copy()).wait(WAIT_S)
        assert left.wait(WAIT_S)
        comm.wait_until(lambda: len(comm.members) == 1, WAIT_S)
        alone = comm.figures()
        comm.leave()
        return [alone, comm.figures()]

    def leaves() -> None:
        with join(server.address, insecure=True, listen="127.0.0.1") as comm:
            comm.all_reduce(values.copy()).wait(WAIT_S)
        left.set()

    for figures in together(stays, leaves)[0]:  # half of the values and half of the results
        for way in ("bytes_out", "bytes_in"):
            assert values.nbytes <= figures[way] < 1.01 * values.nbytes, way
    server.stop()
