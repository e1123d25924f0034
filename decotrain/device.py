"""Rounds on tensors of a GPU: encoded and decoded where they lie; only encoded bytes cross.

A contribution is encoded whole and looked at for NaN, then the round begins and its chunks cross to
pinned memory, step by step: each goes on the wire while the next still crosses. Error feedback is
kept on the GPU too, when the round has been taken. Bits are those of the CPU's path.

A *device* does the work that needs one (`decotrain/cuda.py`; tests have a stand-in on the CPU).
Nothing here knows links or views.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from decotrain import _core
from decotrain.errors import AbandonedError, RoundError

STEP_BYTES = 4 << 20  # that cross before their chunks are said to be there
CODES = {torch.bfloat16: "bf16", torch.float16: "f16"}  # element types that are codecs as well


class Device(Protocol):
    """What a GPU does for a round. Tensors are its own unless said otherwise."""

    def encode(self, codec: str, values: Tensor, chunk_elements: int) -> tuple[Tensor, Tensor]:
        """(bytes of all chunks, flag: not 0 when a value is NaN or infinite)."""
        ...

    def decode(self, codec: str, data: Tensor, chunk_elements: int, out: Tensor) -> Tensor:
        """Into `out`; flag: not 0 when the bytes are no valid encoding."""
        ...

    def host_bytes(self, size: int) -> Tensor:
        """Memory of the host (uint8) to and from which copies overlap with other work."""
        ...

    def to_host(self, data: Tensor, host: Tensor, ends: Sequence[int]) -> Iterator[None]:
        """Copies; yields for each of `ends` (bytes, ascending), when all before it is there."""
        ...

    def from_host(self, host: Tensor, like: Tensor) -> Tensor:
        """A copy of `host` beside `like`."""
        ...


def encoded_bytes(codec: str, elements: int, chunk_elements: int) -> int:
    """Bytes of all chunks of a buffer, one after the other."""
    whole, rest = divmod(elements, chunk_elements)
    size = whole * _core.codec_bytes(codec, chunk_elements)
    return size + (_core.codec_bytes(codec, rest) if rest else 0)


def in_one(tensors: Sequence[Tensor]) -> Tensor:
    """All values as flat float32: one contiguous float32 tensor as it is, else a copy."""
    parts = [one.detach().reshape(-1).float() for one in tensors]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def in_pieces(values: Tensor, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """(tensor, its part of the flat values)."""
    parts = torch.split(values, [one.numel() for one in tensors])
    yield from zip((one.detach() for one in tensors), parts, strict=True)


@torch.no_grad()
def begin(
    node: Any,
    device: Device,
    given: Sequence[Tensor],
    weight: float,
    residual: Sequence[Tensor] | None,
    options: dict[str, Any],
) -> Any:
    """Begins a round of the core; all of the contribution has crossed when it returns.

    ValueError names a tensor that is not finite. Whatever is raised has changed no residual.
    """
    elements = sum(one.numel() for one in given)
    chunk = options["chunk_elements"] or _core.round_chunk_elements(elements)
    options = options | {"chunk_elements": chunk}
    values, codec = in_one(given), options["codec"]
    if residual is not None:
        values = values + in_one(residual)
    encoded, poison = device.encode(codec, values, chunk)
    if int(poison):
        pieces = enumerate(in_pieces(values, given))
        which = next((n for n, (_, part) in pieces if not part.isfinite().all()), 0)
        raise ValueError(f"buffer {which} contains NaN or infinity")
    host = device.host_bytes(encoded.numel())
    work = node.begin_encoded(host.numpy(), elements, weight=weight, **options)
    try:
        _cross(node, work, device, encoded, host, _core.codec_bytes(codec, chunk))
    except BaseException as error:
        node.abandon(work)
        if isinstance(error, RuntimeError):  # of the device
            raise AbandonedError(
                f"round of tag {options['tag']}: the device failed, the others go on without what"
                f" had not crossed: {error}",
                work,
            ) from error
        raise
    if residual is not None:
        lost = torch.empty_like(values)
        device.decode(codec, encoded, chunk, lost)
        torch.sub(values, lost, out=lost)
        for tensor, part in in_pieces(lost, residual):
            tensor.copy_(part.view(tensor.shape))
    return work


def _cross(
    node: Any, work: Any, device: Device, encoded: Tensor, host: Tensor, chunk_bytes: int
) -> None:
    step = max(STEP_BYTES // chunk_bytes, 1)  # chunks
    size, chunks = encoded.numel(), -(-encoded.numel() // chunk_bytes)
    marks = [*range(step, chunks, step), chunks]
    ends = [min(mark * chunk_bytes, size) for mark in marks]
    for mark, _ in zip(marks, device.to_host(encoded, host, ends), strict=True):
        node.chunks_ready(work, mark)


@torch.no_grad()
def decode(held: Any, device: Device, places: Sequence[Tensor]) -> None:
    """A result of the core into tensors of the device."""
    first, chunk = places[0], held.chunk_elements
    host = device.host_bytes(encoded_bytes(held.codec, held.elements, chunk))
    held.encoded_into(host.numpy())
    direct = len(places) == 1 and first.dtype == torch.float32 and first.is_contiguous()
    values = (
        first.detach().view(-1)
        if direct
        else torch.empty(held.elements, dtype=torch.float32, device=first.device)
    )
    if int(device.decode(held.codec, device.from_host(host, first), chunk, values)):
        raise RoundError("a result is no valid encoding: this is a bug, or memory is broken")
    if direct:
        return
    for tensor, part in in_pieces(values, places):
        if tensor.dtype in CODES and part.numel():  # rounded as the CPU's path rounds
            part = device.encode(CODES[tensor.dtype], part, part.numel())[0].view(tensor.dtype)
        tensor.copy_(part.view(tensor.shape))
