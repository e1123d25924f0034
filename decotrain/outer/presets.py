"""Outer optimizers by one word: each a choice of schedule, codec, update and merge.

    outer = make("streaming", model, optimizer, comm, sync_every=100, codec="e2m1+int8")

The keyword arguments of a function below are the options of its preset; configs/outer/ holds the
same for `decotrain train`. lr=None is the published rate for the number of contributors. Instead of
such a word, `module:function` names one of the user's own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from decotrain import named, outer_options
from decotrain.communicator import Communicator
from decotrain.errors import ConfigError, Error
from decotrain.outer.codec import CodecChoice, TopK
from decotrain.outer.gradients import BUCKET_ELEMENTS, GradientAveraging
from decotrain.outer.merge import Eager, Mix, Replace
from decotrain.outer.optimizer import OuterOptimizer
from decotrain.outer.schedule import EveryH, Staggered
from decotrain.outer.update import SGD, ClippedMomentum, DelayedNesterov, Nesterov

Choices = dict[str, Any]  # the four, as OuterOptimizer takes them; ddp: as GradientAveraging does


def coded(preset: Callable[..., Choices]) -> Callable[..., Choices]:
    """Adds the options of every preset that has no codec of its own: `codec` (one word, or
    contributions+results), `error_feedback`, the type of its `residual` (f32 or bf16),
    `stochastic` rounding instead of it, and `owner_feedback` for what results lose."""

    @functools.wraps(preset)
    def whole(
        *,
        codec: str = "f32",
        error_feedback: bool = False,
        residual: str = "f32",
        stochastic: bool = False,
        owner_feedback: bool = False,
        **options: Any,
    ) -> Choices:
        chosen = CodecChoice.named(
            codec,
            error_feedback,
            residual=residual,
            stochastic=stochastic,
            owner_feedback=owner_feedback,
        )
        return {**preset(**options), "codec": chosen}

    added = [o for o in inspect.signature(whole, follow_wrapped=False).parameters.values()][:5]
    own = inspect.signature(preset)
    options = [*own.parameters.values(), *added]
    whole.__signature__ = own.replace(parameters=options)  # type: ignore[attr-defined]
    return whole


@coded
def local_sgd(*, sync_every: int = 100) -> Choices:
    """The mean of the parameters, every `sync_every` steps."""
    return {"schedule": EveryH(sync_every), "update": SGD(1.0)}


@coded
def diloco(
    *,
    sync_every: int = 100,
    lr: float | None = None,
    momentum: float = 0.9,  # 0.6 when the run has fewer than 100 rounds
) -> Choices:
    """Everything every `sync_every` steps, Nesterov outside, replace (arXiv 2311.08105)."""
    return {
        "schedule": EveryH(sync_every),
        "update": Nesterov(lr, momentum),
    }


@coded
def streaming(
    *,
    sync_every: int = 100,
    layers: int = outer_options.LAYERS,  # in a fragment
    pattern: str = "strided",  # or sequential
    overlap: int = outer_options.OVERLAP,  # inner steps that a round has until its result is used
    alpha: float = 0.5,  # how much of the local parameters stays
    lr: float | None = None,
    momentum: float = 0.9,
) -> Choices:
    """One fragment of a few layers after the other, while training goes on (arXiv 2501.18512)."""
    return {
        "schedule": Staggered(sync_every, layers, pattern, overlap),
        "update": Nesterov(lr, momentum),
        "merge": Mix(alpha) if alpha else Replace(),
    }


@coded
def eager(
    *,
    sync_every: int = 100,
    lr: float | None = 0.4,
    momentum: float = 0.9,
) -> Choices:
    """A whole round for the transfer, our own part of the mean at once (arXiv 2502.12996)."""
    return {
        "schedule": EveryH(sync_every, overlap=sync_every),
        "update": Nesterov(lr, momentum),
        "merge": Eager(),
    }


@coded
def co2(
    *,
    sync_every: int = 48,
    lr: float | None = 1.0,
    momentum: float = 0.0,  # up to 16 peers; 0.2 up to 32, 0.5 up to 64
    clip: float = 1.0,
    penalty: bool = True,
) -> Choices:
    """One round late, with a penalty on staleness and clipped momentum (arXiv 2401.16265)."""
    return {
        "schedule": EveryH(sync_every, overlap=sync_every),
        "update": ClippedMomentum(lr, momentum, clip, penalty),
    }


def sparseloco(
    *, sync_every: int = 30, lr: float | None = 1.0, keep: int = 64, decay: float = 0.95
) -> Choices:
    """The largest 64 of every 4096 values in two bits, error feedback (arXiv 2508.15706)."""
    return {"schedule": EveryH(sync_every), "codec": TopK(keep, decay), "update": SGD(lr)}


@coded
def delayed_nesterov(
    *,
    sync_every: int = 50,  # of the fastest peer; the others enter with the steps they have
    delay: int = 4,  # contributions between two steps of the momentum: the number of peers
    lr: float | None = None,
    momentum: float = 0.9,
) -> Choices:
    """For peers of unequal speed that arrive one by one (arXiv 2401.09135)."""
    return {
        "schedule": EveryH(sync_every, hurry=True),
        "update": DelayedNesterov(lr, momentum, delay),
    }


def muloco(
    *,
    sync_every: int = 30,
    lr: float | None = 0.8,
    momentum: float = 0.9,
    codec: str = "e2m1+int8",
    error_feedback: bool = True,
    decay: float = 0.9,  # of what the codec lost
    residual: str = "f32",  # or bf16: what is kept of it
    stochastic: bool = False,  # rounding, without error feedback
    owner_feedback: bool = False,  # of what results lose
) -> Choices:
    """DiLoCo for Muon inside: few bits, and error feedback that fades (arXiv 2505.23725)."""
    return {
        "schedule": EveryH(sync_every),
        "codec": CodecChoice.named(
            codec, error_feedback, decay, residual, stochastic, owner_feedback
        ),
        "update": Nesterov(lr, momentum),
    }


@coded
def ddp(
    *,
    bucket_elements: int = BUCKET_ELEMENTS,
) -> Choices:
    """The mean of the gradients in every step: no outer optimizer, for comparison."""
    return {
        "bucket_elements": bucket_elements,
    }


PRESETS: dict[str, Callable[..., Choices]] = {
    name: globals()[name] for name in outer_options.PRESETS
}
Outer = OuterOptimizer | GradientAveraging
MORE = ("device", "epoch_portions", "state")  # for OuterOptimizer, and no option of `outer.`


def options_of(name: str) -> Mapping[str, inspect.Parameter]:
    """The options of a preset, or of a function of the user's own, by name."""
    if outer_options.is_own(name):
        return _options_of_own(name)
    if name not in PRESETS:
        raise ConfigError(f"outer={name} is unknown; there are {', '.join(PRESETS)}")
    return inspect.signature(PRESETS[name]).parameters


