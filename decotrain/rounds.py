"""A round in a user's hands: what it gave, and the handle to wait for it.

`Work.wait()` is the only place where a caller's tensors change. Rounds are begun by Communicator.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from decotrain import tensors as tn
from decotrain.errors import NotFiniteError, OutOfMemoryError, RoundError, WaitTimeoutError

if TYPE_CHECKING:
    from decotrain.communicator import Communicator

SLICE_S = 0.2  # of a wait, so that an interrupt is seen
BROADCAST_TRIES = 100  # rounds without root, each after a view change
NO_MEMORY = "out of memory"  # how the core begins to say so


@dataclass(frozen=True)
class MemberInfo:
    """A peer of the view, as every peer sees it."""

    peer: int  # 64-bit id of this incarnation
    slot: int
    active: bool  # else observing: receives, contributes and owns nothing


@dataclass
class Result:
    """What a round gave: the same bits on every peer that has it."""

    tag: int
    seq: int
    outcome: str  # "stable"; "lost": completed without us and its bytes are gone: catch_up fetches
    contributors: tuple[int, ...]  # peer ids that are in at least one chunk, by slot
    partial: bool  # some chunk lacks a contributor that another chunk has, or nobody contributed
    digest: int  # of all result bytes and contributor sets
    # Like the input, zeros where nobody contributed; empty for collect.
    tensors: list[Any] = field(default_factory=list)
    parts: dict[int, bytes] = field(default_factory=dict)  # collect: slot -> its bytes
    begun: bool = True  # false: it came to us as an observer, or was missed
    slots: tuple[int, ...] = ()  # of the contributors
    refused: tuple[int, ...] = ()  # peer ids whose bytes were no contribution: see `without`

    @property
    def tensor(self) -> Any:
        """The one tensor of a round begun with one tensor."""
        assert len(self.tensors) == 1, f"this round has {len(self.tensors)} tensors"
        return self.tensors[0]

    def without(self, bad: Collection[int]) -> Result:
        """Of a collect round: as if these slots had contributed nothing. What its bytes mean is
        known to who collects them, so the core cannot leave them out."""
        if not bad:
            return self
        peers = dict(zip(self.slots, self.contributors, strict=True))
        kept = {slot: peer for slot, peer in peers.items() if slot not in bad}
        return replace(
            self,
            parts={slot: data for slot, data in self.parts.items() if slot in kept},
            slots=tuple(kept),
            contributors=tuple(kept.values()),
            refused=tuple(peer for slot, peer in peers.items() if slot in bad),
        )

    def name_refused(self, comm: Communicator) -> None:
        """Says who was left out, here and to the coordinator, as the core does where it decodes."""
        for peer in self.refused:
            detail = f"the contribution of {peer:016x} is no encoding, or has no valid weight"
            comm._agent.doubt("refused", peer, self.tag, self.seq, detail)


class Work:
    """A round that was begun. The caller's tensors change only inside `wait()`."""

    def __init__(
        self,
        comm: Communicator,
        tag: int,
        work: Any,  # decotrain._core.Work; None: lost before it began
        incarnation: int,
        out: list[Any] | None,  # None: a collect round
        again: Callable[[], Work] | None = None,  # when nobody contributed (broadcast)
    ) -> None:
        self.comm, self.tag = comm, tag
        self._work, self._incarnation, self._out, self._again = work, incarnation, out, again
        self._owner_residual: Any = None  # flat
        self._result: Result | None = None
        self._told = False  # that our contribution was withdrawn
        self.begun = work is not None  # false: it was over before it took anything of ours

    @property
    def seq(self) -> int | None:
        """The round's number; None until it has one (no view yet)."""
        if self._result is not None:
            return self._result.seq
        return None if self._work is None else self._work.seq

    def done(self) -> bool:
        """True when `wait()` would return at once."""
        return self._result is not None or self._work is None or self._work.done()

    def lend(self, residual: Any) -> Work:
        """The round adds this (flat) to results that we own, and `wait` writes what they lose."""
        self._owner_residual = residual
        if residual is not None:
            self.comm._shared.lenders[self.tag] = weakref.ref(self)
        return self

    def lends(self) -> bool:
        return self._owner_residual is not None and self._work is not None

    def forgo(self) -> None:
        """In place of `wait`, by who will not call it after an error."""
        if self._work is not None:
            self.comm._shared.skip(self.tag, self._work, self._owner_residual)
            self._owner_residual = None

    def wait(self, timeout_s: float | None = None) -> Result:
        """The result. Raises WaitTimeoutError (the round goes on), RoundError or LeftError."""
        deadline_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        for _ in range(BROADCAST_TRIES):
            if self._result is None:
                self._result = self._finish(deadline_s)
                self._work = None  # and with it the bytes of the result
            if self._again is None or self._result.contributors or self._result.outcome == "lost":
                return self._result
            other = self._again()  # the root was gone: everybody sees that and begins again
            self._work, self._incarnation = other._work, other._incarnation
            self._result = None
        raise RoundError(f"nobody had anything to broadcast in {BROADCAST_TRIES} rounds")

    def _finish(self, deadline_s: float) -> Result:
        comm = self.comm
        if self._work is None:
            return comm._lost(self.tag)
        try:
            while not self._work.wait(min(SLICE_S, max(0.0, deadline_s - time.monotonic()))):
                if time.monotonic() >= deadline_s:
                    raise WaitTimeoutError(
                        f"round {self.seq} of tag {self.tag} is not complete yet: {comm._why()}"
                    )
            held = self._work.result()
            if held is not None and held.withdrawn:
                self._withdrawn()
        except RuntimeError as error:
            if comm._between(self._incarnation, error):
                return comm._lost(self.tag)
            raise RoundError(f"round {self.seq} of tag {self.tag}: {error}") from None
        if held is None:  # results came to us that must be taken first
            if self.tag in comm._shared.fragments:
                return comm._lost(self.tag)
            held = comm._shared.next_missed(self.tag)
        gone = self._incarnation != comm._agent.shared.incarnation  # its branch may be no more
        if (gone and self.tag in comm._shared.fragments) or not comm._shared.follows(held):
            return comm._lost(self.tag)
        if self._owner_residual is not None:  # after a lost round it stays as it was
            held.keep_lost(self._owner_residual)
        # What nobody has broadcast this time may be ours to broadcast next.
        return comm._result(held, self._out, keep_own=self._again is not None)

    def _withdrawn(self) -> None:
        """Chunks of a borrowed tensor were refused by their owners: they are not finite."""
        if not self._told:
            self.forgo()
        self._told = True
        raise NotFiniteError(
            f"round of tag {self.tag}: tensor 0 contains NaN or infinity; the chunks that hold"
            " it were refused, the others go on without them"
        )


def decode(held: Any, places: list[Any]) -> None:
    """Writes a result of the core into tensors."""
    device = tn.device_of(places)
    if device is not None:
        from decotrain import device as on_device

        return on_device.decode(held, device, places)
    pairs = [tn.writable(place, f"tensor {n}") for n, place in enumerate(places)]
    try:
        held.decode_into([buffer for buffer, _ in pairs])
    except (TypeError, ValueError) as error:
        raise RoundError(f"round {held.seq} of tag {held.tag}: {error}") from None
    for _, bring in pairs:
        if bring is not None:
            bring()


def places_for(held: Any, template: list[tn.Pattern] | None) -> list[Any]:
    """Tensors for a result nobody asked for: like those of the tag's last round, or flat."""
    if template is None or sum(one.elements for one in template) != held.elements:
        import numpy as np

        return [np.zeros(held.elements, dtype=np.float32)]
    return [one.empty() for one in template]


def check_memory(name: str, why: str) -> None:
    """Raises what `why` says if that is a lack of memory."""
    if NO_MEMORY in why:
        raise OutOfMemoryError(
            f"{name} is {why}: it has left the run and the others go on without it. Give the"
            " process more memory or use fewer values in a round, then join again"
        )
