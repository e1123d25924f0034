"""P8: a slow, stopped, cut off or stuck peer is named and left out within a bound, and comes back.

Four peers in namespaces of their own run rounds back to back on a shared state; then something
happens to the last one. The others' rounds go on without it, nobody else is named, and when it is
over it fetches what it missed and is active again, in the same process and with equal state.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.fleet import Fleet, sleep_until
from bench.wan.lab import Lab
from tests import steady_peer as sp

pytestmark = [pytest.mark.net, pytest.mark.timeout(240)]

PEERS = 4
ELEMENTS = 1 << 18  # 1 MiB
BEFORE_S, DURING_S, AFTER_S = 3.0, 9.0, 12.0
LINK_DEADLINE_S, SUSPECT_S = 5.0, 3.0  # MeshOptions::link_timeout_s, the coordinator's bound
SPARE_S = 3.0  # for a busy machine
GRACE = {"grace_s": 0.3, "quorum": 0.75, "late_s": 1.5}
QUEUE_BYTES = 25_000  # of the straggler's router: 0.2 s, so that heartbeats pass
PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_DETACH = 0x4206, 0x4207, 17


def run(tmp_path: Path, during: Any, **options: Any) -> tuple[list[dict[str, Any]], str, float]:
    """What the peers saw, what the coordinator said, and when it happened."""
    log = tmp_path / "log"
    with (
        Lab("lan", sites=PEERS + 1) as lab,
        Fleet(PEERS, reports=False, lab=lab, log=log, **options) as fleet,
    ):
        fleet.start(PEERS)
        for peer in fleet.team:
            peer.ask(sp.live, ELEMENTS)
        start_s = time.monotonic() + BEFORE_S
        sleep_until(start_s)
        with during(lab, fleet.team[-1]):
            at_s = time.monotonic()
            sleep_until(at_s + DURING_S)
        sleep_until(time.monotonic() + AFTER_S)
        for peer in fleet.team:
            peer.ask(sp.nothing)
        said = [peer.answer() for peer in fleet.team]
        text = log.read_text()  # before the end of one peer is seen by the others
    return said, text, at_s


@contextmanager
def stopped(lab: Lab, peer: Any) -> Iterator[None]:
    peer.signal(signal.SIGSTOP)
    yield
    peer.signal(signal.SIGCONT)


@contextmanager
def blackholed(lab: Lab, peer: Any) -> Iterator[None]:
    lab.cut(PEERS)  # from everybody, the coordinator too; no connection is told
    yield
    lab.heal(PEERS)


@contextmanager
def not_reading(lab: Lab, peer: Any) -> Iterator[None]:
    """Its network thread stands still: the kernel fills its buffers and offers a window of zero."""
    tasks = Path(f"/proc/{peer.process.pid}/task")
    thread = next(
        int(task.name)
        for task in tasks.iterdir()
        if (task / "comm").read_text().strip() == "decotrain-net"
    )
    libc = ctypes.CDLL(None, use_errno=True)
    for request in (PTRACE_SEIZE, PTRACE_INTERRUPT):
        if libc.ptrace(request, thread, None, None) != 0:
            raise OSError(ctypes.get_errno(), "ptrace")
    yield
    os.waitpid(thread, 0x40000000)  # __WALL
    if libc.ptrace(PTRACE_DETACH, thread, None, None) != 0:
        raise OSError(ctypes.get_errno(), "ptrace")


def gaps(rounds: list[dict[str, Any]], since_s: float) -> list[float]:
    times = [one["at_s"] for one in rounds]
    return [b - a for a, b in itertools.pairwise(times) if b > since_s]


def check(said: list[dict[str, Any]], log: str, at_s: float, bound_s: float) -> None:
    *others, odd = said
    assert len({(one["digest"], one["version"]) for one in said}) == 1
    assert all(one["first"] == one["id"] for one in others)
    for one in others:
        assert [entry["seq"] for entry in one["rounds"]] == list(range(one["version"]))
        assert max(gaps(one["rounds"], at_s)) < bound_s, sorted(gaps(one["rounds"], at_s))[-4:]
        without = [e for e in one["rounds"] if e["at_s"] > at_s and odd["first"] not in e["peers"]]
        assert len(without) > 10
        assert odd["id"] in one["rounds"][-1]["peers"]  # active again
    named = [line for line in log.splitlines() if "suspected" in line or "demoted" in line]
    assert named
    names = {f"{one['first']:016x}" for one in others}
    assert not [line for line in named if any(name in line.split("): ")[0] for name in names)]
    longest = max(max(gaps(one["rounds"], at_s)) for one in others)
    print(f"longest round {longest:.2f} s; {named[0]}")


@pytest.mark.parametrize("fault", [stopped, blackholed, not_reading])
def test_a_silent_peer_is_left_out_and_comes_back(fault: Any, tmp_path: Path) -> None:
    said, log, at_s = run(tmp_path, fault)
    check(said, log, at_s, SUSPECT_S + SPARE_S)


def slow(lab: Lab, peer: Any) -> Any:
    return limited(lab, 1)


@contextmanager
def limited(lab: Lab, mbps: float) -> Iterator[None]:
    queue = {"up_queue_bytes": QUEUE_BYTES, "down_queue_bytes": QUEUE_BYTES}
    lab.set_access(PEERS, up_mbps=mbps, down_mbps=mbps, **queue)
    yield
    wide = {"up_queue_bytes": 10**7, "down_queue_bytes": 10**7}
    lab.set_access(PEERS, up_mbps=1000, down_mbps=1000, **wide)


def test_a_straggler_of_1_mbit_is_waived_with_grace(tmp_path: Path) -> None:
    said, log, at_s = run(tmp_path, slow, **GRACE)
    *others, odd = said
    assert len({(one["digest"], one["version"]) for one in said}) == 1
    assert all(one["first"] == one["id"] for one in said)  # nobody was left out
    demoted = [line for line in log.splitlines() if "demoted" in line]
    assert demoted
    assert all(f"{odd['first']:016x}" in line.split("): ")[0] + ")" for line in demoted), demoted
    longest_s = max(max(gaps(one["rounds"], at_s)) for one in others)
    print(f"longest round {longest_s:.2f} s; {demoted}")
    for one in others:  # none was lost to it, or fetched
        assert [entry["seq"] for entry in one["rounds"]] == list(range(one["version"]))
    assert longest_s < 2 * (GRACE["grace_s"] + GRACE["late_s"]) + SPARE_S


def test_without_grace_a_straggler_is_waited_for_and_nobody_is_lost(tmp_path: Path) -> None:
    said, log, at_s = run(tmp_path, slow)
    assert len({(one["digest"], one["version"]) for one in said}) == 1
    assert all(one["first"] == one["id"] for one in said)
    everybody = {one["id"] for one in said}
    for one in said:
        assert all(set(entry["peers"]) == everybody for entry in one["rounds"])
    assert "suspected" not in log
    print(f"longest round {max(gaps(said[0]['rounds'], at_s)):.2f} s")