def make(
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    comm: Communicator,
    *,
    device: torch.device | str | None = None,
    epoch_portions: int = 0,
    state: dict[str, Any] | None = None,
    **options: Any,
) -> Outer:
    """The outer optimizer of that name, with options of its own. device, state: see
    OuterOptimizer; epoch_portions: see Allotment."""
    known = options_of(name)
    for option in options:
        if option not in known:
            raise ConfigError(f"{name} has no option {option}; there are {', '.join(known)}")
    outer_options.check(options)
    if outer_options.is_own(name):
        more = {"device": device, "epoch_portions": epoch_portions or None, "state": state}
        return _make_own(name, (model, optimizer, comm), options, more)
    if name == "ddp":
        if device is not None:
            raise ConfigError("ddp has no outer state to put on a device; leave device= out")
        choices = ddp(**options)
        return GradientAveraging(
            model, optimizer, comm, **choices, epoch_portions=epoch_portions, state=state
        )
    choices = PRESETS[name](**options) | {"device": device, "epoch_portions": epoch_portions}
    return OuterOptimizer(model, optimizer, comm, **choices, state=state)


# --- one of the user's own


def _options_of_own(name: str) -> Mapping[str, inspect.Parameter]:
    """What its signature has after model, optimizer and comm. It has `sync_every` in any case: a
    run's samples and log go by it, and what lacks it was hardly meant to be one."""
    function = named.function("outer.preset", name)
    try:
        listed = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # written in C
        listed = []
    places = [p for p in listed[:3] if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    found = {p.name: p for p in listed[3:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if len(places) < 3 or "sync_every" not in found:
        raise ConfigError(
            f"outer.preset={name} is no outer optimizer: it is called with (model, optimizer,"
            " comm, sync_every=..., ...)"
        )
    return {key: p for key, p in found.items() if key not in MORE}


def _make_own(
    name: str, places: tuple[Any, ...], options: dict[str, Any], more: dict[str, Any]
) -> OuterOptimizer:
    function = named.function("outer.preset", name)
    listed = inspect.signature(function).parameters
    every = any(p.kind is p.VAR_KEYWORD for p in listed.values())
    given = {key: value for key, value in more.items() if value is not None}
    for key in ("device", "state"):  # without these it would be another run than was asked for
        if key in given and not every and key not in listed:
            raise ConfigError(
                f"outer.preset={name} takes no {key}: give it {key}=None and hand that to"
                " OuterOptimizer"
            )
    given = {key: value for key, value in given.items() if every or key in listed}
    try:
        made = function(*places, **options, **given)
    except Error:
        raise
    except Exception as error:  # whatever somebody else's code raises
        raise ConfigError(f"outer.preset={name} raised {named.said(error)}") from error
    if not isinstance(made, OuterOptimizer):
        raise ConfigError(
            f"outer.preset={name} returned {type(made).__name__}, and no OuterOptimizer"
        )
    return made
