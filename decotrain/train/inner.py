"""The inner optimizers of the main job: AdamW, or Muon for the matrices of layers."""

from __future__ import annotations

import math

import torch
from torch import nn

from decotrain.train.settings import InnerSettings

MUON_DECAY = 1e-4  # of the published runs


def make_optimizers(model: nn.Module, inner: InnerSettings) -> list[torch.optim.Optimizer]:
    """Matrices decay, gains do not. Muon leaves embeddings and gains to AdamW."""
    named = list(model.named_parameters())
    muon = [p for n, p in named if inner.optimizer == "muon" and p.dim() == 2 and "embed" not in n]
    taken = {id(p) for p in muon}
    rest = [p for _, p in named if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": inner.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=inner.lr, betas=inner.betas, fused=True)
    if not muon:
        return [adamw]
    return [
        torch.optim.Muon(muon, lr=inner.muon_lr, weight_decay=MUON_DECAY, momentum=0.9),
        adamw,
    ]


def set_rates(
    optimizers: list[torch.optim.Optimizer], step: int, steps: int, inner: InnerSettings
) -> float:
    """Linear warm-up, then a cosine down to a fraction; AdamW's rate."""
    warm = min(1.0, (step + 1) / max(inner.warmup_steps, 1))
    cosine = 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))
    factor = warm * (inner.final_lr + (1 - inner.final_lr) * cosine)
    for optimizer in optimizers:
        lr = inner.muon_lr if isinstance(optimizer, torch.optim.Muon) else inner.lr
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
    return inner.lr * factor
