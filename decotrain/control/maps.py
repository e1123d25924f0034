"""Reports and installs as maps: their checks, and columns as arrays.

The layout is docs/protocol.md, "Report and plan as maps"; csrc/python binds the same maps to the
engine. Lengths, ranges and cross-references that a plan depends on are checked here; what a report
means is the plan's business.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from typing import Any

from decotrain.control.fields import (
    blob,
    boolean,
    integer,
    number,
    record,
    row,
    sequence,
    u32,
    u64,
)
from decotrain.errors import MessageError

CHUNKS_MAX = 1 << 16
ROUNDS_MAX = 1 << 12
TAGS_MAX = 1 << 12
NO_SLOT = 255
SLOTS = 64
SPEC_BYTES_MAX = 64
SPEC_AHEAD = 20  # the one byte of a specification that a plan looks at
AHEAD_MAX = 15

_tag = integer(0, TAGS_MAX - 1)
_covered = integer(-1, 2**62)
_seq = integer(0, 2**62)
_bytes_column = blob(0, CHUNKS_MAX)
_words_column = blob(0, 8 * CHUNKS_MAX)
_round_fields = {
    "tag": _tag,
    "seq": _seq,
    "spec": blob(1, SPEC_BYTES_MAX),
    "owner": _bytes_column,
    "received": _words_column,
    "born": _words_column,
    "digest": _words_column,
    "contributors": _words_column,
}
_names = sequence(row(integer(0, SLOTS - 1), integer(1, 2**64 - 1)), SLOTS)
_report = record(
    installed=u64,
    declared=boolean,
    tags=sequence(
        record(
            tag=_tag,
            state=boolean,
            covered=_covered,
            stable=sequence(row(_seq, u64), 64),
        ),
        TAGS_MAX,
    ),
    rounds=sequence(record(begun=boolean, skipped=u64, **_round_fields), ROUNDS_MAX),
    names=_names,
)
_install = record(
    view=record(
        id=u64,
        members=sequence(
            row(integer(1, 2**64 - 1), integer(0, SLOTS - 1), boolean, number(0, 1e6)), SLOTS
        ),
    ),
    answers=row(u32, u64),
    reported=u64,
    tags=sequence(record(tag=_tag, stable=_covered, digest=u64), TAGS_MAX),
    rounds=sequence(
        record(
            stable=boolean,
            round_digest=u64,
            kind=_bytes_column,
            holders=_words_column,
            **_round_fields,
        ),
        ROUNDS_MAX,
    ),
    names=_names,
)
_WORDS = ("received", "born", "digest", "contributors", "holders")


def check_report(value: Any) -> dict[str, Any]:
    report: dict[str, Any] = _report(value)
    _check_columns(report["rounds"])
    _check_unique(entry["tag"] for entry in report["tags"])
    _check_unique(slot for slot, _ in report["names"])
    for entry in report["rounds"]:
        if any(slot != NO_SLOT and slot >= SLOTS for slot in entry["owner"]):
            raise MessageError("a round names a slot that does not exist")
    return report


def check_install(value: Any) -> dict[str, Any]:
    install: dict[str, Any] = _install(value)
    _check_columns(install["rounds"])
    _check_unique(entry["tag"] for entry in install["tags"])
    slots = [member[1] for member in install["view"]["members"]]
    if slots != sorted(set(slots)):
        raise MessageError("the members of a view are not in the order of their slots")
    _check_unique(member[0] for member in install["view"]["members"])
    _check_unique(slot for slot, _ in install["names"])
    for entry in install["rounds"]:
        if len(entry["kind"]) != len(entry["owner"]) or any(kind > 1 for kind in entry["kind"]):
            raise MessageError("a plan has an unknown kind of chunk")
    return install


def _check_columns(rounds: list[dict[str, Any]]) -> None:
    for entry in rounds:
        chunks = len(entry["owner"])
        for key in _WORDS:
            if key in entry and len(entry[key]) != 8 * chunks:
                raise MessageError(f"round {entry['tag']}/{entry['seq']}: {key} has a wrong length")
    _check_unique((entry["tag"], entry["seq"]) for entry in rounds)


def _check_unique(keys: Iterable[Any]) -> None:
    seen = set()
    for key in keys:
        if key in seen:
            raise MessageError(f"{key} is named twice")
        seen.add(key)


def ahead(spec: bytes) -> int:
    """How many rounds of its tag may be open before a round."""
    return min(spec[SPEC_AHEAD], AHEAD_MAX) if len(spec) > SPEC_AHEAD else 0


def words(column: bytes) -> array[int]:
    """A u64 column as an array."""
    values = array("Q")
    values.frombytes(column)
    if sys.byteorder == "big":
        values.byteswap()
    return values


def pack_words(values: Iterable[int]) -> bytes:
    column = array("Q", values)
    if sys.byteorder == "big":
        column.byteswap()
    return column.tobytes()
