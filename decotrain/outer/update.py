"""How the averaged pseudo-gradient moves the outer parameters.

Pure and elementwise on flat float32 tensors, with correctly rounded operations only (add, subtract,
multiply, divide, square root; alpha = 1 in every addition, since torch fuses `a + alpha b` where a
CPU can): every peer that applies the same round to the same state gets the same bits, on any
machine. The one reduction, a norm, is made of elementwise additions in a fixed order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

SPAN_ELEMENTS = 1 << 18  # worked on at once: the temporaries stay in the cache
RATES = (0.5, 0.6, 0.6, 0.6, 0.65, 0.7, 0.75, 0.8)  # by contributors (arXiv 2503.09799)


class Update(Protocol):
    """The third of the four choices."""

    buffers: ClassVar[tuple[str, ...]]  # flat float32 state it keeps beside theta, zero at first
    scalars: ClassVar[tuple[str, ...]]  # single float64 values, zero at first
    elementwise: ClassVar[bool]  # an element's move depends on no other element of the state
    linear: ClassVar[bool]  # a sum of pseudo-gradients moves theta by the sum of the moves

    def apply(
        self, theta: Tensor, delta: Tensor, state: dict[str, Tensor], contributors: int
    ) -> None:
        """Moves theta (and the state) in place. delta: averaged theta - w, it points uphill."""
        ...


def rate(lr: float | None, contributors: int) -> float:
    """The learning rate; None: by how many peers are in the mean, which all peers know alike."""
    return RATES[min(max(contributors, 1), len(RATES)) - 1] if lr is None else lr


@dataclass(frozen=True)
class SGD:
    """theta <- theta - lr delta. With lr = 1 this is plain averaging (local SGD)."""

    lr: float | None = 1.0
    buffers: ClassVar[tuple[str, ...]] = ()
    scalars: ClassVar[tuple[str, ...]] = ()
    elementwise: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    def apply(
        self, theta: Tensor, delta: Tensor, state: dict[str, Tensor], contributors: int
    ) -> None:
        lr = rate(self.lr, contributors)
        for span in _spans(theta.numel()):
            theta[span].sub_(delta[span] * lr)


@dataclass(frozen=True)
class Nesterov:
    """m <- mu m + delta; theta <- theta - lr (delta + mu m): PyTorch's SGD(nesterov=True)."""

    lr: float | None = None
    momentum: float = 0.9
    buffers: ClassVar[tuple[str, ...]] = ("momentum",)
    scalars: ClassVar[tuple[str, ...]] = ()
    elementwise: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    def apply(
        self, theta: Tensor, delta: Tensor, state: dict[str, Tensor], contributors: int
    ) -> None:
        m, lr = state["momentum"], rate(self.lr, contributors)
        for span in _spans(theta.numel()):
            m[span].mul_(self.momentum).add_(delta[span])
            move = (m[span] * self.momentum).add_(delta[span]).mul_(lr)
            theta[span].sub_(move)


@dataclass(frozen=True)
class ClippedMomentum:
    """Momentum for results that come one round late (CO2, arXiv 2401.16265).

        gap <- 1 + |last move of theta| / |delta|
        m <- clip(beta m + delta / gap, -clip, clip);  theta <- theta - lr m

    delta was measured from the theta of one round before: the further theta has moved since, the
    less it counts. Both the penalty and the clip are applied (the published code does neither). The
    reference length is the mean pseudo-gradient's own, which all peers have alike; `clip` is in
    units of parameters.
    """

    lr: float | None = 1.0
    momentum: float = 0.0
    clip: float = 1.0
    penalty: bool = True
    buffers: ClassVar[tuple[str, ...]] = ("momentum",)
    scalars: ClassVar[tuple[str, ...]] = ("last_move",)
    elementwise: ClassVar[bool] = False  # the length of the last move
    linear: ClassVar[bool] = False

    def apply(
        self, theta: Tensor, delta: Tensor, state: dict[str, Tensor], contributors: int
    ) -> None:
        m, lr = state["momentum"], rate(self.lr, contributors)
        last, length = (
            float(state["last_move"]),
            math.sqrt(square_sum(delta)) if self.penalty else 0.0,
        )
        weight = length / (length + last) if length + last > 0 else 1.0  # 1 / gap
        square = 0.0
        for span in _spans(theta.numel()):
            m[span].mul_(self.momentum).add_(delta[span] * weight).clamp_(-self.clip, self.clip)
            move = m[span] * lr
            theta[span].sub_(move)
            if self.penalty:
                square += square_sum(move)
        state["last_move"].fill_(math.sqrt(square))


