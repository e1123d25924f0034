"""The lab itself: round trip and TCP goodput of each profile, measured between sites 0 and 1.

It shows what any program can get out of a profile with plain sockets (1 stream, 8 streams),
and that the forwarder keeps up: the share of packets that it delivered more than 1 ms late.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.common import Report, Settings, log
from bench.wan.lab import Lab
from bench.wan.profiles import PROFILES

PROBE = [sys.executable, str(Path(__file__).with_name("probe.py"))]


def ping(lab: Lab, source: int, target: int, **options: float) -> dict[str, Any]:
    """Round trips of UDP packets from one site to another."""
    server = lab.popen(
        target, [*PROBE, "echo", lab.local_address(target)], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    port = server.stdout.readline().strip()
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    done = lab.run(source, [*PROBE, "ping", lab.address(target), port, *flags])
    server.kill()
    server.wait()
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def goodput_mbps(
    lab: Lab, source: int, target: int, streams: int, skip_s: float, measure_s: float,
) -> float:  # fmt: skip
    """TCP payload that arrives in a second, all streams together."""
    sink = lab.popen(
        target,
        [*PROBE, "sink", lab.local_address(target), f"--streams={streams}",
         f"--skip-s={skip_s}", f"--measure-s={measure_s}"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert sink.stdout is not None
    port = sink.stdout.readline().strip()
    flags = [f"--streams={streams}"]
    sender = lab.popen(source, [*PROBE, "source", lab.address(target), port, *flags])
    line, _ = sink.communicate(timeout=60 + skip_s + measure_s)
    sender.kill()
    sender.wait()
    return float(json.loads(line)["mbps"])


def run(settings: Settings) -> Report:
    report = Report("wan-links", "The lab's links", settings)
    names = settings.option("profiles", ",".join(PROFILES)).split(",")
    skip_s, measure_s = (0.5, 0.5) if settings.quick else (3.0, 4.0)
    repeats = 1 if settings.quick else settings.repeats
    congestion = settings.option("congestion", "cubic")
    for name in names:
        profile = PROFILES[name]
        rtts, goodputs = [], {1: [], 8: []}  # type: list[float], dict[int, list[float]]
        late = writes = 0
        for repeat in range(repeats):
            with Lab(profile, sites=2, seed=settings.seed + repeat, congestion=congestion) as lab:
                rtts.append(ping(lab, 0, 1, count=50)["rtt_median_ms"])
                for streams in goodputs:
                    goodputs[streams].append(goodput_mbps(lab, 0, 1, streams, skip_s, measure_s))
                stats = lab.stats()
                late, writes = late + stats["late"], writes + stats["writes"]
        log(f"{name}: {rtts} ms, {goodputs} Mbit/s")
        rate_mbps = profile.access_of(0).up_mbps
        report.add(
            {"profile": name, "rate up (Mbit/s)": rate_mbps, "rtt (ms)": profile.rtt_ms},
            rtt_ms=rtts,
            goodput_1_mbps=goodputs[1],
            goodput_8_mbps=goodputs[8],
            late_percent=100 * late / max(1, writes),
        )
    report.table("links", ["rtt_ms", "goodput_1_mbps", "goodput_8_mbps", "late_percent"])
    report.note("rtt (ms) is the profile's; rtt_ms is measured with UDP, without load. "
                "Goodput: TCP payload, one direction, 1 and 8 streams, Linux as it comes ("
                f"{congestion}). "
                "late_percent: packets the lab delivered more than 1 ms late.")  # fmt: skip
    return report
