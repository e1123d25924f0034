"""The outer optimizer of a run's configuration, as `decotrain.outer.make` takes it."""

from __future__ import annotations

from typing import Any

from decotrain.errors import ConfigError
from decotrain.outer.presets import options_of
from decotrain.outer_options import is_own
from decotrain.train.settings import Settings


def options(settings: Settings) -> dict[str, Any]:
    """Of the preset. One of the user's own gets those that it takes: the others belong to the file
    in configs/outer that the configuration began with."""
    given = {key: v for key, v in vars(settings.outer).items() if v is not None}
    preset = given.pop("preset")
    known = options_of(preset)
    if is_own(preset):
        given = {key: value for key, value in given.items() if key in known}
    elif "sync_every" not in known:  # ddp: it is about the log
        del given["sync_every"]
    for key, value in given.items():
        if key not in known:
            raise ConfigError(
                f"outer.{key}={value}: {preset} has no option {key}; there are {', '.join(known)}"
            )
    codec = vars(settings.codec)  # sparseloco has its own
    names = {"codec": "name"} | {key: key for key in codec if key != "name"}
    return given | {key: codec[at] for key, at in names.items() if key in known}