@dataclass(frozen=True)
class DelayedNesterov:
    """Nesterov for contributions that arrive one by one (Async Local-SGD, arXiv 2401.09135).

    Each arrival g moves theta by lr g / delay; after `delay` of them the momentum takes their
    mean, and moves theta: m <- mu m + mean; theta <- theta - lr mu m. A round with k contributors
    is k arrivals. With `delay` contributors in every round it is `Nesterov`.
    """

    lr: float | None = None
    momentum: float = 0.9
    delay: int = 4  # arrivals; the number of peers
    buffers: ClassVar[tuple[str, ...]] = ("momentum", "arrived")
    scalars: ClassVar[tuple[str, ...]] = ("arrivals",)
    elementwise: ClassVar[bool] = True
    linear: ClassVar[bool] = False

    def apply(
        self, theta: Tensor, delta: Tensor, state: dict[str, Tensor], contributors: int
    ) -> None:
        m, total = state["momentum"], state["arrived"]
        lr = rate(self.lr, self.delay)
        arrivals = float(state["arrivals"]) + contributors
        due = arrivals >= self.delay
        for span in _spans(theta.numel()):
            total[span].add_(delta[span] * float(contributors))
            theta[span].sub_(delta[span] * (lr * contributors / self.delay))
            if due:
                m[span].mul_(self.momentum).add_(total[span] * (1.0 / arrivals))
                theta[span].sub_(m[span] * (lr * self.momentum))
                total[span].zero_()
        state["arrivals"].fill_(0.0 if due else arrivals)


@dataclass(frozen=True)
class AdamW:
    """Adam on the pseudo-gradient. Published as unstable unless eps is as large as 0.1."""

    lr: float | None = 0.3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 0.1
    weight_decay: float = 0.0
    buffers: ClassVar[tuple[str, ...]] = ("mean", "square")
    scalars: ClassVar[tuple[str, ...]] = ("left_1", "left_2")  # 1 - beta^t
    elementwise: ClassVar[bool] = True
    linear: ClassVar[bool] = False

    def apply(
        self, theta: Tensor, delta: Tensor, state: dict[str, Tensor], contributors: int
    ) -> None:
        lr = rate(self.lr, contributors)
        corrections = []
        for name, beta in zip(self.scalars, self.betas, strict=True):
            left = 1.0 - (1.0 - float(state[name])) * beta
            state[name].fill_(left)
            corrections.append(left)
        first, second = self.betas
        for span in _spans(theta.numel()):
            g, mean, square = delta[span], state["mean"][span], state["square"][span]
            mean.mul_(first).add_(g * (1.0 - first))
            square.mul_(second).add_((g * g).mul_(1.0 - second))
            bottom = (square * (1.0 / corrections[1])).sqrt_().add_(self.eps)
            move = (mean * (lr / corrections[0])).div_(bottom)
            theta[span].mul_(1.0 - lr * self.weight_decay).sub_(move)


def square_sum(values: Tensor) -> float:
    """The sum of squares, with the same bits everywhere: by halves, in float64."""
    total = 0.0
    for span in _spans(values.numel()):
        squares = values[span].double()
        squares.mul_(squares)
        while (n := squares.numel()) > 1:
            half = n // 2
            folded = squares[:half] + squares[half : 2 * half]
            squares = folded if n % 2 == 0 else torch.cat([folded, squares[-1:]])
        total += float(squares)
    return total


def _spans(elements: int) -> list[slice]:
    return [slice(at, at + SPAN_ELEMENTS) for at in range(0, elements, SPAN_ELEMENTS)]
