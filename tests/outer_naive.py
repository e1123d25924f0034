"""Every preset as its formulas stand: n replicas in a loop, float64, nothing of decotrain.outer.

Peers are numbers from 1. A script says who is there after which step (`present`), whose round is
not counted (`waived`: peer and number of the round, 1, 2, ...) and how many tokens a step is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from decotrain import _core
from tests.outer_runs import MAKING, batch, loss_of

INNER_LR = 0.1


class Deep(nn.Module):
    """Two parameters outside, four layers inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x).tanh()
        out: Tensor = self.head(x)
        return out


def deep(seed: int = 1) -> nn.Module:
    with MAKING:
        torch.manual_seed(seed)
        return Deep()


def vector(model: nn.Module, names: Collection[str] | None = None) -> Tensor:
    """The parameters whose name starts with one of `names` (None: all) as one vector."""
    found = [p for n, p in model.named_parameters() if names is None or n.startswith(tuple(names))]
    return torch.cat([p.detach().double().reshape(-1) for p in found])


def assign(model: nn.Module, values: Tensor, names: Collection[str] | None = None) -> None:
    at = 0
    for name, parameter in model.named_parameters():
        if names is None or name.startswith(tuple(names)):
            span = values[at : at + parameter.numel()]
            parameter.data.copy_(span.view(parameter.shape))
            at += parameter.numel()


@dataclass
class Script:
    """Who is there, and what happens to them."""

    steps: int
    present: Callable[[int], list[int]]  # peers that take step 1, 2, ...
    waived: set[tuple[int, int]] = field(default_factory=set)
    tokens: Callable[[int], float] = lambda peer: 1.0
    make: Callable[[int], nn.Module] = deep
    dies: dict[int, int] = field(default_factory=dict)  # peer -> the step in whose round it dies


@dataclass
class Naive:
    """One round's mean, with the weights of those who count."""

    script: Script
    replicas: dict[int, Any] = field(default_factory=dict)
    tokens: dict[Any, float] = field(default_factory=dict)  # of (peer, fragment), not counted yet

    def start(self) -> Tensor:
        return vector(self.script.make(1).double())

    def inner_steps(self, step: int, theta: Tensor, fragments: Collection[Any]) -> list[int]:
        """Everybody who is there takes a step; a newcomer from theta."""
        peers = self.script.present(step)
        for peer in peers:
            if peer not in self.replicas:
                self.replicas[peer] = self.script.make(1).double()
                assign(self.replicas[peer], theta)
            model = self.replicas[peer]
            model.zero_grad()
            loss_of(model, batch(peer, step - 1)).backward()
            for parameter in model.parameters():
                parameter.data -= INNER_LR * parameter.grad
            for fragment in fragments:
                key = peer, fragment
                self.tokens[key] = self.tokens.get(key, 0.0) + self.script.tokens(peer)
        return peers

    def mean(
        self, deltas: dict[int, Tensor], fragment: Any, number: int
    ) -> tuple[Tensor, set[int]]:
        """(mean, who counted)"""
        counted = [p for p in deltas if (p, number) not in self.script.waived]
        total = sum(self.tokens[p, fragment] for p in counted)
        mean = sum(deltas[p] * (self.tokens[p, fragment] / total) for p in counted)
        for peer in counted:
            self.tokens[peer, fragment] = 0.0
        return mean, set(counted)


