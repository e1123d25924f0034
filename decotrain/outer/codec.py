"""How pseudo-gradients travel: which codec each way, and who keeps what was lost.

The codecs themselves are in the core, error feedback too (`e <- x + e - decode(encode(x + e))`,
fused with encoding). A residual is private: it never travels, and a view change does not touch it.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decotrain import _core, codecs, tensors
from decotrain.communicator import Communicator
from decotrain.errors import ConfigError, NotFiniteError
from decotrain.rounds import Result, Work

CHUNK = 4096  # values of which top-k keeps some
HEAD = struct.Struct("<d")  # weight, before a sparse contribution
RESIDUALS = {"f32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Contribution:
    """What a peer brings to a round."""

    values: Tensor  # flat float32; may be written to when the round has begun
    weight: float
    out: Tensor  # where a mean may be put; may be `values`
    residual: Tensor | None = None  # of error feedback
    state_digest: int = 0  # of the state that the values were computed from
    owner_residual: Tensor | None = None  # of the results that we own
    before: Tensor | None = None  # a copy of `residual`, when the caller keeps one


class Codec(Protocol):
    """The second of the four choices."""

    def new_residual(self, like: Tensor) -> Tensor | None:
        """What the codec has lost so far of values like these, to be added to the next: zeros. None
        without error feedback."""
        ...

    def new_owner_residual(self, like: Tensor) -> Tensor | None:
        """What results that this peer owned have lost so far: zeros. None: it keeps none of it."""
        ...

    def begin(self, comm: Communicator, tag: int, given: Contribution) -> Work:
        """Begins the tag's next round."""
        ...

    def sound(self, result: Result, elements: int) -> Result:
        """The round without contributions that are none: the same ones for every peer."""
        ...

    def mean(self, result: Result, elements: int) -> Tensor | None:
        """The weighted mean of a sound round: the same bits on every peer. None: there is none."""
        ...


@dataclass(frozen=True)
class CodecChoice:
    """A codec of the core for contributions, and one for results; all-reduced."""

    contribution: str = "f32"
    result: str = "f32"
    error_feedback: bool = False
    decay: float = 1.0  # of the residual, before each round
    residual: str = "f32"  # or "bf16": half the memory, and one part in 256 of it lost each round
    stochastic: bool = False  # contributions are rounded by chance, so that means are kept
    owner_feedback: bool = False  # what results lose comes with later ones

    def __post_init__(self) -> None:
        if self.stochastic:
            codecs.check_stochastic(self.contribution, self.error_feedback)
        if self.owner_feedback:
            codecs.check_owner_feedback(self.result)
        if self.residual not in RESIDUALS:
            raise ConfigError(f"residual={self.residual}: it is kept in {' or '.join(RESIDUALS)}")

    @staticmethod
    def named(
        name: str,
        error_feedback: bool = False,
        decay: float = 1.0,
        residual: str = "f32",
        stochastic: bool = False,
        owner_feedback: bool = False,
    ) -> CodecChoice:
        """From "int8" (both ways) or "e2m1+int8" (contributions + results)."""
        both = codecs.pair(name)
        return CodecChoice(*both, error_feedback, decay, residual, stochastic, owner_feedback)

    def new_residual(self, like: Tensor) -> Tensor | None:
        if not self.error_feedback:
            return None
        # Beside the values where those are encoded, else in memory of the host.
        device = like.device if tensors.device_of([like]) is not None else "cpu"
        return torch.zeros(like.numel(), dtype=RESIDUALS[self.residual], device=device)

    def new_owner_residual(self, like: Tensor) -> Tensor | None:
        return torch.zeros(like.numel()) if self.owner_feedback else None

    def begin(self, comm: Communicator, tag: int, given: Contribution) -> Work:
        before = given.residual
        if before is None or self.decay == 1.0 or given.weight == 0:
            return self._begin(comm, tag, given)
        kept, begun = before.clone() if given.before is None else given.before, False
        before.mul_(self.decay)
        try:
            work = self._begin(comm, tag, given)
            begun = work.begun
            return work
        finally:
            if not begun:  # what is refused, or comes too late for its round, has changed nothing
                before.copy_(kept)

    def _begin(self, comm: Communicator, tag: int, given: Contribution) -> Work:
        return comm.all_reduce(
            given.values,
            tag=tag,
            codec=self.contribution,
            result_codec=self.result,
            weight=given.weight,
            out=given.out,
            residual=given.residual,
            owner_residual=given.owner_residual,
            stochastic=self.stochastic,
            state_digest=given.state_digest,
        )

    def sound(self, result: Result, elements: int) -> Result:
        return result  # whoever combined them has looked

    def mean(self, result: Result, elements: int) -> Tensor | None:
        return torch.as_tensor(result.tensor).view(-1) if result.contributors else None


