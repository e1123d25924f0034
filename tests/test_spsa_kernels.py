"""SPSA's kernels from Python: equal bits on every SIMD level, for every cut, fused or one by one.

The definition of the noise is checked in C++ (csrc/tests/test_spsa.cpp); here the levels, the cuts
and the storage types are played off against one another on random shapes.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from decotrain import _core
from decotrain.spsa import code, kernels
from decotrain.spsa.recipe import Recipe
from decotrain.spsa.space import Layout

ROOT = Path(__file__).resolve().parent.parent
LEVELS = ["scalar", "avx2", "avx512"]
STORES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _level_comes_back() -> Iterator[None]:
    before = _core.simd()
    yield
    _core.set_simd(before)


def floats(size: int, seed: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()


def one_record(terms: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    streams = random.integers(0, 1 << 32, (terms, 2), dtype=np.uint32)
    return streams, random.normal(size=terms).astype(np.float32)


def replayed(
    theta: torch.Tensor, counts: list[int], seed: int, first: int, noise: str
) -> torch.Tensor:
    streams, values = one_record(sum(counts), seed)
    theta = theta.clone()
    _core.spsa_replay(
        theta,
        99,
        streams,
        values,
        np.array(counts, np.uint32),
        np.linspace(1e-4, 1e-2, len(counts), dtype=np.float32),
        np.full(len(counts), 0.999, np.float32),
        first,
        noise,
    )
    return theta


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    size=st.integers(1, 5000),
    first=st.integers(0, 1 << 44),
    counts=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    seed=st.integers(0, 1 << 30),
    noise=st.sampled_from(["rademacher", "gaussian"]),
)
def test_replay_has_the_same_bits_on_every_level(
    size: int, first: int, counts: list[int], seed: int, noise: str
) -> None:
    theta = floats(size, seed)
    results = set()
    for level in LEVELS:
        _core.set_simd(level)
        results.add(bits(replayed(theta, counts, seed, first, noise)))
    assert len(results) == 1


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(1, 5000),
    first=st.integers(0, 1 << 44),
    seed=st.integers(0, 1 << 30),
    epsilon=st.floats(-10, 10, width=32),
    noise=st.sampled_from(["rademacher", "gaussian"]),
    store=st.sampled_from(STORES),
)
def test_perturb_has_the_same_bits_on_every_level_and_casts_as_torch_does(
    size: int, first: int, seed: int, epsilon: float, noise: str, store: torch.dtype
) -> None:
    theta = floats(size, seed)
    outs = {}
    for level in LEVELS:
        _core.set_simd(level)
        for dtype in (torch.float32, store):
            out = torch.empty(size, dtype=dtype)
            _core.spsa_perturb(theta, out, seed, 3, 5, epsilon, first, noise)
            outs[level, dtype] = out
    assert len({bits(outs[level, store]) for level in LEVELS}) == 1
    wide = outs["scalar", torch.float32]
    assert bits(wide.to(store)) == bits(outs["scalar", store])


@settings(max_examples=20, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 3000), min_size=1, max_size=5),
    first=st.integers(0, 10_000),
    seed=st.integers(0, 1 << 30),
)
def test_a_range_may_be_cut_anywhere(cuts: list[int], first: int, seed: int) -> None:
    theta = floats(sum(cuts), seed)
    whole = replayed(theta, [9, 16], seed, first, "rademacher")
    at = 0
    pieces = []
    for cut in cuts:
        pieces.append(replayed(theta[at : at + cut], [9, 16], seed, first + at, "rademacher"))
        at += cut
    assert bits(torch.cat(pieces)) == bits(whole)


def test_fused_terms_equal_a_sum_in_the_same_order() -> None:
    """K terms in one pass are theta - rate * u with u added up one group of four after another."""
    theta = floats(4096, 1)
    streams, values = one_record(11, 2)
    total = torch.zeros(4096)
    for start in range(0, 11, 4):
        group = torch.zeros(4096)
        for k in range(start, min(start + 4, 11)):
            signs = torch.empty(4096)
            _core.spsa_perturb(torch.zeros(4096), signs, 99, *map(int, streams[k]), 1.0)
            assert set(signs.unique().tolist()) == {-1.0, 1.0}
            group = group + signs * float(values[k])
        total = total + group
    rate = np.float32(1e-2)
    got = theta.clone()
    _core.spsa_replay(
        got,
        99,
        streams,
        values,
        np.array([11], np.uint32),
        np.array([rate]),
        np.ones(1, np.float32),
    )
    assert bits(got) == bits(theta - float(rate) * total)


def test_flush_to_zero_does_not_reach_the_kernels() -> None:
    theta = torch.full((4096,), 1e-38)
    plain = replayed(theta, [0], 1, 0, "rademacher")
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        flushed = replayed(theta, [0], 1, 0, "rademacher")
    finally:
        torch.set_flush_denormal(False)
    assert bits(plain) == bits(flushed)
    assert 0 < float(plain[0]) < 1.1754944e-38


def test_threads_change_nothing() -> None:
    layout = Layout.of([("a", (), (3000, 1000), "F32", True), ("b", (), (17,), "F32", False)])
    recipe = Recipe(lr=1e-3, samples=5, weight_decay=0.1)
    updates = [
        recipe.update(step, {0: code.encode([1.0, -2.0, 3.0]), 7: code.encode([0.5] * 4)})
        for step in range(3)
    ]
    results = []
    for count in (1, 3):
        masters = [floats(entry.size, 5) for entry in layout.entries]
        batch = kernels.Batch.of(recipe, updates)
        kernels.replay(layout, masters, batch, kernels.Threads(count))
        results.append([bits(master) for master in masters])
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"noise": "cauchy"}, "noise"),
        ({"first": 1 << 60}, "parameter space"),
        ({"out": torch.empty(3)}, "length"),
        ({"out": torch.empty(4, dtype=torch.float64)}, "float32"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, object], match: str) -> None:
    arguments = {"theta": torch.zeros(4), "out": torch.empty(4), "key": 1, "c2": 0, "c3": 0}
    with pytest.raises(ValueError, match=match):
        _core.spsa_perturb(**{**arguments, "epsilon": 1.0, **change})


def test_counts_that_do_not_add_up_are_refused() -> None:
    streams, values = one_record(4, 1)
    ones = np.ones(1, np.float32)
    with pytest.raises(ValueError, match="add up"):
        _core.spsa_replay(torch.zeros(4), 1, streams, values, np.array([5], np.uint32), ones, ones)


def test_the_code_of_a_byte() -> None:
    assert code.encode([float("nan"), float("inf"), -float("inf"), 1e300]) == bytes(4)
    assert code.encode([0.0, 1.0, -1.0, 1e30]) == bytes([code.ZERO, 64, 0x80 | 64, 127])
    assert code.decode(bytes([code.SKIP, code.ZERO, 70, 0x80 | 70])) == [0.0, 0.0, 2.0, -2.0]
    assert code.encode(code.decode(bytes(range(1, 256)))) == bytes(range(1, 256))


def test_streams_are_distinct_and_stay_in_words() -> None:
    seen = set()
    for step in (0, 1, (1 << 20) - 1, 1 << 20, (1 << 44) - 1):
        for slot in (0, 63):
            for sample in (0, 254):
                words = code.stream(step, slot, sample)
                assert all(0 <= word < 1 << 32 for word in words)
                seen.add(words)
    assert len(seen) == 5 * 2 * 2


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_cuda_twin_compiles(architecture: str, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    command = ["nvcc", "-std=c++17", "-I", "csrc", "--fmad=false", f"-arch={architecture}"]
    command += ["-Werror=all-warnings", "-cubin", "-o", str(tmp_path / "spsa.cubin")]
    done = subprocess.run(
        [*command, "csrc/cuda/spsa.cu"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_cuda_has_the_bits_of_the_cpu(noise: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    layout = Layout.of([("a", (), (70, 111), "F32", True), ("b", (), (17,), "F32", False)])
    recipe = Recipe(lr=1e-3, samples=5, weight_decay=0.1, noise=noise)
    updates = [recipe.update(s, {1: code.encode([1.0, -2.0, 3.0, 0.1, 7.0])}) for s in range(9)]
    batch = kernels.Batch.of(recipe, updates)
    cpu = [floats(entry.size, 5) for entry in layout.entries]
    gpu = [master.cuda() for master in cpu]
    kernels.replay(layout, cpu, batch)
    kernels.replay(layout, gpu, batch)
    for entry, here, there in zip(layout.entries, cpu, gpu, strict=True):
        assert bits(here) == bits(there.cpu())
        for store in STORES:
            out = torch.empty(entry.size, dtype=store)
            out_gpu = torch.empty(entry.size, dtype=store, device="cuda")
            kernels.perturb(recipe, (3, 4), 1e-3, entry, here, out)
            kernels.perturb(recipe, (3, 4), 1e-3, entry, there, out_gpu)
            assert bits(out) == bits(out_gpu.cpu())
