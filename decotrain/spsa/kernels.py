"""Perturb and replay on tensors: the core's kernels on a CPU, their CUDA twins on a GPU.

The bits are the same everywhere. Threads cut a tensor into spans; that changes nothing either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from decotrain import _core
from decotrain.spsa.recipe import Recipe, Update
from decotrain.spsa.space import TILE, Entry, Layout

SPAN = 1 << 20  # elements of one piece of work of a thread; a multiple of TILE
assert SPAN % TILE == 0


@dataclass(frozen=True)
class Batch:
    """Updates as arrays: what one pass of the replay kernel takes."""

    key: int
    noise: str
    streams: npt.NDArray[np.uint32]  # (terms, 2)
    values: npt.NDArray[np.float32]  # (terms,)
    counts: npt.NDArray[np.uint32]  # (steps,) terms of each step
    rates: npt.NDArray[np.float32]  # (steps,)
    decays: npt.NDArray[np.float32]  # (steps,)

    @classmethod
    def of(cls, recipe: Recipe, updates: Sequence[Update]) -> Batch:
        terms = [term for update in updates for term in update.terms]
        streams = np.array([(t.c2, t.c3) for t in terms], dtype=np.uint32).reshape(-1, 2)
        return cls(
            recipe.key,
            recipe.noise,
            streams,
            np.array([t.value for t in terms], dtype=np.float32),
            np.array([len(update.terms) for update in updates], dtype=np.uint32),
            np.array([update.rate for update in updates], dtype=np.float32),
            np.array([update.decay for update in updates], dtype=np.float32),
        )

    def without_decay(self) -> Batch:
        ones = np.ones_like(self.decays)
        return Batch(self.key, self.noise, self.streams, self.values, self.counts, self.rates, ones)


class Threads:
    """Runs pieces of work on `count` threads; one thread means here and now."""

    def __init__(self, count: int = 1) -> None:
        self.pool = ThreadPoolExecutor(count, "spsa") if count > 1 else None

    def run(self, jobs: Sequence[Callable[[], None]]) -> None:
        if self.pool is None:
            for job in jobs:
                job()
        else:
            for future in [self.pool.submit(job) for job in jobs]:
                future.result()


def perturb(
    recipe: Recipe,
    words: tuple[int, int],
    epsilon: float,
    entry: Entry,
    theta: torch.Tensor,  # (entry.size,) float32
    out: torch.Tensor,  # (entry.size,) float32, bfloat16 or float16; not theta
    threads: Threads | None = None,
) -> None:
    """out = cast(theta + epsilon * z)."""
    if theta.is_cuda:
        from decotrain.spsa import gpu

        gpu.perturb(recipe.noise, recipe.key, words, epsilon, entry.first, theta, out)
        return

    def job(start: int, stop: int) -> Callable[[], None]:
        return lambda: _core.spsa_perturb(
            theta[start:stop],
            out[start:stop],
            recipe.key,
            *words,
            epsilon,
            entry.first + start,
            recipe.noise,
        )

    (threads or Threads()).run([job(*span) for span in spans(entry.size, threads)])


def replay(
    layout: Layout,
    masters: Sequence[torch.Tensor],
    batch: Batch,
    threads: Threads | None = None,
) -> None:
    """Apply the updates of a batch, in order, to every parameter of a space."""
    plain = batch.without_decay()
    jobs: list[Callable[[], None]] = []

    def job(master: torch.Tensor, first: int, one: Batch) -> Callable[[], None]:
        return lambda: _core.spsa_replay(
            master,
            one.key,
            one.streams,
            one.values,
            one.counts,
            one.rates,
            one.decays,
            first,
            one.noise,
        )

    for entry, master in zip(layout.entries, masters, strict=True):
        own = batch if entry.decay else plain
        if master.is_cuda:
            from decotrain.spsa import gpu

            gpu.replay(own, entry.first, master)
            continue
        for start, stop in spans(entry.size, threads):
            jobs.append(job(master[start:stop], entry.first + start, own))
    (threads or Threads()).run(jobs)


def spans(size: int, threads: Threads | None) -> list[tuple[int, int]]:
    width = SPAN if threads is not None and threads.pool is not None else max(size, 1)
    return [(start, min(start + width, size)) for start in range(0, size, width)]