@dataclass(frozen=True)
class TopK:
    """The `keep` largest of every 4096 values, two bits each, collected from all (SparseLoCo).

    Every peer adds the contributions itself, in slot order. A contribution that is no valid
    encoding, or has no sensible weight, is left out by everybody alike, and its sender named.
    """

    keep: int = 64
    decay: float = 0.95

    def __post_init__(self) -> None:
        if not 1 <= self.keep <= CHUNK:
            raise ConfigError(f"keep={self.keep}: top-k keeps 1 to {CHUNK} of every {CHUNK} values")

    def new_residual(self, like: Tensor) -> Tensor:
        return torch.zeros(like.numel())

    def new_owner_residual(self, like: Tensor) -> None:
        return None  # nobody owns what is collected

    def begin(self, comm: Communicator, tag: int, given: Contribution) -> Work:
        residual, elements = given.residual, given.values.numel()
        bound = HEAD.size + _core.topk_bytes(elements, self.keep)
        assert residual is not None, "top-k without error feedback loses nearly everything"
        if not given.weight > 0:
            return comm.collect(None, tag=tag, max_bytes=bound)
        left = residual.mul(self.decay).add_(given.values.cpu())
        data = self._take_largest(left, given.weight)
        work = comm.collect(data, tag=tag, max_bytes=bound)
        if not work.begun:  # nor when this raises does the residual change
            return work
        if data is None:
            work.forgo()
            raise NotFiniteError(
                f"round of tag {tag}: a parameter contains NaN or infinity; our contribution is"
                " skipped, the others go on without it"
            )
        residual.copy_(left)
        return work

    def _take_largest(self, values: Tensor, weight: float) -> bytes | None:
        """What is sent, taken out of the values. None, and nothing taken: one is not finite."""
        packed = np.empty(_core.topk_bytes(values.numel(), self.keep), dtype=np.uint8)
        if not _core.topk_encode(values.numpy(), self.keep, packed):
            return None
        _core.topk_add(packed, self.keep, -1.0, values.numpy())
        return HEAD.pack(weight) + packed.tobytes()

    def sound(self, result: Result, elements: int) -> Result:
        nothing = np.zeros(elements, dtype=np.float32)  # stays so: what is valid is added 0 times

        def valid(data: bytes) -> bool:
            if len(data) < HEAD.size:
                return False
            (weight,) = HEAD.unpack_from(data)
            return (
                math.isfinite(weight)
                and weight > 0
                and _core.topk_add(_packed(data), self.keep, 0.0, nothing)
            )

        return result.without([slot for slot, data in result.parts.items() if not valid(data)])

    def mean(self, result: Result, elements: int) -> Tensor | None:
        if not result.parts:  # the broadcast of the first parameters, or nobody contributed
            return torch.as_tensor(result.tensor).view(-1) if result.tensors else None
        given = [(*HEAD.unpack_from(data), data) for _, data in sorted(result.parts.items())]
        total, out = sum(weight for weight, _ in given), np.zeros(elements, dtype=np.float32)
        for weight, data in given:
            _core.topk_add(_packed(data), self.keep, weight / total, out)
        return torch.from_numpy(out)


def _packed(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, dtype=np.uint8, offset=HEAD.size)
