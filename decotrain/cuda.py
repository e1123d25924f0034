"""Codecs on a GPU, and the way between its memory and the host's: the Device of `device.py`.

The kernels (csrc/cuda/codec.cu) give the bits of the CPU's codecs. cupy compiles them at first use,
for the device at hand, and launches them on torch's current stream. cupy is optional: `missing()`
says why this module cannot be used. Nothing here knows rounds, links or error feedback.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from decotrain.device import encoded_bytes
from decotrain.errors import ConfigError

TILE = 1024  # values of a thread block, as in csrc/codec/tile.h
THREADS = 256
CHUNKS_MAX = 65535  # of one launch: the grid's second dimension
# Parity: what csrc/codec/block.h computes must be what the CPU computes.
OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")


@cache
def missing() -> str | None:
    """Why GPU codecs cannot be used here; None when they can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        import cupy  # noqa: F401
    except ImportError:
        return "cupy is not installed: pip install 'decotrain[cuda]'"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the device is older than compute capability 8.0"
    return None


def sources() -> Path:
    """The folder of the kernels' sources: beside this file in a wheel, in the tree otherwise."""
    installed = Path(__file__).parent / "csrc"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "csrc"


@cache
def _kernel(device: int, name: str) -> Any:
    import cupy

    with cupy.cuda.Device(device):
        return _module(device).get_function(name)


@cache
def _module(device: int) -> Any:
    import cupy

    with cupy.cuda.Device(device):
        code = (sources() / "cuda" / "codec.cu").read_text()
        return cupy.RawModule(code=code, options=(*OPTIONS, f"-I{sources()}"))


def _launch(name: str, elements: int, chunk_elements: int, *pointers: torch.Tensor) -> None:
    """name(first, elements, chunk_elements, second, flag) on torch's current stream."""
    import cupy

    first, second, flag = (np.uint64(tensor.data_ptr()) for tensor in pointers)
    device = pointers[0].device.index
    tiles = -(-min(chunk_elements, elements) // TILE)
    chunks = -(-elements // chunk_elements)
    assert chunks <= CHUNKS_MAX, f"{chunks} chunks in one launch"
    stream = torch.cuda.current_stream(device)
    with cupy.cuda.Device(device), cupy.cuda.ExternalStream(stream.cuda_stream):
        _kernel(device, name)(
            (tiles, chunks),
            (THREADS,),
            (first, np.uint64(elements), np.uint32(chunk_elements), second, flag),
        )


def _check(tensor: torch.Tensor, dtype: torch.dtype, elements: int, what: str) -> None:
    if not tensor.is_cuda or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ConfigError(f"{what}: a contiguous CUDA tensor of {dtype} is needed")
    if tensor.numel() != elements:
        raise ConfigError(f"{what}: {elements} elements are needed, not {tensor.numel()}")


def encode(
    codec: str,
    values: torch.Tensor,  # flat float32 on a GPU
    chunk_elements: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(encoded bytes, flag): both on the GPU; the flag is not 0 when a value is NaN or infinite."""
    _check(values, torch.float32, values.numel(), "values")
    size = encoded_bytes(codec, values.numel(), chunk_elements)
    out = torch.empty(size, dtype=torch.uint8, device=values.device)
    flag = torch.zeros(1, dtype=torch.int32, device=values.device)
    if values.numel():
        _launch(f"encode_{codec}", values.numel(), chunk_elements, values, out, flag)
    return out, flag


def decode(
    codec: str,
    data: torch.Tensor,  # uint8 on a GPU
    chunk_elements: int,
    out: torch.Tensor,  # flat float32 on the same GPU
) -> torch.Tensor:
    """Decodes into `out`; returns the flag, not 0 when the bytes are no valid encoding."""
    _check(out, torch.float32, out.numel(), "out")
    _check(data, torch.uint8, encoded_bytes(codec, out.numel(), chunk_elements), "data")
    flag = torch.zeros(1, dtype=torch.int32, device=out.device)
    if out.numel():
        _launch(f"decode_{codec}", out.numel(), chunk_elements, data, out, flag)
    return flag


def host_bytes(size: int) -> torch.Tensor:
    """Pinned memory: copies to and from it run beside the kernels and the caller."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def to_host(data: torch.Tensor, host: torch.Tensor, ends: Sequence[int]) -> Iterator[None]:
    """Copies `data` on a stream of its own, when the current one has made it; yields when all
    before each of `ends` is there, while the rest still crosses."""
    if not host.is_pinned():
        raise ConfigError("the host buffer must be pinned, or copies would not overlap")
    copies = torch.cuda.Stream(data.device)  # type: ignore[no-untyped-call]
    copies.wait_stream(torch.cuda.current_stream(data.device))
    data.record_stream(copies)
    done = []
    with torch.cuda.stream(copies):
        for begin, end in pairwise([0, *ends]):
            host[begin:end].copy_(data[begin:end], non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(copies)
            done.append(event)
    for event in done:
        event.synchronize()
        yield


def from_host(host: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return host.to(like.device, non_blocking=True)
