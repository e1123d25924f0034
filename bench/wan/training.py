"""Loss against wall-clock over slow links: the main job with one outer optimizer after another.

Each peer is a process at a site of its own, the coordinator is at site 0. The first optimizer gets
`budget_s` of training; the best held-out loss it reached is the target, and what the others need
to reach it is measured, within the same budget. The learning rate is constant, so that a run
which is cut short is like the beginning of a longer one. One run of each: a run is minutes, and
the differences that this suite is about are factors.

Options (`--set`): profile=home, peers=4, outers=ddp,streaming (a codec after a slash:
streaming/e2m1+int8), budget_s=240, overrides=model=tiny,batch=4 (of every run).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.common import Report, Settings, log
from bench.wan.lab import ROOT, Lab
from decotrain.cli import configs
from decotrain.control.token import VARIABLE, Token, write
from decotrain.train.metrics import Tail

LOOK_S = 0.5
START_S = 120.0  # until every peer trains
STEPS = 10**7  # never reached
ALWAYS = ("inner.final_lr=1.0", "held_out_windows=64")


@dataclass
class Curve:
    """What one run did."""

    points: list[tuple[float, float]] = field(default_factory=list)  # seconds, held-out loss
    steps: int = 0
    sent_bytes: int = 0

    @property
    def best(self) -> float:
        return min((loss for _, loss in self.points), default=float("nan"))

    def time_to(self, target: float) -> float:
        """When the held-out loss was at the target first; infinite when it never was."""
        return next((at_s for at_s, loss in self.points if loss <= target), float("inf"))


def compose(name: str, folder: Path, peers: int, overrides: list[str]) -> None:
    """Writes the run's configuration as `decotrain train` would."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    outer, _, codec = name.partition("/")
    chosen = [f"outer={outer}", f"name={folder.name}", f"folder={folder.parent}", f"peers={peers}"]
    chosen += [f"codec={codec}"] if codec else []
    with initialize_config_dir(str(configs()), version_base="1.3"):
        config = OmegaConf.to_container(
            hydra_compose("train", [*chosen, *ALWAYS, *overrides]), resolve=True
        )
    assert isinstance(config, dict)
    every = config["outer"]["sync_every"]
    config["steps"] = STEPS // every * every
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def start(lab: Lab, folder: Path, peers: int) -> None:
    """The coordinator and all peers."""
    log_file = (folder / "log.txt").open("w")
    token = str(folder / "run.token")
    write(Token.new(), token)
    coordinator = lab.popen(
        0,
        [sys.executable, "-m", "decotrain.cli", "coordinator", "--run", folder.name,
         "--listen", f"{lab.local_address(0)}:0", "--min-peers", str(peers)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=log_file, text=True, env={VARIABLE: token},
    )  # fmt: skip
    assert coordinator.stdout is not None
    address = coordinator.stdout.readline().split()[-1]
    for site in range(peers):
        lab.popen(
            site,
            [sys.executable, "-m", "decotrain.train.worker", str(folder), "--peer", f"peer-{site}",
             "--join", address],
            cwd=ROOT, stdout=log_file, stderr=log_file,
            env={"OMP_NUM_THREADS": "1", "DECOTRAIN_LISTEN": lab.local_address(site),
                 VARIABLE: token},
        )  # fmt: skip


def follow(folder: Path, peers: int) -> Iterator[dict[str, Any]]:
    """Events of all peers as they come; an empty one now and then."""
    tails = [Tail(folder / f"peer-{site}.jsonl", whole=True) for site in range(peers)]
    while True:
        for number, tail in enumerate(tails):
            for event in tail.read():
                yield {**event, "peer": number}
        yield {}
        time.sleep(LOOK_S)


def train(lab: Lab, name: str, folder: Path, peers: int, settings: Settings,
          budget_s: float, target: float | None) -> Curve:  # fmt: skip
    """One run, until its budget is over or the target is reached."""
    chosen = settings.option("overrides", "")
    compose(name, folder, peers, chosen.split(",") if chosen else [])
    start(lab, folder, peers)
    curve = Curve()
    begun: dict[int, float] = {}
    sent: dict[int, int] = {}
    asked_s = time.time()
    for event in follow(folder, peers):
        kind, at_s = event.get("event"), event.get("time_s", 0.0)
        if kind == "start":
            begun.setdefault(event["peer"], at_s)
        elif kind == "evaluation" and at_s - min(begun.values()) <= budget_s:
            curve.points.append((at_s - min(begun.values()), event["held_out"]))
            log(f"  {name}: {curve.points[-1][0]:.0f} s, {curve.points[-1][1]:.3f} nats")
            if target is not None and event["held_out"] <= target:
                break
        elif kind == "progress":
            curve.steps = max(curve.steps, event["step"])
            sent[event["peer"]] = int(event.get("sent_bytes", 0))
        elif not event and not begun and time.time() - asked_s > START_S:
            raise SystemExit((folder / "log.txt").read_text() or "the peers did not start")
        elif not event and begun and time.time() - min(begun.values()) > budget_s:
            break
    curve.sent_bytes = max(sent.values(), default=0)
    return curve


def run(settings: Settings) -> Report:
    """The suite."""
    report = Report("wan-training", "Loss against wall-clock over slow links", settings)
    profile = settings.option("profile", "home")
    peers = int(settings.option("peers", "4"))
    budget_s = 20.0 if settings.quick else float(settings.option("budget_s", "240"))
    names = settings.option("outers", "ddp,streaming").split(",")
    curves: dict[str, Curve] = {}
    for name in names:
        target = curves[names[0]].best if curves else None
        with (
            Lab(profile, sites=peers, seed=settings.seed) as lab,
            tempfile.TemporaryDirectory() as t,
        ):
            folder = Path(t) / "run"
            folder.mkdir()
            curves[name] = train(lab, name, folder, peers, settings, budget_s, target)
    target = curves[names[0]].best
    for name, curve in curves.items():
        if not curve.points:
            report.skip({"what": name}, f"no evaluation within {budget_s} s")
            continue
        took_s = curve.time_to(target)
        report.add(
            {"profile": profile, "peers": peers, "what": name, "view": "summary"},
            time_to_target_s=took_s,
            times_faster=curves[names[0]].time_to(target) / took_s,
            best_nats=curve.best,
            steps=curve.steps,
            steps_per_s=curve.steps / curve.points[-1][0],
            sent_mb=curve.sent_bytes / 1e6,
        )
        for at_s, loss in curve.points:
            report.add({"what": name, "seconds": at_s, "view": "curve"}, held_out=loss)
    report.table(
        "summary", ["time_to_target_s", "times_faster", "best_nats", "steps", "steps_per_s",
                    "sent_mb"],
        where={"view": "summary"}, title=f"Time to the loss that {names[0]} reached",
    )  # fmt: skip
    report.plot("curve", "seconds", "held_out", lines="what", where={"view": "curve"},
                title=f"Held-out loss, {peers} peers on {profile} links")  # fmt: skip
    report.note(f"Target: {target:.3f} nats, the best of {names[0]} within {budget_s:.0f} s. "
                "sent_mb: of the peer that sent most.")  # fmt: skip
    return report
