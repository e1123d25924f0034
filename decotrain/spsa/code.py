"""The one-byte code of a scalar, and which noise belongs to which sample.

`csrc/spsa/code.h` has the table and the encoder; decoding here looks into that same table. What a
byte means: 0x00 nothing (the sample failed, it is not counted), 0x80 zero (counted, moves nothing),
else a sign and a magnitude.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from decotrain import _core

SKIP = 0x00
ZERO = 0x80
SAMPLES_MAX = 255  # of one peer in one step
SLOTS_MAX = 64
POOL_MARK = 0xFFFFFFFF  # counter word 2 of pool seeds: no slot has this number

_magnitudes = np.array(_core.spsa_magnitudes(), dtype=np.float32)
VALUES: npt.NDArray[np.float32] = np.concatenate([_magnitudes, -_magnitudes])  # by byte
VALUES[ZERO] = 0.0


def encode(values: list[float]) -> bytes:
    """The nearest code of each value; 0x00 for what is not finite."""
    with np.errstate(over="ignore"):  # beyond float32 is not finite: skipped
        return bytes(_core.spsa_encode(np.array(values, dtype=np.float32)))


def decode(codes: bytes) -> list[float]:
    """The float32 values that everybody applies, as Python floats (exact)."""
    return [float(VALUES[code]) for code in codes]


def stream(step: int, slot: int, sample: int) -> tuple[int, int]:
    """Words 2 and 3 of the Philox counter of one sample's noise."""
    assert 0 <= step < 1 << 44, step
    assert 0 <= slot < SLOTS_MAX, slot
    assert 0 <= sample < 1 << 12, sample
    return slot | (step >> 20) << 8, (step & 0xFFFFF) << 12 | sample


def pool_stream(key: int, pool: int, words: tuple[int, int]) -> tuple[int, int]:
    """The seed of a pool of `pool` (a power of two) that stands in for a sample's own stream."""
    mask = (1 << 64) - 1
    x = (key ^ (words[0] << 32 | words[1])) & mask  # splitmix64: every bit counts
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return POOL_MARK, (x ^ (x >> 31)) & (pool - 1)
