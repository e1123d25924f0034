"""One slow peer: what a round costs with equal ownership, and with shares that follow bandwidth.

Eight home lines, one of them with a quarter of the rate. The first team owns equally; it also
measures what each peer can send, and the coordinator's closed form makes the second team's shares
of that. Both take turns in the same lab; nothing of the lab's settings reaches the shares. A sample
is the mean of rounds back to back, the first of which is left out: links that were idle begin
slowly, and that costs both teams the same seconds. `cold` is that first round alone, with `--set
cold=1`.

Options (`--set`): peers=8, mib=8, rate=100 (Mbit/s), slow=25, calls=3 (rounds of one sample),
cold=0. Five samples take four to five minutes.
"""

from __future__ import annotations

from typing import Any

from bench.common import Report, Settings, interleave, log
from bench.wan.allreduce import Team
from bench.wan.lab import Lab
from bench.wan.profiles import Access, Profile
from decotrain.control.ownership import alike, shares

RTT_MS = 20
WARM_ROUNDS = 3  # until every peer has been busy long enough to know its rate
CHUNK_ELEMENTS = 1 << 14


def run(settings: Settings) -> Report:
    """The suite."""
    report = Report("wan-ownership", "One peer with a quarter of the bandwidth", settings)
    peers = int(settings.option("peers", "4" if settings.quick else "8"))
    rate, slow = (float(settings.option(k, d)) for k, d in (("rate", "100"), ("slow", "25")))
    elements = int(settings.option("mib", "1" if settings.quick else "8")) * (1 << 18)
    fast = Access(rate, rate)
    profile = Profile("uneven", "one slow line", RTT_MS, fast,
                      others={peers - 1: Access(slow, slow)})  # fmt: skip
    cold = settings.option("cold", "0") == "1"
    calls = 1 if cold else int(settings.option("calls", "2" if settings.quick else "3"))
    task: dict[str, Any] = {
        "elements": elements, "calls": calls, "variant": "ours", "warm": 0 if cold else 1,
        "chunk_elements": CHUNK_ELEMENTS,
    }  # fmt: skip
    with Lab(profile, sites=peers, seed=settings.seed) as lab:
        equal = Team(lab, {}, dict.fromkeys(range(peers), 1.0))
        said = equal.run(**{**task, "calls": WARM_ROUNDS, "warm": 0})
        rates = {peer: float(one["uplink_bps"]) for peer, one in enumerate(said)}
        parts = shares(alike(rates), dict.fromkeys(rates, 1.0))
        log(f"  measured {[round(r / 1e6) for r in rates.values()]} Mbit/s, shares {parts}")
        teams = {"equal": equal, "measured": Team(lab, {}, parts)}

        def once(name: str) -> float:
            seconds = max(float(one["wall_s"]) for one in teams[name].run(**task))
            log(f"  {name} {seconds:.2f} s")
            return seconds

        repeats = 1 if settings.quick else settings.repeats
        samples = interleave({n: lambda n=n: once(n) for n in teams}, repeats)
        for team in teams.values():
            team.close()
    for name, values in samples.items():
        speedup = [old / new for old, new in zip(samples["equal"], values, strict=True)]
        report.add({"shares": name, "peers": peers}, time_s=values, speedup=speedup)
    report.table("ownership", ["time_s", "speedup"])
    measured = [round(r / 1e6) for r in rates.values()]
    report.note("Every round after a pause." if cold else
                f"Mean of {calls} rounds back to back, after one that is left out.")  # fmt: skip
    report.note(f"Measured uplinks (Mbit/s): {measured}; shares: {list(parts.values())}."
                " The closed form says 7/4 for 8 peers.")  # fmt: skip
    return report
