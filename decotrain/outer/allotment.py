"""Who trains on which samples: agreed by the rounds themselves, without a message of its own.

The samples of a run are one endless seeded order, cut into *portions* of one size: what a peer
trains on between two rounds. `Allotment` is the agreed part. It is shared state like the outer
parameters (a newcomer fetches it, checkpoints hold it, the digest covers it), and moves with each
result by a pure function of who contributed. Each slot holds two portions: the one it trains on,
and the one after, because results may come a round late.

    a contribution counts      the portions in it are done, and the slot is given new ones
    it does not                the slot keeps them; they are done when a later one counts
    a slot falls silent        its portions go to others before anybody gets one of the next epoch

So each number below `following` is done once or held by one slot: no portion is skipped, none is
given out twice. `Portions` is one peer's own part: how far it is in what its slot was given. A
peer that has used both portions and was not heard of since (a newcomer that is not active yet, one
that lost rounds) begins anew: it forgets that progress and trains on the same portions once more.
What the rule cannot see is how many steps a contribution holds. A peer that did fewer than a
portion has (a newcomer in its first round, a slow one of `delayed_nesterov`) finishes it later, and
what it had left is lost with it. Nor does it see what was trained on by whom nobody has heard of: a
peer whose very first contribution is waived, or that was silent for two rounds and comes back with
its progress, may give a portion that another one was given too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

SLOTS = 64  # of a run (kMaxPeers)
HELD = 2  # portions of a slot
SILENT = 2  # rounds without a contribution, after which what a slot holds may go to others
NEVER = -1  # in place of the rounds: no contribution yet
REMEMBERED = 16  # portions that a peer knows it has had

Numbers = npt.NDArray[np.int64]


class Allotment:
    """The agreed part, in one int64 tensor: rows of slots, then `following` and the epoch.

    epoch: portions in an epoch; 0: there are none. carry: a contribution that did not count
    goes with the next one (outer optimizers); else it is gone (gradients).
    """

    def __init__(self, epoch: int, carry: bool = True) -> None:
        self.tensor = torch.zeros(SLOTS * (HELD + 1) + 2, dtype=torch.int64)
        flat: Numbers = self.tensor.numpy()
        self.held = flat[: SLOTS * HELD].reshape(SLOTS, HELD)  # in the order of their use
        self.silent = flat[SLOTS * HELD : -2]  # rounds since a slot's last contribution
        self._last = flat[-2:]
        self.carry = carry
        self.held[:] = np.arange(SLOTS * HELD).reshape(HELD, SLOTS).T
        self.silent[:] = NEVER
        self._last[:] = SLOTS * HELD, epoch

    @property
    def following(self) -> int:
        """The lowest portion that nobody was ever given."""
        return int(self._last[0])

    def count(self, slots: Iterable[int]) -> None:
        """A round's result: these slots contributed. (Nobody: nothing was learned.)"""
        counted = sorted(set(slots))
        if not counted:
            return
        self.silent[self.silent >= 0] += 1
        # Silent in the round before: what was waived has come with this contribution.
        late = {slot for slot in counted if self.carry and self.silent[slot] > 1}
        self.silent[counted] = 0  # before anything is given: not of theirs
        for slot in counted:
            done = HELD if slot in late else 1
            kept = list(self.held[slot, done:])
            self.held[slot] = kept + [self._give() for _ in range(done)]

    def is_silent(self, slot: int) -> bool:
        return bool(self.silent[slot] == NEVER or self.silent[slot] >= SILENT)

    def _give(self) -> int:
        """The next portion: one that a silent slot keeps from an epoch that would be over, or a new
        one."""
        new, epoch = int(self._last[0]), int(self._last[1])
        self._last[0] = new + 1
        if not epoch:
            return new
        left = self.held.min(axis=1) // epoch < new // epoch  # of an epoch that would be over
        fallen, unused = left & (self.silent >= SILENT), left & (self.silent == NEVER)
        if not fallen.any() and not unused.any():
            return new
        # Newcomers get the lowest slot that was never used: that is asked last.
        slot = int(fallen.argmax()) if fallen.any() else int(np.flatnonzero(unused)[-1])
        given = int(self.held[slot].min())
        rest = [int(one) for one in self.held[slot] if one != given]
        self.held[slot] = sorted([*rest, new])
        return given


class Portions:
    """One peer's way through the portions of its slot. It belongs to the trainer's thread."""

    def __init__(self, allotment: Allotment, samples: int) -> None:
        self._allotment, self.samples = allotment, samples  # of a portion
        self._queue: deque[int] = deque()
        self._had: deque[int] = deque(maxlen=REMEMBERED)
        self._at = 0  # samples of the first in the queue that were used
        self._slot = NEVER
        self.uncounted: list[list[int]] = []  # [first, end) of samples; the caller clears it

    def spent(self, slot: int) -> bool:
        """Ahead of all that is agreed: there is nothing to train on before a contribution counts,
        or its progress is forgotten."""
        self._look(slot)
        return not self._queue

    def begin_anew(self) -> None:
        """The progress that did not count is forgotten: its samples are to be used once more."""
        self._slot = NEVER
        self.uncounted = []

    def take(self, slot: int, count: int) -> Numbers:
        """(count,) numbers of the samples to train on now. Not when they are `spent`."""
        self._look(slot)
        parts, left = [], count
        while left:
            first = self._queue[0] * self.samples + self._at
            part = min(left, self.samples - self._at)
            if not self._allotment.carry and not self._at:
                self._forget(first, first + self.samples)
            parts.append(np.arange(first, first + part, dtype=np.int64))
            if self.uncounted and self.uncounted[-1][1] == first:
                self.uncounted[-1][1] = first + part
            else:
                self.uncounted.append([first, first + part])
            left, self._at = left - part, self._at + part
            if self._at == self.samples:
                self._at = 0
                self._queue.popleft()
        return np.concatenate(parts)

    def _forget(self, first: int, end: int) -> None:
        """These samples are begun: once more, if they are among the uncounted."""
        kept = [(a, min(b, first)) for a, b in self.uncounted]
        kept += [(max(a, end), b) for a, b in self.uncounted]
        self.uncounted = sorted([a, b] for a, b in kept if a < b)

    @property
    def untold(self) -> int:
        """Samples that are uncounted."""
        return sum(end - first for first, end in self.uncounted)

    def _look(self, slot: int) -> None:
        """What the slot holds by now."""
        held = [int(one) for one in self._allotment.held[slot]]
        if slot != self._slot:
            self._slot, self._at = slot, 0
            self._queue.clear()
            self._had.clear()
        if not self._allotment.carry:  # always the first: it is done when it has counted
            if list(self._queue)[:1] != held[:1]:
                self._at = 0
            self._queue = deque(held)
            return
        if self._allotment.is_silent(slot):  # others may have been given what we had not begun
            begun = list(self._queue)[: 1 if self._at else 0]
            ahead = [one for one in self._queue if one in held and one not in begun]
            self._queue = deque(begun + ahead)
        for one in held:
            if one not in self._had:
                self._had.append(one)
                self._queue.append(one)
