"""A whole run under a virtual clock: coordinator, disk, peers, network, faults, all from one seed.

The Coordinator, Member, Engine, their messages and frames are those that ship. After every event
the checker judges; after the faults everything is healed, and all that live must make progress.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Any

from decotrain.control import coordinator as co
from decotrain.control import messages as m
from decotrain.control.effects import Log, Persist, Received, Send, Stop, Tick, identity
from decotrain.control.member import Tell
from decotrain.control.record import Record, pack, unpack
from tests.sim.checker import Checker, Violation, name
from tests.sim.net import Control, Links
from tests.sim.options import Options, draw_options
from tests.sim.peer import SimPeer
from tests.sim.plants import Plants
from tests.sim.visits import Visits

HEAL_S = 60.0  # within which all that live must have made progress
ROUNDS_AFTER = 3
EVENTS_MAX = 400_000


class World:
    def __init__(self, seed: int, plant: str = "", trace: Callable[[str], None] | None = None):
        self.draw = random.Random(seed)
        self.seed, self.trace = seed, trace
        self.options: Options = draw_options(self.draw)
        self.plants = Plants(plant)
        self.now = 0.0
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.count = 0
        self.faulty = True
        self.checker = Checker(expect=self._expect)
        self.visits = Visits(self)
        self.control = Control(self)
        self.links = Links(self)
        self.peers: dict[int, SimPeer] = {}  # by id, dead ones too
        self.processes: dict[int, SimPeer] = {}  # process -> its newest incarnation
        self.incarnations = 0
        self.disk: bytes | None = None  # the record, as fsync left it
        self.coordinator: co.Coordinator | None = None
        self.coordinator_stopped = False
        self.crash_armed = False  # the coordinator dies while it makes the next view
        self.slow: set[int] = set()  # peers made observing for it, and not active since

    def _expect(self, tag: int, given: list[Any], chunk: int) -> Any:
        return self.options.shapes[tag].expect(given, chunk)

    # --- time

    def at(self, when_s: float, action: Callable[[], None]) -> None:
        self.count += 1
        heapq.heappush(self.heap, (when_s, self.count, action))

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        self.at(self.now + delay_s, action)

    def run_until(self, end_s: float, done: Callable[[], bool] | None = None) -> bool:
        next_look_s = self.now
        while self.heap and self.heap[0][0] <= end_s:
            when_s, number, action = heapq.heappop(self.heap)
            assert number < EVENTS_MAX, "the history has no end"
            self.now = when_s
            action()
            if done is not None and self.now >= next_look_s:
                next_look_s = self.now + 0.1
                if done():
                    return True
        self.now = end_s
        return False

    def note(self, *what: Any) -> None:
        if self.trace is not None:
            parts = [f"{x:x}" if isinstance(x, int) and x > 1 << 32 else str(x) for x in what]
            self.trace(f"{self.now:8.4f} " + " ".join(parts))

    def check(self, **event: Any) -> None:
        if self.trace is not None:
            self.note(event["ev"], *(f"{k}={v}" for k, v in event.items() if k != "ev"))
        self.visits.take(event)
        self.checker.take(event)

    def refused(self, peer: SimPeer, source: int, reason: str) -> None:
        self.check(ev="complain", peer=peer.id, text=f"refuses a frame of {source:x}: {reason}")

    # --- the coordinator's process

    def start_coordinator(self) -> None:
        if self.coordinator is not None:
            return
        record = unpack(self.disk, "record") if self.disk is not None else None
        options = co.Options(
            run="sim",
            first_term=1 + int(self.now * 100),
            min_peers=self.options.min_peers,
            recover_minority=True,
            suspect_timeout_s=1.6,
            report_timeout_s=1.0,
            install_timeout_s=2.0,
            resend_s=0.2,
            recover_s=1.5,
            generation_s=2.0,
            link_bound_s=1.0,
            promote_retry_s=0.4,
            calm_s=0.1,
        )
        self.coordinator = self.plants.coordinator(co.Coordinator(options, record))
        self.coordinator_stopped = False
        self.note("coordinator starts")
        self.tick_coordinator(self.coordinator)

    def tick_coordinator(self, which: co.Coordinator) -> None:
        if self.coordinator is not which:
            return
        if not self.coordinator_stopped:
            self.carry(which.step(Tick(), self.now))
        self.after(self.options.tick_s, lambda: self.tick_coordinator(which))

    def kill_coordinator(self) -> None:
        self.note("coordinator killed")
        self.visits.coordinator_died()
        self.coordinator = None
        self.crash_armed = False
        self.slow.clear()
        self.disk = self.plants.crash(self.disk)

    def to_coordinator(self, source: bytes, data: bytes) -> None:
        if self.coordinator is None:
            return
        if self.coordinator_stopped:
            self.after(0.5, lambda: self.to_coordinator(source, data))
            return
        message = m.decode(data)
        self.carry(self.coordinator.step(Received(source, message), self.now))

    def carry(self, effects: list[Any]) -> None:
        """One effect after the other; the process may die between any two."""
        effects = self.plants.effects(effects)
        self.visits.carries(effects)
        crash_at = -1
        if self.crash_armed and any(_new_view(effect) for effect in effects):
            crash_at = self.draw.randrange(len(effects) + 1)
        for at, effect in enumerate([*effects, None]):
            if at == crash_at:
                self.kill_coordinator()
                self.after(self.draw.random() * 2.0, self.start_coordinator)
                return
            if isinstance(effect, Persist):
                self.persist(effect.record)
            elif isinstance(effect, Send):
                self.deliver(effect)
            elif isinstance(effect, Log):
                self.note("log", effect.kind, effect.text)
                if effect.kind == "demoted":
                    self.slow.add(int(effect.text.split("(")[1].split(")")[0], 16))
            elif isinstance(effect, Stop):
                self.note("coordinator stops:", effect.reason)
                self.kill_coordinator()
                self.after(0.5, self.start_coordinator)
                return

    def persist(self, record: Record) -> None:
        self.disk = self.plants.write(self.disk, pack(record))
        if record.view >> 32 == record.term:  # else it is the view of an earlier life
            members = [[one.peer, one.slot, one.active] for one in record.members]
            self.slow &= {one.peer for one in record.members if not one.active}
            self.check(
                ev="persist",
                view=record.view,
                generation=record.generation,
                members=members,
                slow=sorted(self.slow),
            )

    def deliver(self, effect: Send) -> None:
        if not effect.to.startswith(b"p"):
            return
        peer = int.from_bytes(effect.to[1:], "big")
        target = self.peers.get(peer)
        if target is not None:
            self.visits.delivers(peer, effect.message)
            self.control.send(peer, target.hear, m.encode(effect.message))

    # --- processes of peers

    def start_peer(self, process: int, void: bool = False) -> SimPeer:
        self.incarnations += 1
        self.visits.started(process)
        peer = SimPeer(self, self.draw.getrandbits(64) | 1, process, self.incarnations, void)
        self.peers[peer.id] = self.processes[process] = peer
        self.note("start", f"p{process}", peer.id)
        peer.start()
        return peer

    def kill_peer(self, peer: SimPeer) -> None:
        if not peer.alive:
            return
        self.note("kill", f"p{peer.process}", peer.id)
        self.visits.died(peer)
        peer.alive = False
        self.gone(peer)
        if self.options.launchers and self.draw.random() < 0.7:
            exited = m.Exited("sim", peer.id, "", "", "killed")
            data = m.encode(exited)
            self.after(0.05, lambda: self.to_coordinator(b"launcher", data))

    def gone(self, peer: SimPeer) -> None:
        """Its connections end."""
        self.links.forget(peer.id)
        if self.draw.random() < 0.7:
            for other in self.live():
                if peer.id in other.contacts:
                    self.after(
                        self.options.latency_s, lambda other=other: other.link(peer.id, False)
                    )

    def left(self, peer: SimPeer, tell: Tell) -> None:
        """Evicted: the same process comes back with another id and nothing held."""
        self.gone(peer)
        if tell.again:
            self.after(self.draw.random() * 0.3, lambda: self.come_back(peer))

    def come_back(self, peer: SimPeer) -> None:
        if peer.alive and self.processes[peer.process] is peer:
            peer.alive = False
            new = self.start_peer(peer.process, void=True)
            new.stopped = peer.stopped
            for tag in new.versions.version:  # it has its old state in memory
                new.versions.version[tag] = peer.versions.version[tag]
                new.state[tag] = peer.state[tag]
            new.versions.make_void()
            new.engine.declare(new.versions.declared())

    def live(self) -> list[SimPeer]:
        return [peer for peer in self.processes.values() if peer.alive and not peer.over]

    # --- the history

    def run(self) -> None:
        with self.plants.planted():
            self._run()

    def _run(self) -> None:
        from tests.sim.faults import strike

        self.begin()
        for when_s, kind in self.options.faults:
            self.at(when_s, lambda kind=kind: strike(self, kind))
        self.run_until(self.options.fault_s)
        self.finish()

    def begin(self) -> None:
        self.note("options", self.options)
        self.start_coordinator()
        for process in range(self.options.peers):
            self.after(self.draw.random() * 0.2, lambda process=process: self.start_peer(process))

    def finish(self) -> None:
        """No more faults: everybody alive makes progress, or Violation."""
        self.heal()
        goal = {peer.id: dict(peer.done_rounds) for peer in self.live()}
        if not self.run_until(self.now + HEAL_S, lambda: self.progressed(goal)):
            raise Violation("progress", self.stuck())

    def heal(self) -> None:
        self.note("heal")
        self.faulty = False
        self.control.cut.clear()
        self.crash_armed = False
        self.coordinator_stopped = False
        self.start_coordinator()
        for edge in sorted(self.links.cut):
            self.links.cut.discard(edge)
            self.heal_link(edge)
        for peer in self.live():
            peer.slow = peer.slow_up = 1.0
            if peer.stopped:
                peer.resume()
        # Rounds without a pause, or faster than the links carry them, need more of a newcomer than
        # is promised: results are kept for a bounded time, and its fetch must end within it.
        options = self.options
        options.think_s, options.fetch_s = max(options.think_s, 0.2), min(options.fetch_s, 0.05)
        options.latency_s, options.window = min(options.latency_s, 0.05), 16
        options.split = min(options.split, 0.2)  # a payload that lags holds up its stream
        self.top_up()

    def top_up(self) -> None:
        """Somebody starts what is missing for a run."""
        while sum(not peer.member.leaving for peer in self.live()) < self.options.min_peers:
            dead = [p for p, one in self.processes.items() if not one.alive]
            self.start_peer(dead[0] if dead else len(self.processes))

    def heal_link(self, edge: tuple[int, int]) -> None:
        self.links.healed(*edge)
        for me, other in (edge, edge[::-1]):
            if me in self.peers:
                self.peers[me].link(other, True)

    def progressed(self, goal: dict[int, dict[int, int]]) -> bool:
        """All that live are active in one view and have completed new rounds of every tag."""
        self.top_up()
        live = self.live()
        views = {peer.member.view for peer in live}
        if len(views) != 1 or not live:
            return False
        for peer in live:
            if not peer.member.active:
                return False
            start = goal.setdefault(peer.id, dict(peer.done_rounds))
            if any(done < start[tag] + ROUNDS_AFTER for tag, done in peer.done_rounds.items()):
                return False
        return True

    def stuck(self) -> str:
        lines = [f"no progress {HEAL_S} s after healing"]
        if self.coordinator is not None:
            lines.append(f"coordinator: {self.coordinator.changes.phase()}")
        for peer in self.live():
            lines.append(
                f"p{peer.process} {peer.id:x}: view {name(peer.member.view)} "
                f"{'active' if peer.member.active else 'observing'} "
                f"{'frozen ' if peer.engine.frozen else ''}{peer.versions} "
                f"flights {peer.flights} done {peer.done_rounds} down {peer.down}"
            )
        return "\n  ".join(lines)


def _new_view(effect: Any) -> bool:
    return isinstance(effect, Persist) and effect.record.view >> 32 == effect.record.term


__all__ = ["Violation", "World", "identity"]
