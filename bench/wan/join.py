"""A newcomer fetches a live run's state over the lab's links, against copying it from one peer.

3 peers hold a state (bench/join.py), each at a site of its own; a fourth joins, fetches it from
all of them and takes part. `over_copy` is the time that one TCP stream from one of them would need
at the goodput it was measured to have on the same path just before (scp, wget), over ours.
`link_share` is what the newcomer got of its downlink, or of the servers' uplinks together where
these are less.

Options (`--set`): profiles=home,europe,transatlantic, mib=NUMBER (of state), peers=3.
"""

from __future__ import annotations

from bench.common import Report, Settings, log
from bench.fleet import Fleet
from bench.join import MIB, checksum, enter, hold, sample
from bench.wan.lab import Lab
from bench.wan.links import goodput_mbps
from bench.wan.profiles import PROFILES

SIZES_MIB = {"home": 8, "mixed": 8, "flaky": 16}  # what takes seconds; others
USUAL_MIB = 128


def run(settings: Settings) -> Report:
    """The suite."""
    report = Report("wan-join", "A newcomer over the lab's links", settings)
    quick = settings.quick
    names = settings.option("profiles", "lan" if quick else "home,europe,transatlantic").split(",")
    peers = int(settings.option("peers", "3"))
    for name in names:
        profile = PROFILES[name]
        mib = float(settings.option("mib", "4" if quick else str(SIZES_MIB.get(name, USUAL_MIB))))
        size = int(mib * MIB)
        access = profile.access_of(0)
        limit_bps = 1e6 * min(access.down_mbps, peers * access.up_mbps)
        rows: dict[str, list[float]] = {"copy_s": [], "over_copy": [], "link_share": []}
        with (
            Lab(profile, sites=peers + 2, seed=settings.seed) as lab,
            Fleet(peers, reports=False, lab=lab) as fleet,
        ):
            fleet.start(peers)
            fleet.all(hold, size, settings.seed)
            fleet.all(enter)
            crc = fleet.all(checksum)[0]
            for _ in range(1 if quick else settings.repeats):
                mbps = goodput_mbps(lab, 1, peers + 1, streams=1, skip_s=1, measure_s=2)
                figures = sample(fleet, size, 0, crc)
                rows["copy_s"].append(8 * size / (mbps * 1e6))
                rows["over_copy"].append(rows["copy_s"][-1] / figures["fetch_s"])
                rows["link_share"].append(8 * size / figures["fetch_s"] / limit_bps)
                for key in ("fetch_s", "active_after_fetch_ms", "servers_growth_mib"):
                    rows.setdefault(key, []).append(figures[key])
                log(f"  {name}: { ({k: round(v[-1], 3) for k, v in rows.items()}) }")
        report.add({"profile": name, "MiB": mib, "servers": peers}, **rows)
    report.table(
        "join",
        ["fetch_s", "copy_s", "over_copy", "link_share", "active_after_fetch_ms"],
        title="From the first request to the whole state",
    )
    return report
