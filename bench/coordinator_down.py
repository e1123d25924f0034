"""The coordinator is away: how many rounds are completed meanwhile, against the usual number?

Peers run rounds back to back; the coordinator is killed and started again from its record. It does
not join or kill peers meanwhile: that waits for the coordinator, by design.

Options (`--set`): seconds=60 (away, and before and after it), kib=1024 (of a round), peers=4.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path

from bench.common import Report, Settings, log
from bench.fleet import Fleet, activate, nothing, sleep_until, spin


def run(settings: Settings) -> Report:
    """The suite."""
    report = Report("coordinator-down", "Rounds without the coordinator", settings)
    peers = int(settings.option("peers", "4"))
    kib = int(settings.option("kib", "1024"))
    seconds = float(settings.option("seconds", "5" if settings.quick else "60"))
    with tempfile.TemporaryDirectory() as folder, Fleet(peers, record=Path(folder)) as fleet:
        fleet.start(peers)
        ids = sorted(fleet.all(activate))
        for peer in fleet.team:
            peer.ask(spin, kib * 256)
        marks_s = [time.monotonic()]
        for action in (fleet.kill_coordinator, fleet.start_coordinator, lambda: None):
            sleep_until(marks_s[-1] + seconds)
            action()
            marks_s.append(time.monotonic())
        for peer in fleet.team:
            peer.ask(nothing)
        said = [peer.answer() for peer in fleet.team]
        for peer in fleet.team:
            peer.answer()
    done = said[0]["done"]
    rates = [
        sum(start_s <= at_s < end_s for at_s in done) / (end_s - start_s)
        for start_s, end_s in itertools.pairwise(marks_s)
    ]
    before, away, after = rates
    log(f"  rounds/s {before:.1f}, {away:.1f} without the coordinator, {after:.1f} after it")
    report.add(
        {"peers": peers, "KiB": kib, "away_s": seconds},
        rounds_before_per_s=before,
        rounds_away_per_s=away,
        rounds_after_per_s=after,
        away_over_usual=away / ((before + after) / 2),
        lost_rounds=sum(one["lost"] for one in said),
        peers_lost=sum(
            sorted(peer for peer, active in one["members"] if active) != ids for one in said
        ),
    )
    return report
