"""Suspecting peers: who is silent, whose links are closed, and when it is we who cannot hear.

A process that ends closes its links at once. So does a live one now and then (a router restarts, a
proxy drops connections), but that one answers when it is asked. When nobody at all is heard, it is
the coordinator that is cut off, or there is nobody to decide for: such time counts against no peer,
rounds go on without us, and when somebody is heard again the others get as long to come back as
when a coordinator starts. A part of Coordinator; it leaves nobody out who is heard.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from decotrain.control import messages as m
from decotrain.control.roster import Peer, shunned

if TYPE_CHECKING:
    from decotrain.control.coordinator import Coordinator


STALL_S = 1.0  # between two steps: then it was we who slept, not the peers
DARK_S = 1.0  # nobody heard, two heartbeats long: it is us


def slept(c: Coordinator, now: float) -> None:
    """At each step: what passed while we did not run was nobody's silence."""
    gap_s = now - c.stepped_s
    c.stepped_s = now
    if gap_s <= STALL_S:
        return
    c.heard_s += gap_s
    for peer in c.peers.values():
        peer.heard_s += gap_s


def dark(c: Coordinator, now: float) -> bool:
    """Nobody is heard: no decision can be right, and none has an effect."""
    return bool(c.peers) and now - c.heard_s > DARK_S


def hear(c: Coordinator, now: float) -> None:
    """A peer is heard. After the dark no clock has run on."""
    gap_s = now - c.heard_s
    was_dark = dark(c, now)
    c.heard_s = now
    if not was_dark:
        return
    for peer in c.peers.values():
        peer.heard_s += gap_s
        peer.asked_s = None
    for edge in c.broken_s:
        c.broken_s[edge] += gap_s
    if c.lost_s is not None:
        c.lost_s += gap_s
    if gap_s > c.options.suspect_timeout_s:
        c.patient_until_s = now + c.options.recover_s
        c.log("dark", f"heard nobody for {gap_s:.1f} s, goes on", now)
    freeze, installing = c.changes.freeze, c.changes.installing
    if freeze is not None:
        freeze.started_s += gap_s
        freeze.deadline_s = max(freeze.deadline_s + gap_s, c.patient_until_s)
    if installing is not None:
        installing.started_s += gap_s


def suspect(c: Coordinator, now: float, read_all: bool) -> None:
    """Acts on who is silent. `read_all`: no message that has arrived is unread, so silence means
    something."""
    _suspect_silent(c, now)
    _suspect_closed(c, now, read_all)


def _suspect_silent(c: Coordinator, now: float) -> None:
    """Leaves out who was not heard within the bound; half of it if others cannot reach it."""
    if now < c.patient_until_s:
        return
    timeout_s = c.options.suspect_timeout_s
    doubted = {other for peer in c.peers.values() for other in peer.down}
    for key, peer in list(c.peers.items()):
        bound_s = timeout_s / 2 if key in doubted else timeout_s
        if now - peer.heard_s > bound_s:
            c.leave_out(key, "silent", f"not heard for {now - peer.heard_s:.1f} s", now)


def _suspect_closed(c: Coordinator, now: float, read_all: bool) -> None:
    """Asks whom most others cannot reach for a heartbeat."""
    c.asking_s = None
    members = c.members()
    closed = shunned(
        {key: peer.down for key, peer in c.peers.items() if key in members and key not in c.out}
    )
    for key, peer in list(c.peers.items()):
        if key not in closed:
            peer.asked_s = None
            continue
        bound_s = c.options.closed_timeout_s + 2 * peer.answer_s
        asked_s = peer.asked_s
        if asked_s is None or (peer.heard_s > asked_s and now >= asked_s + bound_s):
            asked_s = peer.asked_s = now
            c.send(key, m.AskHeartbeat(c.record.run, c.record.term, key))
        elif peer.heard_s <= asked_s and now >= asked_s + bound_s and read_all:
            c.leave_out(key, "silent", "its links are closed and it does not answer", now)
            continue
        due_s = asked_s + bound_s
        c.asking_s = due_s if c.asking_s is None else min(c.asking_s, due_s)


def answer_time(c: Coordinator, peer: Peer, view: int, now: float) -> float:
    """How long it took to install the view: a bound on its round trip."""
    installing = c.changes.installing
    if installing is None or view != installing.view or peer.view >= view:
        return peer.answer_s
    return now - installing.started_s
