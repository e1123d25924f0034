"""Planted bugs: each is one false step in the engine, a member, the coordinator or its disk.

They exist to test the checker. Those of the engine are switched on through Engine.plant, which
only a build with DT_PLANT has (`cmake --preset plant`); the others replace one function of the
control plane for the time of one history.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

ENGINE = {
    "apply_before_stable": 1,
    "contribution_counted_twice": 2,
    "survivors_value_forgotten": 3,
    "stale_frame_accepted": 4,
    "waived_contribution_added": 5,
    "value_kept_against_the_plan": 6,
    "frozen_peer_goes_on": 7,
}


class Plants:
    """Hooks of the world, false when a plant says so."""

    def __init__(self, name: str) -> None:
        assert not name or name in ENGINE or name in CONTROL, f"no such plant: {name}"
        self.name = name
        self.older: bytes | None = None  # what was durable before the last write

    def engine(self, engine: Any) -> Any:
        if self.name in ENGINE:
            engine.plant(ENGINE[self.name])
        return engine

    def coordinator(self, coordinator: Any) -> Any:
        if self.name == "epoch_restarts_at_zero" and coordinator.record.term:
            term = coordinator.record.term - 1  # the start adds one
            coordinator.record = replace(coordinator.record, term=term, epoch=0)
        if self.name == "term_not_raised" and coordinator.record.term > 1:
            coordinator.record = replace(coordinator.record, term=coordinator.record.term - 1)
        return coordinator

    def effects(self, effects: list[Any]) -> list[Any]:
        if self.name == "sent_before_persisted":
            return sorted(effects, key=lambda effect: type(effect).__name__ == "Persist")
        return effects

    def write(self, disk: bytes | None, record: bytes) -> bytes | None:
        """What the disk seems to hold after a write."""
        if self.name == "record_not_fsynced" and self.older is None:
            self.older = disk
        return record

    def crash(self, disk: bytes | None) -> bytes | None:
        """What it does hold after a crash: what was written since the last fsync is gone."""
        if self.name == "record_not_fsynced" and self.older is not None:
            disk, self.older = self.older, None
        return disk

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Replaces what the plant replaces, for one history."""
        place, attribute, make = CONTROL.get(self.name, (None, "", None))
        if place is None or make is None:
            yield
            return
        module = sys.modules[place[0]]
        target = getattr(module, place[1]) if place[1] else module
        right = target.__dict__[attribute]
        setattr(target, attribute, make(right))
        try:
            yield
        finally:
            setattr(target, attribute, right)


def _newcomer_early(right: Callable[..., Any]) -> Callable[..., Any]:
    def covers(report: Any, source: Any, tag: int, stable: int, *others: Any) -> bool:
        return bool(right(report, source, tag, stable - 1, *others))

    return covers


def _stable_forgotten(right: Callable[..., Any]) -> Callable[..., Any]:
    def stable_rounds(sources: Any, renew: bool, plan: Any) -> Any:
        known, digests = right(sources[:1], renew, plan)  # the first report is believed alone
        for source in sources:
            for tag in source.report["tags"]:
                known.setdefault(tag["tag"], -1)
            for tag, _ in source.rounds:
                known.setdefault(tag, -1)
        return known, digests

    return stable_rounds


def _void_state_kept(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self: None


def _counts_what_was_handed_out(right: Callable[..., Any]) -> Callable[..., Any]:
    def applied(self: Any, tag: int, seq: int) -> None:
        right(self, tag, seq)
        self.version[tag] = max(self.version[tag], self.handed.get(tag, -1) + 1)

    return applied


def _no_widening(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, freeze, now: None


def _no_pushing(right: Callable[..., Any]) -> Callable[..., Any]:
    def push(self: Any, installing: Any, now: float) -> None:
        self.installing = None

    return push


def _values_dropped(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda key, entry, sources, plan: [None for _ in entry["owner"]]


def _fast_given_up(right: Callable[..., Any]) -> Callable[..., Any]:
    def stands(value: Any, stable: bool, late: int) -> bool:
        return bool(right(value, stable, late) and (stable or not value.holders & late))

    return stands


_PLAN = ("decotrain.control.plan", "")
_CHANGES = ("decotrain.control.change", "Changes")
_VERSIONS = ("decotrain.versions", "Versions")
CONTROL: dict[str, tuple[Any, str, Any]] = {
    "epoch_restarts_at_zero": (None, "", None),
    "record_not_fsynced": (None, "", None),
    "sent_before_persisted": (None, "", None),
    "term_not_raised": (None, "", None),
    "newcomer_active_one_round_early": (_PLAN, "_covers", _newcomer_early),
    "survivors_value_not_in_the_plan": (_PLAN, "_values", _values_dropped),
    "value_given_up_that_a_fast_peer_holds": (_PLAN, "_stands", _fast_given_up),
    "stable_round_forgotten": (_PLAN, "_stable_rounds", _stable_forgotten),
    "void_state_kept": (_VERSIONS, "make_void", _void_state_kept),
    "version_counts_what_was_handed_out": (_VERSIONS, "applied", _counts_what_was_handed_out),
    "suspects_not_asked_again": (_CHANGES, "_widen", _no_widening),
    "install_not_repeated": (_CHANGES, "_push", _no_pushing),
}


def planted_core() -> Path | None:
    """The extension that was built with DT_PLANT, if there is one."""
    folder = Path(__file__).parent.parent.parent / "build/plant"
    return next(iter(sorted(folder.glob("**/_core*.so"))), None)


def use_planted_core() -> bool:
    """Loads it in place of the one that ships; before anything imports decotrain._core."""
    path = planted_core()
    if path is None:
        return False
    assert "decotrain._core" not in sys.modules, "too late: the extension is loaded"
    found = importlib.util.spec_from_file_location("decotrain._core", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["decotrain._core"] = module
    found.loader.exec_module(module)
    return True
