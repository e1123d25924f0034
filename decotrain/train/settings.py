"""What a training run is told: the configuration as typed, checked values.

hydra composes a mapping; here it becomes dataclasses, or one ConfigError that names the key. The
launcher hands the same mapping to its peers as JSON. It imports no torch and starts nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from decotrain import codecs, outer_options
from decotrain.errors import ConfigError
from decotrain.outer_options import PEERS_MAX
from decotrain.train import typed


@dataclass(frozen=True)
class ModelSettings:
    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    context: int


@dataclass(frozen=True)
class DataSettings:
    path: str | None


@dataclass(frozen=True)
class OuterSettings:
    """The preset and its options; None: the preset's own value, or an option it does not have."""

    preset: str
    sync_every: int  # ddp: steps between two lines in the log
    lr: float | None = None  # None: by the number of contributors
    momentum: float | None = None
    layers: int | None = None
    pattern: str | None = None
    overlap: int | None = None
    alpha: float | None = None
    clip: float | None = None
    penalty: bool | None = None
    delay: int | None = None
    keep: int | None = None
    decay: float | None = None
    bucket_elements: int | None = None
    own: Mapping[str, Any] | None = None  # options that a function of the user's own names


@dataclass(frozen=True)
class CodecSettings:
    name: str
    error_feedback: bool
    residual: str  # f32 or bf16
    stochastic: bool
    owner_feedback: bool


@dataclass(frozen=True)
class InnerSettings:
    optimizer: str
    lr: float
    muon_lr: float
    betas: tuple[float, float]
    weight_decay: float
    clip: float
    warmup_steps: int
    final_lr: float


@dataclass(frozen=True)
class EverySettings:
    evaluation: int
    checkpoint: int


@dataclass(frozen=True)
class Settings:
    name: str
    folder: str
    resume: str
    baseline: bool
    seed: int
    peers: int
    steps: int
    batch: int
    threads: int
    restarts: int
    listen: str
    join: str | None
    keep: int
    held_out_windows: int
    final_windows: int
    prompt: str
    sample_bytes: int
    model: ModelSettings
    data: DataSettings
    outer: OuterSettings
    codec: CodecSettings
    inner: InnerSettings
    every: EverySettings
    token_file: str | None = None
    insecure: bool = False

    @property
    def rounds(self) -> int:
        """Rounds of the whole run."""
        return self.steps // self.outer.sync_every


# What the peers of a run have in common, and who joins by address gets from the coordinator.
SHARED = ("model", "outer", "codec", "inner", "steps", "batch", "seed")
# key -> (least, most); both ends allowed. Those of `outer` are in decotrain/outer_options.py.
LIMITS: dict[str, tuple[float, float]] = {
    "peers": (1, PEERS_MAX),
    "steps": (1, 10**9),
    "batch": (1, 10**6),
    "threads": (1, 1024),
    "restarts": (0, 10**6),
    "seed": (0, 2**63 - 1),
    "keep": (1, 1000),
    "held_out_windows": (1, 10**7),
    "final_windows": (1, 10**7),
    "sample_bytes": (0, 10**6),
    "model.layers": (1, 1000),
    "model.width": (2, 10**6),
    "model.heads": (1, 10**4),
    "model.kv_heads": (1, 10**4),
    "model.hidden": (1, 10**7),
    "model.context": (2, 10**6),
    "inner.lr": (0, 100),
    "inner.muon_lr": (0, 100),
    "inner.weight_decay": (0, 100),
    "inner.clip": (1e-6, 1e9),
    "inner.warmup_steps": (0, 10**9),
    "inner.final_lr": (0, 1),
    "every.evaluation": (1, 10**9),
    "every.checkpoint": (1, 10**9),
}
CHOICES = {
    "resume": ("never", "auto"),
    "codec.residual": ("f32", "bf16"),
    "inner.optimizer": ("adamw", "muon"),
}
# Presets that take no codec: theirs is a part of what they are.
OWN_CODEC = ("sparseloco",)


def parse(config: Mapping[str, Any]) -> Settings:
    """Checked settings; ConfigError names the first key that is wrong and what is allowed."""
    settings = typed.build(Settings, config)
    typed.check(settings, LIMITS, CHOICES)
    outer_options.check_preset("outer.preset", settings.outer.preset)
    given = {key: v for key, v in vars(settings.outer).items() if v is not None}
    outer_options.check(given, "outer.")
    _check_together(settings)
    return settings


def _check_together(settings: Settings) -> None:
    model, outer = settings.model, settings.outer
    if not all(0.0 <= beta < 1.0 for beta in settings.inner.betas):
        raise ConfigError(f"inner.betas={list(settings.inner.betas)}: each is from 0 to below 1")
    if model.width % (2 * model.heads):
        raise ConfigError(
            f"model.width={model.width} is not a multiple of 2 x model.heads={model.heads}"
        )
    if model.heads % model.kv_heads:
        raise ConfigError(
            f"model.heads={model.heads} is not a multiple of model.kv_heads={model.kv_heads}"
        )
    if settings.steps % outer.sync_every:
        raise ConfigError(
            f"steps={settings.steps} is not a multiple of outer.sync_every={outer.sync_every}:"
            " the last steps would never be shared"
        )
    if outer.preset == "streaming":
        parts = outer_options.fragments_of(model.layers, outer.layers or outer_options.LAYERS)
        overlap = outer_options.OVERLAP if outer.overlap is None else outer.overlap
        outer_options.check_overlap(outer.sync_every, parts, overlap)
    codec = settings.codec
    contribution, result = codecs.pair(codec.name)
    if codec.stochastic:
        codecs.check_stochastic(contribution, codec.error_feedback)
    if codec.owner_feedback:
        codecs.check_owner_feedback(result)
    if not settings.prompt:
        raise ConfigError("prompt is empty; the generated sample starts from at least one byte")


def to_mapping(settings: Settings) -> dict[str, Any]:
    """What `parse` takes: for the JSON that peers read."""
    return dataclasses.asdict(settings)
