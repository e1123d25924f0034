"""What an inner optimizer holds before its first step, for who shares it from the start (`ddp`).

torch's optimizers make their state inside their first step and move it at once. So that step is
made with a parameter and a gradient of zeros in place of the real ones, and the first value of each
entry is taken: zeros for Adam, but the rate for Rprop and one for the product of NAdam. Whether the
optimizer really goes on alike from there is tried on a few values: SGD with dampening treats its
first step as a special one, and others start from the parameters, which peers do not share yet.
"""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from decotrain.errors import ConfigError

TRIED_STEPS = 3
TRIED_VALUES = 3  # in each dimension
REMEDY = "use another one (AdamW), or local_sgd with sync_every=1, which shares no state of it"


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """The state it would have made, with the rates that it has now. What was loaded stays."""
    if optimizer.state:
        return
    for group in optimizer.param_groups:
        tried: set[tuple[int, torch.dtype]] = set()
        for parameter in group["params"]:
            if not parameter.requires_grad:
                continue
            if (kind := (parameter.dim(), parameter.dtype)) not in tried:
                tried.add(kind)
                _try(optimizer, group, parameter)
            optimizer.state[parameter] = _first(optimizer, group, parameter)


class _Firsts(UserDict[str, Any]):
    """The state of a parameter, and what its entries were at first."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, Any] = {}

    def __setitem__(self, key: str, value: Any) -> None:
        self.first.setdefault(key, _copied(value))
        super().__setitem__(key, value)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _first(optimizer: torch.optim.Optimizer, group: dict[str, Any], like: Tensor) -> dict[str, Any]:
    """Zeros, so that weight decay is nothing too: SGD's momentum begins as the whole gradient."""
    state: defaultdict[Tensor, Any] = defaultdict(_Firsts)
    parameter = nn.Parameter(torch.zeros_like(like))
    with _in_place_of(optimizer, group, parameter, state):
        _step(optimizer, parameter, torch.zeros_like(like))
    return state[parameter].first if parameter in state else {}


def _try(optimizer: torch.optim.Optimizer, group: dict[str, Any], like: Tensor) -> None:
    """Steps from the state that we make are those from none."""
    generator = torch.Generator().manual_seed(0)
    shape = [min(size, TRIED_VALUES) for size in like.shape]
    start, *gradients = (
        torch.randn(shape, generator=generator).to(like) for _ in range(1 + TRIED_STEPS)
    )
    made = _first(optimizer, group, start)
    ends = []
    for begun in ({}, made):
        state: defaultdict[Tensor, Any] = defaultdict(dict)
        parameter = nn.Parameter(start.clone())
        if begun:
            state[parameter] = {key: _copied(value) for key, value in begun.items()}
        with _in_place_of(optimizer, group, parameter, state):
            for gradient in gradients:
                _step(optimizer, parameter, gradient.clone())
        ends.append({"": parameter.detach(), **state.get(parameter, {})})
    if not _same(*ends):
        raise ConfigError(
            f"ddp shares an optimizer's state before its first step, and {_name(optimizer)} with"
            f" these options makes its own from that step's gradient or parameters; {REMEDY}"
        )


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b

    return one.keys() == other.keys() and all(equal(value, other[k]) for k, value in one.items())


def _step(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, gradient: Tensor) -> None:
    parameter.grad = gradient
    try:
        optimizer.step()
    except (TypeError, ValueError, RuntimeError) as error:  # LBFGS, SparseAdam
        raise ConfigError(
            f"ddp steps with a gradient and no closure, which {_name(optimizer)} does not take"
            f" ({error}); {REMEDY}"
        ) from error


def _name(optimizer: torch.optim.Optimizer) -> str:
    return type(optimizer).__name__


@contextmanager
def _in_place_of(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    parameter: nn.Parameter,
    state: defaultdict[Tensor, Any],
) -> Iterator[None]:
    """The optimizer has this parameter alone, and its own hooks do not hear of its steps."""
    instead: dict[str, Any] = {
        "param_groups": [{**group, "params": [parameter]}],
        "state": state,
        "_optimizer_step_pre_hooks": OrderedDict(),
        "_optimizer_step_post_hooks": OrderedDict(),
    }
    kept = {name: getattr(optimizer, name) for name in instead}
    try:
        vars(optimizer).update(instead)
        yield
    finally:
        vars(optimizer).update(kept)
