"""How new outer parameters enter the local ones, when our own progress is already counted in them.

(When it is not, because our contribution was waived or the round was lost to us, the optimizer
keeps half of the progress: `Fragment.close_in`.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from decotrain.outer.fragment import Fragment
from decotrain.outer.update import SPAN_ELEMENTS, Update


class Merge(Protocol):
    """The fourth of the four choices."""

    def enter(
        self, fragment: Fragment, update: Update, sent: Tensor | None, share: float, peers: int
    ) -> None:
        """Writes the fragment's local parameters, and its `base`: what the next pseudo-gradient
        is measured from.

        sent: the pseudo-gradient that was sent this very moment, when results come one round late
        (None: nothing is on its way). share: our part of its mean. peers: contributors of the
        round that has come in.
        """
        ...

    def forget(self, fragment: Fragment) -> None:
        """The outer parameters moved without us: what is private and rests on the old ones goes."""
        ...

    def private(self, fragment: Fragment) -> dict[str, Tensor]:
        """What only this peer has, by name: saved with its own checkpoint."""
        ...


class _Shared:
    """A merge that keeps nothing to itself."""

    def forget(self, fragment: Fragment) -> None:
        pass

    def private(self, fragment: Fragment) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True)
class Replace(_Shared):
    """w <- theta."""

    def enter(
        self, fragment: Fragment, update: Update, sent: Tensor | None, share: float, peers: int
    ) -> None:
        fragment.adopt()


@dataclass(frozen=True)
class Mix(_Shared):
    """w <- alpha w + (1 - alpha) theta; alpha = 0 is `Replace`, 1 ignores the others."""

    alpha: float = 0.5

    def enter(
        self, fragment: Fragment, update: Update, sent: Tensor | None, share: float, peers: int
    ) -> None:
        fragment.approach(self.alpha)


class Eager:
    """Results one round late, our own part of them at once (arXiv 2502.12996).

    The published rule moves each peer's own theta_i by mean(t-1) + (delta_i(t) - delta_i(t-1)) / M.
    The update being linear, that is theta, which all peers share to the bit and which moves by the
    means alone, plus a private offset that moves by the correction. The offset's terms telescope,
    so it stays as small as one pseudo-gradient.
    """

    def __init__(self) -> None:
        self._private: dict[int, dict[str, Tensor]] = {}

    def private(self, fragment: Fragment) -> dict[str, Tensor]:
        """offset and its buffers; own: our part of the mean that is on its way."""
        if fragment.tag not in self._private:
            names = ("own", "offset", *fragment.buffers)
            self._private[fragment.tag] = {n: torch.zeros_like(fragment.theta) for n in names}
        return self._private[fragment.tag]

    def enter(
        self, fragment: Fragment, update: Update, sent: Tensor | None, share: float, peers: int
    ) -> None:
        whole, parts = self.private(fragment), [slice(None)]
        if update.elementwise and not fragment.theta.is_cuda:  # where temporaries cost most
            starts = range(0, fragment.elements, SPAN_ELEMENTS)
            parts = [slice(at, at + SPAN_ELEMENTS) for at in starts]
        for span in parts:
            held = {name: tensor[span] for name, tensor in whole.items()}
            correction = held["own"].neg()
            if sent is None:
                held["own"].zero_()
            else:
                correction.add_(torch.mul(sent[span], share, out=held["own"]))
            update.apply(held["offset"], correction, held, peers)
            torch.add(fragment.theta[span], held["offset"], out=fragment.base[span])
        fragment.write(fragment.base)

    def forget(self, fragment: Fragment) -> None:
        for tensor in self.private(fragment).values():
            tensor.zero_()
