"""Records: what was agreed for one step, and the bytes that a peer sends for it.

A peer's payload is the step's number (its low 16 bits), 16 bits of the digest of what it was told
(recipe, parameters and, in the first step, the base), and one code for each sample. Everybody
checks them, with the same outcome. A peer whose round slipped by while it measured sends scalars
of noise that the record does not mean: they count as missing. Of peers that were told different
things the most count, and the others find out.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from decotrain.spsa import code


@dataclass(frozen=True)
class Record:
    """The codes of each slot that is in."""

    step: int
    entries: Mapping[int, bytes]

    @property
    def samples(self) -> int:
        return sum(len(codes) for codes in self.entries.values())


HEAD = struct.Struct("<HH")


def payload(step: int, lineage: int, codes: bytes) -> bytes:
    assert 1 <= len(codes) <= code.SAMPLES_MAX, len(codes)
    return HEAD.pack(step & 0xFFFF, lineage) + codes


def entries_of(step: int, parts: Mapping[int, bytes]) -> tuple[dict[int, bytes], int | None]:
    """The codes that count, by slot, and the lineage they share (None: nobody is in).

    What is malformed, of another step or of a smaller camp is missing; of equal camps the one with
    the lowest slot counts.
    """
    camps: dict[int, dict[int, bytes]] = {}
    for slot in sorted(parts):
        data = parts[slot]
        long_enough = HEAD.size < len(data) <= HEAD.size + code.SAMPLES_MAX
        if not long_enough or not 0 <= slot < code.SLOTS_MAX:
            continue
        number, lineage = HEAD.unpack_from(data)
        if number == step & 0xFFFF:
            camps.setdefault(lineage, {})[slot] = bytes(data[HEAD.size :])
    if not camps:
        return {}, None
    chosen = min(camps, key=lambda lineage: (-len(camps[lineage]), min(camps[lineage])))
    return camps[chosen], chosen
