"""A process that takes part in one round for each codec and prints what it holds: see
tests/test_codecs_levels.py, which sets the SIMD level of each by DECOTRAIN_SIMD."""

from __future__ import annotations

import hashlib
import json
import sys

import torch

import decotrain as dt
from decotrain import _core

ELEMENTS = 100_003  # chunks, blocks and registers end within it


def heavy_tailed(name: str) -> torch.Tensor:
    """Values of all sizes, zeros and denormals among them; others for each peer."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    values = torch.randn(ELEMENTS, generator=generator) ** 5
    values *= 10.0 ** torch.randint(-4, 5, (ELEMENTS,), generator=generator)
    values[::1000] = 0.0
    values[1::1000] = 1e-41
    return values


def main(address: str, name: str, pairs: list[str]) -> None:
    comm = dt.join(address, name=name, run="test", insecure=True, listen="127.0.0.1")
    held = {}
    for tag, pair in enumerate(pairs):
        result = comm.all_reduce(heavy_tailed(name), tag=tag, codec=pair).wait()
        assert len(result.contributors) == len(comm.members), result
        held[pair] = hashlib.sha256(result.tensor.numpy().tobytes()).hexdigest()
    print(json.dumps({"simd": _core.simd(), "held": held}), flush=True)
    comm.leave()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
