"""A mapping becomes a dataclass with the types it names, or one ConfigError that names the key.

Knows no particular setting: decotrain/train/settings.py and decotrain/finetune/settings.py do.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from decotrain.errors import ConfigError

Kind = TypeVar("Kind")
Limits = Mapping[str, tuple[float, float]]  # key -> (least, most); both ends allowed
Choices = Mapping[str, tuple[str, ...]]


def build(kind: type[Kind], config: Mapping[str, Any]) -> Kind:
    """Every field there (but those with a default), nothing else, all of the right type."""
    made: Kind = _build(kind, config, "")
    return made


def check(settings: Any, limits: Limits, choices: Choices) -> None:
    """Every value within its bounds."""
    for key, (least, most) in limits.items():
        value = _at(settings, key)
        if value is not None and not least <= value <= most:
            raise ConfigError(f"{key}={value} is out of range; it lies between {least} and {most}")
    for key, allowed in choices.items():
        if _at(settings, key) not in allowed:
            raise ConfigError(f"{key}={_at(settings, key)}: one of {', '.join(allowed)}")


def _at(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = getattr(settings, part)
    return settings


def _build(kind: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix.rstrip('.') or 'the configuration'} must have keys and values")
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)
    names = [field.name for field in fields]
    optional = {field.name for field in fields if field.default is not dataclasses.MISSING}
    for key in values:
        if key not in names:
            raise ConfigError(f"unknown key {prefix}{key}; there are {', '.join(names)}")
    made = {}
    for name in names:
        if name in values:
            made[name] = _value(hints[name], values[name], prefix + name)
        elif name not in optional:
            raise ConfigError(f"{prefix}{name} is missing")
    return kind(**made)


def _value(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, key + ".")
    kinds = [one for one in typing.get_args(hint) if one is not type(None)]
    if len(kinds) == 1 and type(None) in typing.get_args(hint):  # a type, or null
        return None if value is None else _value(kinds[0], value, key)
    if typing.get_origin(hint) is Mapping and isinstance(value, Mapping):  # for others to check
        return {str(name): one for name, one in value.items()}
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (int, bool) and type(value) is hint:
        return value
    if hint is str and isinstance(value, str | int | float):
        return str(value)
    if hint == tuple[float, float] and isinstance(value, list | tuple) and len(value) == 2:
        return (_value(float, value[0], key), _value(float, value[1], key))
    wanted = {int: "a whole number", float: "a number", bool: "true or false"}
    raise ConfigError(f"{key}={value!r} must be {wanted.get(hint, 'a text or two numbers')}")
