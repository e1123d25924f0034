"""All-reduce over the lab's profiles: ours by codec, and Gloo between the same sites in one run.

Two questions. Throughput: how much of the link does a large round use? Goodput is
2 (n-1)/n x bytes on the wire / time, as a share of what a site may send. Latency: how
many one-way delays does a 64 KiB round take, for n = 2 to 8? A sample of the first is one call at
the slowest peer, of the second the mean over peers and calls one after the other; `after_pause_ms`
is the call before those, the first after seconds of silence: the kernel has forgotten how much a
stream may have under way and begins with ten packets. Variants take turns.

Options (`--set`): profiles=, peers=4, mib=256, codecs=f32,int8, gloo=0 (without torch), streams=0
(automatic), latency=0 or throughput=0 to leave one question out, latency_peers=2,4,8,
congestion=cubic (the system's default at all sites), control=system (ours leaves it as it is; else
we take BBR where the kernel has it), pace=0 (no ceilings), scale=1 (rates, bytes and chunks divided
by it: the same round on a machine too slow for the link), gap_s=0 (between two rounds: a second and
more is how training does it), fragments=1 (one more variant: the buffer as so many rounds of
which up to three are under way, as streaming DiLoCo has it).
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import IO, Any

from bench.baselines import name_them
from bench.common import Report, Settings, interleave, log
from bench.wan.lab import ROOT, Lab
from bench.wan.profiles import PROFILES, Access, Profile

SMALL_BYTES = 64 << 10
CHUNK_ELEMENTS = 64 << 10  # what a large round has
PAUSE_S = 1.0
SLACK_MS = 10.0  # what a small round may take beyond three one-way delays
ANSWER_S = 300.0
# Bits of one element on the wire, scales included.
BITS = {"f32": 32, "bf16": 16, "f16": 16, "int8": 8 + 32 / 256, "e2m1": 4 + 8 / 32 + 8 / 1024,
        "e3m0": 4 + 8 / 128, "int2": 2 + 32 / 256}  # fmt: skip
# What a link can be filled with in reasonable time.
MIB = {"home": 4, "mixed": 4, "flaky": 16}


class Team:
    """Workers, one at each site of a lab."""

    def __init__(
        self, lab: Lab, options: Mapping[str, Any], shares: Mapping[int, float] | None = None
    ) -> None:
        self.lab = lab
        self.workers: list[subprocess.Popen[str]] = []
        peers = len(lab.names)
        fastest = max(lab.profile.access_of(site).up_mbps for site in range(peers))
        for site in range(peers):
            # Owners' shares follow their bandwidth.
            share = shares[site] if shares else lab.profile.access_of(site).up_mbps / fastest
            text = json.dumps({**options, "share": share})
            argv = [sys.executable, "-m", "bench.wan.worker", str(site), str(peers),
                    lab.local_address(site), text]  # fmt: skip
            self.workers.append(
                lab.popen(site, argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True, env={"OMP_NUM_THREADS": "1"})
            )  # fmt: skip
        self.tell([worker_says(w) for w in self.workers])
        self.hear()

    def tell(self, what: object) -> None:
        line = json.dumps(what) + "\n"
        for worker in self.workers:
            pipe(worker.stdin).write(line)
        for worker in self.workers:
            pipe(worker.stdin).flush()

    def hear(self) -> list[Any]:
        return [worker_says(worker) for worker in self.workers]

    def run(self, **task: Any) -> list[dict[str, Any]]:
        self.tell(task)
        return self.hear()

    def close(self) -> None:
        for worker in self.workers:
            pipe(worker.stdin).close()
        for worker in self.workers:
            worker.wait(timeout=30)


def pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def worker_says(worker: subprocess.Popen[str]) -> Any:
    # A worker that hangs would hang the suite: its end closes the pipe we read from.
    watch = threading.Timer(ANSWER_S, worker.kill)
    watch.start()
    line = pipe(worker.stdout).readline()
    watch.cancel()
    if not line:
        raise SystemExit(f"a worker ended with status {worker.wait()}; its message is above")
    return json.loads(line)


def options_of(settings: Settings) -> dict[str, Any]:
    return {
        "gloo": settings.option("gloo", "1") == "1",
        "streams": int(settings.option("streams", "0")),
        "control": "" if settings.option("control", "bbr") == "system" else "bbr",
        "pace": settings.option("pace", "1") == "1",
    }


def lab_of(profile: Profile, peers: int, settings: Settings) -> Lab:
    congestion = settings.option("congestion", "cubic")
    return Lab(profile, sites=peers, seed=settings.seed, congestion=congestion)


def slowed(profile: Profile, scale: int) -> Profile:
    """The profile with all rates divided; queues are times and stay."""

    def slow(access: Access) -> Access:
        return replace(access, up_mbps=access.up_mbps / scale, down_mbps=access.down_mbps / scale)

    others = {site: slow(access) for site, access in profile.others.items()}
    return replace(profile, access=slow(profile.access), others=others)


def variants(settings: Settings) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    fragments = int(settings.option("fragments", "1"))
    for codec in settings.option("codecs", "f32,int8").split(","):
        contribution, _, result = codec.partition("/")
        task = {"variant": "ours", "codec": contribution, "result_codec": result or contribution}
        found[f"ours {codec}"] = task
        if fragments > 1:
            found[f"ours {codec}, {fragments} fragments"] = {**task, "fragments": fragments}
    if options_of(settings)["gloo"]:
        found["gloo f32"] = {"variant": "gloo"}
    return found


def wire_bits(task: Mapping[str, Any]) -> float:
    """Mean bits of one element, over both halves of a round."""
    codec = task.get("codec", "f32")
    return 0.5 * (BITS[codec] + BITS[task.get("result_codec", codec)])


def throughput(report: Report, settings: Settings, profile: Profile, peers: int) -> None:
    # The same round on a slower machine: rates, bytes and chunks divided alike.
    scale = int(settings.option("scale", "1"))
    profile = slowed(profile, scale)
    mib = int(settings.option("mib", "0")) or MIB.get(profile.name, 256)
    elements = (1 if settings.quick else mib) * (1 << 18) // scale
    gap_s = float(settings.option("gap_s", "0"))
    repeats = 1 if settings.quick else settings.repeats
    with lab_of(profile, peers, settings) as lab:
        team = Team(lab, options_of(settings))
        tasks = variants(settings)
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in tasks}

        def run(name: str) -> float:
            time.sleep(gap_s)
            more = {"chunk_elements": CHUNK_ELEMENTS // scale} if scale > 1 else {}
            said = team.run(elements=elements, calls=1, **more, **tasks[name])
            answers[name].append(max(said, key=lambda s: s["wall_s"]))
            log(f"  {profile.name} {name} {answers[name][-1]['wall_s']:.2f} s")
            return float(answers[name][-1]["wall_s"])

        samples = interleave({n: lambda n=n: run(n) for n in tasks}, repeats)
        stats = lab.stats()
        team.close()
    rate_mbps = min(profile.access_of(site).up_mbps for site in range(peers))
    for name, task in tasks.items():
        bits = 2 * (peers - 1) / peers * elements * wire_bits(task)
        goodput = [1e-6 * bits / s for s in samples[name]]
        controls = sorted({link[3] for a in answers[name] for link in a["links"]})
        report.add(
            {
                "profile": profile.name,
                "Mbit/s": rate_mbps,
                "peers": peers,
                "MiB": elements / (1 << 18),
                "what": name,
                "control": "/".join(controls),
            },
            time_s=samples[name],
            goodput_mbps=goodput,
            link_percent=[100 * g / rate_mbps for g in goodput],
            streams=[mean(link[1] for link in a["links"]) for a in answers[name][-repeats:]],
            cpu_s=[a["cpu_s"] for a in answers[name][-repeats:]],
        )
    late = 100 * stats["late"] / max(1, stats["writes"])
    log(f"  late packets: {late:.2f} %")
    report.note(f"{profile.name}: {late:.2f} % of the lab's packets were more than 1 ms late.")


def latency(report: Report, settings: Settings, profile: Profile, peers: int) -> None:
    calls = 3 if settings.quick else 10
    repeats = 1 if settings.quick else settings.repeats
    bound_ms = 3 * profile.rtt_ms / 2 + SLACK_MS
    with lab_of(profile, peers, settings) as lab:
        team = Team(lab, options_of(settings))
        tasks = {n: t for n, t in variants(settings).items() if n.endswith("f32")}

        first: dict[str, list[float]] = {name: [] for name in tasks}

        def measured(name: str, count: int) -> float:
            said = team.run(elements=SMALL_BYTES // 4, calls=count, **tasks[name])
            # Peers start up to one delay apart and end so too: only the mean knows no such shift.
            return 1000 * mean(float(s["wall_s"]) for s in said)

        def run(name: str) -> float:
            time.sleep(PAUSE_S)
            first[name].append(measured(name, 1))
            return measured(name, calls)

        samples = interleave({n: lambda n=n: run(n) for n in tasks}, repeats)
        team.close()
    for name, values in samples.items():
        report.add(
            {"profile": profile.name, "round": "64 KiB", "peers": peers, "what": name},
            latency_ms=values,
            after_pause_ms=first[name],
            one_way_delays=[v / (profile.rtt_ms / 2) for v in values],
        )
        log(f"  {profile.name} n={peers} {name}: {[round(v) for v in values]} ms of {bound_ms:.0f}")


def mean(values: Any) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed)


def run(settings: Settings) -> Report:
    """The suite."""
    report = Report("wan-allreduce", "All-reduce over the lab's links", settings)
    peers = int(settings.option("peers", "4"))
    names = settings.option("profiles", "lan,europe,transatlantic,home").split(",")
    if settings.option("throughput", "1") == "1":
        for name in names:
            throughput(report, settings, PROFILES[name], peers)
    if settings.option("latency", "1") == "1":
        default = "2" if settings.quick else "2,4,8"
        for count in settings.option("latency_peers", default).split(","):
            latency(report, settings, PROFILES["transatlantic"], int(count))
    if settings.option("throughput", "1") == "1":
        report.table("throughput", ["time_s", "goodput_mbps", "link_percent", "streams", "cpu_s"],
                     title="Large rounds")  # fmt: skip
    if settings.option("latency", "1") == "1":
        report.table("latency", "latency_ms", columns="what", where={"round": "64 KiB"},
                     title="64 KiB rounds at 90 ms RTT, ms a call")  # fmt: skip
        report.table("pause", "after_pause_ms", columns="what", where={"round": "64 KiB"},
                     title="The first of them after a pause")  # fmt: skip
        report.plot("latency", "peers", "latency_ms", lines="what", where={"round": "64 KiB"},
                    title="A 64 KiB round at 90 ms RTT")  # fmt: skip
    report.note("goodput: 2 (n-1)/n x encoded bytes / time; link_percent: of the slowest site's "
                "uplink, as IP packets, of which TCP payload can be 96.5 %.")  # fmt: skip
    name_them(report)
    return report
