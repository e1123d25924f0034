"""A record that is lost, or older than what peers have installed, is rebuilt from the peers.

From a majority of the last view, or from fewer when the operator says so: a minority cannot know
whether the others have gone on without it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from decotrain.control.record import RecordMember

if TYPE_CHECKING:
    from decotrain.control.coordinator import Coordinator

_EPOCH_MASK = 2**32 - 1


def rebuild(c: Coordinator, now: float) -> None:
    """Takes over the last view from its members when the record lacks it."""
    assert c.lost_s is not None
    views = [peer.hello for peer in c.peers.values() if peer.hello.view > c.record.view]
    if not views:
        c.lost_s = None
        return
    last = max(views, key=lambda hello: (hello.view, hello.peer))
    members = {peer: (slot, active) for peer, slot, active in last.members}
    here = [key for key in members if key in c.peers and c.peers[key].hello.view]
    waited = now - c.lost_s >= c.options.recover_s
    enough = 2 * len(here) > len(members) or c.options.recover_minority
    if len(here) < len(members) and not (waited and enough):
        return
    rebuilt = []
    for key, (slot, active) in sorted(members.items(), key=lambda item: item[1][0]):
        hello = c.peers[key].hello if key in c.peers else None
        rebuilt.append(
            RecordMember(
                peer=key,
                slot=slot,
                active=active,
                share=hello.share if hello else 1.0,
                name=hello.name if hello else "?",
                host=hello.host if hello else "",
                launch=hello.launch if hello else "",
                addresses=hello.addresses if hello else [],
                key=hello.key if hello else b"",
            )
        )
    c.lost_s = None
    c.recovering = True
    term = max([c.record.term, *(peer.hello.term + 1 for peer in c.peers.values())])
    c.persist(
        replace(
            c.record,
            term=term,
            view=last.view,
            epoch=last.view & _EPOCH_MASK,
            generation=last.generation,
            members=tuple(rebuilt),
        )
    )
    c.log("rebuilt", f"the record, from {len(here)} of {len(members)} peers", now)
    for key, peer in list(c.peers.items()):
        if key not in members and peer.hello.view:
            c.leave_out(key, "void", "it is not in the last view", now)
