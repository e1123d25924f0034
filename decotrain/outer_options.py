"""What outer optimizers are told: names and bounds, the same for Python and the command line.

Imports no torch: bad input is answered at once. decotrain/outer/presets.py has the functions.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

from decotrain.errors import ConfigError

PEERS_MAX = 64
PRESETS = (
    "local_sgd", "diloco", "streaming", "eager", "co2", "sparseloco", "delayed_nesterov", "muloco",
    "ddp",
)  # fmt: skip
LAYERS, OVERLAP = 3, 1  # of `streaming`, where nobody says otherwise
# option -> (least, most), both allowed: whole numbers where the bounds are
LIMITS: dict[str, tuple[float, float]] = {
    "sync_every": (1, 10**9),
    "lr": (0.0, 100.0),
    "momentum": (0.0, 0.9999),
    "layers": (1, 10**6),
    "overlap": (0, 10**9),
    "alpha": (0.0, 1.0),
    "clip": (0.0, 1e9),
    "delay": (1, PEERS_MAX),
    "keep": (1, 4096),
    "decay": (0.0, 1.0),
    "bucket_elements": (1, 1 << 28),
}
SWITCHES = ("penalty", "error_feedback", "stochastic", "owner_feedback")
OPTIONAL = ("lr",)  # None: by the number of contributors


def check(values: Mapping[str, Any], prefix: str = "") -> None:
    """ConfigError names the first option that is of the wrong kind or out of range. What is not
    known here (codecs, patterns, options of somebody's own) is for others to check."""
    for key, value in values.items():
        if key in SWITCHES and type(value) is not bool:
            raise ConfigError(f"{prefix}{key}={value!r} must be true or false")
        if key not in LIMITS or (value is None and key in OPTIONAL):
            continue
        least, most = LIMITS[key]
        whole = isinstance(least, int)
        kind = numbers.Integral if whole else numbers.Real  # numpy's too
        bounds = f"{least} and {most}" if whole else f"{least:g} and {most:g}"
        if isinstance(value, bool) or not isinstance(value, kind):
            what = "a whole number" if whole else "a number"
            raise ConfigError(f"{prefix}{key}={value!r} must be {what} between {bounds}")
        if not least <= float(value) <= most:
            raise ConfigError(f"{prefix}{key}={value} is out of range; it lies between {bounds}")


def check_preset(key: str, name: str) -> None:
    """A preset, or what may be a function of somebody's own."""
    module, _, function = name.partition(":")
    if name not in PRESETS and not (module and function):
        raise ConfigError(
            f"{key}={name}: one of {', '.join(PRESETS)}, or module:function for one of your own"
        )


def is_own(name: str) -> bool:
    """`module:function`, and no preset."""
    return ":" in name


def fragments_of(layers: int, each: int) -> int:
    """How many fragments `streaming` makes of a model: its layers by so many, and the rest."""
    return 1 + -(-layers // each)


def check_overlap(sync_every: int, fragments: int, overlap: int) -> None:
    """A round of `streaming` is over when the next fragment's begins."""
    if overlap and overlap * fragments >= sync_every:
        raise ConfigError(
            f"overlap={overlap} is too long: with {fragments} fragments every {sync_every} steps a"
            f" round begins every {sync_every / fragments:g} steps; give a smaller overlap, more"
            " layers in a fragment or a larger sync_every"
        )
