"""A peer's control thread: one poll loop around the pure Member, the coordinator's socket and the
events of the node.

It carries out what Member decides and tells the communicator through `Agent.shared`. An evicted
peer that may come back gets a new incarnation here: new id, new node, nothing held (V11).
"""

from __future__ import annotations

import logging
import os
import random
import re
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import zmq

from decotrain.control import member as mb
from decotrain.control import messages as m
from decotrain.control.effects import identity
from decotrain.control.measures import Meter
from decotrain.control.returns import Returns
from decotrain.control.token import Secret
from decotrain.control.transport import TAIL_BYTES, Handshakes, connect_dealer, with_port
from decotrain.errors import ConfigError, MessageError

TICK_S = 0.05
DOUBTS = ("diverged", "late_done", "refused", "spec_mismatch")
AGAIN_S = 0.2  # before an evicted peer comes back
ABSENT_S = 5.0  # before somebody is told that there is no coordinator

logger = logging.getLogger("decotrain.peer")


class DataPlane(Protocol):
    """What the agent needs of decotrain._core.Node."""

    addresses: list[str]
    event_fd: int

    def freeze(self, term: int, number: int) -> dict[str, Any]: ...
    def install(self, install: dict[str, Any]) -> bool: ...
    def declare(self, covered: list[tuple[int, int]]) -> None: ...
    def set_covered(self, tag: int, seq: int) -> None: ...
    def withdraw(self, tag: int) -> None: ...
    def take_missed(self, tag: int) -> list[Any]: ...
    def set_peers(
        self, peers: list[tuple[int, int, list[str]]], keys: dict[int, bytes]
    ) -> None: ...
    def set_route(self, peer: int, via: int) -> None: ...
    def links(self) -> list[dict[str, Any]]: ...
    def measures(self) -> dict[str, Any]: ...
    def events(self) -> list[dict[str, Any]]: ...
    def close(self) -> None: ...


