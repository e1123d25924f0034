"""What one seed decides: sizes, speeds, probabilities and the faults that will happen."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from decotrain._core import pack_spec
from tests.sim.shapes import CollectShape, Shape

OP_SUM, OP_COLLECT, RULE_SUM = 1, 2, 1

FAULTS = (
    ("kill", 6),
    ("kill_several", 2),
    ("kill_all", 1),
    ("restart", 5),
    ("stop", 4),
    ("kill_coordinator", 5),
    ("crash_coordinator", 5),
    ("stop_coordinator", 1),
    ("lose_record", 1),
    ("break_link", 6),
    ("cut_link", 3),
    ("cut_control", 4),
    ("cut_coordinator", 2),
    ("partition", 2),
    ("join", 5),
    ("leave", 2),
    ("slow", 2),
    ("kick", 1),
    ("replay", 6),
)


@dataclass
class Options:
    peers: int = 3
    min_peers: int = 1
    tags: int = 1
    stateless: tuple[int, ...] = ()
    shapes: list[Any] = field(default_factory=list)
    ahead: list[int] = field(default_factory=list)  # of each tag: rounds open before the newest
    held_back: float = 0.0  # results not applied before those in flight behind them are taken
    latency_s: float = 0.01
    tick_s: float = 0.1
    think_s: float = 0.1
    fetch_s: float = 0.1
    streams: int = 1
    window: int = 4
    split: float = 0.2
    control_loss: float = 0.0
    control_double: float = 0.0
    control_late: float = 0.0
    control_replay: bool = False
    grace_s: float = 0.0
    quorum: float = 1.0
    done_bound_s: float = 0.0
    missed_rounds: int = 64
    skips: float = 0.0
    shares: bool = False
    launchers: bool = True
    state_digests: bool = True
    observers_begin: bool = False
    faults: list[tuple[float, str]] = field(default_factory=list)
    fault_s: float = 5.0


def draw_options(draw: random.Random) -> Options:
    """Every probability is drawn for each seed: rare things are common in some histories."""
    options = Options()
    options.peers = draw.choice((1, 2, 2, 3, 3, 3, 4, 4, 5, 6))
    options.min_peers = draw.randint(1, options.peers)
    options.tags = draw.choice((1, 1, 2, 3))
    options.stateless = tuple(tag for tag in range(options.tags) if draw.random() < 0.15)
    options.ahead = [draw.choice((0, 0, 0, 1, 2, 4, 7)) for _ in range(options.tags)]
    options.shapes = [_draw_shape(draw, ahead) for ahead in options.ahead]
    options.held_back = draw.choice((0.0, 0.2, 0.8))
    options.latency_s = draw.choice((0.001, 0.01, 0.01, 0.05, 0.15))
    options.tick_s = draw.choice((0.1, 0.2))
    options.think_s = draw.choice((0.02, 0.1, 0.3))
    options.fetch_s = draw.choice((0.02, 0.1, 0.5))
    options.streams = draw.choice((1, 1, 2))
    options.window = draw.choice((1, 2, 8))
    options.split = draw.choice((0.0, 0.2, 0.6))
    if draw.random() < 0.5:
        options.control_loss = draw.choice((0.02, 0.1, 0.25))
    options.control_double = draw.choice((0.0, 0.1, 0.3))
    options.control_late = draw.choice((0.0, 0.0, 0.1))
    options.control_replay = draw.random() < 0.5
    if draw.random() < 0.2:
        options.grace_s = draw.choice((0.02, 0.1, 0.3))
        options.quorum = draw.choice((0.5, 0.75))
    if draw.random() < 0.3:
        options.done_bound_s = draw.choice((0.3, 1.0))
    options.missed_rounds = draw.choice((1, 4, 64))
    options.skips = draw.choice((0.0, 0.0, 0.1, 0.5))
    options.shares = draw.random() < 0.3
    options.launchers = draw.random() < 0.5
    options.state_digests = draw.random() < 0.7
    options.observers_begin = draw.random() < 0.2
    options.fault_s = draw.choice((3.0, 5.0, 8.0))
    kinds, weights = zip(*FAULTS, strict=True)
    enabled = [kind for kind in kinds if draw.random() < 0.6]
    rate = draw.choice((0.0, 0.5, 1.0, 2.0, 4.0))  # faults each second
    at_s = 0.3
    while rate and enabled:
        at_s += draw.expovariate(rate)
        if at_s >= options.fault_s:
            break
        share = [weights[kinds.index(kind)] for kind in enabled]
        options.faults.append((at_s, draw.choices(enabled, share)[0]))
    if options.done_bound_s and draw.random() < 0.7:  # somebody must be late for it
        options.grace_s, options.quorum = options.grace_s or 0.1, 0.5
        for _ in range(draw.randint(1, 3)):
            options.faults.append((0.3 + draw.random() * (options.fault_s - 0.3), "slow_up"))
    return options


def _draw_shape(draw: random.Random, ahead: int) -> Any:
    if draw.random() < 0.15:
        return CollectShape(pack_spec(op=OP_COLLECT, elements=0, chunk_elements=64, ahead=ahead))
    chunk = draw.choice((2, 2, 2, 3, 16))
    chunks = draw.choice((1, 2, 3, 5, 8))
    if draw.random() < 0.15:
        chunk, chunks = 6000, 3  # above the size that is sent without waiting for OPEN
    elements = chunk * chunks - draw.choice((0, 0, 1))
    spec = pack_spec(op=OP_SUM, rule=RULE_SUM, elements=elements, chunk_elements=chunk, ahead=ahead)
    return Shape(spec, elements, chunk)
