"""What holds the trainer up: its thread makes no tensor of a fragment's size, rounds reuse memory.

Fragments here are several spans long, so what is done span by span is, and no result changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from decotrain.communicator import join
from decotrain.outer import OuterOptimizer, make
from decotrain.outer.fragment import Fragment
from decotrain.outer.spare import Spare
from decotrain.outer.update import SPAN_ELEMENTS

SHAPE = (601, 1003)
LOSSY: dict[str, Any] = {"codec": "e2m1+int8", "error_feedback": True}
PRESETS: dict[str, dict[str, Any]] = {
    "diloco": {"sync_every": 4},
    "streaming": {"sync_every": 4, "layers": 9, "overlap": 2, **LOSSY},
    "muloco": {"sync_every": 4, **LOSSY},
    "eager": {"sync_every": 4, **LOSSY},
    "co2": {"sync_every": 4},
}
WARM, STEPS = 12, 25  # the third round has all the memory there is
assert SHAPE[0] * SHAPE[1] > 2 * SPAN_ELEMENTS


class MadeHere(TorchDispatchMode):
    """Notes what this thread makes anew and is larger than a span."""

    def __init__(self) -> None:
        super().__init__()
        self.large: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = [*args, *(kwargs or {}).values()]
        known = {one.untyped_storage().data_ptr() for one in given if isinstance(one, Tensor)}
        for one in made if isinstance(made, tuple | list) else [made]:
            if not isinstance(one, Tensor) or one.numel() <= SPAN_ELEMENTS:
                continue
            if one.untyped_storage().data_ptr() not in known:
                self.large.append(str(func))
        return made


@contextmanager
def begun(name: str, state: Any = None) -> Iterator[tuple[nn.Module, OuterOptimizer]]:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(*SHAPE))
    inner = torch.optim.SGD(model.parameters(), lr=1e-3)
    with join("local") as comm:
        outer = make(name, model, inner, comm, state=state, **PRESETS[name])
        assert isinstance(outer, OuterOptimizer)
        yield model, outer


@torch.no_grad()
def inner_step(model: nn.Module, step: int) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.0 - 0.01 * (step % 3)).add_(1e-3)


def go(model: nn.Module, outer: OuterOptimizer, until: int) -> None:
    while outer.global_step < until:
        inner_step(model, outer.global_step)
        outer.step()


@pytest.mark.parametrize("name", PRESETS)
def test_a_round_makes_nothing_of_a_fragments_size(name: str) -> None:
    with begun(name) as (model, outer):
        go(model, outer, WARM)
        made, rounds = MadeHere(), outer.rounds()
        while outer.global_step < STEPS:
            inner_step(model, outer.global_step)
            with made:
                outer.step()
        assert outer.rounds() >= rounds + 3
    assert not made.large


def test_what_is_looked_for_would_be_seen() -> None:
    values = torch.zeros(SPAN_ELEMENTS + 1)
    with MadeHere() as made:
        values.clone()
        values[1:].add_(1.0)
        torch.empty_like(values)
    assert made.large == ["aten.clone.default", "aten.empty_like.default"]


@pytest.mark.parametrize("name", ["streaming", "eager", "co2"])  # their flights can be seen
def test_each_round_has_the_memory_of_those_before(name: str) -> None:
    used: list[set[int]] = []
    with begun(name) as (model, outer):
        while outer.global_step < STEPS:
            go(model, outer, outer.global_step + 1)
            if flight := outer._flights.get(0):
                used.append({one.data_ptr() for one in flight.lent if one is not None})
        late, feedback = outer.schedule.late, bool(outer.residuals)
    assert len(used) >= 9
    assert {len(one) for one in used} == {1 + late + feedback}
    # late: the next pseudo-gradient is taken while the last one is still needed
    assert len(set().union(*used)) <= 1 + 2 * late + feedback


def test_fragments_share_memory_and_a_stranger_is_not_taken() -> None:
    spare = Spare(100)
    small = spare.take(torch.zeros(7))
    large = spare.take(torch.zeros(100))
    assert small.shape == (7,)
    at = {small.data_ptr(), large.data_ptr()}
    assert len(at) == 2
    spare.give(small, None, large, torch.zeros(50))
    assert {spare.take(torch.zeros(n)).data_ptr() for n in (100, 100)} == at
    spare.give(large)
    assert spare.take(torch.zeros(9, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert spare.take(torch.zeros(100)).data_ptr() == large.data_ptr()


@pytest.mark.parametrize("name", ["streaming", "eager"])
def test_a_saved_state_stays_when_rounds_go_on(name: str) -> None:
    """Of who saved it, and of who resumed from it: both use the memory of rounds again."""
    with begun(name) as (model, outer):
        go(model, outer, WARM + 1)
        saved, local = outer.state_dict(), deepcopy(model.state_dict())
        flight = {kind: saved["private"][f"0.{kind}"] for kind in ("sent", "residual_before")}
        kept, start = deepcopy(flight), deepcopy(saved)
        assert all(one.any() for one in kept.values())
        go(model, outer, STEPS)
        end = outer.digest()
    with begun(name, start) as (model, outer):
        for key, one in model.state_dict().items():
            assert torch.equal(one, local[key])
        go(model, outer, STEPS)
        assert outer.digest() == end
    for kind, one in kept.items():
        assert torch.equal(flight[kind], one), "of who saved it"
        assert torch.equal(start["private"][f"0.{kind}"], one), "of who resumed from it"


# --- span by span, with the bits of the whole

MODELS: dict[str, Callable[[], Tensor]] = {
    "f32": lambda: torch.randn(SHAPE),
    "bf16": lambda: torch.randn(SHAPE).bfloat16(),
    "f64": lambda: torch.randn(SHAPE, dtype=torch.float64),
    "strided": lambda: torch.randn(SHAPE[::-1]).t(),
}


def scene(kind: str) -> tuple[Fragment, nn.Parameter, Tensor, Tensor, Tensor]:
    """A fragment; its parameter, the local values before, theta and base, in one shape each."""
    torch.manual_seed(9)
    parameter = nn.Parameter(MODELS[kind]())
    small = nn.Parameter(torch.randn(3))  # what comes next is not at the start of a span
    fragment = Fragment(0, {"small": small, "large": parameter}, [], [])
    fragment.theta.copy_(torch.randn(fragment.elements))
    fragment.base.copy_(torch.randn(fragment.elements))
    theta, base = (one[3:].view(SHAPE).clone() for one in (fragment.theta, fragment.base))
    return fragment, parameter, parameter.detach().clone(), theta, base


@pytest.mark.parametrize("kind", MODELS)
def test_spans_give_the_bits_of_the_whole(kind: str) -> None:
    def after(act: Callable[[Fragment], Any]) -> tuple[Tensor, Tensor]:
        fragment, parameter, *_ = scene(kind)
        act(fragment)
        return parameter.detach(), fragment.base[3:].view(SHAPE)

    fragment, _, local, theta, base = scene(kind)
    single, dtype = local.float(), local.dtype
    out = torch.full_like(fragment.theta, torch.nan)
    assert torch.equal(fragment.drift(out)[3:].view(SHAPE), base - single)
    assert not out.isnan().any()
    w, now = after(lambda one: one.adopt())
    assert torch.equal(w, theta.to(dtype))
    assert torch.equal(now, theta)
    for share in (0.3, 0.0):
        w, now = after(lambda one, share=share: one.approach(share))  # type: ignore[misc]
        assert torch.equal(w, (single * share + theta * (1.0 - share)).to(dtype))
        assert torch.equal(now, theta)
    w, now = after(lambda one: one.follow())
    assert torch.equal(w, (theta - (base - single)).to(dtype))
    assert torch.equal(now, theta)
    w, now = after(lambda one: one.move(one.theta, -0.5))
    assert torch.equal(w, (single + theta * -0.5).to(dtype))
    assert torch.equal(now, base)
