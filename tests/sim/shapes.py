"""What a round of the simulator carries, and what its result has to be."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A round's specification: a sum of f32 chunks whose first two elements tell everything."""

    spec: bytes
    elements: int
    chunk_elements: int

    def data(self, number: int, salt: int) -> bytes:
        out = bytearray(4 * self.elements)
        for at in range(0, self.elements, self.chunk_elements):
            struct.pack_into("<f", out, 4 * at, float(1 << number % 23))
            if at + 1 < self.elements:
                struct.pack_into("<f", out, 4 * at + 4, float(salt))
        return bytes(out)

    def value(self, result: Any, chunk: int) -> list[float]:
        data = result.chunk(chunk)
        pair = [struct.unpack_from("<f", data, at)[0] for at in range(0, min(8, len(data)), 4)]
        return [int(value) for value in pair]

    def expect(self, given: list[Any], chunk: int) -> list[int]:
        if not given:
            return []
        size = min(self.chunk_elements, self.elements - chunk * self.chunk_elements)
        sums = [sum(1 << number % 23 for number, _ in given), sum(salt for _, salt in given)]
        return sums[: min(2, size)]


@dataclass(frozen=True)
class CollectShape:
    """A collect round: each peer's bytes are its number and salt, as many as they like."""

    spec: bytes

    def data(self, number: int, salt: int) -> bytes:
        return struct.pack("<II", number, salt) * (1 + salt % 7)

    def value(self, result: Any, chunk: int) -> list[int]:
        data = result.chunk(chunk)
        return [*struct.unpack_from("<II", data), len(data)] if data else []

    def expect(self, given: list[Any], chunk: int) -> list[int]:
        if not given:
            return []
        number, salt = given[0]
        return [number, salt, 8 * (1 + salt % 7)]
