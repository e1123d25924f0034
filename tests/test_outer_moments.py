"""`ddp` shares an optimizer's state from the start: training is what it would be without."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from decotrain.errors import ConfigError
from decotrain.outer import make
from decotrain.train.inner import Float32Muon
from tests.fake_comm import FakeRun
from tests.outer_runs import batch, loss_of, make_model, run_peers

REFUSED = {"LBFGS", "SparseAdam"}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "weight_decay": 0.1, "maximize": True, "foreach": False},
    ],
    "Adagrad": [{}, {"initial_accumulator_value": 0.5}],
    "AdamW": [{}, {"amsgrad": True}, {"fused": True}],
    "NAdam": [{}, {"weight_decay": 0.1}],
    "RMSprop": [{}, {"momentum": 0.9, "centered": True}],
}
KINDS = [
    kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and name not in {"Optimizer", *REFUSED}
]
CASES = [(k, o) for k in (*KINDS, Float32Muon) for o in OPTIONS.get(k.__name__, [{}])]


def matrices(seed: int) -> nn.Module:
    """Muon takes nothing else."""
    model = make_model(seed)
    for layer in (model[0], model[2]):  # type: ignore[index]
        layer.bias = None
    return model


def steps(model: nn.Module, inner: Any, outer: Any, count: int = 6) -> None:
    for step in range(count):
        loss_of(model, batch(1, step)).backward()
        inner.step()
        inner.zero_grad()
        if outer is not None:
            outer.step()


@pytest.mark.parametrize(("kind", "options"), CASES, ids=[f"{k.__name__}-{o}" for k, o in CASES])
def test_one_peer_trains_as_it_would_alone(kind: Any, options: dict[str, Any]) -> None:
    shared = matrices(1) if "Muon" in kind.__name__ else make_model(1)
    alone = deepcopy(shared)
    one, other = (kind(model.parameters(), lr=0.01, **options) for model in (shared, alone))
    called: list[int] = []
    one.register_step_pre_hook(lambda *_: called.append(1))
    outer = make("ddp", shared, one, FakeRun(1).comm(1))
    assert not called, "somebody's hook has seen a step that is none"
    assert all(parameter.grad is None for parameter in shared.parameters())
    steps(shared, one, outer)
    steps(alone, other, None)
    for found, expected in zip(shared.parameters(), alone.parameters(), strict=True):
        assert torch.equal(found, expected)
        assert one.state[found].keys() == other.state[expected].keys()
        for key, value in other.state[expected].items():
            assert torch.equal(one.state[found][key], value), key


def test_there_is_something_to_share_at_once() -> None:
    """The step sizes of Rprop, before anybody has made a step."""
    model = make_model(1)
    inner = torch.optim.Rprop(model.parameters(), lr=0.03)
    outer = make("ddp", model, inner, FakeRun(1).comm(1))
    sizes = [t for b in outer.buckets for k, t in b.state.items() if "step_size" in k]
    assert len(sizes) == 4
    assert all(torch.equal(t, torch.full_like(t, 0.03)) for t in sizes)


def test_peers_hold_one_state_that_starts_at_no_zero() -> None:
    run = FakeRun(2)
    for peer in (1, 2):
        run.comm(peer)

    def body(peer: int) -> str:
        model = make_model(peer)
        inner = torch.optim.NAdam(model.parameters(), lr=0.01)
        outer = make("ddp", model, inner, run.comms[peer])
        steps(model, inner, outer)
        return outer.digest()

    done = run_peers(run, [1, 2], body)
    assert done[1] == done[2]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_an_optimizer_that_takes_no_plain_step_is_named(name: str) -> None:
    model = make_model(1)
    inner = getattr(torch.optim, name)(model.parameters(), lr=0.01)
    with pytest.raises(ConfigError, match=f"{name} does not take.*AdamW.*local_sgd"):
        make("ddp", model, inner, FakeRun(1).comm(1))
    assert not inner.state
    assert inner.param_groups[0]["params"] == list(model.parameters())


class FromParameters(torch.optim.SGD):
    """Begins at the parameters, as averages of iterates do: peers do not share them yet."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state["average"] = parameter.clone()
            state["average"].lerp_(parameter, 0.5)
            parameter.sub_(parameter.grad * 0.01)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}), (FromParameters, {})],
)
def test_a_first_step_that_is_special_is_refused(kind: Any, options: dict[str, Any]) -> None:
    model = make_model(1)
    with pytest.raises(ConfigError, match=f"{kind.__name__} with these options.*local_sgd"):
        make("ddp", model, kind(model.parameters(), lr=0.1, **options), FakeRun(1).comm(1))


def test_what_was_loaded_stays() -> None:
    model = make_model(1)
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    steps(model, inner, None, 2)
    kept = deepcopy(inner.state_dict())
    make("ddp", model, inner, FakeRun(1).comm(1))
    for number, state in inner.state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(value, kept["state"][number][key])
