"""What the coordinator tells operators: one map, and the same as text for Prometheus.

Reads the coordinator's state and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from decotrain.control.coordinator import Coordinator
    from decotrain.control.roster import Peer


def status(c: Coordinator, now: float, events_after: int = 0) -> dict[str, Any]:
    """Who is in, how fast, how stale. Ids are 16 hex digits, rates bit/s."""
    members = c.members()
    order = sorted(c.known(), key=lambda key: (members[key].slot if key in members else 64, key))
    silent_s = _silent_s(c, now)
    return {
        "run": c.record.run,
        "config": c.record.config,
        "generation": c.record.generation,
        "term": c.record.term,
        "epoch": c.record.epoch,
        # Nobody is left out while nobody is heard, so the view alone looks as if all were well.
        "phase": "hears nobody" if silent_s > c.options.suspect_timeout_s else c.changes.phase(),
        "silent_s": silent_s,
        "waiting_for": c.waiting_for(),
        "peers": [_row(c, key, now) for key in order],
        "routes": [
            [f"{a:016x}", f"{b:016x}", f"{via:016x}"]
            for a, row in sorted(c.routes.items())
            for b, via in sorted(row.items())
            if a < b
        ],
        "events": [event for event in c.events if event["n"] > events_after],
    }


def _silent_s(c: Coordinator, now: float) -> float:
    """Since any member of the view was heard, or since we started; 0 without a view."""
    members = c.members()
    if not members or c.started_s is None:
        return 0.0
    heard = [peer.heard_s for key, peer in c.peers.items() if key in members]
    return now - max(heard, default=c.started_s)


def _row(c: Coordinator, key: int, now: float) -> dict[str, Any]:
    member, peer = c.members().get(key), c.peers.get(key)
    heard = peer is not None and now - peer.heard_s <= c.options.suspect_timeout_s
    row: dict[str, Any] = {
        "peer": f"{key:016x}",
        "name": peer.hello.name if peer else member.name if member else "",
        "host": c.origin(key)[0],
        "region": peer.hello.region if peer else "",
        "version": peer.hello.version if peer else "",
        "addresses": peer.hello.addresses if peer else [],
        "slot": member.slot if member else None,
        "role": "joining" if not member else "active" if member.active else "observing",
        "state": "away" if peer is None else "here" if heard else "silent",
        "share": member.share if member else 0.0,
        "silent_s": now - peer.heard_s if peer else None,
        "heard": heard,  # within the time after which others are suspected
        "installed": bool(peer and peer.view == c.record.view),
        "links_down": [f"{other:016x}" for other in peer.down] if peer else [],
        "uplink_bps": peer.measures.uplink_bps if peer else 0.0,
        "dialled": bool(peer and peer.measures.share > 0),  # false: nobody can dial it
        "links": [_link(*link) for link in peer.measures.links] if peer else [],
        "held_up_s": held_up_s(c, key),
        "waited_s": _waited_s(peer) if peer else [],  # for whom alone
        "figures": dict(peer.figures) if peer else {},
    }
    if key in c.out:
        row["state"] = f"leaving out: {c.out[key][1]}"
    return row


def _link(peer: int, *said: Any) -> dict[str, Any]:
    """A row of messages.Heartbeat.links."""
    names = ("out_bps", "in_bps", "rtt_s", "unix", "shared", "pace_bps", "congestion")
    return {"peer": f"{peer:016x}", **dict(zip(names, said, strict=True))}


def _waited_s(peer: Peer) -> list[list[Any]]:
    return [[f"{slow:016x}", seconds] for slow, seconds in peer.measures.held_up]


def held_up_s(c: Coordinator, key: int) -> float:
    """Seconds that others waited for this peer's contributions alone, since it is in the view."""
    return float(
        sum(
            seconds
            for other, peer in sorted(c.peers.items())
            if other != key
            for slow, seconds in peer.measures.held_up
            if slow == key
        )
    )


GAUGES = {
    "share": "part of a round's chunks that the peer owns; 1 is an equal part",
    "silent_s": "seconds since its last heartbeat",
    "uplink_bps": "what it can send, bit/s; 0 when not measured",
    "held_up_s": "seconds that others waited for its contributions alone",
}


def prometheus(known: Mapping[str, Any]) -> str:
    """A status in the text format 0.0.4."""
    run = f'run="{_quoted(known["run"])}"'
    roles = [peer["role"] for peer in known["peers"]]
    lines = ["# TYPE decotrain_peers gauge"]
    lines += [
        f'decotrain_peers{{{run},role="{role}"}} {roles.count(role)}'
        for role in ("active", "observing", "joining")
    ]
    heard = sum(peer["heard"] for peer in known["peers"])
    lines += [
        "# HELP decotrain_peers_heard peers with a heartbeat within the suspect timeout",
        "# TYPE decotrain_peers_heard gauge",
        f"decotrain_peers_heard{{{run}}} {heard}",
    ]
    for name in ("generation", "term", "epoch"):
        lines += [f"# TYPE decotrain_{name} gauge", f"decotrain_{name}{{{run}}} {known[name]}"]
    for name, meaning in GAUGES.items():
        lines += [f"# HELP decotrain_peer_{name} {meaning}", f"# TYPE decotrain_peer_{name} gauge"]
        lines += [
            f"decotrain_peer_{name}{{{run},{_who(peer)}}} {peer[name]:g}"
            for peer in known["peers"]
            if peer[name] is not None
        ]
    lines.append("# TYPE decotrain_peer_figure gauge")
    lines += [
        f'decotrain_peer_figure{{{run},{_who(peer)},figure="{_quoted(key)}"}} {value:g}'
        for peer in known["peers"]
        for key, value in sorted(peer["figures"].items())
        if isinstance(value, int | float)
    ]
    for name in ("out_bps", "in_bps", "rtt_s", "shared", "pace_bps"):
        lines.append(f"# TYPE decotrain_link_{name} gauge")
        lines += [
            f'decotrain_link_{name}{{{run},{_who(peer)},to="{link["peer"]}"}} {link[name]:g}'
            for peer in known["peers"]
            for link in peer["links"]
        ]
    lines.append("# TYPE decotrain_link_info gauge")
    lines += [
        f'decotrain_link_info{{{run},{_who(peer)},to="{link["peer"]}",'
        f'over="{"unix" if link["unix"] else "tcp"}",congestion="{_quoted(link["congestion"])}"}} 1'
        for peer in known["peers"]
        for link in peer["links"]
    ]
    return "\n".join(lines) + "\n"


def _who(peer: Mapping[str, Any]) -> str:
    return f'peer="{peer["peer"]}",name="{_quoted(peer["name"])}"'


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
