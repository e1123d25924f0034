"""P12: the same seeds and the same history of memberships give the same digests.

A recorded history (who was in which view, and the seeds of what each contributed) is replayed by
engines and codecs that ship, with frames in another order each time and on another SIMD level:
every round's digest, and the state that all results together make, are the same bits.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from decotrain import _core
from decotrain.control.plan import Candidate, make_plan

ELEMENTS, CHUNK = 5000, 1024
MEAN = 0
CODECS = {"f32": 0, "bf16": 1, "f16": 2, "int8": 3, "e2m1": 4}
TERM = 1

# Rounds in a view: (seed, weights by slot; 0 skips). Views: slots of the members.
History = list[tuple[list[int], list[tuple[int, dict[int, float]]]]]
HISTORY: History = [
    ([0, 1, 2], [(11, {0: 1, 1: 1, 2: 1}), (12, {0: 3, 1: 0.5, 2: 7})]),
    ([0, 2], [(13, {0: 1, 2: 1}), (14, {0: 1e-3, 2: 1e3})]),
    ([0, 2, 3, 4], [(15, {0: 5, 2: 4, 3: 3, 4: 2}), (16, {0: 1, 2: 0, 3: 1, 4: 1})]),
    ([3, 4], [(17, {3: 1, 4: 2})]),
    ([1, 3, 4], [(18, {1: 1, 3: 1, 4: 1}), (19, {1: 0.25, 3: 0.125, 4: 1})]),
]


def contribution(seed: int, slot: int) -> Any:
    draw = np.random.default_rng([seed, slot])
    return (draw.standard_normal(ELEMENTS) * np.exp(draw.standard_normal(ELEMENTS))).astype("f4")


class Replay:
    """One engine for each slot; `order` shuffles which frame goes next."""

    def __init__(self, codec: str, result_codec: str, order: int) -> None:
        self.codec, self.result_codec = codec, result_codec
        self.order = random.Random(order)
        self.engines: dict[int, Any] = {}
        self.number = 0
        self.digests: list[int] = []
        self.state = np.zeros(ELEMENTS, np.float32)
        self.spec = _core.pack_spec(
            op=MEAN, contribution=CODECS[codec], result=CODECS[result_codec],
            elements=ELEMENTS, chunk_elements=CHUNK,
        )  # fmt: skip

    def change_view(self, slots: list[int]) -> None:
        self.number += 1
        self.engines = {slot: self.engines.get(slot) or self.fresh(slot) for slot in slots}
        reports = {100 + s: one.freeze(TERM, self.number) for s, one in self.engines.items()}
        who = [Candidate(100 + slot, slot, 1.0, True, True) for slot in slots]
        plan = make_plan(TERM << 32 | self.number, (TERM, self.number), who, reports, set(reports))
        assert sorted(plan.active) == sorted(reports)
        assert not plan.conflicts
        for engine in self.engines.values():
            assert engine.install(plan.install, 0.0)

    def fresh(self, slot: int) -> Any:
        engine = _core.Engine(100 + slot)
        engine.declare([])  # no tag carries state: who comes is active at once
        return engine

    def round(self, seed: int, weights: dict[int, float]) -> None:
        seqs = {}
        slots = list(weights)
        self.order.shuffle(slots)
        for slot in slots:
            data = None
            if weights[slot]:
                data = encoded(contribution(seed, slot), self.codec)
            begin = self.engines[slot].begin
            seqs[slot] = begin(0, self.spec, data, weights[slot], 0, True)
        self.pump()
        results = {slot: self.engines[slot].take_result(0, seqs[slot]) for slot in slots}
        assert len({one.digest for one in results.values()}) == 1
        result = results[slots[0]]
        self.digests.append(result.digest)
        assert result.outcome == "stable"
        self.state += decoded(result, self.result_codec)

    def pump(self) -> None:
        while True:
            ready = [
                (a, b)
                for a in self.engines
                for b in self.engines
                if a != b and self.engines[a].has_frames(100 + b)
            ]
            if not ready:
                return
            a, b = self.order.choice(ready)
            frame = self.engines[a].next_frame(100 + b)
            if frame is not None:
                self.engines[b].on_frame(100 + a, frame, 0.0)


def encoded(values: Any, codec: str) -> bytes:
    """Chunk after chunk."""
    parts = []
    for first in range(0, ELEMENTS, CHUNK):
        part = values[first : first + CHUNK]
        out = np.empty(_core.codec_bytes(codec, part.size), np.uint8)
        assert _core.codec_encode(codec, part, out)
        parts.append(out.tobytes())
    return b"".join(parts)


def decoded(result: Any, codec: str) -> Any:
    parts = []
    for number, first in enumerate(range(0, ELEMENTS, CHUNK)):
        out = np.empty(min(CHUNK, ELEMENTS - first), np.float32)
        data = np.frombuffer(result.chunk(number), np.uint8)
        assert _core.codec_decode(codec, data, out)
        parts.append(out)
    return np.concatenate(parts)


def replay(
    codec: str, result_codec: str, order: int, level: str, history: History = HISTORY
) -> tuple[list[int], bytes]:
    before = _core.simd()
    _core.set_simd(level)
    try:
        one = Replay(codec, result_codec, order)
        for slots, rounds in history:
            one.change_view(slots)
            for seed, weights in rounds:
                one.round(seed, weights)
    finally:
        _core.set_simd(before)
    return one.digests, one.state.tobytes()


@pytest.mark.parametrize(
    "codecs", [("f32", "f32"), ("bf16", "bf16"), ("int8", "int8"), ("e2m1", "int8")]
)
def test_a_history_replayed_gives_the_same_bits(codecs: tuple[str, str]) -> None:
    seen = [replay(*codecs, order, level) for order, level in ((1, _core.simd()), (2, "scalar"))]
    assert seen[0] == seen[1]
    assert len(set(seen[0][0])) == sum(len(rounds) for _, rounds in HISTORY)


def test_another_history_gives_other_bits() -> None:
    digests, state = replay("f32", "f32", 1, _core.simd())
    changed = HISTORY.copy()
    changed[1] = (HISTORY[1][0], [(13, {0: 1, 2: 1}), (14, {0: 1e-3, 2: 999.0})])
    others, other_state = replay("f32", "f32", 1, _core.simd(), changed)
    assert digests[:3] == others[:3]
    assert digests[3] != others[3]
    assert state != other_state
