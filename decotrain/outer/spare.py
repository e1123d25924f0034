"""Memory that rounds need while they are under way, kept from one to the next.

Fresh memory costs the trainer more than what it writes there: each page faults once, and at this
size the allocator gives it back to the system in between. On a device torch's allocator keeps it,
and others there need it between rounds, so nothing is kept of that.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Spare:
    """All buffers are as large as the largest fragment, so that any fragment can have any of them:
    there are as many as were in use at once. For the trainer's thread alone."""

    def __init__(self, elements: int) -> None:
        self._elements = elements
        self._free: dict[torch.dtype, list[Tensor]] = {}

    def take(self, like: Tensor) -> Tensor:
        """A flat tensor of that length, dtype and device, with anything in it."""
        if like.device.type != "cpu":
            return torch.empty_like(like)
        free = self._free.get(like.dtype)
        whole = free.pop() if free else torch.empty(self._elements, dtype=like.dtype)
        return whole[: like.numel()]

    def give(self, *lent: Tensor | None) -> None:
        """What nobody uses any more. What is not given back is freed by whoever drops it."""
        for one in lent:
            if one is None or one.device.type != "cpu":
                continue
            storage = one.untyped_storage()
            if storage.nbytes() == self._elements * one.element_size():
                whole = torch.empty(0, dtype=one.dtype).set_(storage)
                self._free.setdefault(one.dtype, []).append(whole)
