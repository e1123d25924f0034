"""Checks for values that come from outside: one small function for each kind of field.

Each takes a value and returns it, or raises MessageError. Nothing here knows which message a field
belongs to. Ranges and caps are part of the kind, so that no check can be forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from decotrain.errors import ConfigError, MessageError

Check = Callable[[Any], Any]

U8, U16, U32, U64 = 2**8 - 1, 2**16 - 1, 2**32 - 1, 2**64 - 1


def integer(low: int, high: int) -> Check:
    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise MessageError(f"expected an integer in {low}..{high}, got {brief(value)}")
        return value

    return check


def number(low: float, high: float) -> Check:
    def check(value: Any) -> float:
        if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
            raise MessageError(f"expected a number in {low}..{high}, got {brief(value)}")
        return float(value)

    return check


def boolean(value: Any) -> bool:
    if type(value) is not bool:
        raise MessageError(f"expected true or false, got {brief(value)}")
    return value


def text(length_max: int, length_min: int = 0) -> Check:
    def check(value: Any) -> str:
        if type(value) is not str or not length_min <= len(value) <= length_max:
            raise MessageError(
                f"expected text of {length_min}..{length_max} characters, got {brief(value)}"
            )
        if not value.isprintable():
            raise MessageError(f"a text contains control characters: {brief(value)}")
        return value

    return check


def blob(length_min: int, length_max: int) -> Check:
    def check(value: Any) -> bytes:
        if type(value) is not bytes or not length_min <= len(value) <= length_max:
            raise MessageError(f"expected {length_min}..{length_max} bytes, got {brief(value)}")
        return value

    return check


def sequence(item: Check, length_max: int, length_min: int = 0) -> Check:
    def check(value: Any) -> list[Any]:
        if type(value) not in (list, tuple) or not length_min <= len(value) <= length_max:
            raise MessageError(
                f"expected a list of {length_min}..{length_max} items, got {brief(value)}"
            )
        return [item(entry) for entry in value]

    return check


def row(*items: Check) -> Check:
    """A list with one kind for each place."""

    def check(value: Any) -> list[Any]:
        if type(value) not in (list, tuple) or len(value) != len(items):
            raise MessageError(f"expected a list of {len(items)} items, got {brief(value)}")
        return [item(entry) for item, entry in zip(items, value, strict=True)]

    return check


def record(**fields: Check) -> Check:
    """A map with exactly these keys."""

    def check(value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            raise MessageError(f"expected a map, got {brief(value)}")
        if value.keys() != fields.keys():
            odd = sorted(str(key)[:32] for key in value.keys() ^ fields.keys())[:4]
            raise MessageError(f"missing or unknown keys: {', '.join(odd)}")
        return {key: within(key, item, value[key]) for key, item in fields.items()}

    return check


def mapping(key: Check, item: Check, length_max: int) -> Check:
    def check(value: Any) -> dict[Any, Any]:
        if type(value) is not dict or len(value) > length_max:
            raise MessageError(f"expected a map of at most {length_max} keys, got {brief(value)}")
        return {key(name): item(entry) for name, entry in value.items()}

    return check


def optional(item: Check) -> Check:
    def check(value: Any) -> Any:
        return None if value is None else item(value)

    return check


class _BoundError(Exception):
    pass


def tree(depth_max: int, items_max: int) -> Check:
    """Plain data (maps with text keys, lists, numbers, text), bounded in depth and items."""

    def check(value: Any) -> Any:
        try:
            return _tree(value, depth_max, [items_max])
        except _BoundError:
            bounds = f"at most {items_max} items and {depth_max} levels"
            raise MessageError(f"too large or too deep: {bounds} are taken") from None

    return check


def _tree(value: Any, depth: int, left: list[int]) -> Any:
    left[0] -= 1
    if left[0] < 0 or depth < 0:
        raise _BoundError
    if value is None or type(value) in (bool, str):
        return value
    if type(value) is int and -(2**63) <= value <= U64:
        return value
    if type(value) is float and math.isfinite(value):
        return value
    if type(value) is list:
        return [_tree(entry, depth - 1, left) for entry in value]
    if type(value) is dict:
        odd = [key for key in value if type(key) is not str]
        if odd:
            raise MessageError(f"a key that is no text: {brief(odd[0])}")
        return {key: _tree(entry, depth - 1, left) for key, entry in value.items()}
    raise MessageError(f"not plain data: {brief(value)}")


def within(name: str, item: Check, value: Any) -> Any:
    """Runs a check and says in which field it failed."""
    try:
        return item(value)
    except MessageError as error:
        raise MessageError(f"{name}: {error}") from None


def given(name: str, item: Check, value: Any) -> Any:
    """The same for what a person gave, who is told at once and by the name used for it: a message
    that is none is dropped where it comes to, and nobody there knows whose it was."""
    try:
        return within(name, item, value)
    except MessageError as error:
        raise ConfigError(str(error)) from None


def brief(value: Any) -> str:
    shown = repr(value) if type(value) in (int, float, bool, str, type(None)) else type(value)
    return str(shown)[:60]


u8, u16, u32, u64 = integer(0, U8), integer(0, U16), integer(0, U32), integer(0, U64)