@dataclass
class Shared:
    """What the trainer's thread sees. Guarded by `changed`."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    peer: int = 0
    node: Any = None
    incarnation: int = 0
    welcome: bool = False
    config: dict[str, Any] | None = None
    waiting: str = "the coordinator has not answered yet"
    view: int = 0
    generation: int = 0
    members: list[list[Any]] = field(default_factory=list)
    over: str | None = None  # why there is no way back
    over_kind: str = ""  # refused, evicted, left, memory, broken
    open: set[tuple[int, int]] = field(default_factory=set)  # rounds others began and we did not
    routes: dict[int, int] = field(default_factory=dict)
    traffic: list[int] = field(default_factory=lambda: [0, 0])  # out, in; of nodes now closed


class Agent:
    def __init__(
        self,
        address: str,
        who: mb.Identity,
        make_node: Callable[[int], DataPlane],
        declared: Callable[[], list[tuple[int, int]]],  # tags with state, nothing held
        held: Callable[[], list[tuple[int, int]]] = list,  # tags with state, what is held
        # (view, tags of the plan, held before it, void, adopt) after an install; False: what we
        # hold is void
        on_install: Callable[..., bool] = lambda *_: True,
        tell: Callable[[list[str]], list[str]] = list,  # addresses of the node -> for others
        token: Secret | None = None,
    ) -> None:
        self.address, self.token = address, token
        self.make_node = make_node
        self.declared = declared
        self.held = held
        self.on_install = on_install
        self.tell = tell
        self.shared = Shared()
        self.rng = random.Random(new_peer_id())  # noqa: S311 (jitter, not a key)
        self.context: zmq.Context[Any] = zmq.Context()
        self.commands: deque[Any] = deque()
        self.wake_read, self.wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.wake_lock = threading.Lock()  # a descriptor once closed may be somebody else's
        self.awake = True
        self.stopping = False
        self.ready = False
        self.again_s: float | None = None
        self.returns = Returns()
        self.absent_s: float | None = None  # since when the coordinator is not there
        self.missed = False  # and somebody was told
        self._incarnate(who)
        self.thread = threading.Thread(target=self._run, name="decotrain-control", daemon=True)
        self.thread.start()

    # --- any thread

    def post(self, event: Any) -> None:
        """An event for Member, or a callable to run on the control thread."""
        self.commands.append(event)
        self._wake()

    def doubt(self, kind: str, peer: int, tag: int, seq: int, detail: str) -> None:
        """What was found in a round where the core cannot look, as if it were an event of its."""
        event = {"kind": kind, "peer": peer, "tag": tag, "seq": seq, "detail": detail}
        self.post(lambda: self._node_event(event))

    def stop(self) -> None:
        """Ends the thread and the node. Says nothing to the coordinator."""
        self.stopping = True
        self._wake()
        self.thread.join()

    def _wake(self) -> None:
        with self.wake_lock, suppress(BlockingIOError):  # full: it is awake anyway
            if self.awake:
                os.write(self.wake_write, b"x")

    # --- the control thread

    def _incarnate(self, who: mb.Identity) -> None:
        node = self.make_node(who.peer)
        addresses = self.tell(list(node.addresses))[: m.ADDRESSES_MAX]
        who = replace(who, addresses=addresses)
        self.node = node
        self.route = identity(who.peer) + os.urandom(TAIL_BYTES)
        self._connect()
        self.member = mb.Member(who, self.rng)
        self.meter = Meter(who.peer, who.share)
        with self.shared.changed:
            self.shared.peer, self.shared.node = who.peer, node
            self.shared.view, self.shared.members, self.shared.open = 0, [], set()
            self.shared.changed.notify_all()
        if self.ready:
            node.declare(self.declared())
            self._step(mb.Ready())

    def _connect(self) -> None:
        self.socket = connect_dealer(self.context, self.address, self.route, self.token)
        self.handshakes = Handshakes(self.socket, self.address, self.token)

    def _close(self, node: DataPlane) -> None:
        """Its rounds end, its traffic is remembered."""
        with suppress(RuntimeError):  # it has ended by itself
            moved = node.measures()
            with self.shared.changed:
                self.shared.traffic[0] += moved["sent_bytes"]
                self.shared.traffic[1] += moved["received_bytes"]
        node.close()

    def traffic(self) -> tuple[int, int]:
        """Bytes out and in over all links there ever were."""
        with self.shared.changed:
            node, (sent, received) = self.shared.node, self.shared.traffic
        with suppress(RuntimeError):  # closed: counted above
            moved = node.measures()
            return sent + moved["sent_bytes"], received + moved["received_bytes"]
        return sent, received

    def _disconnect(self) -> None:
        self.handshakes.close()
        self.socket.close()

    def _run(self) -> None:
        try:
            while not self.stopping:
                self._turn()
        except Exception as error:  # nobody else can tell the trainer
            logger.exception("the control thread ended")
            self._end("broken", f"the control thread ended: {error!r}")
        finally:
            self._close(self.node)
            self._disconnect()
            self.context.term()
            with self.wake_lock:
                self.awake = False
                os.close(self.wake_read)
                os.close(self.wake_write)

    def _turn(self) -> None:
        poller = select.poll()
        for descriptor in (self.socket.FD, self.node.event_fd, self.wake_read):
            poller.register(descriptor, select.POLLIN)
        # The descriptor of a ZeroMQ socket is edge-triggered: never sleep on unread messages.
        if not int(self.socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN and not self.commands:
            poller.poll(TICK_S * 1000)
        self._drain_wake()
        while self.commands:
            command = self.commands.popleft()
            if callable(command):
                command()
            else:
                if isinstance(command, mb.Ready):
                    self.ready = True
                self._step(command)
        for event in self.node.events():
            self._node_event(event)
        self._receive()
        now = time.monotonic()
        if self.meter.due(now):
            self.member.measures = self.meter.read(self.node.links(), self.node.measures(), now)
        self._step(None)
        wrong = self.handshakes.look()
        if wrong is not None and not self.shared.welcome:  # once welcome we dial for ever
            self._end("refused", wrong)
        elif self.handshakes.stuck:
            self._disconnect()
            self._connect()
        self._watch_coordinator(now)
        if self.again_s is not None and time.monotonic() >= self.again_s:
            self._come_back()

    def _watch_coordinator(self, now: float) -> None:
        """Says once that the coordinator is not there, and once that it is back."""
        place = with_port(self.address)
        if self.handshakes.connected:
            if self.missed:
                logger.warning("the coordinator at %s is there", place)
            self.absent_s, self.missed = None, False
        elif self.absent_s is None:
            self.absent_s = now
        elif now - self.absent_s > ABSENT_S and not self.missed:
            self.missed = True
            if self.shared.view:
                text = (
                    "the coordinator at %s has gone: rounds go on, joins and failures wait until it"
                    " is started again with its record; it is dialled for ever"
                )
            else:
                text = (
                    "no coordinator answers at %s yet: check the address, that it runs, and that"
                    " the port is open; it is dialled for ever"
                )
            logger.warning(text, place)

    def _drain_wake(self) -> None:
        with suppress(BlockingIOError):
            os.read(self.wake_read, 4096)

    def _receive(self) -> None:
        for _ in range(256):
            try:
                data = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = m.decode(data)
            except MessageError as error:
                logger.warning("dropped a message of the coordinator: %s", error)
                continue
            self._step(mb.Message(message))

    def _step(self, event: Any) -> None:
        for effect in self.member.step(event, time.monotonic()):
            self._carry(effect)

    def _carry(self, effect: Any) -> None:
        if isinstance(effect, mb.Say):
            self._say(effect.message)
        elif isinstance(effect, mb.EngineFreeze):
            report = self.node.freeze(*effect.freeze)
            self._step(mb.Reported(effect.freeze, report))
        elif isinstance(effect, mb.EngineInstall):
            self._install(effect)
        elif isinstance(effect, mb.SetRoutes):
            old = self.shared.routes
            for peer in old.keys() - effect.routes.keys():
                self.node.set_route(peer, 0)
            for peer, via in effect.routes.items():
                self.node.set_route(peer, via)
            with self.shared.changed:
                self.shared.routes = effect.routes
        elif isinstance(effect, mb.Tell):
            self._tell(effect)

    def _say(self, message: Any) -> None:
        try:
            data = m.encode(message)
        except ConfigError as error:
            if isinstance(message, m.Hello):  # it would be said for ever, and never heard
                self._end("refused", str(error))
            else:
                logger.warning("not said to the coordinator: %s", error)
            return
        with suppress(zmq.Again):  # nobody there: everything is repeated
            self.socket.send(data, zmq.NOBLOCK)

    def _install(self, effect: mb.EngineInstall) -> None:
        if effect.void:
            self.node.declare(self.declared())
        view = effect.install["view"]
        # What we held before: once the engine goes on, the trainer may take a round of the new view
        # before the next line runs.
        held = dict(self.held())
        done = self.node.install(effect.install)
        if done:
            slots = {row[0]: row[1] for row in view["members"]}
            self.node.set_peers(
                [(c["peer"], slots[c["peer"]], c["addresses"]) for c in effect.contacts],
                {c["peer"]: c["key"] for c in effect.contacts if c["key"]},
            )
        tags = effect.install["tags"]
        ours = not done or self.on_install(view["id"], tags, held, effect.void, effect.adopt)
        self._step(mb.Installed(view["id"], done))
        if not ours:
            self._void("it holds a round that the view does not know")

    def _void(self, why: str) -> None:
        """Our branch is not the run's: we come back as a newcomer (V11)."""
        self._step(mb.Doubt("void", self.member.me.peer, 0, 0, (), why))

    def _node_event(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind in ("link_up", "link_down"):
            self._step(mb.Link(event["peer"], kind == "link_up"))
        elif kind == "broken":
            self._end("memory" if "memory" in event["detail"] else "broken", event["detail"])
        elif kind == "diverged" and event["peer"] == self.member.me.peer:
            said = event["detail"]
            if parse_digests(said):  # the others' word and ours, as the majority sees them
                said = f"its bits diverged in round {event['tag']}/{event['seq']}: {said}"
            self._void(said)
        elif kind in DOUBTS:
            doubt = mb.Doubt(
                kind=kind,
                who=event["peer"],
                tag=event["tag"],
                seq=event["seq"],
                digests=parse_digests(event["detail"]) if kind == "diverged" else (),
                detail=event["detail"],
            )
            logger.warning("%s in round %d/%d: %s", kind, doubt.tag, doubt.seq, doubt.detail)
            self._step(doubt)
        elif kind in ("open", "stable"):
            key = (event["tag"], event["seq"])
            with self.shared.changed:
                if kind == "open":
                    self.shared.open.add(key)
                else:
                    self.shared.open.discard(key)
                self.shared.changed.notify_all()

    def _tell(self, effect: mb.Tell) -> None:
        shared = self.shared
        if effect.kind == "welcome":
            with shared.changed:
                shared.welcome = True
                shared.config = effect.config
                shared.waiting = effect.detail
                shared.changed.notify_all()
        elif effect.kind == "view":
            with shared.changed:
                shared.view, shared.members = self.member.view, self.member.members
                shared.generation = self.member.generation
                shared.changed.notify_all()
        elif effect.again and (vain := self.returns.vain(effect.detail, time.monotonic())):
            self._end("evicted", vain)
        elif effect.again:
            logger.warning("left out of the run: %s; comes back as a newcomer", effect.detail)
            self.again_s = time.monotonic() + AGAIN_S * (0.5 + self.rng.random())
        else:
            self._end("left" if self.member.leaving else effect.kind, effect.detail)

    def _come_back(self) -> None:
        self.again_s = None
        leaving = self.member.leaving
        if leaving:
            self._end("left", "left out while leaving")
            return
        old = self.node
        self._disconnect()
        with self.shared.changed:
            self.shared.incarnation += 1  # before works fail: whoever waits sees why
        self._close(old)
        self._incarnate(replace(self.member.me, peer=new_peer_id(), void=True))

    def _end(self, kind: str, reason: str) -> None:
        with self.shared.changed:
            self.shared.over, self.shared.over_kind = reason, kind
            self.shared.changed.notify_all()
        self.stopping = True  # the node closes, and with it all rounds that somebody waits for


def new_peer_id() -> int:
    """Random, never 0: an id is used once."""
    return int.from_bytes(os.urandom(8), "big") or 1


def parse_digests(detail: str) -> tuple[tuple[int, int], ...]:
    """'0=1f../c0..,2=ab../c0..' (slot=results/state, hex) -> pairs of slot and both in one."""
    return tuple(
        (int(slot), (int(results, 16) * 31 + int(state, 16)) % 2**64)
        for slot, results, state in re.findall(r"(\d+)=([0-9a-f]{16})/([0-9a-f]{16})", detail)
        if int(slot) < 64
    )
