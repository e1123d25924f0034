"""One link of several peers dropped in both directions: do the rounds go on, and is nobody lost?

Every peer has a network namespace of its own (bench/wan). Rounds go back to back; after a while no
packet passes between two of the peers, while everybody else reaches both. Nothing is closed: only
the link's own deadline can notice. Counted: rounds, the longest ones, who is a member at the end.
It needs root (or `unshare -Urn`), and measures no throughput.

Options (`--set`): seconds=30 (of the drop), kib=1024 (of a round), peers=4, before=10.
"""

from __future__ import annotations

import itertools
import time

from bench.common import Report, Settings, log
from bench.fleet import Fleet, activate, nothing, sleep_until, spin
from bench.wan.lab import Lab

LINK_DEADLINE_S = 5.0  # MeshOptions::link_timeout_s
SETTLE_S = 1.0
AFTER_S = 5.0


def sample(peers: int, elements: int, before_s: float, drop_s: float) -> dict[str, float]:
    """One drop."""
    with Lab("lan", sites=peers + 1) as lab, Fleet(peers, reports=False, lab=lab) as fleet:
        fleet.start(peers)
        ids = sorted(fleet.all(activate))
        for peer in fleet.team:
            peer.ask(spin, elements)
        start_s = time.monotonic()
        sleep_until(start_s + before_s)
        lab.cut(1, 2)
        cut_s = time.monotonic()
        sleep_until(cut_s + drop_s)
        lab.heal(1, 2)
        heal_s = time.monotonic()
        sleep_until(heal_s + AFTER_S)
        for peer in fleet.team:
            peer.ask(nothing)
        said = [peer.answer() for peer in fleet.team]
        for peer in fleet.team:
            peer.answer()
    done = said[0]["done"]
    gaps = [(b, b - a) for a, b in itertools.pairwise(done) if b > cut_s]
    return {
        "rounds_before_per_s": _rate(done, start_s + SETTLE_S, cut_s),
        "rounds_during_per_s": _rate(done, cut_s, heal_s),
        "rounds_after_per_s": _rate(done, heal_s, heal_s + AFTER_S),
        "longest_round_s": max(gap for _, gap in gaps),
        "longer_than_deadline": sum(gap > LINK_DEADLINE_S for _, gap in gaps),
        "longer_than_1_s": sum(gap > 1.0 for _, gap in gaps),
        "lost_rounds": sum(one["lost"] for one in said),
        "peers_lost": sum(
            sorted(peer for peer, active in one["members"] if active) != ids for one in said
        ),
    }


def _rate(done: list[float], start_s: float, end_s: float) -> float:
    return sum(start_s <= at_s < end_s for at_s in done) / (end_s - start_s)


def run(settings: Settings) -> Report:
    """The suite."""
    report = Report("link-drop", "A link dropped in both directions", settings)
    peers = int(settings.option("peers", "4"))
    kib = int(settings.option("kib", "1024"))
    drop_s = float(settings.option("seconds", "8" if settings.quick else "30"))
    before_s = float(settings.option("before", "3" if settings.quick else "10"))
    rows: dict[str, list[float]] = {}
    for _ in range(1 if settings.quick else min(3, settings.repeats)):
        figures = sample(peers, kib * 256, before_s, drop_s)
        log(f"  { ({name: round(value, 3) for name, value in figures.items()}) }")
        for name, value in figures.items():
            rows.setdefault(name, []).append(value)
    case = {"peers": peers, "KiB": kib, "drop_s": drop_s, "link_deadline_s": LINK_DEADLINE_S}
    report.add(case, **rows)
    report.table("link-drop", list(rows), title="Rounds before, during and after the drop")
    return report
