"""A peer's death at half of a round over the lab's links, against redoing the round.

bench/recovery.py with every peer at a site of its own, and nobody who reports the end of a process:
closed links tell, and then the coordinator asks, which takes two of the victim's round trips.
The columns are that suite's.

Options (`--set`): profiles=home,europe,transatlantic, mib=NUMBER (of a round), peers=4.
"""

from __future__ import annotations

from bench.common import Report, Settings
from bench.recovery import killed, table_of
from bench.wan.lab import Lab
from bench.wan.profiles import PROFILES

SIZES_MIB = {"home": 4, "mixed": 4, "flaky": 4}  # a round of seconds; others
USUAL_MIB = 32


def run(settings: Settings) -> Report:
    """The suite."""
    report = Report(
        "wan-recovery", "A peer dies at half of a round, over the lab's links", settings
    )
    quick = settings.quick
    names = settings.option("profiles", "lan" if quick else "home,europe,transatlantic").split(",")
    peers = int(settings.option("peers", "4"))
    for name in names:
        mib = float(settings.option("mib", "4" if quick else str(SIZES_MIB.get(name, USUAL_MIB))))
        with Lab(PROFILES[name], sites=peers + 2, seed=settings.seed) as lab:
            killed(report, settings, mib, peers, lab)
    table_of(report)
    return report
