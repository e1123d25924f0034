"""Which of the cases that are hard for the protocol histories go through (docs/simulator.md has the
table). It judges nothing: what must hold in them is the checker's business.

Of some cases only what a peer can see from outside is looked at, so a count can be a little high;
none is counted that did not happen at all.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from decotrain.control import messages as m

if TYPE_CHECKING:
    from tests.sim.peer import SimPeer
    from tests.sim.world import World

CASES = (
    "1 an owner dies, and one peer alone holds its result",
    "1 the only holder of a dead owner's result dies before it reports",
    "1 the only holder of a dead owner's result dies after it reported",
    "2 a peer dies whose DONE some have and others have not",
    "3 the coordinator dies after FREEZE",
    "3 the coordinator dies between the fsync and the last INSTALL",
    "3 only newcomers get the INSTALL",
    "3 an old coordinator's INSTALL comes after the new one's FREEZE",
    "4 an observer comes back after a view in which a chunk that it holds was redone",
    "5 all contributors of a round are gone when it ends",
    "5 a round becomes stable between 'current' and INSTALL",
    "6 a round ends in a view while others have a newer one",
    "7 an observer that missed a result fetches",
    "8 chunks of one round have different contributors",
    "9 a machine is back before its old incarnation has expired",
)
Key = tuple[int, int, int, int]  # generation, tag, seq, chunk


def view_of(message: m.Install) -> int:
    return int(message.install["view"]["id"])


class Visits:
    def __init__(self, world: World) -> None:
        self.world = world
        self.seen: Counter[str] = Counter()
        self.alone: dict[Key, int] = {}  # of a dead owner's chunk -> who holds the result
        self.frozen: dict[int, int] = {}  # peer -> term of the newest FREEZE it answered
        self.current: dict[int, dict[int, int]] = {}  # peer -> versions when it said so
        self.holding: set[int] = set()  # peers that had their state once
        self.sent: list[int] = []  # who was sent the INSTALL of a view, and who was to get it
        self.due: list[int] = []
        self.redone: dict[int, set[Key]] = {}  # view -> chunks that its plan has made again

    def _saw(self, start: str) -> None:
        (case,) = [case for case in CASES if case.startswith(start)]
        self.seen[case] += 1

    # --- what the world says

    def died(self, peer: SimPeer) -> None:
        """Before it is gone."""
        world, checker = self.world, self.world.checker
        reports = world.coordinator.changes.freeze if world.coordinator is not None else None
        for holder in self.alone.values():
            if holder == peer.id:
                reported = reports is not None and peer.id in reports.reports
                when = "after" if reported else "before"
                self._saw(f"1 the only holder of a dead owner's result dies {when}")
        view = checker.members.get(peer.member.view, {})
        others = {one.id for one in world.live() if one is not peer and view.get(one.id)}
        if not view.get(peer.id) or not others:
            return
        self.alone = {}
        for key, digests in checker.values.items():
            generation, tag, seq, _ = key
            held = {one for peers in digests.values() for one in peers} & others
            over = checker.last_returned.get((generation, tag), {})
            if (
                len(held) == 1
                and len(others) > 1
                and not any(done >= seq for one in others for done in over.get(one, {}).values())
            ):
                self.alone[key] = next(iter(held))
        if self.alone:
            self._saw("1 an owner dies")
        for (_, tag, seq), said in checker.returned.items():
            told = {one.peer for one in said}
            late = {one.id for one in world.live() if one.id in others and seq in one.flights[tag]}
            if told & others and late - told:
                self._saw("2 ")
                break

    def started(self, process: int) -> None:
        old = self.world.processes.get(process)
        coordinator = self.world.coordinator
        if old is not None and coordinator is not None and old.id in coordinator.peers:
            self._saw("9 ")

    def coordinator_died(self) -> None:
        coordinator = self.world.coordinator
        if coordinator is None:
            return
        if coordinator.changes.freeze is not None:
            self._saw("3 the coordinator dies after FREEZE")
        if self.due and len(self.sent) < len(self.due):
            self._saw("3 the coordinator dies between")
            old = {one for one in self.sent if one in self.world.checker.installed}
            if self.sent and not old:
                self._saw("3 only newcomers")

    def carries(self, effects: list[Any]) -> None:
        installs = [one for one in effects if isinstance(getattr(one, "message", None), m.Install)]
        self.sent = []
        self.due = [int.from_bytes(one.to[1:], "big") for one in installs]
        for message in [one.message for one in installs[:1]]:
            self.redone[view_of(message)] = {
                (message.generation, entry["tag"], entry["seq"], chunk)
                for entry in message.install["rounds"]
                for chunk, kind in enumerate(entry["kind"])
                if not kind
            }

    def delivers(self, peer: int, message: Any) -> None:
        if isinstance(message, m.Install):
            self.sent.append(peer)

    def hears(self, peer: SimPeer, message: Any) -> None:
        if isinstance(message, m.Freeze):
            term = message.freeze[0]
            self.frozen[peer.id] = max(self.frozen.get(peer.id, 0), term)
        if isinstance(message, m.Install) and view_of(message) >> 32 < self.frozen.get(peer.id, 0):
            self._saw("3 an old coordinator's")

    def says_current(self, peer: SimPeer) -> None:
        self.current[peer.id] = dict(peer.versions.version)

    # --- what the checker is told

    def take(self, event: dict[str, Any]) -> None:
        """Before the checker takes it."""
        look = getattr(self, "_" + event["ev"], None)
        if look is not None:
            look(event)

    def _install(self, event: dict[str, Any]) -> None:
        checker, peer, view = self.world.checker, event["peer"], event["view"]
        before = checker.installed.get(peer, 0)
        missed = [one for one in self.redone if before < one < view]
        for key in {key for one in missed if before for key in self.redone[one]}:
            if any(
                peers.get(peer, view) <= before for peers in checker.values.get(key, {}).values()
            ):
                self._saw("4 ")
                break
        active = any(row[0] == peer and row[2] for row in event["members"])
        said = self.current.pop(peer, None) if active else None
        if said is not None and any(
            held >= said[tag] for tag, held in event["held"].items() if tag in said
        ):
            self._saw("5 a round becomes stable")

    def _return(self, event: dict[str, Any]) -> None:
        checker = self.world.checker
        members = checker.members.get(event["view"], {})
        masks = [tuple(contributors) for contributors, _ in event["chunks"]]
        if any(mask and not set(mask) & members.keys() for mask in masks):
            self._saw("5 all contributors")
        if event["view"] < max(checker.installed.values(), default=0):
            self._saw("6 ")
        if len({mask for mask in masks if mask}) > 1:
            self._saw("8 ")

    def _state(self, event: dict[str, Any]) -> None:
        peer = event["peer"]
        if event.get("seq") is None and peer in self.holding:
            one = self.world.peers.get(peer)
            if one is not None and not one.member.active:
                self._saw("7 ")
        self.holding.add(peer)
