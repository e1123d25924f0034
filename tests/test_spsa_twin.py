"""SPSA's CUDA source, compiled for the host: every thread's part, one after the other.

What a machine without a GPU can show of the twins: which elements a thread touches, which noise
they get, and the order of their sums. The device's own arithmetic has tests of its own
(tests/test_spsa_kernels.py, `-m gpu`).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from decotrain import _core
from decotrain.spsa import code, gpu, kernels
from decotrain.spsa.recipe import Recipe
from decotrain.spsa.space import Layout

ROOT = Path(__file__).resolve().parent.parent
COMPILER = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
SOURCE = """
#define __global__
#define __device__
struct Index { unsigned x; };
static Index blockIdx, threadIdx, blockDim;
#include "cuda/spsa.cu"
extern "C" void become(unsigned block, unsigned thread, unsigned threads) {
  blockIdx.x = block;
  threadIdx.x = thread;
  blockDim.x = threads;
}
"""
CTYPES = {np.int32: ctypes.c_int32, np.uint32: ctypes.c_uint32, np.uint64: ctypes.c_uint64,
          np.float32: ctypes.c_float}  # fmt: skip


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`gpu.launch` runs the kernels here."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    source, made = tmp_path / "twin.cpp", tmp_path / "twin.so"
    source.write_text(SOURCE)
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-I", "csrc"]
    command = [COMPILER, *flags, str(source), "-o", str(made)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(made))

    def launch(name: str, device: Any, threads: int, arguments: tuple[Any, ...]) -> None:
        kernel = getattr(library, name)
        kernel.argtypes = [CTYPES[type(value)] for value in arguments]
        values = [value.item() for value in arguments]
        for block in range(-(-threads // gpu.THREADS)):
            for thread in range(gpu.THREADS):
                library.become(block, thread, gpu.THREADS)
                kernel(*values)

    monkeypatch.setattr(gpu, "launch", launch)


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_every_thread_does_its_part(host: None, noise: str) -> None:
    layout = Layout.of([("a", (), (70, 111), "F32", True), ("b", (), (17,), "F32", False)])
    recipe = Recipe(lr=1e-3, samples=5, weight_decay=0.1, noise=noise)
    codes = code.encode([1.0, -2.0, 3.0, 0.1, 7.0])
    batch = kernels.Batch.of(recipe, [recipe.update(s, {1: codes, 4: codes}) for s in range(3)])
    dice = torch.Generator().manual_seed(5)
    masters = [torch.randn(entry.size, generator=dice) for entry in layout.entries]
    here, there = [m.clone() for m in masters], [m.clone() for m in masters]
    kernels.replay(layout, here, batch)
    for entry, master in zip(layout.entries, there, strict=True):
        gpu.replay(batch if entry.decay else batch.without_decay(), entry.first, master)
    for entry, before, one, other in zip(layout.entries, masters, here, there, strict=True):
        assert not torch.equal(before, one)
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))
        for cut, size in ((0, entry.size), (5, entry.size - 9)):  # a range may be cut anywhere
            part, first = before[cut : cut + size], entry.first + cut
            for store in gpu.STORES:
                out, twin = torch.empty(size, dtype=store), torch.empty(size, dtype=store)
                _core.spsa_perturb(part, out, recipe.key, 3, 4, 1e-3, first, noise)
                gpu.perturb(noise, recipe.key, (3, 4), 1e-3, first, part, twin)
                assert torch.equal(out.view(torch.uint8), twin.view(torch.uint8))
