"""Every preset with the models that people have: bf16, tied, frozen, unused, parameter groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from decotrain.communicator import Result
from decotrain.errors import ConfigError
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
        while outer.global_step < STEPS:  # in a hurry a peer may get there in fewer of its own
            loss_of(model, batch(peer, outer.global_step)).backward()
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


# --- outer state on a device: here the "device" is the CPU again, with memory of its own

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"ddp"}))
def test_outer_steps_on_a_device_give_the_bits_of_the_host(name: str, device: str) -> None:
    """Peer 2 works on the device, peer 1 in host memory; peer 3 comes late and fetches, and a round
    is lost to it. All hold the same bits, and what is saved on a device resumes on the host."""
    run = FakeRun(2)
    for peer in (1, 2):
        run.comm(peer)
    options = {"sync_every": 2} | OPTIONS.get(name, {})
    places = {1: None, 2: device, 3: device}
    state: dict[int, Any] = {}

    def begin(peer: int, saved: Any = None) -> Any:
        with MAKING:
            torch.manual_seed(peer)
            model = Odd().float()
        outer = make(
            name,
            model,
            grouped(model),
            run.comms[peer],
            device=places[peer],
            state=saved,
            **options,
        )
        return model, outer

    def go(peer: int, pair: Any, steps: int) -> Any:
        model, outer = pair
        inner = grouped(model)
        until = outer.global_step + steps
        while outer.global_step < until:
            loss_of(model, batch(peer, outer.global_step)).backward()
            inner.step()
            inner.zero_grad()
            outer.step()
        outer.settle()
        return pair

    pairs = run_peers(run, [1, 2], lambda peer: go(peer, begin(peer), 8))
    last = max(seq for tag, seq in run.rounds if tag == 0)
    run.lost.add((3, last + 2))
    run.comm(3)
    pairs[3] = begin(3)
    run_peers(run, [1, 2, 3], lambda peer: go(peer, pairs[peer], 16))
    for peer, (_, outer) in pairs.items():
        for f in outer.fragments:
            assert torch.equal(f.theta.cpu(), f.served["theta"]), "served is what was not moved"
            for key, tensor in f.state.items():
                assert torch.equal(tensor, pairs[1][1].fragments[f.tag].state[key]), (peer, key)
        state[peer] = outer.state_dict()
    theta = pairs[2][1].fragments[0].theta
    assert theta is not pairs[2][1].fragments[0].served["theta"]
    assert run.comms[3].fetches >= 1
    run = FakeRun(1)
    run.comm(1)
    _, resumed = begin(1, state[2])
    assert resumed.digest() == pairs[2][1].digest()


def test_ddp_has_nothing_to_put_on_a_device() -> None:
    model = Odd()
    with pytest.raises(ConfigError, match="no outer state"):
        make("ddp", model, grouped(model), FakeRun(1).comm(1), device="cpu")


def test_results_after_a_fetch_move_what_was_fetched() -> None:
    """One catch_up may do both: the copy on the device is old when the first result comes."""
    run = FakeRun(1)
    model = Odd().float()
    comm = run.comm(1)
    outer = make("local_sgd", model, grouped(model), comm, sync_every=2, device="cpu")
    fragment = outer.fragments[0]
    fetched, delta = torch.full_like(fragment.theta, 3.0), torch.full_like(fragment.theta, 0.5)

    def catch_up(tag: int, apply: Any, **_: Any) -> int:
        fragment.served["theta"].copy_(fetched)
        comm.versions[tag] += 4
        apply(Result(tag, comm.versions[tag], "stable", (7,), False, 0, [delta.clone()]))
        return comm.versions[tag]

    comm.catch_up = catch_up  # type: ignore[method-assign]
    outer._catch_up(fragment)
    assert torch.equal(fragment.theta, fetched - delta)
    assert torch.equal(fragment.served["theta"], fetched - delta)
