"""A part of the model as flat float32 memory: outer parameters, the update's buffers, a workspace.

One contiguous buffer each, so that a round is one tensor and a newcomer can fetch it as it lies.
The model's own parameters may have any floating dtype and device; they are read and written
through `drift` and `write`. Nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Fragment:
    """theta (outer parameters), buffers, and which parameters of the model they belong to."""

    def __init__(
        self, tag: int, parameters: dict[str, nn.Parameter], buffer_names: Sequence[str]
    ) -> None:
        self.tag = tag
        self.parameters = parameters
        self.spans: dict[str, slice] = {}
        end = 0
        for name, parameter in parameters.items():
            self.spans[name] = slice(end, end + parameter.numel())
            end += parameter.numel()
        self.elements = end
        self.theta = torch.empty(end, dtype=torch.float32)
        self.buffers = {name: torch.zeros(end, dtype=torch.float32) for name in buffer_names}
        self.started = torch.zeros(1, dtype=torch.int64)  # version after the broadcast; 0: not yet
        self.workspace = torch.empty(end, dtype=torch.float32)  # pseudo-gradient, then its mean
        self.tokens = 0.0  # weight of the local progress that no round has counted yet
        self.tokens_sent = 0.0  # the part of it that the round in flight carries
        self.read_local(self.theta)

    @property
    def state(self) -> dict[str, Tensor]:
        """What is shared: bit-equal on every peer that holds the same version."""
        return {"theta": self.theta, "started": self.started, **self.buffers}

    @torch.no_grad()
    def read_local(self, out: Tensor) -> Tensor:
        """out <- w, the model's own values."""
        for name, parameter in self.parameters.items():
            out[self.spans[name]].copy_(parameter.detach().reshape(-1))
        return out

    @torch.no_grad()
    def drift(self, out: Tensor) -> Tensor:
        """out <- theta - w: the pseudo-gradient, in float32."""
        torch.sub(self.theta, self.read_local(out), out=out)
        return out

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """The model's parameters take these values (rounded to their dtype)."""
        for name, parameter in self.parameters.items():
            parameter.copy_(values[self.spans[name]].view(parameter.shape))
