"""How the averaged pseudo-gradient moves the outer parameters.

Pure and elementwise on flat float32 tensors, with correctly rounded operations only (add, subtract,
multiply; alpha = 1 in every addition, since torch fuses `a + alpha b` where a CPU can): every peer
that applies the same round to the same state gets the same bits, on any machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

SPAN_ELEMENTS = 1 << 18  # worked on at once: the temporaries stay in the cache


class Update(Protocol):
    """The third of the four choices."""

    buffers: ClassVar[tuple[str, ...]]  # flat float32 state it keeps beside theta, zero at first

    def apply(self, theta: Tensor, delta: Tensor, buffers: dict[str, Tensor]) -> None:
        """Moves theta (and the buffers) in place. delta: averaged theta - w, it points uphill."""
        ...


@dataclass(frozen=True)
class SGD:
    """theta <- theta - lr delta. With lr = 1 this is plain averaging (local SGD)."""

    lr: float = 1.0
    buffers: ClassVar[tuple[str, ...]] = ()

    def apply(self, theta: Tensor, delta: Tensor, buffers: dict[str, Tensor]) -> None:
        for span in _spans(theta.numel()):
            theta[span].sub_(delta[span] * self.lr)


@dataclass(frozen=True)
class Nesterov:
    """m <- mu m + delta; theta <- theta - lr (delta + mu m): PyTorch's SGD(nesterov=True)."""

    lr: float = 0.7
    momentum: float = 0.9
    buffers: ClassVar[tuple[str, ...]] = ("momentum",)

    def apply(self, theta: Tensor, delta: Tensor, buffers: dict[str, Tensor]) -> None:
        m = buffers["momentum"]
        for span in _spans(theta.numel()):
            m[span].mul_(self.momentum).add_(delta[span])
            move = (m[span] * self.momentum).add_(delta[span]).mul_(self.lr)
            theta[span].sub_(move)


def _spans(elements: int) -> list[slice]:
    return [slice(at, at + SPAN_ELEMENTS) for at in range(0, elements, SPAN_ELEMENTS)]
