"""Outer optimizers: four choices (schedule, codec, update, merge) and presets of them.

The only things here that know both tensors and a `Communicator`; no sockets, no data, no model of
ours. A new outer optimizer is a new preset or one new small class, never a new copy of the loop.
"""

from decotrain.outer.codec import Codec, CodecChoice, TopK
from decotrain.outer.fragment import Fragment
from decotrain.outer.gradients import GradientAveraging
from decotrain.outer.group import LocalGroup
from decotrain.outer.merge import Eager, Merge, Mix, Replace
from decotrain.outer.optimizer import OuterOptimizer
from decotrain.outer.presets import PRESETS, make
from decotrain.outer.schedule import EveryH, Schedule, Staggered
from decotrain.outer.update import (
    SGD,
    AdamW,
    ClippedMomentum,
    DelayedNesterov,
    Nesterov,
    Update,
)

__all__ = [
    "PRESETS",
    "SGD",
    "AdamW",
    "ClippedMomentum",
    "Codec",
    "CodecChoice",
    "DelayedNesterov",
    "Eager",
    "EveryH",
    "Fragment",
    "GradientAveraging",
    "LocalGroup",
    "Merge",
    "Mix",
    "Nesterov",
    "OuterOptimizer",
    "Replace",
    "Schedule",
    "Staggered",
    "TopK",
    "Update",
    "make",
]
