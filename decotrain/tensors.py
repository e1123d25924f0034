"""Tensors of torch and arrays of numpy as the core sees them: contiguous buffers in CPU memory.

Torch is imported only by who already has a tensor of torch. Nothing here knows rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from decotrain.errors import RoundError, StateError

WIRE_TYPES = ("float32", "bfloat16", "float16")


def listed(tensors: Any) -> list[Any]:
    """One tensor or a sequence of them, as a list."""
    if isinstance(tensors, Sequence) and not isinstance(tensors, (str, bytes)):
        return list(tensors)
    return [tensors]


def is_torch(tensor: Any) -> bool:
    return type(tensor).__module__.split(".")[0] == "torch" or hasattr(tensor, "requires_grad")


def dtype_name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def elements(tensor: Any) -> int:
    return int(tensor.numel() if is_torch(tensor) else tensor.size)


def device_of(tensors: Sequence[Any]) -> Any:
    """What encodes and decodes these tensors where they lie (decotrain/device.py); None: the core,
    on the CPU, where tensors that are elsewhere are copied to."""
    if not all(is_torch(one) and one.is_cuda for one in tensors):
        return None
    if len({one.device for one in tensors}) != 1:
        return None
    from decotrain import cuda

    return cuda if cuda.missing() is None else None


def check_type(tensor: Any, place: str) -> None:
    name = dtype_name(tensor)
    if name not in (*WIRE_TYPES, "float64"):
        raise RoundError(f"{place} is {name}; rounds take float32, bfloat16, float16 and float64")


def check_writable(tensor: Any, place: str) -> None:
    check_type(tensor, place)
    if not is_torch(tensor) and not tensor.flags.writeable:
        raise RoundError(f"{place} is read-only: give a tensor that may be written to, or out=")


def readable(tensor: Any, place: str) -> Any:
    """A buffer with the tensor's values: itself where possible, else a contiguous copy."""
    check_type(tensor, place)
    name = dtype_name(tensor)
    if is_torch(tensor):
        import torch

        flat = tensor.detach().to("cpu")
        return (
            (flat.float() if name == "float64" else flat)
            .contiguous()
            .view(-1)
            .to(torch.float32 if name == "float64" else flat.dtype)
        )
    array = np.asarray(tensor, dtype=np.float32 if name == "float64" else None)
    return np.ascontiguousarray(array).reshape(-1)


def writable(tensor: Any, place: str) -> tuple[Any, Callable[[], None] | None]:
    """A buffer to write a result to, and what then brings it into the tensor (None: it is)."""
    readable_buffer = readable(tensor, place)
    if is_torch(tensor):
        direct = bool(readable_buffer.data_ptr() == tensor.data_ptr()) and tensor.numel() > 0
        if direct:
            return readable_buffer, None

        def bring() -> None:
            import torch

            with torch.no_grad():
                tensor.copy_(readable_buffer.view(tensor.shape))

        return readable_buffer, bring
    check_writable(tensor, place)
    if np.shares_memory(readable_buffer, tensor):
        return readable_buffer, None

    def bring_array() -> None:
        tensor[...] = readable_buffer.reshape(tensor.shape)

    return readable_buffer, bring_array


def raw_bytes(tensor: Any, place: str) -> Any:
    """The bits of a tensor of any type where they lie, to be served and fetched in place."""
    if is_torch(tensor):
        import torch

        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise StateError(f"{place} must be a contiguous tensor in CPU memory to be shared")
        return _words(tensor.detach().reshape(-1).view(torch.uint8).numpy(), tensor.itemsize)
    if not isinstance(tensor, np.ndarray) or not tensor.flags.c_contiguous:
        raise StateError(f"{place} must be a contiguous numpy array or torch tensor to be shared")
    if not tensor.flags.writeable:
        raise StateError(f"{place} is read-only: what is fetched is written to it")
    return _words(tensor.reshape(-1).view(np.uint8), tensor.itemsize)


def _words(raw: Any, itemsize: int) -> Any:
    """One unsigned integer for each element, so that the core sees how many there are."""
    return raw.view(f"u{itemsize}") if itemsize in (1, 2, 4, 8) else raw


def check_round(tag: int, weight: float, given: list[Any], places: list[Any]) -> None:
    if not 0 <= tag < 4096:
        raise RoundError(f"tag {tag} is not in 0..4095")
    if not (math.isfinite(weight) and weight >= 0):
        raise RoundError(f"weight {weight} is not a finite number of at least 0")
    for n, tensor in enumerate([*given, *places]):
        if not hasattr(tensor, "dtype"):
            kind = type(tensor).__name__
            raise RoundError(f"tensor {n} is a {kind}, not a torch tensor or numpy array")
    if not given or sum(map(elements, given)) == 0:
        raise RoundError("a round needs at least one value")
    if list(map(elements, given)) != list(map(elements, places)):
        raise RoundError("out has other sizes than the tensors of the round")


@dataclass(frozen=True)
class Pattern:
    """What a tensor looks like, without its memory."""

    shape: tuple[int, ...]
    elements: int
    dtype: Any
    device: Any  # None: an array of numpy

    def empty(self) -> Any:
        if self.device is None:
            return np.empty(self.shape, self.dtype)
        import torch

        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


def pattern(tensor: Any) -> Pattern:
    device = tensor.device if is_torch(tensor) else None
    return Pattern(tuple(tensor.shape), elements(tensor), tensor.dtype, device)
