"""An hour of churn in ten minutes, over links that lose packets and are cut: is anything violated?

Peers train on shared state (scripts/chaos.py), each at a site of its own behind `flaky` links (1 %
loss, jitter, reordering). From one seed they are killed, stopped, told to leave and replaced, and
their connections and the coordinator are killed; beside that the lab cuts paths and whole sites
dead for 0.5 to 6 s. Nobody reports the end of a process: only links and silence tell. A fault every
2 s is what one every 12 s would be in an hour. Then all is healed, and everybody alive must go on.
All histories are judged by the simulator's checker; a violation ends the suite with an error.

Options (`--set`): seconds=600, peers=6, kib=256 (of state), mean=2 (seconds between faults),
cuts=10 (at most, between cuts of the lab), coordinator=40 (between its kills), profile=flaky.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

from bench.common import Report, Settings, log
from bench.wan.lab import Lab
from bench.wan.profiles import PROFILES, Cuts
from scripts.chaos import HEAL_S, ROUNDS_AFTER, Storm, judge

SPARE_SITES = 6  # for who has been told to leave and for who replaces them


def run(settings: Settings) -> Report:
    """The suite."""
    report = Report("wan-churn", "Churn over lossy links", settings)
    quick = settings.quick
    number = lambda key, usual, small: float(  # noqa: E731
        settings.option(key, small if quick else usual)
    )
    seconds, mean_s = number("seconds", "600", "10"), number("mean", "2", "1")
    peers, kib = int(number("peers", "6", "4")), int(number("kib", "256", "64"))
    coordinator_s, apart_s = number("coordinator", "40", "5"), number("cuts", "10", "5")
    name = settings.option("profile", "flaky")
    profile = replace(PROFILES[name], cuts=None)  # its cuts end before everybody must go on
    cuts = Cuts(apart_s, 0.5, min(6.0, 0.45 * apart_s), 0.25, until_s=seconds)
    with (
        tempfile.TemporaryDirectory() as made,
        Lab(profile, sites=1 + peers + SPARE_SITES, seed=settings.seed) as lab,
    ):
        storm = Storm(Path(made), settings.seed, peers, kib * 256, mean_s,
                      coordinator_s=coordinator_s, lab=lab)  # fmt: skip
        try:
            storm.begin()
            sites = lab.names[: 1 + peers]
            plan = list(cuts.schedule(sites, settings.seed))
            for at_s, text in plan:
                lab.after(at_s, text)
            storm.disturb(seconds)
            time.sleep(max(0.0, plan[-1][0] - seconds))  # the last path comes back
            storm.heal()
            stats = lab.stats()
        finally:
            storm.close()
        judged = judge(Path(made))
    faults = {kind: count for kind, count in storm.counts.items() if kind != "heal_ms"}
    log(f"  faults {faults}, judged {dict(judged)}")
    segments = {key: sum(path[key] for path in stats["paths"]) for key in ("segments", "lost")}
    report.add(
        {"profile": name, "peers": peers, "KiB": kib, "seconds": seconds},
        faults=sum(faults.values()),
        cuts=len(plan) / 4,  # down and up, both ways
        coordinator_kills=faults.get("coordinator", 0),
        violations=0,  # one would have ended the suite
        rounds=judged["rounds"],
        rounds_per_s=judged["rounds"] / seconds,
        peers_a_round=judged["return"] / judged["rounds"],
        views=judged["install"],
        lost_percent=100 * segments["lost"] / segments["segments"],
        heal_s=storm.counts["heal_ms"] / 1e3,
    )
    report.note(
        f"Healed: everybody alive returned {ROUNDS_AFTER} more rounds within {HEAL_S:g} s; faults:"
        f" {faults}. Judged: {dict(judged)}. views: installed, at all peers together."
    )
    return report
