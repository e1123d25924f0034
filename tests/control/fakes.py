"""Coordinator and members under a virtual clock, with an engine that holds no rounds.

For unit tests of membership alone. The simulator (tests/sim) drives the real engine.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from decotrain.control import messages as m
from decotrain.control.coordinator import Coordinator, Options
from decotrain.control.effects import Log, Persist, Received, Send, Stop, Tick, identity
from decotrain.control.member import (
    EngineFreeze,
    EngineInstall,
    Identity,
    Installed,
    Member,
    Message,
    Ready,
    Reported,
    Say,
    SetRoutes,
    Tell,
)
from decotrain.control.record import Record, pack, unpack

TICK_S = 0.05


def empty_report(installed: int) -> dict[str, Any]:
    return {"installed": installed, "declared": False, "tags": [], "rounds": [], "names": []}


@dataclass
class FakePeer:
    member: Member
    alive: bool = True
    report: dict[str, Any] | None = None  # None: an engine without rounds
    told: list[Tell] = field(default_factory=list)
    routes: dict[int, int] = field(default_factory=dict)
    installs: list[dict[str, Any]] = field(default_factory=list)


class World:
    """Messages arrive one tick later, encoded and decoded. `cut` peers hear and say nothing."""

    def __init__(self, **options: Any) -> None:
        self.now = 100.0
        self.options = Options(**options)
        self.record: Record | None = None
        self.coordinator: Coordinator | None = None
        self.peers: dict[int, FakePeer] = {}
        self.cut: set[int] = set()
        self.wire: list[tuple[bytes, bytes, bytes]] = []  # from, to, data
        self.log: list[Log] = []
        self.answers: list[Any] = []
        self.start()

    def start(self) -> None:
        record = self.record
        if record is not None:
            record = unpack(pack(record), "record")
        self.coordinator = Coordinator(self.options, record)

    def kill_coordinator(self) -> None:
        self.coordinator = None

    def add(self, peer: int, **identity: Any) -> FakePeer:
        fields = {"name": f"peer{peer}", "run": "default", **identity}
        member = Member(Identity(peer=peer, **fields), random.Random(peer))
        self.peers[peer] = FakePeer(member)
        self.step(self.peers[peer], Ready())
        return self.peers[peer]

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / TICK_S)):
            self.tick()

    def tick(self) -> None:
        self.now += TICK_S
        wire, self.wire = self.wire, []
        for source, to, data in wire:
            message = m.decode(data)
            if to == b"c":
                if self.coordinator is not None:
                    self._carry(self.coordinator.step(Received(source, message), self.now))
                continue
            peer = next((one for key, one in self.peers.items() if identity(key) == to), None)
            if peer is None:
                self.answers.append(message)
            else:
                self.step(peer, Message(message))
        if self.coordinator is not None:
            self._carry(self.coordinator.step(Tick(), self.now))
        for peer in self.peers.values():
            self.step(peer, None)

    def ask(self, message: Any) -> None:
        self.wire.append((b"operator", b"c", m.encode(message)))

    def _carry(self, effects: list[Any]) -> None:
        for effect in effects:
            if isinstance(effect, Persist):
                self.record = effect.record
            elif isinstance(effect, Send):
                self.wire.append((b"c", effect.to, m.encode(effect.message)))
            elif isinstance(effect, Log):
                self.log.append(effect)
            elif isinstance(effect, Stop):
                self.coordinator = None

    def step(self, peer: FakePeer, event: Any) -> None:
        key = peer.member.me.peer
        if not peer.alive or (key in self.cut and isinstance(event, Message)):
            return
        for effect in peer.member.step(event, self.now):
            if isinstance(effect, Say):
                if key not in self.cut:
                    self.wire.append((identity(key), b"c", m.encode(effect.message)))
            elif isinstance(effect, EngineFreeze):
                report = peer.report or empty_report(peer.member.view)
                self.step(peer, Reported(effect.freeze, {**report, "installed": peer.member.view}))
            elif isinstance(effect, EngineInstall):
                peer.installs.append(effect.install)
                self.step(peer, Installed(effect.install["view"]["id"], True))
            elif isinstance(effect, SetRoutes):
                peer.routes = effect.routes
            elif isinstance(effect, Tell):
                peer.told.append(effect)

    def views(self) -> dict[int, tuple[int, tuple[int, ...]]]:
        """Peer -> installed view and its members, for peers that live and are in the run."""
        return {
            key: (peer.member.view, tuple(row[0] for row in peer.member.members))
            for key, peer in self.peers.items()
            if peer.alive and not peer.member.over
        }

    def agreed(self) -> tuple[int, ...]:
        """The members of the one view that every living peer has installed."""
        views = set(self.views().values())
        assert len(views) == 1, views
        return next(iter(views))[1]

    def texts(self, kind: str) -> list[str]:
        return [entry.text for entry in self.log if entry.kind == kind]


def three(**options: object) -> World:
    world = World(min_peers=3, **options)
    for peer in (1, 2, 3):
        world.add(peer)
    world.run(1.0)
    assert world.agreed() == (1, 2, 3)
    return world
