"""SPSA's kernels on one core against a straightforward MeZO in PyTorch, and the memory of a step.

MeZO is what its authors publish: torch.manual_seed, torch.randn, in place; K scalars are K
passes. Ours applies K scalars in one pass. Times are CPU times of the one thread that does
the work, so that other programs cost less; they still share the memory bus. `of_memcpy` counts the
bytes a kernel reads and writes, against those of a copy in the same turn.

Options: --set million=100 (parameters), --set level=scalar|avx2|avx512.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import Report, Settings, interleave, log
from decotrain import _core

APPLIED = (1, 4, 16, 64)
AGAINST = (1, 16)  # K for which MeZO is run, too
REPLAY_STEPS, REPLAY_SAMPLES = 64, 16
KEY = 12345


def run(settings: Settings) -> Report:
    report = Report("spsa", "SPSA on one core", settings)
    torch.set_num_threads(1)
    _core.set_simd(settings.option("level", _core.simd()))
    count = 1_000_000 if settings.quick else 1_000_000 * int(settings.option("million", "100"))
    theta = torch.randn(count, generator=torch.Generator().manual_seed(settings.seed)) * 0.02
    _perturb(report, settings, theta)
    _apply(report, settings, theta)
    _replay(report, settings, theta)
    _memory(report, settings)
    report.table("perturb", ["ms", "gb_per_s", "of_memcpy"], where={"what": "perturb"},
                 title=f"Perturb, {count / 1e6:g} M parameters ({_core.simd()})")  # fmt: skip
    report.table("apply", ["ms", "billion_signs_per_s", "times_faster"], where={"what": "apply"},
                 title="Apply K scalars")  # fmt: skip
    report.table("replay", ["billion_signs_per_s"], where={"what": "replay"},
                 title=f"Replay of {REPLAY_STEPS} steps of {REPLAY_SAMPLES} samples")  # fmt: skip
    report.table("memory", ["peak_mib", "above_inference_in_layers"],
                 where={"what": "memory"},
                 title="Peak memory of a step above the loaded model")  # fmt: skip
    report.note(__doc__.split("\n\n")[1].replace("\n", " "))
    return report


def _timed(call: Callable[[], object]) -> Callable[[], float]:
    def seconds() -> float:
        start = time.thread_time()
        call()
        return time.thread_time() - start

    return seconds


def _perturb(report: Report, settings: Settings, theta: torch.Tensor) -> None:
    short = torch.empty(theta.numel(), dtype=torch.bfloat16)
    wide = torch.empty_like(theta)

    def ours(out: torch.Tensor, noise: str = "rademacher") -> Callable[[], float]:
        return _timed(lambda: _core.spsa_perturb(theta, out, KEY, 1, 2, 1e-3, 0, noise))

    def mezo() -> None:
        torch.manual_seed(KEY)
        torch.add(theta, torch.randn(theta.numel()), alpha=1e-3, out=wide)

    times = interleave(
        {
            "memcpy": _timed(lambda: wide.copy_(theta)),
            "f32": ours(wide),
            "bf16": ours(short),
            "gaussian f32": ours(wide, "gaussian"),
            "mezo f32": _timed(mezo),
        },
        settings.repeats,
    )
    for name, samples in times.items():
        moved = theta.numel() * (6 if name == "bf16" else 8)
        plain = [8 * theta.numel() / t for t in times["memcpy"]]
        report.add(
            {"what": "perturb", "kernel": name},
            ms=[1e3 * t for t in samples],
            gb_per_s=[moved / t / 1e9 for t in samples],
            of_memcpy=[moved / t / copy for t, copy in zip(samples, plain, strict=True)],
        )


def _terms(count: int, steps: int) -> dict[str, Any]:
    random = np.random.default_rng(3)
    return {
        "streams": random.integers(0, 1 << 32, (count * steps, 2), dtype=np.uint32),
        "values": random.normal(size=count * steps).astype(np.float32),
        "counts": np.full(steps, count, np.uint32),
        "rates": np.full(steps, 1e-9, np.float32),
        "decays": np.ones(steps, np.float32),
    }


def _apply(report: Report, settings: Settings, theta: torch.Tensor) -> None:
    def ours(count: int) -> Callable[[], float]:
        terms = _terms(count, 1)
        return _timed(lambda: _core.spsa_replay(theta, KEY, **terms))

    def mezo(count: int) -> Callable[[], float]:
        def passes() -> None:
            for k in range(count):
                torch.manual_seed(k)
                theta.add_(torch.randn(theta.numel()), alpha=-1e-9)

        return _timed(passes)

    times = interleave({str(count): ours(count) for count in APPLIED}, settings.repeats)
    log("MeZO in PyTorch")
    slow = {count: mezo(count)() for count in AGAINST}
    for count in APPLIED:
        samples = times[str(count)]
        rate = [count * theta.numel() / t / 1e9 for t in samples]
        metrics = {"ms": [1e3 * t for t in samples], "billion_signs_per_s": rate}
        if count in slow:
            metrics["times_faster"] = [slow[count] / t for t in samples]
        report.add({"what": "apply", "K": count, "by": "decotrain"}, **metrics)
    for count, seconds in slow.items():
        report.add({"what": "apply", "K": count, "by": "MeZO, PyTorch"}, ms=1e3 * seconds)


def _replay(report: Report, settings: Settings, theta: torch.Tensor) -> None:
    part = theta[: max(1, theta.numel() // 10)]
    terms = _terms(REPLAY_SAMPLES, REPLAY_STEPS)
    call = _timed(lambda: _core.spsa_replay(part, KEY, **terms))
    times = interleave({"replay": call}, settings.repeats)["replay"]
    signs = part.numel() * REPLAY_SAMPLES * REPLAY_STEPS
    report.add({"what": "replay"}, billion_signs_per_s=[signs / t / 1e9 for t in times])


# --- memory: each way of making a step in a process of its own


def _memory(report: Report, settings: Settings) -> None:
    width = 256 if settings.quick else 2048
    report.note(
        f"Memory: 8 layers {width} x {width}, the largest {width * width * 4 / 2**20:g} MiB."
    )
    peaks: dict[str, float] = {}
    for way in ("inference", "spsa", "adamw"):
        command = [sys.executable, "-c", f"import bench.spsa as b; b.peak({way!r}, {width})"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[way] = float(done.stdout)
        metrics = {"peak_mib": peaks[way]}
        if way == "spsa":  # what a step needs above a forward pass
            layer = width * width * 4 / 2**20
            metrics["above_inference_in_layers"] = (peaks[way] - peaks["inference"]) / layer
        report.add({"what": "memory", "way": way}, **metrics)


def peak(way: str, width: int) -> None:
    """Prints the growth of this process's peak memory over some steps, in MiB."""
    from decotrain.spsa import SPSA

    torch.set_num_threads(1)
    model = torch.nn.Sequential(*[torch.nn.Linear(width, width, bias=False) for _ in range(8)])
    x = torch.ones(4, width)
    spsa = SPSA(model, lr=1e-9)
    small = torch.nn.Linear(2, 2)
    SPSA(small).step(lambda: small(torch.ones(1, 2)).sum())  # whatever is loaded at first use
    start = _peak_kib(reset=True)
    if way == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, foreach=False)
        for _ in range(2):
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for _ in range(2):
        if way == "spsa":
            spsa.step(lambda: model(x).sum())
        if way == "inference":
            with torch.no_grad():
                model(x).sum()
    print((_peak_kib() - start) / 1024)


def _peak_kib(reset: bool = False) -> int:
    """Of this process, since the reset. getrusage would count the parent's before exec."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])
