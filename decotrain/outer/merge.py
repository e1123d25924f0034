"""How new outer parameters enter the local ones, when our own progress is already counted in them.

(When it is not, because our contribution was waived or the round was lost to us, the optimizer
keeps the progress: the local parameters move along with the outer ones.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Merge(Protocol):
    """The fourth of the four choices."""

    def mix(self, local: Tensor, outer: Tensor) -> Tensor:
        """The new local values. Both are float32 and of one shape; neither may be changed."""
        ...


@dataclass(frozen=True)
class Replace:
    """w <- theta."""

    def mix(self, local: Tensor, outer: Tensor) -> Tensor:
        return outer


@dataclass(frozen=True)
class Mix:
    """w <- alpha w + (1 - alpha) theta; alpha = 0 is `Replace`, 1 ignores the others."""

    alpha: float = 0.5

    def mix(self, local: Tensor, outer: Tensor) -> Tensor:
        return local * self.alpha + outer * (1.0 - self.alpha)
