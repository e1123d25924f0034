"""One peer of the simulator: the real Member and the real Engine, and a model of a trainer.

The trainer begins rounds of several tags in order, contributes numbers whose sum names its
contributors, keeps a chained digest as its state, applies results in order, and fetches state
when it lacks rounds. What to do when is decided by the real `decotrain.versions`.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from decotrain._core import Engine
from decotrain.control import member as mb
from decotrain.control import messages as m
from decotrain.control.agent import parse_digests
from decotrain.control.effects import identity
from decotrain.versions import Versions

if TYPE_CHECKING:
    from tests.sim.world import World


class SimPeer:
    def __init__(
        self, world: World, peer: int, process: int, number: int, void: bool = False
    ) -> None:
        self.world = world
        self.id = peer
        self.process = process  # who is started again, with another id
        self.number = number  # of the incarnation in this history: its bit in sums
        self.alive, self.stopped = True, False
        self.slow = self.slow_up = 1.0  # times the usual latency; up: of what it sends
        self.later: list[Callable[[], None]] = []  # what waits for SIGCONT
        options = world.options
        self.engine = world.plants.engine(
            Engine(
                peer,
                grace_s=options.grace_s,
                quorum=options.quorum,
                done_bound_s=options.done_bound_s,
                missed_rounds=options.missed_rounds,
                missed_bytes=0,
            )
        )
        who = mb.Identity(
            run="sim",
            peer=peer,
            name=f"p{process}",
            host="h",
            launch=f"w{process}" if options.launchers else "",
            void=void,
            share=world.draw.choice((1.0, 1.0, 2.0, 0.0)) if options.shares else 1.0,
        )
        self.member = mb.Member(who, random.Random(peer))
        self.arrived: list[dict[str, Any]] = []  # values of chunks, not seen in the engine yet
        self.others: list[int] = []
        self.contacts: set[int] = set()
        self.routes: dict[int, int] = {}
        self.down: set[int] = set()
        self.over = False
        # the trainer
        stateful = [tag for tag in range(options.tags) if tag not in options.stateless]
        self.versions = Versions(dict.fromkeys(stateful, 0))
        self.state = dict.fromkeys(stateful, "")
        # Rounds begun here whose results are not taken yet.
        self.flights: dict[int, deque[int]] = {tag: deque() for tag in range(options.tags)}
        self.due_s = dict.fromkeys(range(options.tags), 0.0)
        self.lost = dict.fromkeys(range(options.tags), False)  # one of several in flight was
        self.holds_back = dict.fromkeys(range(options.tags), False)  # results, begins nothing
        self.given: dict[int, list[Any]] = {tag: [] for tag in stateful}  # to be applied
        self.fetching: dict[int, float] = {}
        self.done_rounds = dict.fromkeys(range(options.tags), 0)

    # --- the process

    def start(self) -> None:
        self.engine.declare(self.versions.declared())
        self.step(mb.Ready())
        self.world.after(self.world.draw.random() * 0.1, self.tick)

    def tick(self) -> None:
        if not self.alive or self.over:
            return
        if not self.stopped:
            self.engine.tick(self.world.now)
            self.step(None)
            self.touched()
        self.world.after(self.world.options.tick_s, self.tick)

    def step(self, event: Any) -> None:
        if not self.alive or self.over:
            return
        for effect in self.member.step(event, self.world.now):
            self.carry(effect)
            if not self.alive:
                return

    def hear(self, data: bytes) -> None:
        """A control message arrives."""
        if not self.alive or self.over:
            return
        if self.stopped:
            self.later.append(lambda: self.hear(data))
            return
        message = m.decode(data)
        self.world.visits.hears(self, message)
        self.step(mb.Message(message))
        self.touched()

    def carry(self, effect: Any) -> None:
        world = self.world
        if isinstance(effect, mb.Say):
            source, data = identity(self.id), m.encode(effect.message)
            world.control.send(self.id, lambda data: world.to_coordinator(source, data), data)
        elif isinstance(effect, mb.EngineFreeze):
            report = self.engine.freeze(*effect.freeze)
            world.note("freeze", self.id, effect.freeze)
            self.tell_values(report)
            self.step(mb.Reported(effect.freeze, report))
        elif isinstance(effect, mb.EngineInstall):
            self.install(effect)
        elif isinstance(effect, mb.SetRoutes):
            changed = {
                peer
                for peer in self.routes.keys() | effect.routes.keys()
                if self.routes.get(peer) != effect.routes.get(peer)
            }
            self.routes = effect.routes
            for peer in sorted(changed):
                self.reset(peer)
        elif isinstance(effect, mb.Tell):
            world.note("told", self.id, effect.kind, effect.detail)
            if effect.kind in ("evicted", "refused"):
                self.over = True
                world.left(self, effect)

    def install(self, effect: mb.EngineInstall) -> None:
        world, view = self.world, effect.install["view"]
        if effect.void:
            self.versions.make_void()
            self.engine.declare(self.versions.declared())
        held = dict(self.versions.declared())
        done = self.engine.install(effect.install, world.now)
        if not done:
            self.step(mb.Installed(view["id"], False))
            return
        self.others = [row[0] for row in view["members"] if row[0] != self.id]
        self.contacts = set(self.others)
        tags = effect.install["tags"]
        ours = self.versions.installed(view["id"], tags, held, effect.void, effect.adopt)
        if effect.adopt:
            for tag, last in self.versions.declared():
                self.engine.set_covered(tag, last)
        self.step(mb.Installed(view["id"], True))
        world.check(
            ev="install",
            peer=self.id,
            view=view["id"],
            generation=self.member.generation,
            members=[row[:3] for row in view["members"]],
            held=self.held(),
        )
        for tag in self.versions.version if effect.adopt else ():
            self.state_event(tag)
        for tag in self.flights:
            self.take_ready(tag)
        self.down &= self.contacts
        if not ours:
            self.doubt_self("holds a round that the view does not know")
        world.links.again(self)
        world.links.resume(self)

    def held(self) -> dict[int, int]:
        """For each tag with state the last round whose effect or result we have."""
        report = self.engine.freeze(0, 0)  # an old FREEZE stops nothing
        return {tag["tag"]: tag["covered"] for tag in report["tags"] if tag["state"]}

    def doubt_self(self, why: str) -> None:
        self.versions.make_void()
        self.engine.declare(self.versions.declared())
        self.step(mb.Doubt("void", self.id, 0, 0, (), why))

    def knows(self, other: int) -> bool:
        return other in self.contacts

    def reset(self, other: int) -> None:
        if self.alive and not self.over and other in self.contacts:
            if self.stopped:
                self.later.append(lambda: self.reset(other))
                return
            self.engine.on_link_reset(other, self.world.now)
            self.touched()

    def link(self, other: int, up: bool) -> None:
        """What the mesh sees of a link."""
        if not self.alive or self.over or (other not in self.contacts and not up):
            return
        if self.stopped:
            self.later.append(lambda: self.link(other, up))
        elif up == (other in self.down):
            self.down ^= {other}
            self.step(mb.Link(other, up))

    def resume(self) -> None:
        self.stopped = False
        later, self.later = self.later, []
        for action in later:
            action()
        self.world.links.resume(self)
        self.touched()

    # --- the trainer

    def touched(self) -> None:
        """Something may have changed: events, results, frames."""
        if not self.alive or self.over:
            return
        self.look_at_values()
        for event in self.engine.take_events():
            self.on_event(event)
        self.train()
        self.world.links.pump(self)

    def look_at_values(self) -> None:
        """Tells the checker of values that the engine holds now: a frame of a round that is not
        open here is parked, and is as if never sent when the view ends before the round opens."""
        if self.engine.frozen:
            self.arrived.clear()
        if not self.arrived:
            return
        report = self.engine.freeze(0, 0)
        rounds = {(one["tag"], one["seq"]): one for one in report["rounds"]}
        stable = {(tag["tag"], seq) for tag in report["tags"] for seq, _ in tag["stable"]}
        arrived, self.arrived = self.arrived, []
        for value in arrived:
            if value["view"] != self.member.view:
                continue
            key, at = (value["tag"], value["seq"]), 8 * value["chunk"]
            columns = rounds.get(key, {"contributors": b"", "digest": b""})
            said = columns["contributors"][at : at + 8] + columns["digest"][at : at + 8]
            if key in stable or said.hex() == value["digest"]:
                event = {"peer": self.id, "generation": self.member.generation, **value}
                self.world.check(ev="value", **event)
            else:
                self.arrived.append(value)

    def tell_values(self, report: dict[str, Any]) -> None:
        """Tells the checker of all values held at a FREEZE, also those combined here."""
        if not report["installed"]:
            return
        common = {"ev": "value", "peer": self.id, "generation": self.member.generation}
        for entry in report["rounds"]:
            for at in range(0, 8 * len(entry["owner"]), 8):
                if any(entry["born"][at : at + 8]):
                    value = entry["contributors"][at : at + 8] + entry["digest"][at : at + 8]
                    where = {"tag": entry["tag"], "seq": entry["seq"], "chunk": at // 8}
                    view = report["installed"]
                    self.world.check(**common, **where, view=view, digest=value.hex())

    def on_event(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        self.world.note("event", self.id, kind, event["tag"], event["seq"], event["detail"])
        if kind == "diverged" and event["peer"] == self.id:
            self.doubt_self(event["detail"])
        elif kind in ("diverged", "late_done", "refused", "spec_mismatch"):
            if kind != "late_done":
                self.world.check(ev="complain", peer=self.id, text=f"{kind} {event['detail']}")
            digests = parse_digests(event["detail"]) if kind == "diverged" else ()
            self.step(
                mb.Doubt(kind, event["peer"], event["tag"], event["seq"], digests, event["detail"])
            )

    def train(self) -> None:
        if not self.member.view:
            return
        for tag in self.due_s:
            if not self.alive or self.over:
                return
            before = len(self.flights[tag])
            self.take_ready(tag)
            if self.flights[tag]:
                if self.world.options.ahead[tag]:
                    self.begin(tag)
            elif not before and self.catch_up(tag):
                self.begin(tag)
        current = self.versions.current()
        if current != self.member.current and not self.member.active:
            self.world.visits.says_current(self)
            self.step(mb.Current(current))

    def catch_up(self, tag: int) -> bool:
        """True when nothing is missing."""
        while True:
            missed = self.engine.missed(tag)
            if tag not in self.versions.version:
                if not missed:
                    return True
                self.returned(self.engine.take_result(tag, missed[0]))
                continue
            step = self.versions.next(tag, missed)
            if step.do in ("apply", "discard"):
                result = self.engine.take_result(tag, step.seq)
                if step.do == "apply":
                    self.apply(result)
                continue
            if step.do == "fetch":
                self.fetch(tag)
            return step.do == "nothing"

    def begin(self, tag: int) -> None:
        world, options = self.world, self.world.options
        flights, ahead = self.flights[tag], options.ahead[tag]
        if self.due_s[tag] > world.now or not self.engine.may_begin(tag, ahead):
            return
        following = self.versions.version.get(tag, 0) + len(flights)
        waits = self.lost[tag] or self.holds_back[tag]
        if flights and (len(flights) > ahead or waits or self.behind(tag)):
            return
        if not self.member.active and not options.observers_begin:
            return
        stateful = tag in self.versions.version
        shape = options.shapes[tag]
        salt = world.draw.randrange(1 << 12)
        skip = world.faulty and world.draw.random() < options.skips
        data = None if skip else shape.data(self.number, salt)
        state = self.state[tag] if stateful else ""
        digest = digest_of(state) if options.state_digests and stateful and not ahead else 0
        seq = self.engine.begin(
            tag, shape.spec, data, state_digest=digest, encoded=False, now=world.now
        )
        give = None if data is None else [self.number, salt]
        world.check(
            ev="begin",
            peer=self.id,
            generation=self.member.generation,
            tag=tag,
            seq=seq,
            give=give,
        )
        if stateful and self.member.active and seq != following:
            text = f"begins {tag}/{seq} at version {self.versions.version[tag]}"
            world.check(ev="complain", peer=self.id, text=text)
        flights.append(seq)
        if ahead:
            self.due_s[tag] = self.thought()

    def behind(self, tag: int) -> bool:
        """As the communicator sees it: what is computed from our state must not be contributed."""
        if tag not in self.versions.version:
            return bool(self.engine.missed(tag))
        return self.versions.next(tag, self.engine.missed(tag)).do != "nothing"

    def take_ready(self, tag: int) -> None:
        """Results of rounds begun here, in order. After one that is lost, or does not follow on the
        state, nothing is begun before all are taken."""
        flights = self.flights[tag]
        while flights and self.engine.ready(tag, flights[0]):
            self.take(tag)
            if not self.alive or self.over:
                return

    def thought(self) -> float:
        think_s = self.world.options.think_s * self.slow * (0.5 + self.world.draw.random())
        return self.world.now + think_s

    def take(self, tag: int) -> None:
        seq = self.flights[tag].popleft()
        if not self.world.options.ahead[tag]:
            self.due_s[tag] = self.thought()
        result = self.engine.take_result(tag, seq)
        self.lost[tag] = bool(self.flights[tag]) and self.lost[tag]
        if result.outcome != "stable":
            self.world.note("lost", self.id, tag, seq, result.outcome)
            self.lost[tag] = bool(self.flights[tag])
            return
        if tag not in self.versions.version:
            self.returned(result)
        else:
            self.give(tag, result)

    def give(self, tag: int, result: Any) -> None:
        """To the trainer, which applies it at once, or when it has all that is in flight: a trainer
        of several rounds at a time waits for them so when one was lost."""
        excused = self.lost[tag] or not self.member.active
        if self.versions.follows(tag, result.seq) and not self.versions.void[tag]:
            self.versions.hand_out(tag, result.seq)
            self.given[tag].append(result)
        else:
            self.pass_over(result, excused)
        if self.flights[tag] and self.world.draw.random() < self.world.options.held_back:
            self.holds_back[tag] = True
            return
        self.holds_back[tag] = False
        given, self.given[tag] = self.given[tag], []
        for one in given:
            if not self.alive or self.over:
                return
            if one.seq == self.versions.version[tag] and not self.versions.void[tag]:
                self.apply(one)
            else:
                self.versions.passed(tag, one.seq)
                self.pass_over(one, excused)

    def pass_over(self, result: Any, excused: bool) -> None:
        tag, seq = result.tag, result.seq
        if not self.versions.void[tag]:
            self.world.check(ev="passed", peer=self.id, tag=tag, seq=seq, excused=excused)

    def returned(self, result: Any) -> None:
        peers = dict(result.peers)
        shape = self.world.options.shapes[result.tag]
        chunks = [
            [[peers[slot] for slot in range(64) if mask >> slot & 1], shape.value(result, chunk)]
            for chunk, mask in enumerate(result.contributors)
        ]
        self.done_rounds[result.tag] += 1
        self.world.check(
            ev="return",
            peer=self.id,
            view=result.view,
            generation=self.member.generation,
            tag=result.tag,
            seq=result.seq,
            digest=result.digest,
            chunks=chunks,
        )

    def apply(self, result: Any) -> None:
        self.returned(result)
        if not self.alive:
            return
        tag = result.tag
        value = hashlib.blake2b(result.values, digest_size=8).hexdigest()
        self.state[tag] = hashlib.blake2b(
            f"{self.state[tag]} {result.seq} {value}".encode(), digest_size=8
        ).hexdigest()
        self.versions.applied(tag, result.seq)
        self.engine.set_covered(tag, result.seq)
        self.state_event(tag, result.seq)

    def state_event(self, tag: int, seq: int | None = None) -> None:
        self.world.check(
            ev="state",
            peer=self.id,
            view=self.member.view,
            generation=self.member.generation,
            tag=tag,
            version=self.versions.version[tag],
            digest=self.state[tag],
            seq=seq,
        )

    def fetch(self, tag: int) -> None:
        world = self.world
        if self.fetching.get(tag, 0.0) > world.now:
            return
        able = [
            peer
            for peer in self.others
            if (other := world.peers.get(peer)) is not None
            and other.alive and not other.stopped and not other.over
            and world.links.usable(self.id, peer)
            and tag in other.versions.version and not other.versions.void[tag]
            and other.member.view
        ]  # fmt: skip
        if not able:
            return
        server = world.peers[world.draw.choice(able)]
        got = (server.versions.version[tag], server.state[tag], server.member.view, server.id)
        delay_s = world.options.fetch_s * (0.5 + world.draw.random())
        self.fetching[tag] = world.now + delay_s
        world.after(delay_s, lambda: self.fetched(tag, *got))

    def fetched(self, tag: int, version: int, state: str, view: int, server: int) -> None:
        if not self.alive or self.over:
            return
        if self.stopped:
            self.later.append(lambda: self.fetched(tag, version, state, view, server))
            return
        behind = self.versions.void[tag] or version > self.versions.version[tag]
        if not behind or self.flights[tag]:
            return
        member = server in self.contacts
        if self.versions.fetched(tag, version, view, member, self.engine.frozen):
            self.state[tag] = state
            self.engine.set_covered(tag, version - 1)
            self.world.note("fetched", self.id, tag, version)
            self.state_event(tag)
        self.touched()


def digest_of(state: str) -> int:
    return int.from_bytes(hashlib.blake2b(state.encode(), digest_size=8).digest(), "big") or 1
