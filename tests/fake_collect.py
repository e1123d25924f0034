"""Collect rounds of several peers in one process, for tests of SPSA: threads, no sockets.

Peers may come and go between any two rounds. A newcomer fetches the registered tensors from the
peer that has most; a peer can be made to miss rounds. No views, no failures in mid-round.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from decotrain.communicator import Result

WAIT_S = 20.0


@dataclass
class Round:
    members: frozenset[int]  # slots it waits for
    parts: dict[int, bytes] = field(default_factory=dict)
    result: Result | None = None


class CollectRun:
    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.rounds: list[Round] = []
        self.active: set[int] = set()
        self.comms: dict[int, CollectComm] = {}

    def join(self, slot: int) -> CollectComm:
        with self.changed:
            comm = self.comms[slot] = CollectComm(self, slot)
            return comm

    def remove(self, slot: int) -> None:
        with self.changed:
            self.active.discard(slot)
            del self.comms[slot]
            for seq in range(len(self.rounds)):
                self.settle(seq)
            self.changed.notify_all()

    def settle(self, seq: int) -> None:
        one = self.rounds[seq]
        if one.result is None and (one.members & self.active) <= set(one.parts):
            parts = {slot: data for slot, data in sorted(one.parts.items()) if data}
            one.result = Result(0, seq, "stable", (), not parts, 0, [], parts)
            self.changed.notify_all()


@dataclass
class CollectWork:
    run: CollectRun
    seq: int

    def wait(self) -> Result:
        run = self.run
        with run.changed:
            ok = run.changed.wait_for(lambda: run.rounds[self.seq].result is not None, WAIT_S)
            result = run.rounds[self.seq].result
        assert ok, f"round {self.seq} never completed"
        assert result is not None
        return result


class CollectComm:
    def __init__(self, run: CollectRun, slot: int) -> None:
        self.run, self.slot = run, slot
        self.state: Mapping[str, torch.Tensor] = {}
        self.held, self.next_seq = 0, 0
        self.fetches = 0

    def register_state(
        self,
        tag: int,
        tensors: Mapping[str, torch.Tensor],
        version: int,
        effect: object = None,
        shortcut: object = None,
    ) -> None:
        with self.run.changed:
            self.state, self.held, self.next_seq = tensors, version, version
            self._catch_up()
            self.run.active.add(self.slot)

    def _catch_up(self) -> None:
        """A newcomer copies the state of the peer that has most."""
        most = max(self.run.comms.values(), key=lambda comm: comm.held)
        if most.held > self.held:
            for name, tensor in self.state.items():
                tensor.copy_(most.state[name])
            self.held = self.next_seq = most.held
            self.fetches += 1

    def version(self, tag: int) -> int:
        return self.held

    @contextmanager
    def updating(self, tag: int, version: int | None = None) -> Iterator[None]:
        with self.run.changed:
            yield
            self.held = self.held + 1 if version is None else version
            self.run.changed.notify_all()

    def catch_up(self, tag: int, apply: Callable[[Result], None], *, wait: bool = False) -> int:
        with self.run.changed:
            while self.held < len(self.run.rounds) and (one := self.run.rounds[self.held]).result:
                apply(one.result)
            self.next_seq = max(self.next_seq, self.held)
            return self.held

    def collect(
        self, data: bytes | None, *, tag: int, max_bytes: int, ahead: int = 0
    ) -> CollectWork:
        run = self.run
        with run.changed:
            seq, self.next_seq = self.next_seq, self.next_seq + 1
            while len(run.rounds) <= seq:
                run.rounds.append(Round(frozenset(run.active)))
            if run.rounds[seq].result is None:
                run.rounds[seq].parts[self.slot] = data or b""
            run.settle(seq)
            return CollectWork(run, seq)
