"""A peer of bench.fleet that runs rounds on a shared state, and one that does something wrong.

Every round's result is added to the state; what a contribution was computed from travels as its
state digest. The first value of a round is the number of peers that want to stop: all end after the
same round. It judges nothing: tests/test_failures.py and tests/test_slow_peers.py do.
"""

from __future__ import annotations

import os
import resource
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from decotrain.errors import NotFiniteError, OutOfMemoryError

TAG = 0
WAIT_S = 60.0
ACT_AT = 12  # version of the state from which the one peer acts, once
MORE = 8  # rounds of the acting peer that must count before all stop
SPARE_BYTES = 16 << 20  # that a process short of memory may still have
# Between rounds, so that a fast machine does not make thousands. Pacing only: when to stop is
# agreed inside a round (wants_to_stop).
HURRY_S = 0.002


class Steady:
    def __init__(self, state: SimpleNamespace, elements: int, act: str) -> None:
        self.comm, self.pipe, self.act = state.comm, state.pipe, act
        self.w = np.zeros(elements, np.float32)
        self.buffer = np.zeros(elements, np.float32)
        self.rounds: list[dict[str, Any]] = []
        self.said: list[str] = []  # errors
        self.first_id = self.comm.peer
        self.acted = False
        self.calm = 0  # rounds of ours that counted since the act
        self.comm.register_state(TAG, {"w": self.w}, version=0, effect=self.effect)

    def effect(self, result: Any) -> None:
        self.w += result.tensor.reshape(-1)

    @property
    def stop(self) -> bool:
        """It is in the state, so that who fetches the last round's effect stops too."""
        return bool(self.w[0] > 0)

    def apply(self, result: Any) -> None:
        with self.comm.updating(TAG, result.seq + 1):
            self.effect(result)
        self.rounds.append(
            {"at_s": time.monotonic(), "seq": result.seq, "peers": result.contributors,
             "partial": result.partial, "begun": result.begun, "digest": result.digest}
        )  # fmt: skip
        if self.acted and result.seq > ACT_AT:
            self.calm += self.comm.peer in result.contributors

    def round(self) -> None:
        comm = self.comm
        comm.catch_up(TAG, self.apply, wait=True, timeout_s=WAIT_S)
        if self.stop:
            return
        digest = zlib.crc32(self.w)
        self.buffer.fill(1.0)
        self.buffer[0] = float(self.wants_to_stop())
        if self.act and not self.acted and comm.version(TAG) >= ACT_AT:
            self.acted = True
            if self.act == "flip":  # from now on it computes from something else
                self.w.view(np.uint32)[self.w.size // 2] ^= 1 << 3
                digest = zlib.crc32(self.w)
            else:
                self.buffer[[1, -1]] = np.nan  # two owners: one of them is another peer
        work = comm.all_reduce(
            self.buffer, tag=TAG, op="sum", state_digest=digest, borrow=self.buffer.nbytes > 2 << 20
        )
        result = work.wait(WAIT_S)
        if result.outcome == "stable":
            self.apply(result)

    def wants_to_stop(self) -> bool:
        if self.pipe.poll(0):
            return True
        return self.calm >= MORE


def live(state: SimpleNamespace, elements: int, act: str = "") -> dict[str, Any]:
    """Rounds until somebody wants to stop: by the parent's word, or well after its act."""
    steady = Steady(state, elements, act)
    while not steady.stop:
        try:
            steady.round()
        except NotFiniteError as error:
            steady.said.append(str(error))
        time.sleep(HURRY_S)
    comm = state.comm
    return {
        "rounds": steady.rounds,
        "said": steady.said,
        "digest": zlib.crc32(steady.w),
        "version": comm.version(TAG),
        "first": steady.first_id,
        "id": comm.peer,
        "process": os.getpid(),
    }


def short_of_memory(state: SimpleNamespace, elements: int, borrow: bool) -> list[str]:
    """Two rounds for which there is no memory: what they raise."""
    buffer = np.ones(elements, np.float32)
    state.comm.all_reduce(np.ones(4, np.float32), tag=1).wait(WAIT_S)
    have = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (have + SPARE_BYTES, limits[1]))
    said = []
    for _ in range(2):
        buffer.fill(1.0)
        try:
            state.comm.all_reduce(buffer, tag=TAG, op="sum", borrow=borrow).wait(WAIT_S)
            said.append("no error")
        except OutOfMemoryError as error:
            said.append(str(error))
    resource.setrlimit(resource.RLIMIT_AS, limits)
    return said


def plenty(state: SimpleNamespace, elements: int, rounds: int) -> list[int]:
    """The same rounds where there is memory: how many contributed to each."""
    buffer = np.ones(elements, np.float32)
    state.comm.all_reduce(np.ones(4, np.float32), tag=1).wait(WAIT_S)
    counts = []
    for _ in range(rounds):
        buffer.fill(1.0)
        result = state.comm.all_reduce(buffer, tag=TAG, op="sum").wait(WAIT_S)
        assert result.outcome == "stable", result.outcome
        here = len(result.contributors)
        right = result.partial or bool((buffer == here).all())
        assert right, f"{here} in round {result.seq}: {buffer.min()} to {buffer.max()}"
        counts.append(len(result.contributors))
    return counts


def nothing(state: SimpleNamespace) -> None:
    """A word from the parent."""
