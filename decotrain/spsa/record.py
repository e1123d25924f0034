"""Records: what was agreed for one step, and the bytes that a peer sends for it.

A peer's payload is the step's number (its low 16 bits) and one code for each sample. The number is
checked by everybody, with the same outcome: a peer whose round slipped by while it measured sends
scalars of noise that the record does not mean, and they count as missing.
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


def payload(step: int, codes: bytes) -> bytes:
    assert 1 <= len(codes) <= code.SAMPLES_MAX, len(codes)
    return struct.pack("<H", step & 0xFFFF) + codes


def entries_of(step: int, parts: Mapping[int, bytes]) -> dict[int, bytes]:
    """The valid payloads of a round, by slot; what is malformed or of another step is missing."""
    entries = {}
    for slot in sorted(parts):
        data = parts[slot]
        good = 3 <= len(data) <= 2 + code.SAMPLES_MAX and 0 <= slot < code.SLOTS_MAX
        if good and struct.unpack_from("<H", data)[0] == step & 0xFFFF:
            entries[slot] = bytes(data[2:])
    return entries
