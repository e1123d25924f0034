"""Outer optimizers by name: each a choice of schedule, codec, update and merge."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from decotrain.communicator import Communicator
from decotrain.outer.codec import CodecChoice
from decotrain.outer.optimizer import OuterOptimizer
from decotrain.outer.schedule import EveryH
from decotrain.outer.update import Nesterov


def DiLoCo(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    comm: Communicator,
    *,
    sync_every: int = 100,
    lr: float = 0.7,
    momentum: float = 0.9,  # 0.6 when the run has fewer than 100 rounds
    codec: str = "f32",
    error_feedback: bool = False,
    state: dict[str, Any] | None = None,
) -> OuterOptimizer:
    """Everything every `sync_every` steps, Nesterov outside, replace (arXiv 2311.08105)."""
    return OuterOptimizer(
        model,
        optimizer,
        comm,
        schedule=EveryH(sync_every),
        codec=CodecChoice.named(codec, error_feedback),
        update=Nesterov(lr, momentum),
        state=state,
    )
