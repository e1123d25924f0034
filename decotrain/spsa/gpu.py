"""The kernels on a CUDA device: compiled at first use, run on torch's current stream.

csrc/cuda/spsa.cu shares its arithmetic with the CPU twins, so the bits are theirs. Needs cupy
(`pip install decotrain[cuda]`).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from decotrain.errors import ConfigError

if TYPE_CHECKING:
    from decotrain.spsa.kernels import Batch

THREADS = 256  # of a block
TILE, LANES = 2048, 16
STORES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NOISES = {"rademacher": 0, "gaussian": 1}
GAUSSIAN_UNIT = np.float32(1.0) / np.float32(147.8)
TERM = np.dtype([("c2", "<u4"), ("c3", "<u4"), ("value", "<f4")])


def sources() -> Path:
    """csrc/ beside the package in a checkout, inside the package when installed."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "cuda" / "spsa.cu").is_file():
            return folder
    raise ConfigError("decotrain's CUDA sources are missing: install the package again")


@cache
def module() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise ConfigError("SPSA on a GPU needs cupy: pip install decotrain[cuda]") from error
    folder = sources()
    text = (folder / "cuda" / "spsa.cu").read_text()
    options = ("-std=c++17", f"-I{folder}", "--fmad=false", "--ftz=false")
    return cupy.RawModule(code=text, options=options)


def launch(name: str, device: torch.device, threads: int, arguments: tuple[Any, ...]) -> None:
    import cupy

    stream = torch.cuda.current_stream(device)
    with cupy.cuda.Device(device.index or 0), cupy.cuda.ExternalStream(stream.cuda_stream):
        blocks = -(-threads // THREADS)
        module().get_function(name)((blocks,), (THREADS,), arguments)


def tiles(first: int, size: int) -> int:
    return (first + size - 1) // TILE - first // TILE + 1 if size else 0


def pointer(tensor: torch.Tensor) -> Any:
    return np.uint64(tensor.data_ptr())


def perturb(
    noise: str,
    key: int,
    words: tuple[int, int],
    epsilon: float,
    first: int,
    theta: torch.Tensor,
    out: torch.Tensor,
) -> None:
    threads = tiles(first, theta.numel()) * LANES
    if not threads:
        return
    amount = np.float32(epsilon)
    if noise == "gaussian":
        amount = amount * GAUSSIAN_UNIT
    arguments = (
        np.int32(NOISES[noise]),
        np.int32(STORES[out.dtype]),
        np.uint64(key),
        np.uint32(words[0]),
        np.uint32(words[1]),
        amount,
        np.uint64(first),
        np.uint64(theta.numel()),
        np.uint64(threads),
        pointer(theta),
        pointer(out),
    )
    launch("spsa_perturb", theta.device, threads, arguments)


def replay(batch: Batch, first: int, theta: torch.Tensor) -> None:
    threads = tiles(first, theta.numel()) * LANES * 4
    if not threads or not len(batch.counts):
        return
    terms = np.zeros(max(1, len(batch.values)), dtype=TERM)
    if len(batch.values):
        unit = GAUSSIAN_UNIT if batch.noise == "gaussian" else np.float32(1.0)
        terms["c2"], terms["c3"] = batch.streams[:, 0], batch.streams[:, 1]
        terms["value"] = batch.values * unit
    # Freed only after the kernel: torch's allocator knows the stream.
    held = [
        torch.from_numpy(array.view(np.uint8).copy()).to(theta.device)
        for array in (terms, batch.counts, batch.rates, batch.decays)
    ]
    arguments = (
        np.int32(NOISES[batch.noise]),
        np.uint64(batch.key),
        *map(pointer, held),
        np.uint32(len(batch.counts)),
        np.uint64(first),
        np.uint64(theta.numel()),
        np.uint64(threads),
        pointer(theta),
    )
    launch("spsa_replay", theta.device, threads, arguments)
