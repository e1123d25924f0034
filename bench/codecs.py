"""Codecs on one core: encode, decode and combine against memcpy, numpy and torch.

What is counted: gigabytes of float32 per second, encoded from or decoded to; for combine those of
all n contributions. `of_memcpy` divides by what a copy of the same float32 buffer reaches in the
same turn (buffer bytes per second, counted once). Times are CPU times of the one thread that does
the work, so that other programs on the machine cost less; they still share its memory bus.

Options: --set mib=64 (float32 of the buffer), --set level=scalar|avx2|avx512|neon.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench.common import Report, Settings, interleave
from decotrain import _core

CODECS = ("f32", "bf16", "f16", "int8", "e2m1", "e3m0", "int2")
COMBINED = (2, 8, 32)
CHUNK = 1 << 18  # values, as in a round
CACHED = 1 << 16  # values: eight contributions of int8 are half a MiB, of f32 two
STOCHASTIC = ("int8", "e2m1", "e3m0")
KEEP = 64  # of every 4096


def run(settings: Settings) -> Report:
    report = Report("codecs", "Codecs on one core", settings)
    torch.set_num_threads(1)
    _core.set_simd(settings.option("level", _core.simd()))
    mib = 1 if settings.quick else int(settings.option("mib", "64"))
    values = np.random.default_rng(settings.seed).standard_t(4, mib << 18).astype(np.float32)
    for codec in CODECS:
        _speed(report, settings, codec, values)
    _sparse(report, settings, values)
    _others(report, settings, values)
    report.table("speed", ["gb_per_s", "of_memcpy"], title=f"Speed ({_core.simd()})",
                 where={"what": "speed"})  # fmt: skip
    report.table("others", ["gb_per_s", "times_slower"], where={"what": "others"},
                 title="int8 over 256, by others")  # fmt: skip
    report.plot("speed", "codec", "of_memcpy", lines="op", title="One core, relative to memcpy",
                where={"what": "speed"})  # fmt: skip
    report.note(__doc__.split("\n\n")[1].replace("\n", " "))
    return report


def _cpu_time(call: Callable[[], object]) -> Callable[[], float]:
    """A variant for `interleave`: the thread's CPU seconds, of enough calls to be measured."""

    def run() -> float:
        calls = 0
        start = time.thread_time()
        while (spent := time.thread_time() - start) < 0.02 or calls == 0:
            call()
            calls += 1
        return spent / calls

    return run


def _chunks(array: np.ndarray[Any, Any], size: int) -> list[np.ndarray[Any, Any]]:
    return [array[first : first + size] for first in range(0, array.size, size)]


def _speed(report: Report, settings: Settings, codec: str, values: np.ndarray[Any, Any]) -> None:
    """Chunk by chunk, as a round does it."""
    parts = _chunks(values, CHUNK)
    out = np.empty_like(values)
    out_parts = _chunks(out, CHUNK)
    data = [np.empty(_core.codec_bytes(codec, part.size), np.uint8) for part in parts]

    def encode() -> None:
        for part, encoded in zip(parts, data, strict=True):
            assert _core.codec_encode(codec, part, encoded)

    def decode() -> None:
        for part, encoded in zip(out_parts, data, strict=True):
            assert _core.codec_decode(codec, encoded, part)

    kept = _chunks(np.zeros_like(values), CHUNK)

    def feedback() -> None:
        for part, residual, encoded in zip(parts, kept, data, strict=True):
            assert _core.codec_encode_with_feedback(codec, part, residual, encoded)

    def stochastic() -> None:
        for number, (part, encoded) in enumerate(zip(parts, data, strict=True)):
            assert _core.codec_encode_stochastic(codec, part, 1, number, encoded)

    encode()
    calls: dict[str, Callable[[], object]] = {"encode": encode, "decode": decode}
    if codec != "f32":
        calls["encode, feedback"] = feedback
    if codec in STOCHASTIC:
        calls["encode, stochastic"] = stochastic
    amounts = dict.fromkeys(calls, values.nbytes)
    for n in COMBINED:
        calls[f"combine {n}"], amounts[f"combine {n}"] = _combine(codec, parts, n)
    cached = f"combine {COMBINED[1]}, in cache"
    calls[cached], amounts[cached] = _combine(codec, [parts[0][:CACHED]], COMBINED[1])
    if codec != "f32":
        fed = f"combine {COMBINED[1]}, owner feedback"
        calls[fed], amounts[fed] = _combine(codec, parts, COMBINED[1], feedback=True)
    _measure(report, settings, codec, values, calls, amounts)


