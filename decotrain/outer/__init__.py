"""Outer optimizers: four choices (schedule, codec, update, merge) and presets of them.

The only things here that know both tensors and a `Communicator`; no sockets, no data, no model of
ours. A new outer optimizer is a new preset or one new small class, never a new copy of the loop.
"""

from decotrain.outer.codec import CodecChoice
from decotrain.outer.merge import Merge, Mix, Replace
from decotrain.outer.optimizer import OuterOptimizer
from decotrain.outer.presets import DiLoCo
from decotrain.outer.schedule import EveryH, Schedule
from decotrain.outer.update import SGD, Nesterov, Update

__all__ = [
    "SGD",
    "CodecChoice",
    "DiLoCo",
    "EveryH",
    "Merge",
    "Mix",
    "Nesterov",
    "OuterOptimizer",
    "Replace",
    "Schedule",
    "Update",
]
