"""A peer of bench.fleet that holds or fetches state, and one that stops or dies while it fetches.

The state belongs to a tag without rounds, so that a fetch of it can always be completed; small
rounds of another tag go on meanwhile. It judges nothing: tests/test_joins_in_trouble.py does.
"""

from __future__ import annotations

import os
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np

from bench.fleet import activate
from decotrain.shared import SharedState

STATE_TAG, ROUND_TAG = 0, 1
NEWCOMERS = 2
WAIT_S = 90.0


def state_of_the_run(elements: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(5).standard_normal(elements, np.float32)


def hold(state: SimpleNamespace, elements: int) -> None:
    """One of the first peers: the run goes on from what it holds."""
    state.w, state.parts = state_of_the_run(elements), []
    _take_part(state)


def come(state: SimpleNamespace, elements: int, sent: int) -> dict[str, Any]:
    """A newcomer that sends itself a signal (0: none) once, when a part of the state is here; then
    `rounds`."""
    parts: list[int] = []
    wait_for = SharedState._wait_for

    def struck(self: SharedState, node: Any, work: Any, servers: list[int], tag: int) -> bool:
        while sent and not parts and work.bytes == 0 and not work.wait(0.0):
            pass
        if sent and not parts:
            parts.append(work.bytes)
            os.kill(os.getpid(), sent)
        return wait_for(self, node, work, servers, tag)

    SharedState._wait_for = struck  # type: ignore[method-assign]
    state.w, state.parts = np.zeros(elements, np.float32), parts
    _take_part(state)
    return rounds(state)


def _take_part(state: SimpleNamespace) -> None:
    state.comm.register_state(STATE_TAG, {"w": state.w}, version=0)
    state.comm.catch_up(STATE_TAG, None, wait=True, timeout_s=WAIT_S)
    activate(state)


def rounds(state: SimpleNamespace) -> dict[str, Any]:
    """Until both newcomers that live take part and have a new word."""
    comm = state.comm
    buffer = np.zeros(4, np.float32)
    counts: list[int] = []
    while True:
        buffer.fill(1.0)
        buffer[0] = float(state.pipe.poll(0))
        result = comm.all_reduce(buffer, tag=ROUND_TAG, op="sum").wait(WAIT_S)
        if result.outcome != "stable":
            continue
        counts.append(int(buffer[1]))
        assert buffer[1] == len(result.contributors)
        if buffer[0] >= NEWCOMERS:
            return {"crc": zlib.crc32(state.w), "parts": state.parts, "counts": counts}
