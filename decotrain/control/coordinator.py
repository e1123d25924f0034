"""The coordinator as a pure state machine: who is in the run, and in which view.

`step(event, now)` takes a message or the passing of time and gives effects, to be carried out in
order: a record is durable before a message that depends on it leaves (V8). It opens no socket,
reads no clock and knows no tensors. How a view is made (FREEZE, plan, INSTALL) is in change.py;
this file admits, listens, suspects and decides that a change is due.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Any

from decotrain import __version__
from decotrain.control import messages as m
from decotrain.control import misfits
from decotrain.control.change import Changes
from decotrain.control.effects import Log, Persist, Received, Send, Stop, Tick, identity
from decotrain.control.measures import Measures
from decotrain.control.plan import waits_for_observers
from decotrain.control.record import BARRED_MAX, Record, RecordMember
from decotrain.control.roster import Gone, Peer, broken_edges, config_misfit, meant, relays
from decotrain.control.status import status
from decotrain.control.suspicion import answer_time, dark, hear, slept, suspect

EVENTS_MAX = 256


@dataclass(frozen=True)
class Options:
    run: str = "default"
    config: dict[str, Any] | None = None  # None: the first peer that brings one decides
    min_peers: int | None = None  # of the first view; None: what the peers ask for
    token: bytes = b""  # fingerprint
    # Of a run without record: later than any term a lost record can have had. The shell gives the
    # time in seconds, so that no epoch is used twice even then.
    first_term: int = 1
    recover_minority: bool = False  # rebuild a lost record from fewer than a majority
    suspect_timeout_s: float = 3.0  # without heartbeat
    closed_timeout_s: float = 0.1  # and two round trips; most links closed, and no sign of life
    report_timeout_s: float = 3.0  # without report after a FREEZE
    install_timeout_s: float = 6.0  # without ack of an INSTALL
    resend_s: float = 0.3
    batch_s: float = 0.02  # reasons that come together share a view
    calm_s: float = 0.2  # between views that only admit or promote
    promote_retry_s: float = 1.0
    recover_s: float = 5.0  # a coordinator that starts waits so long for recorded peers
    generation_s: float = 6.0  # without report of an active peer: open a new generation
    link_bound_s: float = 3.0  # a broken link that nobody can relay
    rebalance_s: float = 30.0  # between views that only move ownership


class Coordinator:
    def __init__(self, options: Options, record: Record | None) -> None:
        if record is not None and record.run != options.run:
            raise ValueError(f"the record is of run {record.run!r}, not {options.run!r}")
        # durable
        self.record = record or Record(run=options.run, config=options.config, token=options.token)
        # volatile
        self.peers: dict[int, Peer] = {}
        self.gone = Gone()
        self.out: dict[int, tuple[str, str]] = {}  # members to leave out: kind, reason
        self.demoted: dict[int, str] = {}  # active members to observe
        self.due_s: float | None = None  # a change that cannot wait is due
        self.doubtful: misfits.Doubtful | None = None
        self.effects: list[Any] = []
        self.events: deque[dict[str, Any]] = deque(maxlen=EVENTS_MAX)
        self.event_count = 0
        self.asking_s: float | None = None  # when a heartbeat that was asked for is late
        self.started_s: float | None = None
        self.stepped_s = 0.0
        self.heard_s = 0.0  # anybody
        self.patient_until_s = 0.0  # with who is silent
        self.stopped = False
        self.recovering = self.record.view != 0  # FREEZE first, when its peers are back
        self.lost_s: float | None = None  # since when peers of an unrecorded view are heard
        self.broken_s: dict[tuple[int, int], float] = {}
        self.routes: dict[int, dict[int, int]] = {}
        self.routes_number = 0
        # configuration
        self.options = options
        self.changes = Changes(self)

    # --- in and out

    def step(self, event: Received | Tick, now: float) -> list[Any]:
        if self.stopped:
            return []
        self.effects = []
        if self.started_s is None:
            self.started_s = self.stepped_s = self.heard_s = now
            term = self.record.term + 1 if self.record.term else self.options.first_term
            self.persist(replace(self.record, term=term))
            self.log("started", f"run {self.record.run}, term {self.record.term}", now)
        slept(self, now)
        if isinstance(event, Received):
            self._receive(event, now)
        if not self.stopped and not dark(self, now):
            suspect(self, now, isinstance(event, Tick))
            self._relay(now)
            self.changes.advance(now)
        return self.effects

    def send(self, peer: int, message: Any) -> None:
        self.effects.append(Send(identity(peer), message))

    def persist(self, record: Record) -> None:
        self.record = record
        self.effects.append(Persist(record))

    def log(self, kind: str, text: str, now: float) -> None:
        self.event_count += 1
        self.events.append({"n": self.event_count, "at_s": now, "kind": kind, "text": text[:512]})
        self.effects.append(Log(kind, text))

    def members(self) -> dict[int, RecordMember]:
        return {member.peer: member for member in self.record.members}

    # --- messages

    def _receive(self, event: Received, now: float) -> None:
        source, message = event.source, event.message
        if isinstance(message, m.Foreign):
            reason = f"the coordinator speaks protocol {m.PROTOCOL} (decotrain {__version__}), this"
            reason += f" peer {message.protocol}: install the same version of decotrain on both"
            self._refuse(source, message, reason, now)
            return
        if event.key and event.key in self.record.barred:
            if hasattr(message, "peer") and source == identity(message.peer):
                before = self.out.get(message.peer) or self.gone.get(message.peer)
                told = [one for one in before or () if isinstance(one, str)]
                reason = told[-1] if told else "the key of this peer was taken away"
                self.send(message.peer, m.Evicted(self.record.run, message.peer, reason, False))
            return
        if isinstance(message, m.AskStatus) and message.run in ("", self.record.run):
            self.effects.append(Send(source, m.Status(status(self, now, message.events_after))))
            return
        if message.run != self.record.run and not (isinstance(message, m.Kick) and not message.run):
            reason = f"this is run {self.record.run!r}, not {message.run!r}: give --run"
            reason += f" {self.record.run}, or the address of that other run's coordinator"
            if isinstance(message, m.Hello):
                self._refuse(source, message, reason, now)
            elif isinstance(message, m.AskStatus | m.AskProbe | m.Kick | m.Exited):
                self.effects.append(Send(source, m.Done(False, reason)))
            return
        if isinstance(message, m.Exited):
            self._exited(event, message, now)
        elif isinstance(message, m.Kick):
            if event.key:
                reason = "that takes the run's token, not the key of a peer"
                self.effects.append(Send(source, m.Done(False, reason)))
            else:
                self._kick(source, message, now)
        elif source == identity(message.peer) and self.key_of(message.peer) in (None, event.key):
            if isinstance(message, m.Hello):
                self._hello(source, replace(message, key=event.key), now)
            else:
                self._from_peer(message, now)

    def _from_peer(self, message: Any, now: float) -> None:
        peer = self.peers.get(message.peer)
        if peer is None:
            gone = self.gone.get(message.peer)
            if gone is None:
                self.send(message.peer, m.AskHello(self.record.run, self.record.term, message.peer))
            else:
                self.send(message.peer, m.Evicted(self.record.run, message.peer, *gone))
            return
        hear(self, now)
        peer.heard_s = now
        if isinstance(message, m.Heartbeat):
            self._heartbeat(peer, message, now)
        elif isinstance(message, m.Report):
            self.changes.report(message, now)
        elif isinstance(message, m.Ack):
            if message.done:
                peer.answer_s = answer_time(self, peer, message.view, now)
                peer.view = max(peer.view, message.view)
        elif isinstance(message, m.Leave):
            if not self.only_holder(message.peer):
                self.leave_out(message.peer, "left", "left", now)
        elif isinstance(message, m.Suspect):
            self._accused(peer, message, now)

    def _heartbeat(self, peer: Peer, message: m.Heartbeat, now: float) -> None:
        if message.term > self.record.term:
            self._higher_term(peer, message.term)
            return
        peer.view = max(peer.view, message.view)
        peer.current = message.current
        if message.current and message.view == self.record.view:
            peer.void = False
        if message.ready and not peer.hello.ready:
            peer.hello = replace(peer.hello, ready=True)
        peer.down = tuple(message.down)
        peer.routes = message.routes
        peer.figures = message.figures
        peer.measures = Measures(message.share, message.uplink_bps, message.links, message.held_up)
        kind, reason = self.out.get(message.peer, ("", ""))
        if kind == "silent":
            del self.out[message.peer]  # it was only slow
        elif kind == "exited":  # or so said a late hello of what ran in its place before
            self.out[message.peer] = ("heard", reason)

    def _higher_term(self, peer: Peer, term: int) -> None:
        """Somebody else coordinates, or did while our record was away."""
        if self.changes.number == 0:
            self.persist(replace(self.record, term=term + 1))
            return
        self.stopped = True
        self.effects.append(Stop(f"{peer.name} knows term {term}, ours is {self.record.term}"))

    # --- admission

    def _hello(self, source: bytes, hello: m.Hello, now: float) -> None:
        gone = self.gone.of(hello)
        if gone is not None:
            self.send(hello.peer, m.Evicted(self.record.run, hello.peer, *gone))
            return
        misfit = self._misfit(hello)
        if misfit is not None:
            self._refuse(source, hello, misfit, now)
            return
        member = hello.peer in self.members()
        stale = hello.view > self.record.view and self.changes.number == 0
        if hello.view and not member and not stale:
            reason = "the run has gone on without it"
            self.gone.add(hello.peer, reason, True)
            self.send(hello.peer, m.Evicted(self.record.run, hello.peer, reason, True))
            return
        if self.record.config is None and hello.config is not None:
            self.persist(replace(self.record, config=hello.config))
        hear(self, now)
        peer = self.peers.get(hello.peer)
        if peer is None:
            peer = self.peers[hello.peer] = Peer(hello=hello, heard_s=now, joined_s=now)
            peer.measures.share = hello.share
            self._replaces(hello, now)
            self.log("joined", f"{peer.name} from {hello.host or 'an unknown host'}", now)
            peer.void = hello.void
        peer.hello, peer.heard_s = hello, now
        peer.view = max(peer.view, hello.view)
        if stale and self.lost_s is None:
            self.lost_s = now
        if hello.term > self.record.term:
            self._higher_term(peer, hello.term)
        config = self.record.config
        welcome = m.Welcome(
            self.record.run, self.record.term, hello.peer, config, self.waiting_for()
        )
        self.send(hello.peer, welcome)

    def _misfit(self, hello: m.Hello) -> str | None:
        if hello.config is not None and self.record.config is not None:
            odd = config_misfit(self.record.config, hello.config)
            if odd is not None:
                return f"the configuration does not fit the run's: {odd}"
        if hello.peer not in self.peers and len(self.peers) >= m.PEERS_MAX:
            return f"the run is full: {m.PEERS_MAX} peers"
        return None

    def _refuse(self, source: bytes, hello: m.Hello | m.Foreign, reason: str, now: float) -> None:
        self.log("refused", f"{hello.name}: {reason}", now)
        self.effects.append(Send(source, m.Refuse(hello.run, hello.peer, reason[:2048])))

    def _replaces(self, hello: m.Hello, now: float) -> None:
        """The process that took the place of another one proves that one's end."""
        if not hello.launch:
            return
        for peer in list(self.known()):
            if peer != hello.peer and self.origin(peer) == (hello.host, hello.launch):
                self.leave_out(peer, "exited", "replaced by a new incarnation", now)

    def known(self) -> set[int]:
        return self.peers.keys() | self.members().keys()

    def origin(self, peer: int) -> tuple[str, str]:
        if peer in self.peers:
            return self.peers[peer].hello.host, self.peers[peer].hello.launch
        member = self.members()[peer]
        return member.host, member.launch

    def key_of(self, peer: int) -> bytes | None:
        """What it has to show; None: nobody knows it."""
        if peer in self.peers:
            return self.peers[peer].hello.key
        member = self.members().get(peer)
        return member.key if member else None

    def min_peers(self) -> int:
        if self.options.min_peers is not None:
            return max(1, self.options.min_peers)
        return max([1, *(peer.hello.min_peers for peer in self.peers.values())])

    def ready(self) -> set[int]:
        """Peers that may be in a view: their application has said what state it holds."""
        return {key for key, peer in self.peers.items() if peer.hello.ready}

    def waiting_for(self) -> int:
        """Peers missing for the first view."""
        return 0 if self.record.view else max(0, self.min_peers() - len(self.ready()))

    # --- leaving out

    def leave_out(self, peer: int, kind: str, reason: str, now: float) -> None:
        """kind: left, exited, kicked, diverged, unfit, misfit at once; silent until it talks."""
        reason = reason[: m.NOTE_MAX]  # else nobody takes the message that says it
        if peer not in self.members():
            name = self.name(peer)
            if self.peers.pop(peer, None) is None:
                return
            self.log("left" if kind == "left" else "suspected", f"{name}: {reason}", now)
            if kind != "silent":
                again = kind not in ("left", "kicked")
                self.gone.add(peer, reason, again)
                self.send(peer, m.Evicted(self.record.run, peer, reason, again))
            return
        before = self.out.get(peer)
        if before is not None and before[0] != "silent":
            return
        self.out[peer] = (kind, reason)
        if before is None:
            self.due_s = now + self.options.batch_s if self.due_s is None else self.due_s
            self.log("left" if kind == "left" else "suspected", f"{self.name(peer)}: {reason}", now)

    def only_holder(self, peer: int) -> bool:
        """Is it the one active peer, with others waiting to fetch what it holds?"""
        members = self.members()
        active = [key for key, one in members.items() if one.active and key not in self.out]
        others = [key for key in self.ready() if key != peer and key not in self.out]
        return active == [peer] and bool(others) and peer in self.peers

    def name(self, peer: int) -> str:
        if peer in self.peers:
            return self.peers[peer].name
        member = self.members().get(peer)
        return f"{member.name} ({peer:016x})" if member else f"{peer:016x}"

    def _exited(self, event: Received, message: m.Exited, now: float) -> None:
        found = [
            peer
            for peer in sorted(self.known())
            if (peer == message.peer
                or (not message.peer and message.launch
                    and self.origin(peer) == (message.host, message.launch)))
            and event.key in (b"", self.key_of(peer))
        ]  # fmt: skip
        for peer in found:
            self.leave_out(peer, "exited", message.detail or "its process ended", now)
        detail = f"{len(found)} peers left out"
        self.effects.append(Send(event.source, m.Done(bool(found), detail)))

    def _kick(self, source: bytes, message: m.Kick, now: float) -> None:
        names_of = {peer: self.name(peer) for peer in sorted(self.known())}
        found = meant(message.peer, message.name, names_of)
        if len(found) == 1 and self.only_holder(found[0]):
            detail = "it is the only active peer, and others need its state"
            self.effects.append(Send(source, m.Done(False, detail)))
            return
        names = ", ".join(self.name(peer) for peer in found[:4])
        if len(found) == 1:
            # Else it would stay, as the last who holds the state.
            alone = self.known() == set(found)
            kind = "left" if message.leave or alone else "kicked"
            reason = m.ASKED_TO_LEAVE if message.leave else "kicked out by an operator"
            reason += f" ({message.detail})" if message.detail else ""
            if not message.leave:
                self.gone.bar(self.origin(found[0]), reason)
                names += " with its key" * self._bar_key(found[0])
            self.leave_out(found[0], kind, reason, now)
        detail = f"{len(found)} peers match: {names}" if len(found) > 1 else names
        detail = (detail or "nobody of that name or id is in the run")[:512]
        self.effects.append(Send(source, m.Done(len(found) == 1, detail)))

    def _bar_key(self, peer: int) -> bool:
        """A kicked peer's own key, if it has one, opens nothing any more, also after a restart."""
        key, barred = self.key_of(peer), self.record.barred
        if key and key not in barred:
            self.persist(replace(self.record, barred=(*barred, key)[-BARRED_MAX:]))
        return bool(key)

    def next_s(self) -> float | None:
        """When a tick must not come later than usual."""
        judged_s = self.doubtful.due_s if self.doubtful and not self.changes.busy() else None
        due = [due_s for due_s in (self.due_s, self.asking_s, judged_s) if due_s is not None]
        return min(due) if due else None

    def _accused(self, peer: Peer, message: m.Suspect, now: float) -> None:
        """What rounds say about others. Stale once the view has changed."""
        members = self.members()
        accuser = members.get(message.peer)
        if accuser is None or message.view != self.record.view or self.changes.busy():
            return
        if message.who == message.peer:  # its own NaN, say, is no reason to leave it out
            if message.kind == "void":
                self.leave_out(message.who, "void", message.detail or "its state is void", now)
            elif message.kind == "spec_mismatch":
                misfits.hear(self, accuser, message, now)
            return
        if message.kind == "diverged" and not message.who:
            self._diverged(message, now)
            return
        accused = members.get(message.who)
        going = self.demoted.keys() | self.out.keys()
        # Two that accuse each other: the word that came first stands.
        if accused is None or {accused.peer, accuser.peer} & going:
            return
        detail = f"{message.kind} in round {message.tag}/{message.seq}, says {peer.name}"
        if message.kind == "late_done" and self._excused(accuser.active, message):
            return
        if message.kind == "late_done" and accused.active:
            active = [one for one in self.record.members if one.active]
            if len(active) - len(self.demoted) > 1:
                self.demoted[accused.peer] = detail
                self.due_s = now + self.options.batch_s
                self.log("demoted", f"{self.name(accused.peer)}: {detail}", now)
        elif message.kind == "diverged":
            self.leave_out(accused.peer, "diverged", detail, now)
        elif message.kind == "spec_mismatch":
            misfits.hear(self, accuser, message, now)
        elif message.kind == "refused":
            self.log("refused", f"{self.name(accused.peer)}: {message.detail}", now)

    def _excused(self, by_active: bool, message: m.Suspect) -> bool:
        """An observer may see others late through a slow link of its own, and a round that waits
        for what only observers hold takes as long as they need."""
        installing = self.changes.installing
        if not by_active or installing is None:
            return not by_active
        plan = next(iter(installing.messages.values())).install
        return waits_for_observers(plan, message.tag, message.seq)

    def _diverged(self, message: m.Suspect, now: float) -> None:
        """The minority goes; in a tie the digest of the lowest slot stands."""
        slots = {member.slot: member for member in self.record.members if member.active}
        said = [(slot, digest) for slot, digest in sorted(message.digests) if slot in slots]
        count: dict[int, int] = {}
        for _, digest in said:
            count[digest] = count.get(digest, 0) + 1
        if len(count) < 2:
            return
        best = max(count, key=lambda digest: (count[digest], -_first(said, digest)))
        for slot, digest in said:
            if digest != best:
                reason = f"its bits diverged in round {message.tag}/{message.seq}"
                self.leave_out(slots[slot].peer, "diverged", reason, now)

    # --- links

    def _relay(self, now: float) -> None:
        """Frames between two live peers whose link is broken travel through a third (V12)."""
        here = [key for key in sorted(self.peers) if key in self.members() and key not in self.out]
        edges = broken_edges({key: self.peers[key].down for key in here})
        for edge in sorted(edges - self.broken_s.keys()):
            self.broken_s[edge] = now
            self.log("link", f"{self.name(edge[0])} - {self.name(edge[1])} is broken", now)
        for edge in sorted(self.broken_s.keys() - edges):
            del self.broken_s[edge]
        alive = {
            edge
            for edge in edges
            if all(self.peers[end].heard_s > self.broken_s[edge] for end in edge)
        }
        routes, stuck = relays(alive, here)
        if routes != self.routes:
            self.routes = routes
            self.routes_number += 1
            for key in here:
                self._send_routes(key)
        elif self.routes_number:
            for key in here:
                peer = self.peers[key]
                if peer.routes != self.routes_number and peer.heard_s == now:
                    self._send_routes(key)
        for edge in stuck:
            if now - self.broken_s[edge] > self.options.link_bound_s:
                members = self.members()
                worst = max(edge, key=lambda key: (not members[key].active, members[key].slot))
                other = edge[0] if worst == edge[1] else edge[1]
                reason = f"no link to {self.name(other)}, and nobody to relay"
                self.leave_out(worst, "unfit", reason, now)

    def _send_routes(self, key: int) -> None:
        table = sorted(self.routes.get(key, {}).items())
        self.send(
            key,
            m.Routes(
                self.record.run, self.record.term, self.routes_number, [list(r) for r in table]
            ),
        )


def _first(said: list[tuple[int, int]], digest: int) -> int:
    return next(slot for slot, other in said if other == digest)
