"""A part of the model as flat float32 memory: outer parameters, the update's buffers, their base.

One contiguous buffer each, so that a round is one tensor and a newcomer can fetch it as it lies.
The model's own parameters may have any floating dtype and device; they are read and written
here, span by span. Nothing here communicates.

What is shared lies in host memory, where it is served from. With a `device` there is a copy of it
to work on, there: `push` and `pull` keep the two equal. Without one, the two are the same memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from decotrain.errors import ConfigError
from decotrain.outer.allotment import Allotment
from decotrain.outer.update import SPAN_ELEMENTS

KEPT_SHARE = 0.5  # of progress and tokens that a round did not count: see close_in


class Fragment:
    """theta (outer parameters), buffers, and which parameters of the model they belong to."""

    def __init__(
        self,
        tag: int,
        parameters: dict[str, nn.Parameter],
        buffer_names: Sequence[str],
        scalar_names: Sequence[str],
        device: torch.device | str | None = None,  # to work on; None: in host memory, no copy
    ) -> None:
        kept = [*buffer_names, *scalar_names]
        for name in kept:  # the allotment is the first by name, see `state`
            if name <= "allotted" or name in ("theta", "started") or kept.count(name) > 1:
                raise ConfigError(
                    f"the update keeps {name!r}: names of its buffers and scalars differ, come"
                    " after 'allotted' in the alphabet, and are not theta or started"
                )
        self.tag = tag
        self.parameters = parameters
        self.spans: dict[str, slice] = {}
        end = 0
        for name, parameter in parameters.items():
            self.spans[name] = slice(end, end + parameter.numel())
            end += parameter.numel()
        self.elements = end
        # shared: bit-equal on every peer that holds the same version
        names = ("theta", *buffer_names)
        self.served = {name: torch.zeros(end, dtype=torch.float32) for name in names}
        worked = self.served
        if device is not None:
            worked = {name: tensor.to(device, copy=True) for name, tensor in self.served.items()}
        self.theta = worked["theta"]
        self.buffers = {name: worked[name] for name in buffer_names}
        self.scalars = {name: torch.zeros(1, dtype=torch.float64) for name in scalar_names}
        self.allotment: Allotment | None = None  # of samples; the first fragment has it
        self.started = torch.zeros(1, dtype=torch.int64)  # version after the broadcast; 0: not yet
        # ours
        self.base = torch.empty_like(self.theta)  # what pseudo-gradients are measured from
        self.tokens = 0.0  # weight of the local progress that no round has carried yet
        self.version = 0  # rounds whose result has entered the local parameters
        self.digest = b""  # of the shared state at that version
        self.read_local(self.theta)
        self.base.copy_(self.theta)
        self.push()

    @property
    def layout(self) -> str:
        """The shapes that theta stands for: a model of as many values is another one."""
        return " ".join(str(list(parameter.shape)) for parameter in self.parameters.values())

    @property
    def state(self) -> dict[str, Tensor]:
        """What is shared, where it is served from. The allotment is the first by name: so it is in
        one piece of a fetch (docs/state.md), and a round that ends meanwhile moves it whole."""
        state = {**self.served, "started": self.started, **self.scalars}
        return state if self.allotment is None else state | {"allotted": self.allotment.tensor}

    def push(self) -> None:
        """The outer step was made on the device: served is what it gave."""
        for name, tensor in self._worked():
            self.served[name].copy_(tensor)

    def pull(self) -> None:
        """The shared state was fetched or loaded: the device follows."""
        for name, tensor in self._worked():
            tensor.copy_(self.served[name])

    def _worked(self) -> Iterator[tuple[str, Tensor]]:
        """What has a copy on a device."""
        for name, tensor in {"theta": self.theta, **self.buffers}.items():
            if tensor is not self.served[name]:
                yield name, tensor

    def state_digest(self) -> bytes:
        """SHA-256 of what is shared, without the version."""
        total = hashlib.sha256()
        for tensor in self.state.values():
            total.update(tensor.numpy().data.cast("B"))  # the GIL is free meanwhile
        return total.digest()

    def pairs(self, flat: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter of the model with its part of a flat tensor, in its shape."""
        for name, parameter in self.parameters.items():
            yield parameter, flat[self.spans[name]].view(parameter.shape)

    def pieces(self, *flats: Tensor) -> Iterator[tuple[Any, ...]]:
        """The same of the model's values and parts of flat tensors, little enough to stay in the
        cache while it is worked on. What is no plain memory of the host comes by parameters."""
        for name, parameter in self.parameters.items():
            start, end = self.spans[name].start, self.spans[name].stop
            if not _plain(parameter, *flats):
                yield parameter, *(flat[start:end].view(parameter.shape) for flat in flats)
                continue
            local = parameter.detach().view(-1)
            for at in range(start, end, SPAN_ELEMENTS):
                to = min(at + SPAN_ELEMENTS, end)
                yield local[at - start : to - start], *(flat[at:to] for flat in flats)

    @torch.no_grad()
    def read_local(self, out: Tensor) -> Tensor:
        """out <- w, the model's own values."""
        for parameter, part in self.pairs(out):
            part.copy_(parameter.detach())
        return out

    @torch.no_grad()
    def drift(self, out: Tensor) -> Tensor:
        """out <- base - w: the pseudo-gradient, in float32."""
        for parameter, part, base in self.pieces(out, self.base):
            local = parameter.detach()
            if local.dtype != part.dtype or local.device != part.device:
                local = part.copy_(local)
            torch.sub(base, local, out=part)
        return out

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """The model's parameters take these values (rounded to their dtype)."""
        for parameter, part in self.pairs(values):
            parameter.copy_(part)

    @torch.no_grad()
    def move(self, by: Tensor, sign: float = 1.0) -> None:
        """w <- w + sign * by, in float32."""
        for parameter, part in self.pieces(by):
            parameter.copy_(parameter.detach().float() + part.to(parameter.device) * sign)

    @torch.no_grad()
    def adopt(self) -> None:
        """The local parameters are the outer ones."""
        for parameter, outer, base in self.pieces(self.theta, self.base):
            base.copy_(outer)
            parameter.copy_(outer)

    @torch.no_grad()
    def approach(self, share: float) -> None:
        """w <- share w + (1 - share) theta, in float32, measured from theta henceforth."""
        scratch = torch.empty(SPAN_ELEMENTS)  # each temporary would be mapped anew
        for parameter, outer, base in self.pieces(self.theta, self.base):
            base.copy_(outer)
            if _plain(parameter, outer) and parameter.dtype == outer.dtype:
                theirs = torch.mul(outer, 1.0 - share, out=scratch[: outer.numel()])
                parameter.mul_(share).add_(theirs)
            else:
                local = parameter.detach().float() * share
                parameter.copy_(local.add_(outer.to(parameter.device) * (1.0 - share)))

    @torch.no_grad()
    def follow(self) -> None:
        """The local parameters move as far as the outer ones did, which hold all but what we have
        done since: that stays ours."""
        for parameter, outer, base in self.pieces(self.theta, self.base):
            drift = torch.sub(base, parameter.detach().to(base.device, base.dtype))
            base.copy_(outer)
            parameter.copy_(torch.sub(outer, drift, out=drift))

    @torch.no_grad()
    def close_in(self, rounds: int) -> None:
        """The outer parameters moved without us: for each round we go half of the way to them, and
        half of our tokens stay.

        Our progress is not put on top of theirs: most of it is the same, and twice it goes too far
        (docs/outer.md has figures). Who was away for long comes back to theta, and does not pull
        the others to where it left them.
        """
        share = KEPT_SHARE ** max(rounds, 1)
        self.tokens *= share
        self.approach(share)


def _plain(*tensors: Any) -> bool:
    """Contiguous and in memory of the host; no subclass, and no stand-in (see group.py)."""
    return all(
        type(one) in (Tensor, nn.Parameter) and one.device.type == "cpu" and one.is_contiguous()
        for one in tensors
    )
