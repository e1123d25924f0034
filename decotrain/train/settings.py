"""What a training run is told: the configuration as typed, checked values.

hydra composes a mapping; here it becomes dataclasses, or one ConfigError that names the key. The
launcher hands the same mapping to its peers as JSON. It imports no torch and starts nothing.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from decotrain.errors import ConfigError

PEERS_MAX = 64


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
    preset: str
    sync_every: int
    lr: float
    momentum: float


@dataclass(frozen=True)
class CodecSettings:
    name: str
    error_feedback: bool


@dataclass(frozen=True)
class InnerSettings:
    lr: float
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

    @property
    def rounds(self) -> int:
        """Rounds of the whole run."""
        return self.steps // self.outer.sync_every


# key -> (least, most); both ends allowed
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
    "outer.sync_every": (1, 10**9),
    "outer.lr": (0, 100),
    "outer.momentum": (0, 0.9999),
    "inner.lr": (0, 100),
    "inner.weight_decay": (0, 100),
    "inner.clip": (1e-6, 1e9),
    "inner.warmup_steps": (0, 10**9),
    "inner.final_lr": (0, 1),
    "every.evaluation": (1, 10**9),
    "every.checkpoint": (1, 10**9),
}
CHOICES = {"resume": ("never", "auto"), "outer.preset": ("diloco",)}


def parse(config: Mapping[str, Any]) -> Settings:
    """Checked settings; ConfigError names the first key that is wrong and what is allowed."""
    settings: Settings = _build(Settings, config, "")
    for key, (least, most) in LIMITS.items():
        value = _at(settings, key)
        if not least <= value <= most:
            raise ConfigError(f"{key}={value} is out of range; it lies between {least} and {most}")
    for key, allowed in CHOICES.items():
        if _at(settings, key) not in allowed:
            raise ConfigError(f"{key}={_at(settings, key)}: one of {', '.join(allowed)}")
    _check_together(settings)
    return settings


def _check_together(settings: Settings) -> None:
    model, outer = settings.model, settings.outer
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
    if not settings.prompt:
        raise ConfigError("prompt is empty; the generated sample starts from at least one byte")


def _at(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = getattr(settings, part)
    return settings


def _build(kind: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix.rstrip('.') or 'the configuration'} must have keys and values")
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in names:
            raise ConfigError(f"unknown key {prefix}{key}; there are {', '.join(names)}")
    made = {}
    for name in names:
        if name not in values:
            raise ConfigError(f"{prefix}{name} is missing")
        made[name] = _value(hints[name], values[name], prefix + name)
    return kind(**made)


def _value(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, key + ".")
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (int, bool) and type(value) is hint:
        return value
    if hint is str and isinstance(value, str | int | float):
        return str(value)
    if hint == (str | None) and isinstance(value, str | int | None):
        return None if value is None else str(value)
    if hint == tuple[float, float] and isinstance(value, list | tuple) and len(value) == 2:
        return (_value(float, value[0], key), _value(float, value[1], key))
    wanted = {int: "a whole number", float: "a number", bool: "true or false"}
    raise ConfigError(f"{key}={value!r} must be {wanted.get(hint, 'a text or two numbers')}")


def to_mapping(settings: Settings) -> dict[str, Any]:
    """What `parse` takes: for the JSON that peers read."""
    return dataclasses.asdict(settings)
