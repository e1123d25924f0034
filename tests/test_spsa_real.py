"""SPSA over the real core: processes on different SIMD levels that join, leave and are killed.

At every version all peers hold the same parameters, and a replay of the log in one process holds
them too.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from decotrain.control.coordinator import Options
from decotrain.control.server import ServerThread
from decotrain.spsa import SPSA, seedlog
from tests.spsa_peer import make_model

ROOT = Path(__file__).resolve().parent.parent
WAIT_S = 100.0
LEVELS = ["avx512", "scalar", "avx2"]
OPTIONS = {"lr": 1e-2, "samples": 4, "weight_decay": 0.01}


class Fleet:
    def __init__(self, address: str, folder: Path, staleness: int = 2) -> None:
        self.address, self.folder, self.staleness = address, folder, staleness
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, steps: int = 1 << 30) -> None:
        level = LEVELS[len(self.processes) % len(LEVELS)]
        command = [sys.executable, "-m", "tests.spsa_peer", self.address, name, str(steps)]
        options = {**OPTIONS, "staleness": self.staleness}
        command += [str(self.folder), json.dumps(options)]
        environment = {**os.environ, "DECOTRAIN_SIMD": level, "OMP_NUM_THREADS": "1"}
        errors = (self.folder / f"{name}.err").open("wb")
        self.processes[name] = subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=errors, stdout=errors
        )
        errors.close()

    def held(self, name: str) -> dict[int, str]:
        """Version -> digest, as the peer wrote them; whole lines only."""
        path = self.folder / f"{name}.txt"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        pairs = (line.split() for line in lines)
        return {int(first): second for first, second in pairs if first.isdigit()}

    def wait_for(self, true: Callable[[], bool], limit_s: float = WAIT_S) -> None:
        deadline = time.monotonic() + limit_s
        while not true():
            assert time.monotonic() < deadline, self.errors()
            time.sleep(0.02)

    def stop_at(self, version: int) -> None:
        draft = self.folder / "until.tmp"
        draft.write_text(str(version))
        draft.rename(self.folder / "until")

    def errors(self) -> str:
        return "\n".join(p.read_text()[-2000:] for p in sorted(self.folder.glob("*.err")))

    def finish(self, name: str) -> None:
        assert self.processes[name].wait(WAIT_S) == 0, self.errors()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    server = ServerThread(Options(run="test", min_peers=3))
    made = Fleet(server.address, tmp_path)
    yield made
    for process in made.processes.values():
        process.kill()
        process.wait()
    server.stop()


def check(fleet: Fleet, logged: str, until: int) -> None:
    """All versions of all peers agree, and with a replay of one peer's log."""
    log = seedlog.read(fleet.folder / f"{logged}.seedlog")
    assert log.next_step >= until
    replayed = SPSA(make_model(), recipe=log.header.recipe)
    assert replayed.digest() == log.header.base_digest
    expected = {}
    for record in log:
        replayed.apply([replayed.recipe.update(record.step, record.entries)], record.step)
        expected[record.step + 1] = replayed.digest()
    for name in fleet.processes:
        held = fleet.held(name)
        held.pop(0, None)
        assert held, f"{name} never held anything: {fleet.errors()}"
        assert held.items() <= expected.items(), f"{name} differs"
    assert any(len(record.entries) >= 3 for record in log)


def test_peers_on_three_levels_with_a_kill_and_a_newcomer(fleet: Fleet) -> None:
    for number in range(3):
        fleet.start(f"p{number}")
    fleet.wait_for(lambda: len(fleet.held("p0")) >= 8)
    fleet.processes["p2"].kill()
    fleet.start("late")
    fleet.wait_for(lambda: len(fleet.held("late")) >= 5)
    until = max(fleet.held("p0")) + 50
    fleet.stop_at(until)
    for name in ("p0", "p1", "late"):
        fleet.finish(name)
    check(fleet, "p0", until)


@pytest.mark.chaos
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("staleness", [0, 2])
def test_a_thousand_steps_of_joins_leaves_and_kills(fleet: Fleet, staleness: int) -> None:
    """At every step the SHA-256 of all peers' parameters is that of a replay in one process."""
    fleet.staleness = staleness
    dice = random.Random(5)
    for number in range(3):
        fleet.start(f"p{number}")
    fleet.wait_for(lambda: len(fleet.held("p0")) >= 8)
    for turn in range(8):
        name = f"q{turn}"
        fleet.start(name, dice.randrange(50, 2000))
        fleet.wait_for(lambda name=name: len(fleet.held(name)) >= 5)
        alive = [n for n, p in fleet.processes.items() if p.poll() is None and n != "p0"]
        if len(alive) > 2:
            fleet.processes[dice.choice(alive)].kill()
    until = max(1000, max(fleet.held("p0")) + 100)
    fleet.stop_at(until)
    fleet.wait_for(lambda: max(fleet.held("p0"), default=0) >= until, 600)
    fleet.finish("p0")
    check(fleet, "p0", until)
