"""All-reduce in place between processes of this host: rounds over TCP and Unix sockets, and Gloo.

The parent makes the view by hand and installs it at every node (no coordinator), then tells all
processes what to run, one variant after the other in turns. A sample is the slowest process's mean
over a few calls. Bus bandwidth is 2 (n-1)/n x bytes / time, the convention of nccl-tests; CPU is
the time of all threads of a process, for each GB of its buffer.

Options (`--set`): peers=2,4,8, sizes=16384,262144 (KiB), full=1, gloo=0 (without torch),
streams=1, codec=f32 (or a pair, e2m1+int8). It does not measure churn (bench.recovery) or real
networks (bench.wan).
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

from bench.baselines import name_them
from bench.common import Report, Settings, Stats, interleave, log

KIB = 1024
MIB = 1024 * KIB
SIZES = [64 * KIB, 1 * MIB, 16 * MIB, 64 * MIB]
SIZES_FULL = [64 * KIB, 256 * KIB, 1 * MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB]
TINY_ELEMENTS = 4
BUDGET_S = 0.4  # of one sample: how many calls go into it
CALLS_MAX = 200
VIEW = 1 << 32 | 1  # term 1, epoch 1
WAIT_S = 120.0
ROUGH = 0.4  # off by so much of the value: e3m0 has powers of two only


# --- in a worker process


class Ours:
    """Three nodes: TCP only, the same with TLS, and one that prefers Unix sockets."""

    def __init__(self, rank: int, streams: int, codec: str) -> None:
        from decotrain import _core

        contribution, result = _core.codec_pair(codec)
        self.codecs = {"codec": contribution, "result_codec": result}
        self.nodes = {
            "tcp": _core.Node(rank + 1, ["tcp://127.0.0.1:0"], 7, streams=streams, force_tcp=True),
            "tls": _core.Node(
                rank + 1,
                ["tcp://127.0.0.1:0"],
                7,
                streams=streams,
                force_tcp=True,
                tls_key=bytes(32),
            ),
            "unix": _core.Node(rank + 1, ["unix://"], 7, streams=streams),
        }

    def addresses(self) -> dict[str, list[str]]:
        return {name: node.addresses for name, node in self.nodes.items()}

    def install(self, everybody: Sequence[dict[str, list[str]]]) -> None:
        members = [[rank + 1, rank, True, 1.0] for rank in range(len(everybody))]
        plan = {
            "view": {"id": VIEW, "members": members},
            "answers": [1, 1],
            "reported": (1 << len(everybody)) - 1,
            "tags": [],
            "rounds": [],
            "names": [],
        }
        for name, node in self.nodes.items():
            node.set_peers([(r + 1, r, who[name]) for r, who in enumerate(everybody)])
            node.freeze(1, 1)
            assert node.install(plan)

    def run(self, transport: str, buffer: Any) -> None:
        work = self.nodes[transport].begin([buffer], borrow=True, **self.codecs)
        assert work.wait(WAIT_S), "no result"
        work.result().decode_into([buffer])

    def close(self) -> None:
        for node in self.nodes.values():
            node.close()


def worker(rank: int, peers: int, store: str, options: dict[str, str], pipe: Connection) -> None:
    import numpy as np

    ours = Ours(rank, int(options["streams"]), options["codec"])
    tolerance = 1e-3 if options["codec"] == "f32" else ROUGH
    gloo = None
    if options["gloo"] == "1":
        import torch
        import torch.distributed as gloo

        torch.set_num_threads(1)
        gloo.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=peers)
    pipe.send(ours.addresses())
    ours.install(pipe.recv())
    tiny = np.ones(TINY_ELEMENTS, np.float32)
    buffers: dict[int, Any] = {}
    while (task := pipe.recv()) is not None:
        variant, elements, calls = task
        if elements not in buffers:
            buffers = {elements: np.full(elements, 1.0 + rank, np.float32)}
        buffer = buffers[elements]
        buffer.fill(1.0 + rank)
        ours.run("unix", tiny)  # everybody is here
        cpu, start = time.process_time(), time.perf_counter()
        for _ in range(calls):
            if variant == "gloo":
                gloo.all_reduce(torch.from_numpy(buffer))
            else:
                ours.run(variant, buffer)
        taken = time.perf_counter() - start, time.process_time() - cpu
        if variant != "gloo":
            mean = (peers + 1) / 2
            assert abs(float(buffer[-1]) - mean) < mean * tolerance, buffer[-1]
        pipe.send([t / calls for t in taken])
    ours.close()
    if gloo is not None:
        gloo.destroy_process_group()


# --- in the parent


class Team:
    """The worker processes of one n."""

    def __init__(self, peers: int, options: dict[str, str]) -> None:
        self.peers = peers
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        store = os.path.join(self.folder.name, "store")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(peers):
            here, there = context.Pipe()
            process = context.Process(
                target=worker, args=(rank, peers, store, options, there), daemon=True
            )
            process.start()
            there.close()  # so that a worker's death ends our recv
            self.pipes.append(here)
            self.processes.append(process)
        self.everybody = [pipe.recv() for pipe in self.pipes]  # addresses by transport
        for pipe in self.pipes:
            pipe.send(self.everybody)

    def run(self, variant: str, elements: int, calls: int) -> tuple[float, float]:
        """Seconds of one call at the slowest process, CPU seconds of one call at the mean one."""
        for pipe in self.pipes:
            pipe.send((variant, elements, calls))
        taken = [pipe.recv() for pipe in self.pipes]
        return max(t[0] for t in taken), sum(t[1] for t in taken) / self.peers

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(30)
            if process.is_alive():
                process.kill()
        self.folder.cleanup()


def measure(team: Team, report: Report, settings: Settings, size: int, names: list[str]) -> None:
    elements = size // 4
    cpu: dict[str, list[float]] = {name: [] for name in names}
    calls = {}
    for name in names:
        once = min(team.run(name, elements, 1)[0] for _ in range(2))
        calls[name] = 1 if settings.quick else max(1, min(CALLS_MAX, int(BUDGET_S / once)))

    def variant(name: str) -> float:
        wall, cpu_s = team.run(name, elements, calls[name])
        cpu[name].append(cpu_s / (size / 1e9))
        return wall

    samples = interleave({n: lambda n=n: variant(n) for n in names}, settings.repeats)
    share = 2 * (team.peers - 1) / team.peers
    for name in names:
        case = {"peers": team.peers, "KiB": size / KIB, "transport": name}
        report.add(
            case,
            time_ms=[s * 1e3 for s in samples[name]],
            bus_gb_per_s=[share * size / s / 1e9 for s in samples[name]],
            cpu_s_per_gb=cpu[name][1:],
        )
        if name != "gloo" and "gloo" in names:
            pairs = zip(samples["gloo"], samples[name], strict=True)
            report.rows[-1]["metrics"].update(ratio([g / s for g, s in pairs]))
        log(f"  {case} {sorted(samples[name])[len(samples[name]) // 2] * 1e3:.3f} ms")


def ratio(values: list[float]) -> dict[str, Any]:
    """Speed against Gloo, sample by sample of the same turn."""
    return {"times_gloo": asdict(Stats.of(values))}


def run(settings: Settings) -> Report:
    """The suite."""
    report = Report("allreduce", "All-reduce in place on one host", settings)
    full = settings.option("full", "0") == "1"
    sizes = [int(float(s) * KIB) for s in settings.option("sizes", "").split(",") if s]
    sizes = sizes or ([64 * KIB, MIB] if settings.quick else SIZES_FULL if full else SIZES)
    peers = [
        int(n) for n in settings.option("peers", "2" if settings.quick else "2,4,8").split(",")
    ]
    options = {
        "gloo": settings.option("gloo", "1"),
        "streams": settings.option("streams", "0"),
        "codec": settings.option("codec", "f32"),
    }
    os.environ["OMP_NUM_THREADS"] = "1"
    names = ["tcp", "unix"] + (["gloo"] if options["gloo"] == "1" else [])
    for n in peers:
        team = Team(n, options)
        try:
            for size in [TINY_ELEMENTS * 4, *sizes]:
                measure(team, report, settings, size, names)
        finally:
            team.close()
    report.table("time", "time_ms", columns="transport", title="Time of one call, ms")
    report.table("bus", "bus_gb_per_s", columns="transport", title="Bus bandwidth, GB/s")
    report.table("cpu", "cpu_s_per_gb", columns="transport", title="CPU seconds for each GB")
    if "gloo" in names:
        report.table("times", "times_gloo", columns="transport", title="Speed, times Gloo's")
    if options["codec"] != "f32":
        report.note(f"Codec {options['codec']}; Gloo's in f32.")
    report.note("Median [quartiles] over the samples; every sample after a warm-up, in turns.")
    name_them(report)
    return report
