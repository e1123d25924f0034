"""A peer's side of membership as a pure state machine: says hello, freezes, installs, leaves.

`step(event, now)` gives effects: messages to the coordinator, orders to the engine, news for the
communicator. It decides no view, and nothing in it ends because the coordinator is silent: rounds
go on, and hello is repeated for ever. An eviction is final for a peer id (V11): who comes back is
a new `Member` with a new id and a new engine, whose state is void. That is simpler than taking an
old id back, and no late message can mean the wrong incarnation.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from decotrain import __version__
from decotrain.control import messages as m
from decotrain.control.measures import Measures

HEARTBEAT_S = 0.5
HELLO_FIRST_S = 0.1
HELLO_LAST_S = 2.0
LEAVE_S = 0.5
SUSPECTS_MAX = 16
REFUSED_MAX = 4  # of one peer in one view: told once each

Freeze = tuple[int, int]


# --- events besides Received and Tick


@dataclass(frozen=True)
class Message:
    """From the coordinator, checked."""

    message: Any


@dataclass(frozen=True)
class Reported:
    """The engine is frozen and gave its report."""

    freeze: Freeze
    report: dict[str, Any]


@dataclass(frozen=True)
class Installed:
    """The engine took an install (or did not)."""

    view: int
    done: bool


@dataclass(frozen=True)
class Link:
    peer: int
    up: bool


@dataclass(frozen=True)
class Doubt:
    """An event of our rounds about another peer: fields of messages.Suspect."""

    kind: str
    who: int
    tag: int
    seq: int
    digests: tuple[tuple[int, int], ...]
    detail: str


@dataclass(frozen=True)
class Current:
    """The application holds (or does not hold) the state of every tag."""

    current: bool


@dataclass(frozen=True)
class Ready:
    """The application has declared its state: from now on we may be in a view."""


@dataclass(frozen=True)
class AskLeave:
    pass


# --- effects besides Send


@dataclass(frozen=True)
class Say:
    """To the coordinator."""

    message: Any


@dataclass(frozen=True)
class EngineFreeze:
    freeze: Freeze


@dataclass(frozen=True)
class EngineInstall:
    install: dict[str, Any]
    contacts: list[dict[str, Any]]
    void: bool  # first forget what state was declared here: it is not the run's
    adopt: bool  # the run goes on from what we hold, void or not


@dataclass(frozen=True)
class SetRoutes:
    routes: dict[int, int]  # to reach peer, send through


@dataclass(frozen=True)
class Tell:
    """News for the communicator: welcome, view, refused, evicted."""

    kind: str
    detail: str
    again: bool = True
    config: dict[str, Any] | None = None


@dataclass(frozen=True)
class Identity:
    run: str
    peer: int
    name: str
    host: str = ""
    launch: str = ""
    region: str = ""
    addresses: list[str] = field(default_factory=list)
    key: bytes = b""
    share: float = 1.0
    config: dict[str, Any] | None = None
    min_peers: int = 0
    void: bool = False  # was in the run before: its state is not what a run starts from
    slot: int | None = None  # it asks for, as what it resumes from was made in it


class Member:
    def __init__(self, identity: Identity, rng: random.Random) -> None:
        self.me = identity
        self.rng = rng
        self.over = False  # evicted or refused: nothing more is said
        # what binds us (V1)
        self.term = 0
        self.freeze: Freeze = (0, 0)  # newest seen
        self.report: dict[str, Any] | None = None  # ours, for that freeze
        self.view = 0
        self.generation = 0
        self.members: list[list[Any]] = []  # peer, slot, active, share
        self.pending: m.Install | None = None  # given to the engine, not answered yet
        # what we repeat
        self.known = False  # the coordinator has welcomed us
        self.ready = False
        self.current = False
        self.leaving = False
        self.down: set[int] = set()
        self.doubts: list[Doubt] = []
        self.refused: dict[int, int] = {}  # peer -> how often its frames were, in this view
        self.routes = 0
        self.figures: dict[str, Any] = {}
        self.last_round: dict[str, str] = {}  # tag/number, as a figure
        self.measures = Measures(share=identity.share)
        # when
        self.hello_s = 0.0
        self.hello_pause_s = HELLO_FIRST_S
        self.heartbeat_s = 0.0
        self.leave_s = 0.0
        self.heard_s: float | None = None  # the coordinator
        self.effects: list[Any] = []

    @property
    def active(self) -> bool:
        return any(peer == self.me.peer and active for peer, _, active, _ in self.members)

    @property
    def frozen(self) -> bool:
        return self.report is not None

    def step(self, event: Any, now: float) -> list[Any]:
        """Effects in order. A Tick is `step(None, now)`."""
        if self.over:
            return []
        self.effects = []
        if isinstance(event, Message):
            self._message(event.message, now)
        elif isinstance(event, Reported):
            if event.freeze == self.freeze:
                self.report = event.report
                self._send_report()
        elif isinstance(event, Installed):
            self._installed(event, now)
        elif isinstance(event, Link):
            self._link(event, now)
        elif isinstance(event, Doubt):
            self._doubt(event)
        elif isinstance(event, Current):
            if event.current != self.current:
                self.current = event.current
                self.heartbeat_s = now
        elif isinstance(event, Ready):
            if not self.ready:
                self.ready = True
                self.heartbeat_s = now
        elif isinstance(event, AskLeave):
            self.leaving = True
            self.leave_s = now
        if not self.over:
            self._repeat(now)
        return self.effects

    def _doubt(self, event: Doubt) -> None:
        if event.kind == "refused":  # brings no view about, so nothing would ever forget it
            told = self.refused[event.who] = self.refused.get(event.who, 0) + 1
            if told <= REFUSED_MAX:
                self._say_doubt(event)
        elif event not in self.doubts and len(self.doubts) < SUSPECTS_MAX:
            self.doubts.append(event)
            self._say_doubt(event)

    # --- what the coordinator says

    def _message(self, message: Any, now: float) -> None:
        if getattr(message, "run", self.me.run) != self.me.run:
            return
        if isinstance(message, m.Freeze):
            self._freeze(message, now)
        elif isinstance(message, m.Install):
            self._install(message, now)
        elif getattr(message, "peer", self.me.peer) != self.me.peer:
            return
        elif isinstance(message, m.Welcome):
            self._heard(message.term, now)
            self.known = True
            self.hello_pause_s = HELLO_FIRST_S
            self.effects.append(
                Tell("welcome", f"{message.waiting_for} peers missing", config=message.config)
            )
        elif isinstance(message, m.AskHello):
            self._heard(message.term, now)
            if self.known:
                self.known = False
                self.hello_s = now
        elif isinstance(message, m.AskHeartbeat):
            self._heard(message.term, now)
            self.heartbeat_s = now
        elif isinstance(message, m.Routes):
            if message.term >= self.term and message.number != self.routes:
                self.routes = message.number
                self.effects.append(SetRoutes({peer: via for peer, via in message.routes}))
        elif isinstance(message, m.Refuse):
            if not self.view:  # in a run we are evicted, not refused
                self.over = True
                self.effects.append(Tell("refused", message.reason, again=False))
        elif isinstance(message, m.Evicted):
            self.over = True
            self.effects.append(Tell("evicted", message.reason, again=message.again))

    def _heard(self, term: int, now: float) -> None:
        self.heard_s = now
        self.term = max(self.term, term)

    def _freeze(self, message: m.Freeze, now: float) -> None:
        freeze = (message.freeze[0], message.freeze[1])
        if freeze < self.freeze or freeze[0] < self.term:
            return  # late, or of a coordinator that has been replaced
        self._heard(freeze[0], now)
        if freeze > self.freeze:
            self.freeze, self.report = freeze, None
            self.effects.append(EngineFreeze(freeze))
        elif self.report is not None:
            self._send_report()

    def _send_report(self) -> None:
        assert self.report is not None
        self.effects.append(
            Say(
                m.Report(self.me.run, self.me.peer, list(self.freeze), self.generation, self.report)
            )
        )

    def _install(self, message: m.Install, now: float) -> None:
        """V1: only the INSTALL that answers the newest FREEZE seen here."""
        view = message.install["view"]["id"]
        if view == self.view:
            self.heard_s = now
            self._ack(view)
        if tuple(message.install["answers"]) != self.freeze or self.report is None:
            return
        if view <= self.view or self.pending is not None:
            return
        mine = [row for row in message.install["view"]["members"] if row[0] == self.me.peer]
        if not mine:
            return
        self.heard_s = now
        self.pending = message
        first, active = self.view == 0, mine[0][2]
        start = active and (first or message.generation != self.generation)
        self.effects.append(
            EngineInstall(message.install, message.contacts, void=first and not active, adopt=start)
        )

    def _installed(self, event: Installed, now: float) -> None:
        message, self.pending = self.pending, None
        if message is None or not event.done or message.install["view"]["id"] != event.view:
            return
        self.view = event.view
        self.generation = message.generation
        self.members = message.install["view"]["members"]
        self.report = None
        self.current = False
        self.doubts.clear()
        self.refused.clear()
        here = {row[0] for row in self.members}
        self.down &= here
        self._ack(event.view)
        self.effects.append(Tell("view", f"{event.view >> 32}.{event.view & 0xFFFFFFFF}"))

    def _ack(self, view: int) -> None:
        self.effects.append(Say(m.Ack(self.me.run, self.me.peer, view, True)))

    # --- what we say

    def _link(self, event: Link, now: float) -> None:
        if event.up:
            self.down.discard(event.peer)
        else:
            self.down.add(event.peer)
        self.heartbeat_s = now  # at once

    def _say_doubt(self, doubt: Doubt) -> None:
        self.effects.append(
            Say(
                m.Suspect(
                    run=self.me.run,
                    peer=self.me.peer,
                    view=self.view,
                    kind=doubt.kind,
                    who=doubt.who,
                    tag=doubt.tag,
                    seq=doubt.seq,
                    digests=[list(entry) for entry in doubt.digests],
                    detail=doubt.detail[:512],
                )
            )
        )

    def _repeat(self, now: float) -> None:
        if not self.known:
            if now >= self.hello_s:
                self.hello_s = now + self.hello_pause_s * (0.5 + self.rng.random())
                self.hello_pause_s = min(2 * self.hello_pause_s, HELLO_LAST_S)
                self.effects.append(Say(self._hello()))
        elif now >= self.heartbeat_s:
            self.heartbeat_s = now + HEARTBEAT_S
            self.effects.append(
                Say(
                    m.Heartbeat(
                        run=self.me.run,
                        peer=self.me.peer,
                        term=self.term,
                        view=self.view,
                        ready=self.ready,
                        current=self.current and not self.active,
                        down=sorted(self.down)[: m.PEERS_MAX],
                        routes=self.routes,
                        figures={**self.last_round, **self.figures},
                        share=self.measures.share,
                        uplink_bps=self.measures.uplink_bps,
                        links=self.measures.links[: m.PEERS_MAX],
                        held_up=self.measures.held_up[: m.PEERS_MAX],
                    )
                )
            )
            for doubt in self.doubts:
                self._say_doubt(doubt)
        if self.leaving and now >= self.leave_s:
            self.leave_s = now + LEAVE_S
            self.effects.append(Say(m.Leave(self.me.run, self.me.peer)))

    def _hello(self) -> m.Hello:
        me = self.me
        return m.Hello(
            run=me.run,
            protocol=m.PROTOCOL,
            peer=me.peer,
            name=me.name,
            host=me.host,
            launch=me.launch,
            region=me.region,
            version=__version__,
            addresses=me.addresses,
            key=me.key,
            share=me.share,
            config=me.config,
            min_peers=me.min_peers,
            ready=self.ready,
            void=self.me.void and not self.view,
            term=self.term,
            view=self.view,
            generation=self.generation,
            members=[row[:3] for row in self.members],
            slot=None if me.void or self.view else me.slot,
        )
