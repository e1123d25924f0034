"""The seed log: a fine-tune as a file of kilobytes.

    magic "DTSEEDL1" | u32 header bytes | header (zlib JSON) | 8-byte chain of all before | records

The header holds the recipe, the list of parameters, the digest of the base (SHA-256 of the float32
parameters before the first record) and the number of the first step. A record is one step:

    u8 flags | layout, if it differs from the one before: u8 peers, (u8 slot, u8 samples) each
             | one byte for each sample, slot after slot | u16 chain

The chain is a BLAKE2b over the chain before and the record: a wrong byte makes its record wrong,
and all that follow. After every SEAL_EVERY records, before the next, a seal holds all 8 bytes.
So a step of 16 samples takes 19 bytes. All integers are little-endian.

Appending only; a tail torn by a crash is cut off when the log is opened for appending. Damage
further from the end is an error that names the step: nothing is repaired by guessing.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decotrain.errors import ConfigError, FileError
from decotrain.spsa import code
from decotrain.spsa.recipe import Recipe
from decotrain.spsa.record import Record
from decotrain.spsa.space import Layout

MAGIC = b"DTSEEDL1"
HEADER_BYTES_MAX = 16 << 20
SEAL_EVERY = 256
TAIL_BYTES_MAX = 64 << 10  # more than this behind the last good record is damage, not a torn tail
LAYOUT, SEAL = 1, 0x80
CHAIN, CHECK = 8, 2


@dataclass(frozen=True)
class Header:
    recipe: Recipe
    layout: Layout
    base_digest: str
    first_step: int = 0

    def to_bytes(self) -> bytes:
        text = json.dumps(
            {
                "recipe": self.recipe.to_json(),
                "parameters": self.layout.to_json(),
                "base_digest": self.base_digest,
                "first_step": self.first_step,
            },
            sort_keys=True,
        )
        packed = zlib.compress(text.encode(), 9)
        body = MAGIC + struct.pack("<I", len(packed)) + packed
        return body + chained(b"", body)

    @classmethod
    def parse(cls, packed: bytes) -> Header:
        inflate = zlib.decompressobj()
        try:
            text = inflate.decompress(packed, HEADER_BYTES_MAX)
            values = json.loads(text)
        except (zlib.error, ValueError) as error:
            raise FileError(f"the header of the seed log cannot be read: {error}") from error
        digest, first = values.get("base_digest"), values.get("first_step")
        recipe = values.get("recipe")
        if not isinstance(digest, str) or not isinstance(first, int) or not 0 <= first < 1 << 44:
            raise FileError("the header of the seed log is malformed")
        if not isinstance(recipe, dict):
            raise FileError("the seed log has no recipe")
        try:
            made = Recipe.from_json(recipe)
        except ConfigError as error:
            raise FileError(f"the recipe in the seed log cannot be used: {error}") from error
        return cls(made, Layout.from_json(values.get("parameters")), digest, first)


def chained(chain: bytes, body: bytes) -> bytes:
    return hashlib.blake2b(chain + body, digest_size=CHAIN).digest()


def layout_of(entries: Mapping[int, bytes]) -> tuple[tuple[int, int], ...]:
    return tuple((slot, len(entries[slot])) for slot in sorted(entries))


class Writer:
    """Appends records; each is handed to the system at once, and synced every `sync_every`. One
    that cannot be written (FileError) leaves nothing in the file: the log is good up to there."""

    def __init__(self, path: Path | str, header: Header, sync_every: int = 64) -> None:
        self.path = Path(path)
        self.sync_every = sync_every
        if self.path.exists():
            log = read(self.path)
            if log.header != header:
                raise FileError(
                    f"{self.path} belongs to another run (recipe, parameters or base differ): "
                    "name another file, or resume from its own base"
                )
            if log.torn:
                self.next_step = log.next_step
                self._cut(log)
        else:
            write_atomically(self.path, header.to_bytes())
            log = read(self.path)
        self.next_step = log.next_step
        self._chain, self._layout, self._since_seal = log.chain, log.last_layout, log.since_seal
        self._good_bytes = log.good_bytes
        try:
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise self._failed(error) from error

    def _cut(self, log: Log) -> None:
        if log.torn > TAIL_BYTES_MAX:
            raise FileError(
                f"{self.path} is damaged at step {log.next_step}, {log.torn} bytes before its end: "
                "restore it from a copy, or replay up to that step and begin a new log"
            )
        try:
            with self.path.open("r+b") as file:
                file.truncate(log.good_bytes)
                os.fsync(file.fileno())
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> FileError:
        return FileError(
            f"cannot write {self.path}: {error.strerror}; make room there and resume: the log is"
            f" whole up to step {self.next_step}"
        )

    def append(self, record: Record) -> None:
        if record.step != self.next_step:
            raise FileError(
                f"{self.path} goes on with step {self.next_step}: step {record.step} cannot follow"
            )
        layout = layout_of(record.entries)
        flags = 0 if layout == self._layout else LAYOUT
        body = bytes([flags])
        if flags:
            body += bytes([len(layout)]) + b"".join(bytes(pair) for pair in layout)
        body += b"".join(record.entries[slot] for slot, _ in layout)
        data, chain, since_seal = b"", self._chain, self._since_seal
        if since_seal == SEAL_EVERY:
            chain = chained(chain, bytes([SEAL]))
            data = bytes([SEAL]) + chain
            since_seal = 0
        chain = chained(chain, body)
        self._write(data + body + chain[:CHECK])
        self._chain, self._layout, self._since_seal = chain, layout, since_seal + 1
        self.next_step += 1
        if self.next_step % self.sync_every == 0:
            self._sync()

    def _write(self, data: bytes) -> None:
        """All of it, or nothing."""
        try:
            if os.fstat(self._file.fileno()).st_size != self._good_bytes:
                os.ftruncate(self._file.fileno(), self._good_bytes)  # what an error left
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) or 0 :]
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), self._good_bytes)
            raise self._failed(error) from error
        self._good_bytes += len(data)

    def _sync(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        if not self._file.closed:
            try:
                self._sync()
            finally:
                self._file.close()


@dataclass(frozen=True)
class Log:
    """A log as read: every record up to the end or to the first that is not whole."""

    header: Header
    records: list[Record]
    good_bytes: int
    torn: int  # bytes behind the last good record
    chain: bytes
    last_layout: tuple[tuple[int, int], ...] | None
    since_seal: int

    @property
    def next_step(self) -> int:
        return self.header.first_step + len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)


class _Cursor:
    """Reads forward in bytes; None at the end, never past it."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at

    def take(self, count: int) -> bytes | None:
        if count > len(self.data) - self.at:
            return None
        self.at += count
        return self.data[self.at - count : self.at]


