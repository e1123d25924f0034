"""A round between the moment its pseudo-gradient was taken and the one its result is used."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Landed:
    """What became of it; by then the result is in the outer parameters."""

    lost: bool = False
    contributors: tuple[int, ...] = ()
    version: int = 0  # of the fragment, with this round
    digest: bytes = b""

    def counted(self, peer: int) -> bool:
        """Our own progress is in the result."""
        return peer in self.contributors


@dataclass
class Flight:
    due: int  # global step after which the result enters the local parameters
    tokens: float  # its weight
    delta: Tensor  # what was sent; gone once it has landed, unless results come one round late
    residual: Tensor | None  # of error feedback, as it was before; written when it takes off
    done: Future[Landed]
    out: Tensor | None = None  # where the mean is put; may be `delta`

    @property
    def lent(self) -> tuple[Tensor | None, ...]:
        """Its memory, each piece once: free when its result is used."""
        return self.delta, self.residual, None if self.out is self.delta else self.out
