"""Three sites, rate-limited links, one site behind a NAT router: a run joined by address.

Each peer is a `decotrain run` in a network namespace of its own. What must hold: everybody who has
a version of the state has the same bits, through joins, a leave and a kill, also at the site that
nobody can dial.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.wan.lab import Lab
from bench.wan.profiles import Access, Profile
from decotrain.control.token import Token, write

ROOT = Path(__file__).parent.parent
WAIT_S = 100.0
# 20 ms between sites, 40 Mbit/s up and 100 down at each: a home line.
HOMES = Profile("homes", "three home lines", 20, Access(40, 100))
NAT_SITE = 2
PORT = 29400
SCRIPT = """
import sys, time, zlib, numpy
import decotrain as dt

comm = dt.join()
state = numpy.zeros(1 << 16, numpy.float32)
comm.register_state(0, {"w": state})

def take(result):
    if result.contributors:
        with comm.updating(0):
            numpy.multiply(state, numpy.float32(0.5), out=state)
            numpy.add(state, result.tensor, out=state)
    print("has", comm.version(0), f"{zlib.crc32(state):08x}", len(result.contributors), flush=True)

while True:
    comm.catch_up(0, take, wait=True)
    noise = numpy.random.default_rng([comm.peer, comm.version(0)])
    result = comm.all_reduce(noise.standard_normal(1 << 16).astype(numpy.float32)).wait()
    if result.outcome == "stable":
        take(result)
    time.sleep(0.3)
"""

pytestmark = [pytest.mark.net, pytest.mark.timeout(400)]


class Site:
    """A `decotrain run` at a site; what it says goes to a file."""

    def __init__(self, lab: Lab, number: int, folder: Path, name: str) -> None:
        self.said = folder / f"{name}.log"
        command = [
            sys.executable, "-m", "decotrain.cli", "run", "--join", f"{lab.address(0)}:{PORT}",
            "--run", "homes", "--name", name, "--token-file", str(folder / "token"),
            str(folder / "script.py"),
        ]  # fmt: skip
        with self.said.open("w") as log:
            self.process = lab.popen(
                number, command, cwd=folder, stdout=log, stderr=log, env={"PYTHONPATH": str(ROOT)}
            )

    def has(self) -> dict[int, tuple[str, int]]:
        """version -> digest of the state, contributors of the round before."""
        rows = [line.split() for line in self.said.read_text().splitlines() if line[:4] == "has "]
        return {int(row[1]): (row[2], int(row[3])) for row in rows if len(row) == 4}

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code: int = self.process.wait(WAIT_S)
        return code


def until(what: Callable[[], Any], *sites: Site) -> None:
    """Waits for the outside world; the bound is only there to end a broken test."""
    end_s = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < end_s, [site.said.read_text()[-2000:] for site in sites]
        time.sleep(0.1)


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(HOMES, sites=3, nat=[NAT_SITE]) as made:
        yield made


def moved(*sites: Site, contributors: int) -> Callable[[], bool]:
    """True once all of them have a newer state, of a round of so many."""
    before = [max(site.has(), default=0) for site in sites]

    def look() -> bool:
        return all(
            any(v > old + 2 and count == contributors for v, (_, count) in site.has().items())
            for site, old in zip(sites, before, strict=True)
        )

    return look


def test_joins_leaves_and_a_kill_by_address_are_bit_identical(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    write(Token.new(), tmp_path / "token")
    coordinator = lab.popen(
        0, [sys.executable, "-m", "decotrain.cli", "coordinator", "--listen",
            f"{lab.address(0)}:{PORT}", "--run", "homes", "--token-file", str(tmp_path / "token")],
        env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert coordinator.stdout is not None
    assert "listens on" in coordinator.stdout.readline()
    first = [Site(lab, 0, tmp_path, "first"), Site(lab, NAT_SITE, tmp_path, "behind-nat")]
    until(moved(*first, contributors=2), *first)
    second = Site(lab, 1, tmp_path, "second")  # joins a run that goes on
    until(moved(*first, second, contributors=3), *first, second)
    assert second.end() == 128 + signal.SIGTERM  # leaves in order
    until(moved(*first, contributors=2), *first)
    again = Site(lab, 1, tmp_path, "again")
    until(moved(*first, again, contributors=3), *first, again)
    first[0].process.kill()  # the launcher: its script leaves with it
    until(moved(first[1], again, contributors=2), first[1], again)
    status = lab.run(
        1, [sys.executable, "-m", "decotrain.cli", "status", f"{lab.address(0)}:{PORT}",
            "--token-file", str(tmp_path / "token")], env={"PYTHONPATH": str(ROOT)},
    ).stdout  # fmt: skip
    assert "behind-nat" in status
    assert first[1].end() == again.end() == 128 + signal.SIGTERM
    held = [site.has() for site in (*first, second, again)]
    versions = set().union(*held)
    for version in versions:
        assert len({has[version][0] for has in held if version in has}) == 1, version
    shared = [v for v in versions if sum(v in has for has in held) > 1]
    assert len(shared) > 12
