"""What `decotrain status` shows, made from the map that the coordinator gives.

No sockets, no clock: the command itself is in operate.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

EVENTS_SHOWN = 8
SLOW_S = 1.0  # waited for one peer alone, before it is worth a line
LINKS_UP_TO = 6  # peers, every link is a line; beyond, every peer
SUMMARIES_MAX = 16  # such lines, those with the worst links
BROKEN_SHOWN = 3  # names of them, for each peer
RECENT_S = 60.0


@dataclass(frozen=True)
class Waits:
    seconds: Mapping[tuple[str, str], float]  # who waited for whom alone
    since: str

    @classmethod
    def of(cls, known: Mapping[str, Any]) -> Waits:
        """A peer counts from when it and the other are both in the run."""
        rows = ((peer["peer"], row) for peer in known["peers"] for row in peer["waited_s"])
        return cls({(who, slow): seconds for who, (slow, seconds) in rows}, "since the start")


class RecentWaits:
    """Those of about the last minute: what the sums of two looks differ by."""

    def __init__(self) -> None:
        self.looks: deque[tuple[float, Waits]] = deque()

    def add(self, known: Mapping[str, Any], now: float) -> Waits:
        sums = Waits.of(known)
        self.looks.append((now, sums))
        while len(self.looks) > 2 and now - self.looks[1][0] >= RECENT_S:
            self.looks.popleft()
        then, before = self.looks[0]
        if then == now:
            return sums
        grown = {
            pair: seconds - before.seconds.get(pair, 0.0) for pair, seconds in sums.seconds.items()
        }
        # A sum that has shrunk began again, with a peer that did.
        grown = {pair: s if s >= 0 else sums.seconds[pair] for pair, s in grown.items()}
        return Waits(grown, f"in the last {now - then:.0f} s")


def lines_of(
    known: Mapping[str, Any], address: str, every_link: bool = False, waits: Waits | None = None
) -> list[str]:
    """One screen of status; `waits` are those since the start, unless given."""
    peers = known["peers"]
    names = {peer["peer"]: peer["name"] for peer in peers}
    active = sum(peer["role"] == "active" for peer in peers)
    head = f"run {known['run']} at {address}: view {known['term']}.{known['epoch']}"
    head += f" of generation {known['generation']}, {known['phase']}"
    head += f" for {known['silent_s']:.0f} s" if known["phase"] == "hears nobody" else ""
    head += f", {active} of {len(peers)} peers active"
    heard = sum(peer.get("heard", True) for peer in peers)  # an older coordinator does not say
    head += f", {heard} heard" if heard < len(peers) else ""
    if known["waiting_for"]:
        head += f", waiting for {known['waiting_for']} more"
    versions = sorted({peer["version"] for peer in peers if peer["version"]})
    if versions:
        head += f"; decotrain {', '.join(versions)}"
    regions = any(peer["region"] for peer in peers)
    lines = [head]
    if peers:
        lines.append(
            f"{'':>3} {'peer':<18} {'id':<8} {'host':<14} " + f"{'region':<10} " * regions
            + f"{'role':<9} {'last round':>10} {'behind':>6} {'heard':>7}"
            f" {'share':>5} {'can send':>9} {'held up':>8}  figures"
        )  # fmt: skip
    newest = _newest_rounds(peers)
    for peer in peers:
        version = f" decotrain {peer['version']}" if len(versions) > 1 else ""
        lines.append(_peer_line(peer, newest, regions) + version)
        if peer["state"] not in ("here", "silent", "away"):  # the line itself says those
            lines.append(f"      {peer['state']}")
    links = _link_lines if every_link or len(peers) <= LINKS_UP_TO else _summaries
    return [
        *lines,
        *links(peers, names),
        *_wait_lines(waits or Waits.of(known), names),
        *(f"  {event.get('kind', '')}: {event.get('text', '')}" for event in
          known["events"][-EVENTS_SHOWN:]),
    ]  # fmt: skip


def _link_lines(peers: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[str]:
    """Every link with what goes over it."""
    lines = []
    for peer in peers:
        for link in peer["links"]:
            lines.append(
                f"  {peer['name']:>18} -> {names.get(link['peer'], link['peer']):<18}"
                f" {_rate(link['out_bps']):>9}" + _way(link)
            )
        for other in peer["links_down"]:
            lines.append(f"  {peer['name']:>18} -- {names.get(other, other):<18} broken")
    return lines


def _summaries(peers: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[str]:
    """A line for each peer: links grow with the square of their number, screens do not."""
    linked = [peer for peer in peers if peer["links"] or peer["links_down"]]
    worst_first = sorted(
        linked, key=lambda peer: (-len(peer["links_down"]), -_longest(peer)["rtt_s"])
    )
    shown = {peer["peer"] for peer in worst_first[:SUMMARIES_MAX]}
    lines = [_summary(peer, names) for peer in linked if peer["peer"] in shown]
    left = len(linked) - len(lines)
    more = f"and {left} peers with better links; " if left else ""
    return [*lines, f"  {more}--links shows every link"] if lines else []


def _summary(peer: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Its broken links, and of the others the one with the longest round trip."""
    links, down = peer["links"], [names.get(other, other) for other in peer["links_down"]]
    rates = [_rate(sum(link[way] for link in links)) for way in ("out_bps", "in_bps")]
    text = f"  {peer['name'][:18]:>18} {len(links):>2} links, out {rates[0]:>9}, in {rates[1]:>9}"
    if links:
        worst = _longest(peer)
        text += f"; worst -> {names.get(worst['peer'], worst['peer'])}{_way(worst)}"
    if down:
        more = f" and {len(down) - BROKEN_SHOWN} more" if len(down) > BROKEN_SHOWN else ""
        text += f"; broken -- {', '.join(down[:BROKEN_SHOWN])}{more}"
    return text


