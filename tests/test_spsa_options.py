"""Every option of SPSA does what it says to the parameters, exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from decotrain.spsa import SPSA, Recipe, code, kernels
from decotrain.spsa.code import POOL_MARK

CODES = bytes([0x40, 0xC0 | 3, code.ZERO, code.SKIP])


def small() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4))


def applied(step: int, codes: bytes = CODES, **options: object) -> tuple[SPSA, list[torch.Tensor]]:
    """After one record of slot 2; and what the parameters were before."""
    spsa = SPSA(small(), **options)  # type: ignore[arg-type]
    before = [master.clone() for master in spsa.space.masters]
    spsa.apply([spsa.recipe.update(step, {2: codes})], step)
    return spsa, before


def noise(spsa: SPSA, words: tuple[int, int], index: int) -> torch.Tensor:
    entry = spsa.space.layout.entries[index]
    out = torch.empty(entry.size)
    kernels.perturb(spsa.recipe, words, 1.0, entry, torch.zeros(entry.size), out)
    return out


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_a_record_moves_the_parameters_by_rate_times_scalar_times_noise(kind: str) -> None:
    spsa, before = applied(3, noise=kind, lr=0.25)
    values = code.decode(CODES)[:2]
    for index, (old, new) in enumerate(zip(before, spsa.space.masters, strict=True)):
        moved = sum(v * noise(spsa, code.stream(3, 2, s), index) for s, v in enumerate(values))
        assert torch.allclose(new, old - (0.25 / 3) * moved, atol=1e-6)  # 3 of 4 samples count


def test_weight_decay_is_one_factor_on_matrices_and_nothing_else() -> None:
    spsa, before = applied(0, bytes([code.ZERO]), lr=0.5, weight_decay=0.1)
    factor = np.float32(1.0 - 0.5 * 0.1)
    for entry, old, new in zip(spsa.space.layout.entries, before, spsa.space.masters, strict=True):
        expected = old.numpy() * factor if entry.name in ("0.weight", "2.weight") else old.numpy()
        assert np.array_equal(new.numpy(), expected), entry.name


@pytest.mark.parametrize(
    ("options", "step", "lr"),
    [
        ({"schedule": "linear", "total_steps": 10}, 5, 0.5),
        ({"schedule": "cosine", "total_steps": 10, "final_fraction": 0.5}, 10, 0.5),
        ({"warmup_steps": 3}, 0, 0.25),
        ({"warmup_steps": 3}, 7, 1.0),
    ],
)
def test_a_schedule_reaches_the_parameters(
    options: dict[str, object], step: int, lr: float
) -> None:
    scheduled, _ = applied(step, lr=1.0, **options)
    plain, _ = applied(step, lr=lr)
    assert scheduled.digest() == plain.digest()


def test_normalisations_differ_by_what_they_divide_by() -> None:
    values = np.array(code.decode(CODES[:3]))
    rates = {name: Recipe(lr=1.0, normalise=name).update(0, {0: CODES}).rate
             for name in ("mean", "sqrt", "std")}  # fmt: skip
    assert rates["mean"] == np.float32(1 / 3)
    assert rates["sqrt"] == np.float32(1 / np.sqrt(3))
    assert rates["std"] == pytest.approx(1 / 3 / values.std(), rel=1e-6)


def test_one_sided_is_one_evaluation_more_than_samples() -> None:
    x = torch.ones(2, 6)
    for one_sided, evaluations in ((True, 6), (False, 10)):
        model, calls = small(), [0]

        def loss(model: nn.Module = model, calls: list[int] = calls) -> torch.Tensor:
            calls[0] += 1
            out: torch.Tensor = model(x)
            return out.square().sum()

        spsa = SPSA(model, samples=5, one_sided=one_sided)
        spsa.measure(0, loss)
        calls[0] = 0  # the first call also finds out who uses what
        spsa.measure(1, loss)
        assert calls[0] == evaluations


def test_a_pool_has_no_other_seeds() -> None:
    recipe = Recipe(pool=4, samples=64)
    terms = recipe.update(9, {0: bytes([0x40] * 64)}).terms
    assert {term.c2 for term in terms} == {POOL_MARK}
    assert {term.c3 for term in terms} == {0, 1, 2, 3}


def test_adapters_move_and_what_they_adapt_does_not() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(6, 6)
            self.lora_down = nn.Linear(6, 2, bias=False)
            self.lora_up = nn.Linear(2, 6, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.base(x) + self.lora_up(self.lora_down(x))
            return out

    model = Adapted()
    spsa = SPSA(model, select="adapters", lr=1e-2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    spsa.step(lambda: model(x).square().sum())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"lora_down.weight", "lora_up.weight"}


def test_frozen_parameters_are_not_moved() -> None:
    model = small()
    model[0].weight.requires_grad_(False)  # type: ignore[union-attr]
    spsa = SPSA(model)
    assert "0.weight" not in [entry.name for entry in spsa.space.layout.entries]


def test_dropout_is_the_same_in_all_evaluations_of_a_step() -> None:
    """Else the difference of two losses would be that of two masks."""
    model = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, 1))
    x = torch.ones(1, 6)
    spsa = SPSA(model, eval_mode=False, samples=3, epsilon=1e-6)
    losses: list[float] = []

    def loss() -> torch.Tensor:
        out = functional.mse_loss(model(x), torch.zeros(1, 1))
        losses.append(float(out))
        return out

    spsa.measure(0, loss)
    losses.clear()
    spsa.measure(1, loss)
    assert len(losses) == 6
    assert max(losses) - min(losses) < 1e-3 * max(losses)
    spsa.measure(2, loss)
    assert abs(losses[-1] - losses[0]) > 1e-2 * max(losses), "and another one in the next step"
