"""A run of peers in one process, for tests of what is built on `Communicator`: threads, no sockets.

It averages in float64 what the active peers contribute, and follows a script of misfortunes: whose
contribution to a round is waived, to whom a round is lost. It has no views, codecs or failures of
its own; the real thing is tested elsewhere.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from decotrain.communicator import MemberInfo, Result

WAIT_S = 60.0


@dataclass
class FakeRound:
    given: dict[int, tuple[Any, float]] = field(default_factory=dict)  # by peer
    digests: set[int] = field(default_factory=set)
    result: Result | None = None


class FakeRun:
    def __init__(self, peers: int) -> None:
        self.changed = threading.Condition()
        self.rounds: dict[tuple[int, int], FakeRound] = {}
        self.active: set[int] = set(range(1, peers + 1))
        self.waived: set[tuple[int, int]] = set()  # (peer, seq): does not count, gets the result
        self.lost: set[tuple[int, int]] = set()  # (peer, seq): never hears of the result
        self.comms: dict[int, FakeComm] = {}

    def comm(self, peer: int) -> FakeComm:
        self.comms[peer] = FakeComm(self, peer)
        return self.comms[peer]

    def remove(self, peer: int) -> None:
        with self.changed:
            self.active.discard(peer)
            for tag, seq in list(self.rounds):
                self.settle(tag, seq)
            self.changed.notify_all()

    def settle(self, tag: int, seq: int) -> None:
        """Completes the round when every active peer has begun it."""
        open_round = self.rounds[tag, seq]
        if open_round.result is not None or not self.active <= set(open_round.given):
            return
        counted = [
            (peer, values, weight)
            for peer, (values, weight) in sorted(open_round.given.items())
            if weight > 0 and (peer, seq) not in self.waived
        ]
        total = sum(weight for _, _, weight in counted)
        result = Result(tag, seq, "stable", tuple(p for p, _, _ in counted), not counted, 0)
        result.slots = tuple(p - 1 for p, _, _ in counted)
        if counted and isinstance(counted[0][1], bytes):
            result.parts = {peer - 1: values for peer, values, _ in counted}
        elif counted:
            mean = sum(values.double() * (weight / total) for _, values, weight in counted)
            result.tensors = [mean.float()]
        open_round.result = result
        self.changed.notify_all()


@dataclass
class FakeWork:
    comm: FakeComm
    tag: int
    seq: int
    out: torch.Tensor | None
    begun = True

    def forgo(self) -> None:
        """`catch_up` gives every result that was not waited for."""

    def wait(self, timeout_s: float | None = None) -> Result:
        run = self.comm.run
        with run.changed:
            ok = run.changed.wait_for(lambda: run.rounds[self.tag, self.seq].result, WAIT_S)
        assert ok, f"round {self.seq} of tag {self.tag} never completed"
        if (self.comm.peer, self.seq) in run.lost:
            return Result(self.tag, self.seq, "lost", (), True, 0)
        result = run.rounds[self.tag, self.seq].result
        assert result is not None
        if result.tensors and self.out is not None:
            self.out.copy_(result.tensors[0])
        return result


class FakeComm:
    def __init__(self, run: FakeRun, peer: int) -> None:
        self.run, self.peer, self.slot = run, peer, peer - 1
        self.versions: dict[int, int] = {}
        self.state: dict[int, dict[str, torch.Tensor]] = {}
        self.next_seq: dict[int, int] = {}
        self.fetches = 0

    @property
    def active(self) -> bool:
        return self.peer in self.run.active

    def register_state(
        self, tag: int, tensors: Any, version: int = 0, effect: Any = None, layout: str = ""
    ) -> None:
        with self.run.changed:
            self.state[tag], self.versions[tag], self.next_seq[tag] = tensors, version, version

    @contextmanager
    def updating(self, tag: int, version: int | None = None) -> Iterator[None]:
        with self.run.changed:
            yield
            self.versions[tag] = self.versions[tag] + 1 if version is None else version
            self.run.changed.notify_all()

    def _ahead(self, tag: int) -> bool:
        return any(c.versions.get(tag, -1) > self.versions[tag] for c in self.run.comms.values())

    @property
    def view(self) -> tuple[int, int]:
        return 1, len(self.run.comms)

    def wait_until(self, true: Callable[[], Any], timeout_s: float) -> bool:
        with self.run.changed:
            return bool(self.run.changed.wait_for(true, min(timeout_s, WAIT_S)))

    def version(self, tag: int) -> int:
        return self.versions[tag]

    def pending(self, tag: int) -> bool:
        with self.run.changed:
            seq = self.next_seq[tag]
            return self._open(tag, seq) is not None and seq == self.versions[tag]

    def _open(self, tag: int, seq: int) -> FakeRound | None:
        found = self.run.rounds.get((tag, seq))
        return found if found and found.result is None else None

    def _begin(
        self, tag: int, given: Any, out: torch.Tensor | None, weight: float, digest: int
    ) -> FakeWork:
        run = self.run
        with run.changed:
            seq = self.next_seq[tag]
            assert seq == self.versions[tag], "a round was begun on old state"
            self.next_seq[tag] += 1
            here = run.rounds.setdefault((tag, seq), FakeRound())
            if here.result is None and self.active:
                here.given[self.peer] = (given, weight)
                here.digests.add(digest)
                assert len(here.digests) == 1, "peers computed from different outer states"
            run.settle(tag, seq)
            run.changed.notify_all()
        return FakeWork(self, tag, seq, out)

    def all_reduce(
        self,
        tensors: torch.Tensor,
        *,
        tag: int,
        weight: float,
        out: torch.Tensor | None = None,
        state_digest: int = 0,
        **options: Any,
    ) -> FakeWork:
        place = tensors if out is None else out
        return self._begin(tag, tensors.clone(), place, weight, state_digest)

    def collect(self, data: bytes | None, *, tag: int, max_bytes: int) -> FakeWork:
        assert data is None or len(data) <= max_bytes
        return self._begin(tag, data or b"", None, 0.0 if data is None else 1.0, 0)

    @property
    def members(self) -> tuple[MemberInfo, ...]:
        return tuple(MemberInfo(peer, peer - 1, True) for peer in sorted(self.run.active))

    def catch_up(
        self,
        tag: int,
        apply: Callable[[Result], None] | None,
        *,
        wait: bool = False,
        timeout_s: float | None = None,
    ) -> int:
        """Missed results in order; a lost one, or no state at all, is a fetch from who has most."""
        with self.run.changed:
            lost = (self.peer, self.versions[tag]) in self.run.lost
            if wait and lost:
                assert self.run.changed.wait_for(lambda: self._ahead(tag), WAIT_S)
            ahead = self._ahead(tag)
            most = max(self.run.comms.values(), key=lambda comm: comm.versions.get(tag, -1))
            if ahead and (self.versions[tag] == 0 or lost or apply is None):
                self.fetches += 1
                for name, tensor in self.state[tag].items():
                    tensor.copy_(most.state[tag][name])
                self.versions[tag] = most.versions[tag]
            while (found := self.run.rounds.get((tag, self.versions[tag]))) and found.result:
                if apply is None:
                    break
                apply(found.result)
            self.next_seq[tag] = max(self.next_seq[tag], self.versions[tag])
            self.run.active.add(self.peer)
            return self.versions[tag]
