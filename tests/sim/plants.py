"""Planted bugs: each is one false step in the engine, a member, the coordinator or its disk.

They exist to test the checker. The engine's are compiled in only with DT_PLANT.
"""

from __future__ import annotations

from typing import Any


class Plants:
    def __init__(self, name: str) -> None:
        self.name = name

    def engine(self, engine: Any) -> Any:
        return engine

    def member(self, member: Any) -> Any:
        return member

    def coordinator(self, coordinator: Any) -> Any:
        return coordinator

    def write(self, disk: bytes | None, record: bytes) -> bytes | None:
        """What a crash right after the write leaves on the disk."""
        return record

    def crash(self, disk: bytes | None) -> bytes | None:
        return disk

    def fetch_frozen(self, frozen: bool) -> bool:
        return frozen
