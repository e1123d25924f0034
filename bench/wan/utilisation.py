"""How busy trainers stay on limited links, by outer optimizer: measured, and what the plan says.

Peers whose steps sleep (bench/wan/sleeper.py) train over the lab's links with real outer
optimizers, codecs and rounds. `measured_percent` is the time that the steps should take over the
time they took, mean over peers; so it also counts what one machine cannot do at once for all.
`predicted_percent` is the closed form of `decotrain plan` on the same figures.
`waited_percent` is the trainers' own account, from their time inside rounds. `cpu_cores` is what
all peers together used. The window begins and ends with a round, after two rounds without account.

Options (`--set`): mbps=20,100 (each way), rtt_ms=20, peers=4, parameters=1e6, step_ms=400, cases=
(names from the table), windows=2 (as many times as long). It learns nothing (bench.outer does).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bench.common import Report, Settings, log
from bench.wan.allreduce import mean, pipe, worker_says
from bench.wan.lab import ROOT, Lab
from bench.wan.profiles import Access, Profile
from decotrain.plan import Choice, Links, choices, cost

LAYERS = 12


@dataclass(frozen=True)
class Case:
    """One outer optimizer, as it is run and as the planner sees it."""

    preset: str
    sync_every: int
    codec: str = "f32"
    fragments: int = 1
    overlap: int = 1  # of streaming
    rounds: int = 2  # of all parameters, in the window
    warm: int = 2  # such rounds before it

    @property
    def name(self) -> str:
        return self.preset if self.codec in ("f32", "topk") else f"{self.preset} {self.codec}"

    def options(self) -> dict[str, Any]:
        """For `decotrain.outer.make`."""
        if self.preset == "ddp":
            return {"codec": self.codec, "bucket_elements": 1}  # a bucket for each layer
        found: dict[str, Any] = {"sync_every": self.sync_every}
        if self.codec != "topk":
            found["codec"] = self.codec
        if self.preset == "streaming":
            found |= {"layers": LAYERS // self.fragments, "overlap": self.overlap}
        return found

    def choice(self) -> Choice:
        known = {c.preset: c for c in choices(self.sync_every, self.fragments, self.overlap)}
        return replace(known[self.preset], codec=self.codec)


# Periods at which the presets differ most on these links.
CASES = [
    Case("ddp", 1, rounds=6),
    Case("ddp", 1, "int8", rounds=6),
    Case("diloco", 6),
    Case("diloco", 6, "e2m1+int8"),
    Case("streaming", 8, fragments=4),
    Case("streaming", 8, "e2m1+int8", fragments=4),
    Case("eager", 3, rounds=4),
    Case("co2", 3, rounds=4),
    Case("sparseloco", 3, "topk", rounds=4),
]


@dataclass
class Crew:
    """Sleepers, one at each site of a lab; a coordinator for each task."""

    lab: Lab
    workers: list[subprocess.Popen[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for site in range(len(self.lab.names)):
            self.workers.append(
                self.lab.popen(
                    site, [sys.executable, "-m", "bench.wan.sleeper", f"site-{site}"], cwd=ROOT,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                    env={"OMP_NUM_THREADS": "1", "DECOTRAIN_LISTEN": self.lab.local_address(site)},
                )
            )  # fmt: skip

    def run(self, task: Mapping[str, Any]) -> list[dict[str, float]]:
        """What each peer says of the task."""
        coordinator = self.lab.popen(
            0,
            [sys.executable, "-m", "decotrain.cli", "coordinator", "--insecure",
             "--listen", f"{self.lab.local_address(0)}:0", "--min-peers", str(len(self.workers))],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        line = pipe(coordinator.stdout).readline()
        if not line:
            raise SystemExit("the coordinator did not start")
        for worker in self.workers:
            pipe(worker.stdin).write(json.dumps({**task, "join": line.split()[-1]}) + "\n")
            pipe(worker.stdin).flush()
        said = [worker_says(worker) for worker in self.workers]
        coordinator.kill()
        coordinator.wait()
        if len({one.pop("digest") for one in said}) != 1:
            raise SystemExit(f"the peers do not hold the same state: {task}")
        return said

    def close(self) -> None:
        for worker in self.workers:
            pipe(worker.stdin).close()
        for worker in self.workers:
            worker.wait(timeout=30)


def measure(crew: Crew, case: Case, links: Links, bandwidth: str, seed: int) -> dict[str, float]:
    """Metrics of one case; `bandwidth` is for the log."""
    task = {
        "outer": case.preset, "options": case.options(), "parameters": int(links.parameters),
        "layers": LAYERS, "step_s": links.step_s, "warm": case.warm * case.sync_every,
        "steps": case.rounds * case.sync_every,
        "seed": seed,
    }  # fmt: skip
    said = crew.run(task)
    slept_s = [one["steps"] * links.step_s for one in said]
    walls_s = [one["wall_s"] for one in said]
    found = {
        "measured_percent": 100 * mean(s / w for s, w in zip(slept_s, walls_s, strict=True)),
        "predicted_percent": 100 * cost(case.choice(), links).utilisation,
        "waited_percent": 100 * mean(one["waited_s"] / one["wall_s"] for one in said),
        "cpu_cores": sum(one["cpu_s"] for one in said) / max(walls_s),
        "sent_mb_per_step": mean(one["sent_bytes"] / one["steps"] for one in said) / 1e6,
        "window_s": max(walls_s),
    }
    found["off_points"] = found["measured_percent"] - found["predicted_percent"]
    log(f"  {bandwidth} {case.name}: { ({k: round(v, 2) for k, v in found.items()}) }")
    return found


def table_of(report: Report, name: str, title: str) -> None:
    columns = ["measured_percent", "predicted_percent", "off_points", "waited_percent",
               "cpu_cores", "sent_mb_per_step", "window_s"]  # fmt: skip
    report.table(name, columns, title=title)


def run(settings: Settings) -> Report:
    """The suite."""
    report = Report("wan-utilisation", "Utilisation on limited links", settings)
    quick = settings.quick
    number = lambda key, usual, small: float(  # noqa: E731
        settings.option(key, small if quick else usual)
    )
    peers, windows = int(number("peers", "4", "2")), int(number("windows", "2", "1"))
    rtt_ms = number("rtt_ms", "20", "4")
    rates = settings.option("mbps", "100" if quick else "20,100").split(",")
    wanted = settings.option("cases", "diloco,eager" if quick else "").split(",")
    for mbps in map(float, rates):
        profile = Profile("limited", "one rate each way", rtt_ms, Access(mbps, mbps, 100, 50))
        links = Links(number("parameters", "1e6", "1e5"), peers, mbps * 1e6, rtt_ms / 1e3,
                      number("step_ms", "400", "50") / 1e3)  # fmt: skip
        with Lab(profile, sites=peers, seed=settings.seed) as lab:
            crew = Crew(lab)
            for case in (c for c in CASES if wanted == [""] or c.name in wanted):
                longer = replace(case, rounds=case.rounds * windows)
                found = measure(crew, longer, links, f"{mbps:g} Mbit/s", settings.seed)
                row = {"preset": case.name, "every": case.sync_every, "fragments": case.fragments}
                report.add({"Mbit/s": mbps, **row}, **found)
            crew.close()
            stats = lab.stats()
        late = 100 * stats["late"] / max(1, stats["writes"])
        report.note(f"{mbps:g} Mbit/s: {late:.2f} % of the packets were more than 1 ms late.")
    table_of(report, "limits", f"{peers} peers, {links.parameters:,.0f} parameters,"
             f" {links.step_s:g} s for a step, {rtt_ms:g} ms RTT")  # fmt: skip
    return report
