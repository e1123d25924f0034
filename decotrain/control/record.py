"""The coordinator's durable record: what must survive its death, and the file that holds it.

`Record` is a value; `RecordFile` writes it so that a crash or a full disk at any moment leaves
either the new record or the one before (temporary file, fsync, rename, fsync of the folder; the
previous record is kept beside it). It does not decide what is in a record.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgpack

from decotrain.control import messages as m
from decotrain.control.fields import (
    blob,
    boolean,
    integer,
    number,
    optional,
    sequence,
    text,
    tree,
    u32,
    u64,
    within,
)
from decotrain.control.fields import record as fields_of
from decotrain.errors import FileError, MessageError

_MAGIC = b"decotrain record 2\n"
_DIGEST_BYTES = 32
BARRED_MAX = 4096
RECORD_BYTES_MAX = 4 << 20


@dataclass(frozen=True)
class RecordMember:
    peer: int
    slot: int
    active: bool
    share: float
    name: str
    host: str
    launch: str
    addresses: list[str] = field(default_factory=list)
    key: bytes = b""  # its own key, if it has one


@dataclass(frozen=True)
class Record:
    run: str
    config: dict[str, Any] | None = None
    token: bytes = b""  # fingerprint of the run's token
    generation: int = 0
    term: int = 0
    epoch: int = 0  # of the last view; its term is in view
    view: int = 0
    members: tuple[RecordMember, ...] = ()
    slots_used: tuple[int, ...] = ()  # least recently used first
    barred: tuple[bytes, ...] = ()  # own keys of peers that were kicked


_check_member = fields_of(
    peer=integer(1, 2**64 - 1),
    slot=integer(0, 63),
    active=boolean,
    share=number(0, 1e6),
    name=text(128),
    host=text(256),
    launch=text(128),
    addresses=sequence(text(256), m.ADDRESSES_MAX),
    key=blob(0, 64),
)
_check = fields_of(
    run=text(128, 1),
    config=optional(tree(8, 4096)),
    token=blob(0, 64),
    generation=u32,
    term=u32,
    epoch=u32,
    view=u64,
    members=sequence(_check_member, m.PEERS_MAX),
    slots_used=sequence(integer(0, 63), 64),
    barred=sequence(blob(1, 64), BARRED_MAX),
)


def pack(record: Record) -> bytes:
    body: bytes = msgpack.packb(asdict(record), use_bin_type=True)
    return _MAGIC + hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest() + body


def unpack(data: bytes, where: str) -> Record:
    head = len(_MAGIC) + _DIGEST_BYTES
    if not data.startswith(_MAGIC):
        raise FileError(f"{where} is no coordinator record: remove it, or name another file")
    body = data[head:]
    if hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest() != data[len(_MAGIC) : head]:
        raise FileError(f"{where} is damaged: its checksum does not match its content")
    try:
        content = within("record", _check, msgpack.unpackb(body, raw=False))
    except (MessageError, ValueError) as error:
        raise FileError(f"{where} is damaged: {error}") from None
    members = tuple(RecordMember(**member) for member in content.pop("members"))
    slots, barred = tuple(content.pop("slots_used")), tuple(content.pop("barred"))
    return Record(members=members, slots_used=slots, barred=barred, **content)


class RecordFile:
    """One record in one folder: `coordinator.record` and `coordinator.record.previous`."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "coordinator.record"
        self.previous = self.folder / "coordinator.record.previous"

    def load(self) -> Record | None:
        """The record; None when there never was one. A damaged one is an error that says so.

        There is no falling back to the previous record: it may lack a view that peers have
        installed. Without a record the run is rebuilt from the peers (docs/operating.md).
        """
        try:
            data = self._read(self.path)
        except FileNotFoundError:
            return None
        return unpack(data, str(self.path))

    def _read(self, path: Path) -> bytes:
        try:
            with open(path, "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise FileError(f"{path} is not a regular file")
                data = file.read(RECORD_BYTES_MAX + 1)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise FileError(f"cannot read {path}: {error.strerror}") from None
        if len(data) > RECORD_BYTES_MAX:
            raise FileError(f"{path} is too large for a coordinator record")
        return data

    def save(self, record: Record) -> None:
        """Durable when it returns. Raises FileError, and the old record still stands."""
        temporary = self.path.with_suffix(".new")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_durably(temporary, pack(record))
            if self.path.exists():
                self.previous.unlink(missing_ok=True)
                os.link(self.path, self.previous)
            os.replace(temporary, self.path)
            _sync_folder(self.folder)
        except OSError as error:
            raise FileError(
                f"cannot write the record {self.path}: {error.strerror}; free some space, or name a"
                " folder that can be written (--record)"
            ) from None


def _write_durably(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