def _sparse(report: Report, settings: Settings, values: np.ndarray[Any, Any]) -> None:
    """Top-k, whole: the largest 64 of every 4096, and their sum into a buffer."""
    data = np.empty(_core.topk_bytes(values.size, KEEP), np.uint8)
    total = np.zeros_like(values)

    def encode() -> None:
        assert _core.topk_encode(values, KEEP, data)

    def add() -> None:
        assert _core.topk_add(data, KEEP, 1.0, total)

    encode()
    calls: dict[str, Callable[[], object]] = {"encode": encode, "add": add}
    _measure(report, settings, f"top-{KEEP}", values, calls, dict.fromkeys(calls, values.nbytes))


def _measure(
    report: Report,
    settings: Settings,
    codec: str,
    values: np.ndarray[Any, Any],
    calls: dict[str, Callable[[], object]],
    amounts: dict[str, int],
) -> None:
    out = np.empty_like(values)
    calls = {"memcpy": lambda: np.copyto(out, values), **calls}
    samples = interleave({k: _cpu_time(call) for k, call in calls.items()}, settings.repeats)
    copied = [values.nbytes / s for s in samples["memcpy"]]
    for op, amount in amounts.items():
        speeds = [amount / s for s in samples[op]]
        report.add({"what": "speed", "codec": codec, "op": op},
                   gb_per_s=[speed / 1e9 for speed in speeds],
                   of_memcpy=[a / b for a, b in zip(speeds, copied, strict=True)],
                   memcpy_gb_per_s=[c / 1e9 for c in copied])  # fmt: skip


def _combine(
    codec: str, parts: list[np.ndarray[Any, Any]], n: int, feedback: bool = False
) -> tuple[Callable[[], None], int]:
    """n contributions to each of some chunks, all in memory of their own; weights differ."""
    rounds = max(1, min(len(parts), 2 * len(parts) // n))
    size = _core.codec_bytes(codec, parts[0].size)
    encoded = np.empty((rounds, n, size), np.uint8)
    for index in range(rounds * n):
        part = parts[index % len(parts)]
        if part.size == parts[0].size:
            assert _core.codec_encode(codec, part, encoded[index // n, index % n])
    weights = [1.0 - 0.5 * (k % 2) for k in range(n)]
    result = np.empty(size, np.uint8)
    residuals = np.zeros((rounds if feedback else 0, parts[0].size), np.float32)
    lost = np.empty(parts[0].size, np.float32)

    def combine() -> None:
        for index, contributions in enumerate(encoded):
            fed = {"residual": residuals[index], "lost": lost} if feedback else {}
            assert _core.codec_combine(
                "mean", codec, list(contributions), weights, parts[0].size, codec, result, **fed
            )

    return combine, rounds * n * parts[0].nbytes


# --- the same job by others


def _others(report: Report, settings: Settings, values: np.ndarray[Any, Any]) -> None:
    """absmax over 256 to int8 and back, in numpy and in torch's two ways, on one thread."""
    rows = values.reshape(-1, 256)
    tensor = torch.from_numpy(rows)
    ours = np.empty(_core.codec_bytes("int8", values.size), np.uint8)
    back = np.empty_like(values)
    scales = tensor.abs().amax(1) / 127
    codes = torch.round(tensor / scales[:, None]).to(torch.int8)
    np_scales, np_codes = scales.numpy()[:, None], codes.numpy()
    zeros = torch.zeros(rows.shape[0], dtype=torch.int64)
    _core.codec_encode("int8", values, ours)

    def numpy_encode() -> None:
        scale = np.abs(rows).max(1, keepdims=True) / np.float32(127)
        np.rint(rows / scale).astype(np.int8)

    def torch_encode() -> None:
        scale = tensor.abs().amax(1, keepdim=True) / 127
        torch.round(tensor / scale).to(torch.int8)

    def torch_quantize() -> None:
        low, high = torch.aminmax(tensor, dim=1)
        scale = torch.maximum(-low, high) / 127
        torch.quantize_per_channel(tensor, scale, zeros, 0, torch.qint8)

    quantized = torch.quantize_per_channel(tensor, scales, zeros, 0, torch.qint8)
    calls: dict[str, dict[str, Callable[[], object]]] = {
        "encode": {
            "ours": lambda: _core.codec_encode("int8", values, ours),
            "numpy": numpy_encode,
            "torch": torch_encode,
            "torch.quantize_per_channel": torch_quantize,
        },
        "decode": {
            "ours": lambda: _core.codec_decode("int8", ours, back),
            "numpy": lambda: np_codes * np_scales,
            "torch": lambda: codes * scales[:, None],
            "torch.quantize_per_channel": quantized.dequantize,
        },
    }
    for op, variants in calls.items():
        samples = interleave({k: _cpu_time(v) for k, v in variants.items()}, settings.repeats)
        for by, seconds in samples.items():
            slower = [s / o for s, o in zip(seconds, samples["ours"], strict=True)]
            report.add({"what": "others", "op": op, "by": by}, times_slower=slower,
                       gb_per_s=[values.nbytes / s / 1e9 for s in seconds])  # fmt: skip