def streaming(
    script: Script, groups: list[list[str]], every: int, overlap: int, alpha: float,
    lr: float, momentum: float,
) -> list[dict[int, Tensor]]:  # fmt: skip
    """Local parameters of each peer after each step (Douillard et al. 2025, algorithm 2)."""
    naive = Naive(script)
    whole = script.make(1).double()
    theta = {p: vector(whole, names) for p, names in enumerate(groups)}
    m = {p: torch.zeros_like(t) for p, t in theta.items()}
    offsets = [p * every // len(groups) for p in range(len(groups))]
    flying: dict[int, tuple[Tensor, set[int], set[int]]] = {}
    out = []

    def landed(p: int) -> tuple[Tensor, Tensor]:
        new_m = momentum * m[p] + flying[p][0]
        return new_m, theta[p] - lr * (flying[p][0] + momentum * new_m)

    for t in range(1, script.steps + 1):
        for p, names in enumerate(groups):  # what a newcomer gets: rounds under way included
            assign(whole, landed(p)[1] if p in flying else theta[p], names)
        peers = naive.inner_steps(t, vector(whole), range(len(groups)))
        for p, names in enumerate(groups):
            since = t - offsets[p]
            if since % every == 0 and since >= every:
                deltas = {i: theta[p] - vector(naive.replicas[i], names) for i in peers}
                flying[p] = (*naive.mean(deltas, p, since // every), set(peers))
            if (since - overlap) % every == 0 and p in flying:
                m[p], theta[p] = landed(p)
                _, counted, took_part = flying.pop(p)
                for i in took_part & set(peers):
                    w = vector(naive.replicas[i], names)
                    new = alpha * w + (1 - alpha) * theta[p]
                    assign(naive.replicas[i], new if i in counted else (w + theta[p]) / 2, names)
                    if i not in counted:
                        naive.tokens[i, p] /= 2
        out.append({i: vector(naive.replicas[i]) for i in peers})
    return out


def eager(script: Script, every: int, lr: float, momentum: float) -> list[dict[int, Tensor]]:
    """Each peer has a theta and an m of its own (Kale et al. 2025).

    A newcomer's are what they would be had it always moved by the means alone. Who was waived goes
    half of the way to its new theta: what is left goes with the next round, as in `late`.
    """
    naive = Naive(script)
    start = naive.start()
    zero = torch.zeros_like(start)
    theta: dict[int, Tensor] = {}
    m: dict[int, Tensor] = {}
    own: dict[int, Tensor] = {}  # each peer's part of the mean that is on its way
    common, common_m = start, zero  # moved by the means that have come in
    mean = zero
    flying: tuple[dict[int, Tensor], set[int], dict[int, float]] = {}, set(), {}
    out = []
    for t in range(1, script.steps + 1):
        landed_m = momentum * common_m + mean
        landed = common - lr * (mean + momentum * landed_m)
        newcomers = set(script.present(t)) - set(naive.replicas)
        peers = naive.inner_steps(t, landed, [0])
        for i in newcomers:
            theta[i], m[i], own[i] = common, common_m, zero
        if t % every == 0:
            deltas = {}
            sent, counted, tokens = flying
            given = {i: naive.tokens[i, 0] for i in peers}
            for i in peers:
                began = i in theta and own[i] is not zero
                deltas[i] = (theta[i] if began else landed) - vector(naive.replicas[i])
                g = mean - own[i] + deltas[i] / len(peers)
                m[i] = momentum * m[i] + g
                before, theta[i] = theta[i], theta[i] - lr * (g + momentum * m[i])
                own[i] = deltas[i] / len(peers)
                waived = i in sent and i not in counted
                w = (before - sent[i] + theta[i]) / 2 if waived else theta[i]
                assign(naive.replicas[i], w)
            common, common_m = landed, landed_m
            mean, counts = naive.mean(deltas, 0, t // every)
            for i in peers:
                waived = i in sent and i not in counted
                naive.tokens[i, 0] = tokens[i] / 2 if waived else 0.0
            flying = deltas, counts, given
        out.append({i: vector(naive.replicas[i]) for i in peers})
    return out


def late(
    script: Script,
    every: int,
    apply: Callable[[Tensor, Tensor, dict[str, Any]], Tensor],
) -> list[dict[int, Tensor]]:
    """The mean of round t - 1 is used at the end of round t, and everybody starts from there."""
    naive = Naive(script)
    theta = naive.start()
    memory: dict[str, Any] = {}
    flying: tuple[Tensor, set[int], dict[int, Tensor]] | None = None
    tokens: dict[int, float] = {}
    base: dict[int, Tensor] = {}  # where a peer's present steps began
    out = []
    for t in range(1, script.steps + 1):
        landed = theta if flying is None else apply(theta, flying[0], dict(memory))
        newcomers = set(script.present(t)) - set(naive.replicas)
        peers = naive.inner_steps(t, landed, [0])
        base |= dict.fromkeys(newcomers, landed)
        if t % every == 0:
            deltas = {i: base[i] - vector(naive.replicas[i]) for i in peers}
            lost: dict[int, Tensor] = {}
            if flying is not None:
                delta, counted, sent = flying
                theta = apply(theta, delta, memory)
                lost = {i: d for i, d in sent.items() if i not in counted}
            given = {i: naive.tokens[i, 0] for i in peers}
            flying = (*naive.mean(deltas, 0, t // every), deltas)
            for i in peers:  # what did not count goes with the next round, half of the way to theta
                w = (base[i] - lost[i] + theta) / 2 if i in lost else theta
                base[i] = theta
                assign(naive.replicas[i], w)
                naive.tokens[i, 0] = tokens.get(i, 0.0) / 2 if i in lost else 0.0
            tokens = given
        out.append({i: vector(naive.replicas[i]) for i in peers})
    return out


def co2(momentum: float, clip: float, lr: float = 1.0) -> Any:
    """CO2's outer step, penalty and clip included; the gap's reference is the mean's own length."""

    def apply(theta: Tensor, delta: Tensor, memory: dict[str, Any]) -> Tensor:
        gap = 1 + memory.get("move", torch.zeros(())).norm() / delta.norm()
        m = momentum * memory.get("m", torch.zeros_like(theta)) + delta / gap
        memory["m"] = m.clamp(-clip, clip)
        memory["move"] = lr * memory["m"]
        return theta - memory["move"]

    return apply


def nesterov(lr: float, momentum: float) -> Any:
    def apply(theta: Tensor, delta: Tensor, memory: dict[str, Any]) -> Tensor:
        memory["m"] = momentum * memory.get("m", torch.zeros_like(theta)) + delta
        return theta - lr * (delta + momentum * memory["m"])

    return apply


def delayed(
    script: Script, every: int, delay: int, lr: float, momentum: float
) -> list[dict[int, Tensor]]:
    """Liu et al. 2024: arrivals one after the other. Those of one round are equally weighted."""
    naive = Naive(script)
    theta = naive.start()
    m, total, count = torch.zeros_like(theta), torch.zeros_like(theta), 0
    out = []
    for t in range(1, script.steps + 1):
        peers = naive.inner_steps(t, theta, [0])
        if t % every == 0:
            deltas = {i: theta - vector(naive.replicas[i]) for i in peers}
            mean, counted = naive.mean(deltas, 0, t // every)
            theta = theta - lr * mean * len(counted) / delay
            total, count = total + mean * len(counted), count + len(counted)
            if count >= delay:
                m = momentum * m + total / count
                theta = theta - lr * momentum * m
                total, count = torch.zeros_like(theta), 0
            for i in peers:
                w = vector(naive.replicas[i])
                assign(naive.replicas[i], theta if i in counted else (w + theta) / 2)
                if i not in counted:
                    naive.tokens[i, 0] /= 2
        out.append({i: vector(naive.replicas[i]) for i in peers})
    return out


def sparse(script: Script, every: int, keep: int, decay: float) -> list[dict[int, Tensor]]:
    """SparseLoCo; the codec is the core's."""
    naive = Naive(script)
    theta = naive.start()
    residual: dict[int, Tensor] = {}
    out = []
    for t in range(1, script.steps + 1):
        peers = naive.inner_steps(t, theta, [0])
        if t % every == 0:
            sents = {}
            for i in peers:
                e = decay * residual.get(i, torch.zeros_like(theta))
                e = e + theta - vector(naive.replicas[i])
                data = np.empty(_core.topk_bytes(e.numel(), keep), np.uint8)
                assert _core.topk_encode(e.float().numpy(), keep, data)
                sent = np.zeros(e.numel(), np.float32)
                assert _core.topk_add(data, keep, 1.0, sent)
                residual[i] = e - torch.from_numpy(sent).double()
                sents[i] = torch.from_numpy(sent).double()
            theta = theta - naive.mean(sents, 0, t // every)[0]
            for i in peers:
                assign(naive.replicas[i], theta)
        out.append({i: vector(naive.replicas[i]) for i in peers})
    return out


def muloco(
    script: Script, every: int, codec: str, lr: float, momentum: float, decay: float
) -> list[dict[int, Tensor]]:
    """Nesterov on what a lossy codec leaves, what it took comes later; the codec is the core's."""
    naive = Naive(script)
    theta = naive.start()
    apply, memory = nesterov(lr, momentum), dict[str, Any]()
    residual: dict[int, Tensor] = {}
    out = []
    for t in range(1, script.steps + 1):
        peers = naive.inner_steps(t, theta, [0])
        if t % every == 0:
            sents = {}
            for i in peers:
                e = decay * residual.get(i, torch.zeros_like(theta))
                e = e + theta - vector(naive.replicas[i])
                data = np.empty(_core.codec_bytes(codec, e.numel()), np.uint8)
                assert _core.codec_encode(codec, e.float().numpy(), data)
                sent = np.zeros(e.numel(), np.float32)
                assert _core.codec_decode(codec, data, sent)
                sents[i] = torch.from_numpy(sent).double()
                residual[i] = e - sents[i]
            theta = apply(theta, naive.mean(sents, 0, t // every)[0], memory)
            for i in peers:
                assign(naive.replicas[i], theta)
        out.append({i: vector(naive.replicas[i]) for i in peers})
    return out


def data_parallel(script: Script) -> list[dict[int, Tensor]]:
    """One model; the mean of everybody's gradients."""
    model = script.make(1).double()
    out = []
    for t in range(1, script.steps + 1):
        peers = script.present(t)
        model.zero_grad()
        for peer in peers:
            (loss_of(model, batch(peer, t - 1)) / len(peers)).backward()
        for parameter in model.parameters():
            parameter.data -= INNER_LR * parameter.grad
        out.append(dict.fromkeys(peers, vector(model)))
    return out
