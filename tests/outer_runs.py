"""Peers as threads over a fake run, and the naive reference, for tests of outer optimizers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from decotrain.outer import (
    OuterOptimizer,
)
from tests.fake_comm import WAIT_S, FakeRun

MAKING = threading.Lock()  # torch's generator is one for the process, and peers are threads here


def make_model(seed: int = 0) -> nn.Module:
    with MAKING:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def batch(peer: int, step: int, size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * peer + step)
    return (
        torch.randn(size, 5, generator=generator),
        torch.randn(size, 3, generator=generator),
    )


def loss_of(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    x, y = data
    dtype = next(model.parameters()).dtype
    return ((model(x.to(dtype)) - y.to(dtype)) ** 2).mean()


@dataclass
class Trained:
    outer: OuterOptimizer
    model: nn.Module
    theta: list[torch.Tensor] = field(default_factory=list)  # after each round
    digests: list[str] = field(default_factory=list)


def run_peers(run: FakeRun, peers: list[int], body: Callable[[int], Any]) -> dict[int, Any]:
    """Runs body(peer) for each peer in a thread of its own; the first error is raised here."""
    done: dict[int, Any] = {}
    errors: list[BaseException] = []

    def work(peer: int) -> None:
        try:
            done[peer] = body(peer)
        except BaseException as error:
            errors.append(error)
            run.remove(peer)

    threads = [threading.Thread(target=work, args=(peer,), daemon=True) for peer in peers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    if errors:
        raise errors[0]
    assert len(done) == len(peers), "a peer hangs"
    return done


def train(
    run: FakeRun,
    peer: int,
    steps: int,
    make: Callable[[nn.Module, torch.optim.Optimizer, Any], OuterOptimizer],
    tokens: Callable[[int], float] = lambda peer: 1.0,
    inner_lr: float = 0.1,
) -> Trained:
    model = make_model(seed=peer)  # different on purpose: the broadcast makes them equal
    inner = torch.optim.SGD(model.parameters(), lr=inner_lr)
    out = Trained(make(model, inner, run.comms[peer]), model)
    for step in range(steps):
        loss_of(model, batch(peer, step)).backward()
        inner.step()
        inner.zero_grad()
        if out.outer.step(tokens(peer)):
            out.theta.append(out.outer.fragments[0].theta.clone())
            out.digests.append(out.outer.digest())
    return out


def take_steps(model: nn.Module, inner: Any, outer: Any, steps: int) -> None:
    """Peer 1's first steps."""
    for step in range(steps):
        loss_of(model, batch(1, step)).backward()
        inner.step()
        inner.zero_grad()
        outer.step(1.0)


def train_all(n: int, steps: int, make: Any, **options: Any) -> dict[int, Trained]:
    run = FakeRun(n)
    for peer in range(1, n + 1):
        run.comm(peer)
    return run_peers(run, list(run.comms), lambda peer: train(run, peer, steps, make, **options))


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().double().reshape(-1) for p in model.parameters()])


def put(model: nn.Module, values: torch.Tensor) -> None:
    at = 0
    for parameter in model.parameters():
        span = values[at : at + parameter.numel()]
        parameter.data.copy_(span.view(parameter.shape))
        at += parameter.numel()


def reference(
    n: int,
    rounds: int,
    sync_every: int,
    lr: float,
    momentum: float,
    tokens: Callable[[int], float] = lambda peer: 1.0,
    alpha: float = 0.0,
    inner_lr: float = 0.1,
) -> list[torch.Tensor]:
    """theta after each round: Douillard et al. 2023, written down as it stands, in float64."""
    replicas = [make_model(seed=1).double() for _ in range(n)]
    theta = flat(replicas[0])
    m = torch.zeros_like(theta)
    out = []
    for number in range(rounds):
        for index, replica in enumerate(replicas):
            for step in range(number * sync_every, (number + 1) * sync_every):
                replica.zero_grad()
                loss_of(replica, batch(index + 1, step)).backward()
                for parameter in replica.parameters():
                    parameter.data -= inner_lr * parameter.grad
        total = sum(tokens(peer) for peer in range(1, n + 1))
        delta = sum(
            (theta - flat(replica)) * tokens(index + 1) / total
            for index, replica in enumerate(replicas)
        )
        m = momentum * m + delta
        theta = theta - lr * (delta + momentum * m)
        for replica in replicas:
            put(replica, alpha * flat(replica) + (1 - alpha) * theta)
        out.append(theta.clone())
    return out


def assert_close(found: torch.Tensor, expected: torch.Tensor, relative: float = 1e-6) -> None:
    error = float((found.double() - expected).norm() / expected.norm())
    assert error < relative, f"relative error {error:.2e}"
