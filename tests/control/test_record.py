"""The record: durable or an error, never half of one."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from decotrain.control.record import Record, RecordFile, RecordMember, pack, unpack
from decotrain.errors import FileError

MEMBER = RecordMember(7, 3, True, 1.0, "n", "h", "w", ["tcp://1.2.3.4:5"], b"k")
RECORD = Record("r", {"a": 1}, b"t", 2, 5, 9, (5 << 32) | 9, (MEMBER,), (1, 2))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "new" / "folder")
    assert file.load() is None
    file.save(Record("r"))
    file.save(RECORD)
    assert file.load() == RECORD
    assert unpack(file.previous.read_bytes(), "previous") == Record("r")
    assert file.path.stat().st_mode & 0o077 == 0


def test_every_damage_is_noticed(tmp_path: Path) -> None:
    file = RecordFile(tmp_path)
    good = pack(RECORD)
    for cut in range(len(good)):
        file.path.write_bytes(good[:cut])
        with pytest.raises(FileError):
            file.load()
    for at in range(len(good)):
        file.path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(FileError):
            file.load()


def test_a_foreign_file_is_named(tmp_path: Path) -> None:
    file = RecordFile(tmp_path)
    file.path.write_text("something else")
    with pytest.raises(FileError, match="is no coordinator record"):
        file.load()
    file.path.unlink()
    file.path.mkdir()
    with pytest.raises(FileError, match=r"coordinator\.record"):
        file.load()


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_an_error_at_any_call_leaves_the_old_record(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = RecordFile(tmp_path)
    file.save(RECORD)

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(FileError, match="No space left"):
            file.save(Record("r", term=99))
    assert file.load() == RECORD
