"""Every preset with the models that people have: bf16, tied, frozen, unused, parameter groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from decotrain.outer import PRESETS, OuterOptimizer, make
from tests.fake_comm import FakeRun
from tests.outer_runs import MAKING, batch, loss_of, run_peers

OPTIONS: dict[str, dict[str, Any]] = {
    "streaming": {"sync_every": 4, "overlap": 1},
    "sparseloco": {"sync_every": 2, "keep": 20},
    "muloco": {"sync_every": 2, "codec": "f32"},
    "ddp": {"bucket_elements": 10},
}
STEPS = 12


class Odd(nn.Module):
    """bf16, a tied matrix, a frozen one and one that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5, bias=False)
        self.second = nn.Linear(5, 5, bias=False)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.full((5,), 0.5), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3))
        self.last = nn.Linear(5, 3)
        self.bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.second(self.first(x).relu()) * self.frozen)
        return out


def grouped(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups of their own rates; a matrix decays, the rest does not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0, "lr": 2e-3},
        ],
        lr=1e-2,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_bf16_tied_frozen_and_unused_parameters_in_groups(name: str, dtype: torch.dtype) -> None:
    run = FakeRun(2)
    comms = {peer: run.comm(peer) for peer in (1, 2)}

    def body(peer: int) -> tuple[str, Odd, Any, float, float]:
        with MAKING:
            torch.manual_seed(peer)
            model = Odd().to(dtype)
        inner = grouped(model)
        options = OPTIONS.get(name, {"sync_every": 2})
        outer = make(name, model, inner, comms[peer], **options)
        with torch.no_grad():
            before = float(loss_of(model, batch(0, 0, 64)))
        for step in range(STEPS):
            loss_of(model, batch(peer, step)).backward()
            inner.step()
            inner.zero_grad()
            outer.step()
        outer.finish()
        with torch.no_grad(), outer.swapped():
            after = float(loss_of(model, batch(0, 0, 64)))
        return outer.digest(), model, outer, before, after

    done = run_peers(run, [1, 2], body)
    (one, model, outer, before, after), (two, *_) = done[1], done[2]
    assert one == two
    assert after < before, "it learned nothing"
    assert model.second.weight is model.first.weight
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.frozen.tolist() == [0.5] * 5
    assert model.unused.tolist() == [1.0] * 3
    parts = outer.fragments if isinstance(outer, OuterOptimizer) else outer.buckets
    names = [key for part in parts for key in part.parameters]
    assert sorted(names) == ["first.weight", "last.bias", "last.weight", "unused"]
    if isinstance(outer, OuterOptimizer):
        assert all(f.theta.dtype == torch.float32 for f in outer.fragments), "outer state is f32"


def test_local_parameters_in_bf16_are_the_outer_ones_rounded() -> None:
    run = FakeRun(1)
    model = Odd()
    inner = grouped(model)
    outer = make("diloco", model, inner, run.comm(1), sync_every=2)
    for step in range(4):
        loss_of(model, batch(1, step)).backward()
        inner.step()
        inner.zero_grad()
        outer.step()
    theta, span = outer.fragments[0].theta, outer.fragments[0].spans["first.weight"]
    assert torch.equal(model.first.weight.detach().flatten(), theta[span].bfloat16())
    assert not torch.equal(theta, theta.bfloat16().float()), "theta is no more precise than w"
