"""Ten minutes of faults: does everything hold, is nothing used up, and what goodput is left?

Peers train on shared state (scripts/chaos.py), first undisturbed, then under a fault every few
seconds, with the coordinator killed at fixed times beside. Two peers are neither killed nor told
to leave: their descriptors, threads and memory are sampled, and their rounds counted. All histories
are judged by the simulator's checker in the end; a violation or a peer without progress ends the
suite with an error.

Options (`--set`): seconds=600, calm=60 (undisturbed before it), peers=8, kib=1024, mean=2 (seconds
between faults), coordinator=30 (seconds between its kills).
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from pathlib import Path

from bench.common import Report, Settings, log
from bench.fleet import Peer
from scripts.chaos import HEAL_S, ROUNDS_AFTER, Storm, judge

ELDERS = 2
SAMPLE_S = 2.0


class Watch:
    """What a process uses, again and again."""

    def __init__(self, peers: list[Peer]) -> None:
        self.peers = peers
        self.next_s = 0.0
        self.found: dict[str, list[list[float]]] = {
            name: [[] for _ in peers] for name in ("descriptors", "threads", "memory_mib")
        }

    def look(self) -> None:
        if time.monotonic() < self.next_s:
            return
        self.next_s = time.monotonic() + SAMPLE_S
        for number, peer in enumerate(self.peers):
            folder = Path(f"/proc/{peer.process.pid}")
            rows = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
            self.found["descriptors"][number].append(len(list((folder / "fd").iterdir())))
            self.found["threads"][number].append(int(rows["Threads"]))
            self.found["memory_mib"][number].append(int(rows["VmRSS"].split()[0]) / 1024)

    def figures(self) -> dict[str, list[float]]:
        """Medians of the first and the last quarter, of each peer."""
        out: dict[str, list[float]] = {}
        for name, series in self.found.items():
            quarters = [max(1, len(one) // 4) for one in series]
            out[f"{name}_first"] = [
                statistics.median(one[:n]) for one, n in zip(series, quarters, strict=True)
            ]
            out[f"{name}_last"] = [
                statistics.median(one[-n:]) for one, n in zip(series, quarters, strict=True)
            ]
        return out


def run(settings: Settings) -> Report:
    """The suite."""
    report = Report("storm", "A storm", settings)
    quick = settings.quick
    seconds = float(settings.option("seconds", "10" if quick else "600"))
    calm_s = float(settings.option("calm", "3" if quick else "60"))
    peers = int(settings.option("peers", "4" if quick else "8"))
    kib = int(settings.option("kib", "256" if quick else "1024"))
    mean_s = float(settings.option("mean", "2"))
    coordinator_s = float(settings.option("coordinator", "5" if quick else "30"))
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        storm = Storm(folder, settings.seed, peers, kib * 256, mean_s, ELDERS, coordinator_s)
        try:
            storm.begin()
            elders = storm.fleet.team[:ELDERS]
            marks = [(time.monotonic(), [storm.done(peer) for peer in elders])]
            time.sleep(calm_s)
            marks.append((time.monotonic(), [storm.done(peer) for peer in elders]))
            watch = Watch(elders)
            storm.disturb(seconds, watch.look)
            marks.append((time.monotonic(), [storm.done(peer) for peer in elders]))
            storm.heal()
        finally:
            storm.close()
        judged = judge(folder)
    rates = [
        [(now - then) / (end_s - start_s) for then, now in zip(before, after, strict=True)]
        for (start_s, before), (end_s, after) in itertools.pairwise(marks)
    ]
    calm, disturbed = map(statistics.mean, rates)
    faults = {kind: count for kind, count in storm.counts.items() if kind != "heal_ms"}
    log(f"  faults {faults}, judged {dict(judged)}")
    log(f"  rounds/s {calm:.1f} undisturbed, {disturbed:.1f} in the storm")
    report.add(
        {"peers": peers, "KiB": kib, "seconds": seconds, "mean_s": mean_s},
        faults=sum(faults.values()),
        coordinator_kills=faults.get("coordinator", 0),
        violations=0,  # one would have ended the suite
        rounds=judged["rounds"],
        calm_rounds_per_s=rates[0],
        storm_rounds_per_s=rates[1],
        goodput_share=disturbed / calm,
        heal_s=storm.counts["heal_ms"] / 1e3,
        **watch.figures(),
    )
    report.note(
        f"Healed: everybody alive returned {ROUNDS_AFTER} more rounds within {HEAL_S:g} s; faults:"
        f" {faults}. A peer that is killed is replaced within 2 s, one that is stopped wakes after"
        " 0.1 to 6.1 s: meanwhile the others wait for what is in flight."
    )
    return report
