"""Suspecting a peer whose links are closed: a process that ends closes them at once.

So does a live one now and then (a router restarts, a proxy drops connections), but that one answers
when it is asked. A part of Coordinator; it leaves nobody out who is heard.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from decotrain.control import messages as m
from decotrain.control.roster import Peer, shunned

if TYPE_CHECKING:
    from decotrain.control.coordinator import Coordinator


def suspect_closed(c: Coordinator, now: float, read_all: bool) -> None:
    """Asks whom most others cannot reach for a heartbeat. `read_all`: no message that has arrived
    is unread, so silence means something."""
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
