"""The inner optimizers of the main job: AdamW, or Muon for the matrices of layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from decotrain.train.settings import InnerSettings

MUON_DECAY = 1e-4  # of the published runs


class Float32Muon(torch.optim.Muon):
    """torch's Muon, orthogonalising in float32: its bfloat16 is ten times slower on a CPU that has
    no instructions for it. The same state and options."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average, momentum = state["momentum_buffer"], group["momentum"]
        average.lerp_(gradient, 1 - momentum)
        update = gradient.lerp(average, momentum) if group["nesterov"] else average
        update = orthogonalised(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
        rows, columns = parameter.shape
        if group["adjust_lr_fn"] == "match_rms_adamw":
            ratio = 0.2 * math.sqrt(max(rows, columns))
        else:
            ratio = math.sqrt(max(1.0, rows / columns))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * ratio)


def orthogonalised(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """The matrix with singular values near 1, by Newton and Schulz's iteration (Jordan 2024)."""
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = (matrix.T if tall else matrix) / matrix.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


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
    on_cpu = all(parameter.device.type == "cpu" for parameter in muon)
    kind = Float32Muon if on_cpu else torch.optim.Muon
    return [kind(muon, lr=inner.muon_lr, weight_decay=MUON_DECAY, momentum=0.9), adamw]


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