def read(path: Path | str) -> Log:
    """The whole log. Raises FileError when the header is bad or the file is no seed log."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from error
    cursor = _Cursor(data, 0)
    if cursor.take(len(MAGIC)) != MAGIC:
        raise FileError(f"{path} is no seed log")
    length = cursor.take(4)
    size = struct.unpack("<I", length)[0] if length else HEADER_BYTES_MAX + 1
    packed = cursor.take(size) if size <= HEADER_BYTES_MAX else None
    chain = cursor.take(CHAIN) if packed is not None else None
    if packed is None or chain != chained(b"", data[: cursor.at - CHAIN]):
        raise FileError(f"the header of {path} is torn or damaged")
    return _records(cursor, Header.parse(packed), chain)


def _records(cursor: _Cursor, header: Header, chain: bytes) -> Log:
    records: list[Record] = []
    layout: tuple[tuple[int, int], ...] | None = None
    since_seal = 0
    good = cursor.at
    while (flags := cursor.take(1)) is not None:
        if since_seal == SEAL_EVERY:
            sealed = chained(chain, bytes([SEAL]))
            if flags[0] != SEAL or cursor.take(CHAIN) != sealed:
                break
            chain, since_seal, good = sealed, 0, cursor.at
            continue
        found = _body(cursor, flags[0], layout)
        if found is None:
            break
        new_layout, entries, start = found
        new_chain = chained(chain, cursor.data[start : cursor.at])
        if cursor.take(CHECK) != new_chain[:CHECK]:
            break
        chain, layout, good = new_chain, new_layout, cursor.at
        since_seal += 1
        records.append(Record(header.first_step + len(records), entries))
    return Log(header, records, good, len(cursor.data) - good, chain, layout, since_seal)


def _body(
    cursor: _Cursor, flags: int, layout: tuple[tuple[int, int], ...] | None
) -> tuple[tuple[tuple[int, int], ...], dict[int, bytes], int] | None:
    """One record's layout and codes, and where its body starts; None when it is not whole."""
    start = cursor.at - 1
    if flags not in (0, LAYOUT):
        return None
    if flags == LAYOUT:
        peers = cursor.take(1)
        pairs = cursor.take(2 * peers[0]) if peers else None
        if pairs is None or not peers or peers[0] > code.SLOTS_MAX:
            return None
        layout = tuple(zip(pairs[0::2], pairs[1::2], strict=True))
        slots = [slot for slot, _ in layout]
        if slots != sorted(set(slots)) or any(slot >= code.SLOTS_MAX for slot in slots):
            return None
    if layout is None:
        return None
    entries = {}
    for slot, count in layout:
        codes = cursor.take(count)
        if codes is None:
            return None
        entries[slot] = codes
    return layout, entries, start


def write_atomically(path: Path, data: bytes) -> None:
    """The file is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror}") from error


def summary(log: Log) -> dict[str, Any]:
    """What `decotrain seedlog show` prints."""
    peers = sorted({slot for record in log for slot in record.entries})
    counts = [record.samples for record in log]
    skipped = sum(codes.count(code.SKIP) for r in log for codes in r.entries.values())
    return {
        "steps": len(log.records),
        "first_step": log.header.first_step,
        "next_step": log.next_step,
        "samples": sum(counts),
        "samples_skipped": skipped,
        "slots": peers,
        "parameters": len(log.header.layout.entries),
        "elements": log.header.layout.elements,
        "base_digest": log.header.base_digest,
        "bytes": log.good_bytes,
        "torn_bytes": log.torn,
        "recipe": log.header.recipe.to_json(),
    }
