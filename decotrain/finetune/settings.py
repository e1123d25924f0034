"""What a fine-tune is told: the configuration as typed, checked values.

It imports no torch and opens no file; the recipe's own rules are decotrain/spsa/recipe.py's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from decotrain.control.transport import split_address
from decotrain.errors import ConfigError
from decotrain.outer_options import PEERS_MAX
from decotrain.train import typed
from decotrain.train.settings import DataSettings

TASKS = ("text", "classify")
# What the run says to who joins it by address; base and data are its own, and base is checked.
SHARED = ("task", "seed", "steps", "spsa")


@dataclass(frozen=True)
class SpsaSettings:
    """Fields of `Recipe`, but for those that the run itself says (seed, total_steps)."""

    select: str
    lr: float
    epsilon: float
    samples: int
    noise: str
    normalise: str
    one_sided: bool
    schedule: str
    warmup_steps: int
    final_fraction: float
    weight_decay: float
    staleness: int
    pool: int
    rebase_every: int


@dataclass(frozen=True)
class EverySettings:
    evaluation: int


@dataclass(frozen=True)
class Settings:
    name: str
    folder: str
    resume: str
    seed: int
    base: str | None
    factory: str | None
    task: str
    context: int
    peers: int
    steps: int
    batch: int
    threads: int
    restarts: int
    listen: str
    join: str | None
    held_out_windows: int
    data: DataSettings
    spsa: SpsaSettings
    every: EverySettings
    token_file: str | None = None
    insecure: bool = False

    def recipe_fields(self) -> dict[str, Any]:
        """For `Recipe(**...)`; with constant lr the number of steps may change on a resume."""
        fields = dataclasses.asdict(self.spsa)
        del fields["select"]
        total = 0 if self.spsa.schedule == "constant" else self.steps
        return {**fields, "seed": self.seed, "total_steps": total}

    def shared(self) -> dict[str, Any]:
        """What all peers of a run must have been told alike."""
        values = dataclasses.asdict(self)
        return {key: values[key] for key in SHARED}


LIMITS: typed.Limits = {
    "peers": (1, PEERS_MAX),
    "steps": (1, 10**9),
    "batch": (1, 10**6),
    "threads": (1, 1024),
    "restarts": (0, 10**6),
    "seed": (0, 2**63 - 1),
    "context": (0, 10**6),
    "held_out_windows": (1, 10**7),
    "every.evaluation": (1, 10**9),
}
CHOICES: typed.Choices = {"resume": ("never", "auto"), "task": TASKS}


def parse(config: Mapping[str, Any]) -> Settings:
    """Checked settings; ConfigError names the first key that is wrong and what is allowed."""
    settings = typed.build(Settings, config)
    typed.check(settings, LIMITS, CHOICES)
    if settings.base is None:
        raise ConfigError(
            "base is missing: name the model to start from, base=runs/NAME (of `decotrain train`),"
            " a checkpoint's folder, or a safetensors file together with factory=module:function"
        )
    if settings.join is not None:
        split_address(settings.join)
    return settings
