"""The outer optimizer of a run's configuration, as `decotrain.outer.make` takes it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from decotrain.errors import ConfigError
from decotrain.outer.presets import options_of
from decotrain.outer.schedule import Schedule
from decotrain.outer_options import is_own
from decotrain.train.settings import Settings

PROBED = 8  # rounds of a schedule whose distance is looked at


def check_distance(schedule: Schedule, sync_every: int) -> None:
    """Samples are handed out for `sync_every` steps: where no round tells of them in that time,
    a peer would forget what it has learnt from them."""
    steps = [0, *(schedule.sent_at(0, number) for number in range(1, PROBED + 1))]
    for before, after in pairwise(steps):
        if after - before > sync_every:
            raise ConfigError(
                f"the schedule's rounds after steps {before} and {after} are further apart than"
                f" outer.sync_every={sync_every}: make that at least {after - before}, since"
                " samples are handed out for so many steps at a time"
            )


def options(settings: Settings) -> dict[str, Any]:
    """Of the preset. One of the user's own gets those that it takes: the others belong to the file
    in configs/outer that the configuration began with."""
    given = {key: v for key, v in vars(settings.outer).items() if v is not None}
    preset, own = given.pop("preset"), given.pop("own", {})
    known = options_of(preset)
    if is_own(preset):
        given = {key: value for key, value in given.items() if key in known} | own
    elif own:
        raise ConfigError(f"outer.own is for a function of your own, and {preset} is none")
    elif "sync_every" not in known:  # ddp: it is about the log
        del given["sync_every"]
    for key, value in given.items():
        if key not in known:
            where = f"outer.own.{key}" if key in own else f"outer.{key}"
            there = ", ".join(known)
            raise ConfigError(f"{where}={value}: {preset} has no option {key}; there are {there}")
    codec = vars(settings.codec)  # sparseloco has its own
    names = {"codec": "name"} | {key: key for key in codec if key != "name"}
    return given | {key: codec[at] for key, at in names.items() if key in known}
