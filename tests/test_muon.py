"""Muon on a CPU: torch's own but for the precision of its products."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from decotrain.train.inner import Float32Muon, orthogonalised

OPTIONS = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}


def matrices(seed: int) -> list[nn.Parameter]:
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape)) for shape in ((48, 96), (96, 48), (64, 64))]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_it_moves_as_torchs_does(nesterov: bool, adjust: str) -> None:
    ours, theirs = matrices(1), matrices(1)
    before = matrices(1)
    options = {**OPTIONS, "nesterov": nesterov, "adjust_lr_fn": adjust}
    both = [Float32Muon(ours, **options), torch.optim.Muon(theirs, **options)]
    for step in range(4):
        torch.manual_seed(10 + step)
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for one in both:
            one.step()
    for mine, other, was in zip(ours, theirs, before, strict=True):
        moved = (other - was).norm()
        assert (mine - other).norm() < 0.02 * moved, "more than bfloat16 explains"
    for mine, other in zip(ours, theirs, strict=True):
        states = [one.state[p] for one, p in zip(both, (mine, other), strict=True)]
        assert states[0].keys() == states[1].keys()
        assert torch.equal(states[0]["momentum_buffer"], states[1]["momentum_buffer"])


def test_what_is_orthogonalised_has_singular_values_near_one() -> None:
    for shape in ((40, 90), (90, 40)):
        torch.manual_seed(3)
        values = torch.linalg.svdvals(
            orthogonalised(torch.randn(shape), (3.4445, -4.7750, 2.0315), 5, 1e-7)
        )
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_a_closure_and_a_missing_gradient() -> None:
    parameters = matrices(2)
    muon = Float32Muon(parameters, **OPTIONS)
    kept = parameters[2].detach().clone()

    def closure() -> torch.Tensor:
        loss = sum(p.square().sum() for p in parameters[:2])
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        return loss.detach()

    assert float(muon.step(closure)) > 0
    assert torch.equal(parameters[2], kept)
    assert muon.state[parameters[0]]
