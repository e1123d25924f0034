"""Eight homes train one model: how busy does each optimizer keep them?

Profile `home` (20 Mbit/s up, 100 down, 15 ms), 8 peers, 10 M parameters, steps of one second, which
sleep (bench/wan/sleeper.py). Streaming with contributions of 4 bits should compute at least 95 % of
the time where per-step averaging stays under 5 %. The columns are those of wan-utilisation.

Options (`--set`): profile=home, peers=8, parameters=1e7, step_ms=1000, overlap=2 (of streaming),
cases=streaming e2m1+int8,ddp (also: diloco e2m1+int8).
"""

from __future__ import annotations

from dataclasses import replace

from bench.common import Report, Settings
from bench.wan.lab import Lab
from bench.wan.profiles import PROFILES
from bench.wan.utilisation import Case, Crew, measure, table_of
from decotrain.plan import Links

CASES = [
    Case("streaming", 30, "e2m1+int8", fragments=4, overlap=2, rounds=2),
    Case("diloco", 30, "e2m1+int8", rounds=2),
    Case("ddp", 1, rounds=2, warm=1),
]
USUAL = "streaming e2m1+int8,ddp"


def run(settings: Settings) -> Report:
    """The suite."""
    report = Report("wan-home", "Training at home", settings)
    quick = settings.quick
    profile = PROFILES[settings.option("profile", "home")]
    peers = int(settings.option("peers", "2" if quick else "8"))
    parameters = float(settings.option("parameters", "1e5" if quick else "1e7"))
    step_s = float(settings.option("step_ms", "50" if quick else "1000")) / 1e3
    access = profile.access_of(0)
    links = Links(parameters, peers, min(access.up_mbps, access.down_mbps) * 1e6,
                  profile.rtt_ms / 1e3, step_s)  # fmt: skip
    wanted = settings.option("cases", USUAL).split(",")
    with Lab(profile, sites=peers, seed=settings.seed) as lab:
        crew = Crew(lab)
        for case in (c for c in CASES if c.name in wanted):
            if case.preset == "streaming":
                case = replace(case, overlap=int(settings.option("overlap", str(case.overlap))))
            found = measure(crew, case, links, profile.name, settings.seed)
            row = {"preset": case.name, "every": case.sync_every, "fragments": case.fragments}
            report.add({"profile": profile.name, "peers": peers, **row}, **found)
        crew.close()
        stats = lab.stats()
    late = 100 * stats["late"] / max(1, stats["writes"])
    report.note(f"{late:.2f} % of the packets were more than 1 ms late.")
    title = f"{peers} peers, {parameters:,.0f} parameters, {step_s:g} s for a step"
    table_of(report, "home", title)
    return report
