"""The newest records, served to newcomers: kilobytes that can stand in for the parameters.

A peer keeps its last records in a buffer of fixed size, which a newcomer fetches first. The chain,
a digest over everything since the base, tells it whether its own parameters are on the way to those
of the others; then it replays, if the time that takes is less than that of a fetch of the
parameters. Otherwise, or when the buffer begins too late, it fetches those.

    u64 number of the first record | u64 the next one | u64 bytes used | 8-byte chain after the last
    then for each record: u8 peers | (u8 slot, u8 samples) each | codes | first 2 bytes of the chain

All integers are little-endian. What comes from another peer is checked throughout, and believed
only when the chain closes.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from decotrain.spsa import code
from decotrain.spsa.record import Record

HEAD = struct.Struct("<QQQ8s")
CHAIN, CHECK = 8, 2
BYTES_MIN, BYTES_MAX = 64 << 10, 512 << 10  # more records than the latter are never worth a replay
STATE_PART = 8  # of the bytes of the parameters, at most, so that looking here first costs little
REPLAY_FREE_S = 1.0  # a replay this short is always taken: with it the newcomer's log goes on
Bytes = npt.NDArray[np.uint8]


def size_for(state_bytes: int) -> int:
    """Of the buffer: the same on all peers of a run."""
    return max(BYTES_MIN, min(BYTES_MAX, state_bytes // STATE_PART))


def root(text: str) -> bytes:
    """The chain before the first record: who was told what, and which base."""
    return hashlib.blake2b(text.encode(), digest_size=CHAIN).digest()


def body_of(entries: Mapping[int, bytes]) -> bytes:
    slots = sorted(entries)
    layout = b"".join(bytes((slot, len(entries[slot]))) for slot in slots)
    return bytes([len(slots)]) + layout + b"".join(entries[slot] for slot in slots)


def after(chain: bytes, entries: Mapping[int, bytes]) -> bytes:
    """The chain behind one more record."""
    return hashlib.blake2b(chain + body_of(entries), digest_size=CHAIN).digest()


class History:
    """What this peer can tell a newcomer. `buffer` is what is served, as it lies."""

    def __init__(self, size: int, step: int, chain: bytes) -> None:
        self.buffer: Bytes = np.zeros(size, dtype=np.uint8)
        self.restart(step, chain)

    def restart(self, step: int, chain: bytes) -> None:
        """Nothing is known of what was before this step."""
        self.first = self.step = step
        self.chain, self._used = chain, 0
        self._write_head()

    def _write_head(self) -> None:
        head = HEAD.pack(self.first, self.step, self._used, self.chain)
        self.buffer[: HEAD.size] = np.frombuffer(head, dtype=np.uint8)

    def append(self, record: Record) -> None:
        assert record.step == self.step, (record.step, self.step)
        self.chain = after(self.chain, record.entries)
        data = body_of(record.entries) + self.chain[:CHECK]
        if HEAD.size + self._used + len(data) > len(self.buffer):
            self._drop_half()
        at = HEAD.size + self._used
        self.buffer[at : at + len(data)] = np.frombuffer(data, dtype=np.uint8)
        self._used += len(data)
        self.step += 1
        self._write_head()

    def _drop_half(self) -> None:
        """The oldest records, until the buffer is half empty."""
        held = self.buffer[HEAD.size : HEAD.size + self._used].tobytes()
        at = 0
        while at < len(held) // 2:
            found = _record(held, at)
            assert found is not None
            at = found[1]
            self.first += 1
        self._used = len(held) - at
        self.buffer[HEAD.size : HEAD.size + self._used] = np.frombuffer(held[at:], dtype=np.uint8)


@dataclass
class Offer:
    """A history as a `Shortcut` of the communicator."""

    tag: int
    history: History
    take: Callable[[Bytes, float], int | None]

    @property
    def buffer(self) -> Bytes:
        return self.history.buffer


def _record(data: bytes, at: int) -> tuple[dict[int, bytes], int] | None:
    """The codes of the record at an offset, and where the next one is; None: not whole."""
    if at >= len(data):
        return None
    peers = data[at]
    codes_at = at + 1 + 2 * peers
    pairs = data[at + 1 : codes_at]
    if peers > code.SLOTS_MAX or len(pairs) != 2 * peers:
        return None
    slots, counts = pairs[0::2], pairs[1::2]
    end = codes_at + sum(counts) + CHECK
    if (
        end > len(data)
        or list(slots) != sorted(set(slots))
        or any(s >= code.SLOTS_MAX for s in slots)
    ):
        return None
    entries = {}
    for slot, count in zip(slots, counts, strict=True):
        entries[slot] = data[codes_at : codes_at + count]
        codes_at += count
    return entries, end


def records_from(data: Bytes, step: int, chain: bytes) -> Sequence[Record] | None:
    """The records from `step` on that another peer's buffer holds, when they follow this chain."""
    text = data.tobytes()
    if len(text) < HEAD.size:
        return None
    first, following, used, last = HEAD.unpack_from(text)
    if not first <= step <= following or used > len(text) - HEAD.size:
        return None
    body, at = text[HEAD.size : HEAD.size + used], 0
    records = []
    for number in range(first, following):
        found = _record(body, at)
        if found is None:
            return None
        entries, at = found
        if number < step:
            continue
        chain = after(chain, entries)
        if body[at - CHECK : at] != chain[:CHECK]:
            return None
        records.append(Record(number, entries))
    return records if at == used and chain == last else None