def _longest(peer: Mapping[str, Any]) -> Mapping[str, Any]:
    none: Mapping[str, Any] = {"rtt_s": 0.0, "unix": True}
    return max(peer["links"], key=lambda link: (not link["unix"], link["rtt_s"]), default=none)


def _wait_lines(waits: Waits, names: Mapping[str, str]) -> list[str]:
    """Who waited for whom, the longest waits."""
    held_up: dict[str, float] = {}
    for (_, slow), seconds in waits.seconds.items():
        held_up[slow] = held_up.get(slow, 0.0) + seconds
    slow = max(held_up, key=lambda one: held_up[one], default="")
    if not slow or held_up[slow] < SLOW_S:
        return []
    lines = [
        f"{waits.since}: the others waited {held_up[slow]:.1f} s for {names.get(slow, slow)} alone"
    ]
    found = [
        (seconds, names.get(who, who), names.get(other, other))
        for (who, other), seconds in waits.seconds.items()
        if seconds >= SLOW_S
    ]
    return lines + [f"  {who} waited {s:.1f} s for {one}" for s, who, one in sorted(found)[:-5:-1]]


def _way(link: Mapping[str, Any]) -> str:
    """How the bytes of a link travel."""
    if link["unix"]:
        return " same machine, shared memory" if link["shared"] else " same machine"
    control = f" {link['congestion']}" if link["congestion"] else ""
    if link["pace_bps"]:
        control += f", at most {_rate(link['pace_bps'])}"
    return f" {1e3 * link['rtt_s']:.1f} ms{control}"


def _newest_rounds(peers: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The newest round of each tag that any peer has taken."""
    newest: dict[str, int] = {}
    for peer in peers:
        tag, number = _last_round(peer)
        newest[tag] = max(newest.get(tag, 0), number)
    return newest


def _last_round(peer: Mapping[str, Any]) -> tuple[str, int]:
    tag, _, number = str(peer["figures"].get("last_round", "")).partition("/")
    return tag, int(number) if number.isdecimal() else 0


def _peer_line(peer: Mapping[str, Any], newest: Mapping[str, int], regions: bool) -> str:
    figures = dict(peer["figures"])
    last = str(figures.pop("last_round", ""))
    tag, number = _last_round(peer)
    behind = str(newest[tag] - number) if last else ""
    shown = " ".join(f"{key}={_short(value)}" for key, value in figures.items())
    slot = "-" if peer["slot"] is None else peer["slot"]
    heard = "away" if peer["silent_s"] is None else f"{peer['silent_s']:.1f} s"
    mark, note = " ", "" if peer["dialled"] else " (dials out only)"
    if not peer.get("heard", True):
        mark, note = "!", f" ({peer['state']})" * (peer["state"] in ("silent", "away"))
    return (
        f"{mark}{slot:>2} {peer['name'][:18]:<18} {peer['peer'][:8]} {peer['host'][:14]:<14} "
        + f"{peer['region'][:10]:<10} " * regions
        + f"{peer['role']:<9} {last:>10} {behind:>6} {heard:>7} {peer['share']:>5.2f}"
        f" {_rate(peer['uplink_bps']):>9} {peer['held_up_s']:>6.1f} s  {shown}" + note
    )


def _rate(bps: float) -> str:
    if not bps:
        return "-"
    return f"{bps / 1e6:.3g} Mb/s" if bps < 1e9 else f"{bps / 1e9:.3g} Gb/s"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
