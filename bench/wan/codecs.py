"""Codecs on a slow link: does a codec that sends a quarter of the bytes take a quarter of the time?

Sites with 100 Mbit/s each way in the lab, one large round with each codec, in turns. `speed_up` is
the time of f32 over the codec's in the same turn; `of_ideal_percent` the same over the ratio of the
bytes (goal: at least 90). `wire_over_percent` is what all peers gave to their sockets, headers
included, beyond (n-1) x (contributions + results) as docs/codecs.md counts them (goal: at most
0.5). A sample is one call at the slowest peer.

Options (`--set`): peers=2, mib=64 (of f32), codecs=f32,bf16,...,e2m1/int8, mbps=100. It does not
measure encoding on its own (bench.codecs), nor other paths (bench.wan.allreduce).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bench.common import Report, Settings, interleave, log
from bench.wan.allreduce import Team, lab_of, variants, wire_bits
from bench.wan.profiles import Access, Profile

CODECS = "f32,bf16,f16,int8,e2m1,e3m0,int2,e2m1/int8"
LINK = Profile("limited", "one room, a slow switch", 1.0, Access(100, 100, up_queue_ms=100))
BASE = "ours f32"


def wire_bytes(task: Mapping[str, Any], peers: int, elements: int) -> float:
    """What a round needs: each half of it goes to all peers but one."""
    return (peers - 1) * 2 * elements * wire_bits(task) / 8


def run(settings: Settings) -> Report:
    """The suite."""
    report = Report("wan-codecs", "Codecs on a limited link", settings)
    peers = int(settings.option("peers", "2"))
    elements = int(settings.option("mib", "1" if settings.quick else "64")) << 18
    mbps = float(settings.option("mbps", "100"))
    profile = replace(LINK, access=replace(LINK.access, up_mbps=mbps, down_mbps=mbps))
    options = {"codecs": settings.option("codecs", CODECS), "gloo": "0"}
    tasks = variants(replace(settings, options=options))
    if BASE not in tasks:
        raise SystemExit("--set codecs=...: f32 must be among them, others are compared with it")
    sent: dict[str, list[float]] = {name: [] for name in tasks}
    with lab_of(profile, peers, settings) as lab:
        team = Team(lab, {"gloo": False, "streams": 0})

        def once(name: str) -> float:
            said = team.run(elements=elements, calls=1, **tasks[name])
            sent[name].append(sum(float(one["sent_bytes"]) for one in said))
            wall_s = max(float(one["wall_s"]) for one in said)
            log(f"  {name} {wall_s:.3f} s")
            return wall_s

        samples = interleave({n: lambda n=n: once(n) for n in tasks}, settings.repeats)
        stats = lab.stats()
        team.close()
    for name, task in tasks.items():
        ratio = wire_bits(tasks[BASE]) / wire_bits(task)
        gain = [a / b for a, b in zip(samples[BASE], samples[name], strict=True)]
        needed = wire_bytes(task, peers, elements)
        report.add(
            {"codec": name.removeprefix("ours ").replace("/", "+"), "peers": peers},
            time_s=samples[name],
            byte_ratio=ratio,
            speed_up=gain,
            of_ideal_percent=[100 * g / ratio for g in gain],
            wire_over_percent=[100 * (s / needed - 1) for s in sent[name][-settings.repeats :]],
        )
    late = 100 * stats["late"] / max(1, stats["writes"])
    report.table(
        "codecs", ["time_s", "byte_ratio", "speed_up", "of_ideal_percent", "wire_over_percent"],
        title=f"{elements >> 18} MiB of f32 at {mbps:g} Mbit/s",
    )  # fmt: skip
    report.note(f"{late:.2f} % of the lab's packets were more than 1 ms late.")
    return report
