"""What encryption costs: rounds between processes of this host, over plain TCP, TLS, Unix sockets.

As in bench.allreduce: a sample is the slowest process's mean over a few calls, variants take turns,
CPU is the time of all threads of a process for each GB of its buffer. `of_plain` divides by plain
TCP in the same turn. The second part is a round over TLS while strangers dial both peers and say
nothing, nonsense, or one byte of a handshake now and then; strangers share the processors with the
peers, so their rate is bounded and named. There a sample is made of many short spells, calm and
attacked in turns, so that whatever else the machine does falls on both alike. What the peers hold
after each turn is in the same table: descriptors, and memory above that of the first calm turn, of
the peer that holds most.

Options (`--set`): peers=2, sizes=1024,65536 (KiB), rate=200 (strangers each second), part=attack
(only that). It does not measure real networks: no line in bench.wan carries what one core encrypts.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import statistics
import time
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from bench.allreduce import KIB, MIB, Team, measure
from bench.common import Report, Settings, Stats, interleave, log

VARIANTS = ["tcp", "tls", "unix"]
ATTACKED_BYTES = 16 * MIB
OPEN_MAX = 500  # connections that a stranger holds
ATTACK_ROWS = 2
SPELLS = 10  # of each kind in one sample,
CALLS = 6  # rounds in one spell: a quarter of a second


def run(settings: Settings) -> Report:
    """The suite."""
    report = Report("crypto", "Encryption on one host", settings)
    peers = int(settings.option("peers", "2"))
    sizes = [int(float(s) * KIB) for s in settings.option("sizes", "").split(",") if s]
    sizes = sizes or ([MIB] if settings.quick else [MIB, 64 * MIB])
    rate = int(settings.option("rate", "200"))
    os.environ["OMP_NUM_THREADS"] = "1"
    team = Team(peers, {"gloo": "0", "streams": "0", "codec": "f32"})
    try:
        for size in sizes if settings.option("part", "all") == "all" else []:
            first = len(report.rows)
            measure(team, report, settings, size, VARIANTS)
            _add_ratios(report.rows[first:])
        _under_attack(team, report, settings, rate)
    finally:
        team.close()
    titles = {"bus_gb_per_s": "Bus bandwidth, GB/s", "cpu_s_per_gb": "CPU seconds for each GB",
              "of_plain": "Speed, of plain TCP's"}  # fmt: skip
    for metric, title in titles.items() if len(report.rows) > ATTACK_ROWS else ():
        report.table(metric.partition("_")[0], metric, columns="transport", title=title,
                     where={"part": "cost"})  # fmt: skip
    report.table("attack", ["time_ms", "of_calm", "descriptors", "more_mib"],
                 where={"part": "attack"}, title="A round over TLS, with strangers")  # fmt: skip
    report.note("Median [quartiles] over the samples; every sample after a warm-up, in turns.")
    return report


def _add_ratios(rows: list[dict[str, Any]]) -> None:
    by_name = {row["case"]["transport"]: row for row in rows}
    plain = by_name["tcp"]["metrics"]["time_ms"]["samples"]
    for row in rows:
        row["case"] = {"part": "cost", **row["case"]}
        pairs = zip(plain, row["metrics"]["time_ms"]["samples"], strict=True)
        row["metrics"]["of_plain"] = asdict(Stats.of([p / mine for p, mine in pairs]))


def _under_attack(team: Team, report: Report, settings: Settings, rate: int) -> None:
    places = [who["tls"][0].removeprefix("tcp://").rpartition(":") for who in team.everybody]
    targets = [(host, int(port)) for host, _, port in places]
    context = multiprocessing.get_context("spawn")
    on, over = context.Event(), context.Event()
    stranger = context.Process(target=_dial, args=(targets, rate, on, over), daemon=True)
    stranger.start()
    elements = (MIB if settings.quick else ATTACKED_BYTES) // 4
    calls, spells = (2, 2) if settings.quick else (CALLS, SPELLS)
    names = {False: "calm", True: f"{rate}/s"}
    held: dict[str, list[tuple[int, float]]] = {name: [] for name in names.values()}

    def spell(attacked: bool) -> float:
        if attacked:
            on.set()
            time.sleep(0.2)  # until there is a crowd
        wall, _ = team.run("tls", elements, calls)
        on.clear()
        held[names[attacked]].append(_held(team))
        return wall

    samples: dict[str, list[float]] = {name: [] for name in names.values()}
    try:
        for _ in range(1 + settings.repeats):  # the first is the warm-up
            kinds = {name: lambda a=attacked: spell(a) for attacked, name in names.items()}
            for name, walls in interleave(kinds, spells, warmup=0).items():
                samples[name].append(statistics.fmean(walls))
    finally:
        over.set()
        on.set()
        stranger.join(10)
    for name, (_, *taken) in samples.items():
        pairs = zip(taken, samples["calm"][1:], strict=True)
        case = {"part": "attack", "KiB": elements * 4 / KIB, "strangers": name}
        counts, bytes_ = zip(*held[name][spells:], strict=True)
        report.add(
            case,
            time_ms=[t * 1e3 for t in taken],
            of_calm=[t / calm for t, calm in pairs],
            descriptors=[float(n) for n in counts],
            more_mib=[(n - held["calm"][0][1]) / MIB for n in bytes_],
        )
        log(f"  strangers {name}: {sorted(taken)[len(taken) // 2] * 1e3:.1f} ms")


def _held(team: Team) -> tuple[int, float]:
    """Descriptors and resident bytes of the peer that holds most of them."""
    ids = [process.pid for process in team.processes]
    pages = [int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in ids]
    counts = [len(os.listdir(f"/proc/{one}/fd")) for one in ids]
    return max(counts), max(pages) * os.sysconf("SC_PAGE_SIZE")


def _dial(targets: list[tuple[str, int]], rate: int, on: Event, over: Event) -> None:
    """A stranger: dials all targets in turn, so many times a second, and keeps what it gets."""
    words = [b"", os.urandom(600), b"\x16\x03\x01\x01\x00\x01", b"GET / HTTP/1.1\r\n\r\n"]
    held: list[socket.socket] = []
    number = 0
    while on.wait() and not over.is_set():
        number += 1
        started = time.perf_counter()
        with suppress(OSError):
            made = socket.create_connection(targets[number % len(targets)], 1)
            made.setblocking(False)
            held.append(made)
            made.send(words[number % len(words)])
        with suppress(OSError):
            held[number % len(held)].send(b"\x00")  # slowly, one byte
        if len(held) > OPEN_MAX:
            held.pop(0).close()
        time.sleep(max(0.0, 1 / rate - (time.perf_counter() - started)))
