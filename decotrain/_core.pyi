"""decotrain's collective core"""

from typing import Annotated

import numpy
from numpy.typing import NDArray


def spsa_perturb(theta: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], out: Annotated[NDArray, dict(shape=(None,), order='C', device='cpu')], key: int, c2: int, c3: int, epsilon: float, first: int = 0, noise: str = 'rademacher') -> None:
    """
    out = cast(theta + epsilon * z). theta is flat float32, out float32, bfloat16 or float16;
    element 0 of both is element `first` of the parameter space.
    """

def spsa_replay(theta: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu')], key: int, streams: Annotated[NDArray[numpy.uint32], dict(shape=(None, None), order='C', device='cpu', writable=False)], values: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], counts: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu', writable=False)], rates: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], decays: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], first: int = 0, noise: str = 'rademacher') -> None:
    """
    For each step s in order: theta = theta * decays[s] - rates[s] * sum of value * z over
    its counts[s] terms, in place, one pass over memory.
    """

def spsa_encode(values: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> bytes:
    """The one-byte code of each float32 value."""

def spsa_magnitudes() -> list:
    """The 128 magnitudes of the one-byte code."""

def simd() -> str:
    """The SIMD level in use: scalar, avx2 or avx512."""

def set_simd(level: str) -> str:
    """
    For tests: use this SIMD level, or the CPU's best below; returns the one in use.
    """
