"""Quantities with units, from a person and for one: counts, rates, times, bytes.

One place for all of them, so that `1Gbit/s`, `80ms` and `1e9` mean the same everywhere. Prefixes
are decimal (k = 1000), bits and bytes are told apart, and a time or a rate without its unit is
an error.
"""

from __future__ import annotations

import math
import re

from decotrain.errors import ConfigError

PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
COUNTS = {**PREFIXES, "b": 1e9}  # 7B parameters are billions
NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(.*?)\s*", re.IGNORECASE)


def parse_count(key: str, text: str) -> float:
    """`1e9`, `10M`, `1.5B`."""
    number, unit = _split(key, text, "10M or 1e9")
    if unit.lower() not in COUNTS:
        raise ConfigError(f"{key}={text}: a count ends in k, M, G (or B) or T, not in {unit!r}")
    return _positive(key, text, number * COUNTS[unit.lower()])


def parse_seconds(key: str, text: str, *, zero: bool = False) -> float:
    """`80ms`, `0.8s`, `2min`."""
    number, unit = _split(key, text, "80ms or 0.8s")
    if unit not in SECONDS:
        wrong = f"{unit!r} is no unit of time" if unit else "a time needs its unit"
        raise ConfigError(f"{key}={text}: {wrong}; write {', '.join(SECONDS)}, as in {key}=80ms")
    return _positive(key, text, number * SECONDS[unit], zero)


def parse_bits_per_s(key: str, text: str) -> float:
    """`1Gbit/s`, `20Mbps`, `12.5MB/s`: b or bit are bits, B or byte are bytes."""
    number, unit = _split(key, text, "100Mbit/s")
    match = re.fullmatch(r"([kKmMgGtT]?)(bit/s|bits/s|bps|b/s|B/s|bytes/s|byte/s)", unit)
    if match is None:
        wrong = f"{unit!r} is no unit of a rate" if unit else "a rate needs its unit"
        raise ConfigError(f"{key}={text}: {wrong}; write bits or bytes for each second, as in"
                          f" {key}=100Mbit/s or {key}=12MB/s")  # fmt: skip
    bits = 8.0 if match[2][0] == "B" or match[2].startswith("byte") else 1.0
    return _positive(key, text, number * PREFIXES[match[1].lower()] * bits)


def _split(key: str, text: str, example: str) -> tuple[float, str]:
    match = NUMBER.fullmatch(text)
    if match is None:
        raise ConfigError(f"{key}={text} is no number with a unit; write for example {example}")
    return float(match[1]), match[2]


def _positive(key: str, text: str, value: float, zero: bool = False) -> float:
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ConfigError(f"{key}={text}: it must be {'0 or more' if zero else 'more than 0'}")
    return value


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def rate(bits_per_s: float) -> str:
    """Bits for each second, for people."""
    for unit in ("bit/s", "kbit/s", "Mbit/s", "Gbit/s"):
        if bits_per_s < 1000:
            return f"{bits_per_s:.3g} {unit}"
        bits_per_s /= 1000
    return f"{bits_per_s:.3g} Tbit/s"
