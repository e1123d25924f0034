"""A caller's tensors as a contribution to a round: encoded by the core, or where they lie.

What is refused (NaN, no memory) has changed nothing of the caller's. Nothing here waits.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from decotrain import _core, codecs
from decotrain import tensors as tn
from decotrain.errors import ConfigError, NotFiniteError, OutOfMemoryError, RoundError

_DRAWN = itertools.count()


def draw_chance(peer: int) -> int:
    """A key for stochastic rounding that no other contribution has, of this peer or of another."""
    text = f"{peer} {next(_DRAWN)}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def flat(owner_residual: Any) -> Any:
    """Its values where they lie, for the core."""
    return tn.writable(owner_residual, "owner_residual")[0].reshape(-1)


@dataclass(frozen=True)
class Given:
    """What one peer brings to one round."""

    tensors: list[Any]
    options: dict[str, Any]  # of Node.begin, the same for all peers but for the tag's state digest
    weight: float = 1.0
    borrow: bool = False
    residual: list[Any] | None = None  # of error feedback, updated when the round has begun
    chance: int | None = None  # key of stochastic rounding; None: to the nearest
    owner_residual: Any = None  # of the results that we own: flat float32, only read here

    def check(self) -> None:
        """Raises RoundError for tensors that no round takes, ConfigError for a codec."""
        if self.chance is not None:
            codecs.check_stochastic(self.options["codec"], self.residual is not None)
            if tn.device_of(self.tensors) is not None:
                raise ConfigError("stochastic=True: tensors of a GPU are rounded to the nearest")
        for n, tensor in enumerate(self.tensors):
            tn.check_type(tensor, f"tensor {n}")
        for n, tensor in enumerate(self.residual or []):
            tn.check_writable(tensor, f"tensor {n} of residual")
        if self.owner_residual is not None:
            codecs.check_owner_feedback(self.options["result_codec"])
            self._check_owner_residual()

    def _check_owner_residual(self) -> None:
        kept, elements = self.owner_residual, sum(map(tn.elements, self.tensors))
        tn.check_writable(kept, "owner_residual")
        in_place = tn.writable(kept, "owner_residual")[1] is None
        if not in_place or "float32" not in str(kept.dtype) or tn.elements(kept) != elements:
            raise RoundError(
                f"owner_residual is {tn.elements(kept)} values of {kept.dtype}; it must be one"
                f" contiguous float32 tensor of the host with the round's {elements} values"
            )

    def _options(self) -> dict[str, Any]:
        if self.owner_residual is None:
            return self.options
        return self.options | {"owner_residual": flat(self.owner_residual)}

    def begin(self, node: Any) -> Any:
        """Begins the round. Raises NotFiniteError, OutOfMemoryError; then `skip` it."""
        tag = self.options["tag"]
        if self.weight == 0:
            return self.skip(node, self._options())
        try:
            return self._begin(node)
        except MemoryError:
            raise OutOfMemoryError(
                f"round of tag {tag}: no memory for the snapshot of its"
                f" {sum(map(tn.elements, self.tensors))} values; our contribution is skipped, the"
                " others go on without it. Use fewer values in a round, or borrow=True"
            ) from None
        except ValueError as error:
            if "contains NaN" not in str(error):
                raise
            raise NotFiniteError(
                f"round of tag {tag}: {str(error).replace('buffer', 'tensor')}; our"
                " contribution is skipped, the others go on without it"
            ) from None

    def skip(self, node: Any, options: dict[str, Any] | None = None) -> Any:
        """The same round with weight 0: we only receive. Looks at no value."""
        options = options or self.options
        elements = sum(map(tn.elements, self.tensors))
        chunk = options["chunk_elements"] or _core.round_chunk_elements(elements)
        options = options | {"chunk_elements": chunk}
        return node.begin_encoded(np.empty(0, np.uint8), elements, weight=0.0, **options)

    def _begin(self, node: Any) -> Any:
        device = tn.device_of([*self.tensors, *(self.residual or [])])
        if device is not None:
            from decotrain import device as on_device

            return on_device.begin(
                node, device, self.tensors, self.weight, self.residual, self._options()
            )
        buffers = [tn.readable(tensor, f"tensor {n}") for n, tensor in enumerate(self.tensors)]
        if self.residual is None:
            return node.begin(
                buffers,
                weight=self.weight,
                borrow=self.borrow,
                chance=self.chance,
                **self._options(),
            )
        kept = [tn.writable(one, f"tensor {n} of residual") for n, one in enumerate(self.residual)]
        work = node.begin(
            buffers,
            weight=self.weight,
            residual=[buffer for buffer, _ in kept],
            **self._options(),
        )
        for _, bring in kept:
            if bring is not None:
                bring()
        return work
