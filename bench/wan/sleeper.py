"""One peer that trains by sleeping: its steps cost no processor, everything else is real.

    python -m bench.wan.sleeper NAME

The model is a stack of layers whose forward and backward pass sleep for what a real one would take
(autograd runs them, so gradients come layer by layer); the communicator, the outer optimizer, the
codecs, TCP and the links are those of a real run. It takes tasks as JSON lines, each a run of its
own, and says how long its steps took. Parameters drift by a constant gradient; nothing is learned.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from decotrain.communicator import join
from decotrain.outer import make

# Parts of a step: forward, backward (twice as long), then the optimizer's own update, which is
# real and takes what it takes; the rest of the step is slept.
FORWARD, BACKWARD = 0.3, 0.6
WAIT_S = 300.0


class Clock:
    """Time of computing within one step: the trainer's waits for rounds do not count."""

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s
        self.outer: Any = None
        self._begun_s = self._waited_s = 0.0

    def begin(self) -> None:
        self._begun_s, self._waited_s = time.perf_counter(), self.outer.sync_s

    def until(self, part: float) -> None:
        """Sleeps until so much of the step's computing is over."""
        waited_s = self.outer.sync_s - self._waited_s
        left_s = self._begun_s + waited_s + part * self.step_s - time.perf_counter()
        if left_s > 0:
            time.sleep(left_s)


class Slept(torch.autograd.Function):
    """One layer's passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Layer) -> Tensor:
        ctx.layer = layer
        layer.clock.until(FORWARD * (layer.number + 1) / layer.count)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        layer = ctx.layer
        layer.clock.until(FORWARD + BACKWARD * (layer.count - layer.number) / layer.count)
        return gradient, layer.gradient, None


class Layer(nn.Module):
    def __init__(self, number: int, count: int, gradient: Tensor, clock: Clock) -> None:
        super().__init__()
        self.number, self.count, self.clock, self.gradient = number, count, clock, gradient
        self.weight = nn.Parameter(torch.zeros_like(gradient))

    def forward(self, x: Tensor) -> Tensor:
        return Slept.apply(x, self.weight, self)


class Model(nn.Module):
    """Nothing but layers, so that fragments are of one size."""

    def __init__(self, parameters: int, layers: int, clock: Clock, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        gradient = torch.randn(parameters // layers, generator=generator)
        self.blocks = nn.Sequential(*(Layer(n, layers, gradient, clock) for n in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


@contextmanager
def joined(task: dict[str, Any], name: str) -> Iterator[Any]:
    comm = join(task["join"], name=name, insecure=True, timeout_s=WAIT_S)
    try:
        yield comm
        comm.leave()
    finally:
        comm.close()


def train(task: dict[str, Any], name: str) -> dict[str, float]:
    """`warm` steps, then `steps` of which the time is taken."""
    clock = Clock(task["step_s"])
    model = Model(task["parameters"], task["layers"], clock, task["seed"])
    inner = torch.optim.SGD(model.parameters(), lr=1e-3)
    start = torch.zeros((), requires_grad=True)
    with joined(task, name) as comm:
        outer = clock.outer = make(task["outer"], model, inner, comm, **task["options"])
        made, marks = 0, []
        while outer.global_step < task["warm"] + task["steps"]:
            if not marks and outer.global_step >= task["warm"]:
                made, marks = 0, [figures(outer, comm)]
            clock.begin()
            model(start).backward()
            inner.step()
            inner.zero_grad()
            clock.until(1.0)
            outer.step()
            made += 1
        marks.append(figures(outer, comm))
        outer.finish()
        digest = int(outer.digest()[:12], 16)
    first, last = marks
    return {key: last[key] - first[key] for key in first} | {"steps": made, "digest": digest}


def figures(outer: Any, comm: Any) -> dict[str, float]:
    return {
        "wall_s": time.perf_counter(),
        "waited_s": outer.sync_s,
        "cpu_s": time.process_time(),
        "sent_bytes": comm.figures()["bytes_out"],
    }


def main() -> int:
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(train(json.loads(line), sys.argv[1])), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
