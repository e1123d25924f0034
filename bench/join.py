"""A newcomer fetches the state of a live run: how fast, and what the others notice of it.

3 peers hold a state; a fourth joins and fetches it from all of them, once while they do nothing
and once while they run rounds of another tag back to back; in the end once more while tiny rounds
move the state itself, back to back, so that it is never the same for as long as a fetch takes. A
sample is one newcomer, checked byte by byte against a peer's state. It measures no real network.

Options (`--set`): mib=1024 (of state), round_mib=4, peers=3.
"""

from __future__ import annotations

import itertools
import statistics
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.common import Report, Settings, log
from bench.fleet import HANG_S, Fleet, activate, ask_all, nothing, sleep_until, spin

MIB = 1 << 20
STATE, ROUNDS = 0, 1  # tags
BEFORE_S = 2.0  # of undisturbed rounds, to compare with
SETTLE_S = 0.3


# --- in a peer's process


def hold(state: SimpleNamespace, size: int, seed: int | None) -> None:
    """Registers a state of so many bytes; a newcomer's (no seed) holds nothing of it."""
    import numpy as np

    if seed is None:
        state.array = np.full(size, 0xAA, np.uint8)
    else:
        state.array = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    state.comm.register_state(STATE, {"w": state.array}, 0, effect_on(state.array))


def effect_on(array: Any) -> Callable[[Any], None]:
    """What a round of the state's tag does: each byte moves by the round's second value."""

    def effect(result: Any) -> None:
        array.__iadd__(array.dtype.type(int(result.tensor[-1]) & 255))

    return effect


def enter(state: SimpleNamespace) -> None:
    """What we hold is what the run starts from; one round, so that a newcomer's is not."""
    import numpy as np

    state.comm.catch_up(STATE, lambda result: None, wait=True, timeout_s=HANG_S)
    activate(state)
    result = state.comm.all_reduce(np.zeros(2, np.float32), tag=STATE).wait(HANG_S)
    with state.comm.updating(STATE):
        effect_on(state.array)(result)


def checksum(state: SimpleNamespace) -> int:
    return zlib.crc32(state.array)


def memory(state: SimpleNamespace, reset: bool) -> dict[str, int]:
    """Bytes resident now, and at most since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(rows[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")}


def fetch(state: SimpleNamespace) -> dict[str, float]:
    """A newcomer's whole way until it is active."""
    start_s = time.monotonic()
    state.comm.catch_up(STATE, lambda result: None, wait=True, timeout_s=HANG_S)
    fetched_s = time.monotonic()
    activate(state)
    return {
        "start_s": start_s,
        "fetched_s": fetched_s,
        "active_s": time.monotonic(),
        "bytes": state.comm.figures()["fetched_bytes"],
    }


def move(state: SimpleNamespace) -> dict[str, Any]:
    """Rounds that move the state, back to back, until one of all has a new word."""
    import numpy as np

    comm, effect = state.comm, effect_on(state.array)
    told = {"start_s": time.monotonic(), "began": comm.version(STATE), "fetched_s": 0.0,
            "active_s": 0.0, "fetches": 0}  # fmt: skip

    def apply(result: Any) -> None:
        with comm.updating(STATE):
            effect(result)

    done = []
    while True:
        comm.catch_up(STATE, apply, wait=True, timeout_s=HANG_S)
        if not told["fetched_s"]:
            told |= {"fetched_s": time.monotonic(), "fetches": comm._shared.fetches,
                     "version": comm.version(STATE)}  # fmt: skip
        if not told["active_s"] and comm.active:
            told["active_s"] = time.monotonic()
        mine = np.array([state.pipe.poll(0), 1.0], np.float32)
        result = comm.all_reduce(mine, tag=STATE, op="sum").wait(HANG_S)
        if result.outcome != "stable":
            continue
        apply(result)
        done.append(time.monotonic())
        if mine[0] > 0:
            return {**told, "done": done, "crc": zlib.crc32(state.array),
                    "bytes": comm.figures()["fetched_bytes"]}  # fmt: skip


def depart(state: SimpleNamespace) -> None:
    state.comm.leave()


# --- in the parent


def intervals(times: list[float], start_s: float, end_s: float) -> list[float]:
    inside = [t for t in times if start_s <= t <= end_s]
    return [after - before for before, after in itertools.pairwise(inside)]


def sample(fleet: Fleet, size: int, elements: int, crc: int) -> dict[str, float]:
    """One newcomer comes and goes. elements: of the rounds meanwhile, 0 for none."""
    servers = list(fleet.team)
    (newcomer,) = fleet.start()
    newcomer.ask(hold, size, None)
    newcomer.answer()
    base = ask_all(servers, memory, True)
    began_s = time.monotonic()
    if elements:
        for peer in servers:
            peer.ask(spin, elements, ROUNDS)
        sleep_until(began_s + BEFORE_S)
    newcomer.ask(fetch)
    way = newcomer.answer()
    times: list[float] = []
    if elements:
        newcomer.ask(spin, elements, ROUNDS)
        servers[0].ask(nothing)
        times = [peer.answer()["done"] for peer in servers].pop()
        newcomer.answer()
        servers[0].answer()
    peaks = ask_all(servers, memory, False)
    newcomer.ask(checksum)
    if newcomer.answer() != crc:
        raise RuntimeError("the newcomer's state is not the run's")
    newcomer.ask(depart)
    newcomer.answer()
    newcomer.end()
    fleet.team.remove(newcomer)
    taken_s = way["fetched_s"] - way["start_s"]
    figures = {
        "fetch_s": taken_s,
        "gib_per_s": size / taken_s / (1 << 30),
        "active_after_fetch_ms": (way["active_s"] - way["fetched_s"]) * 1e3,
        "servers_growth_mib": max(
            now["VmHWM"] - then["VmRSS"] for now, then in zip(peaks, base, strict=True)
        ) / MIB,
    }  # fmt: skip
    before = intervals(times, began_s + SETTLE_S, way["start_s"])
    during = intervals(times, way["start_s"], way["fetched_s"])
    if before and during:
        figures["round_before_ms"] = statistics.median(before) * 1e3
        figures["round_during_ms"] = statistics.median(during) * 1e3
        figures["longest_before_ms"] = max(before) * 1e3
        figures["longest_during_ms"] = max(during) * 1e3
        rates = len(before) / sum(before), len(during) / sum(during)
        figures["rounds_during_over_before"] = rates[1] / rates[0]
    return figures


def moving(fleet: Fleet, size: int) -> dict[str, float]:
    """One newcomer while the state moves."""
    servers = list(fleet.team)
    base = ask_all(servers, memory, True)
    began_s = time.monotonic()
    for peer in servers:
        peer.ask(move)
    sleep_until(began_s + BEFORE_S)
    (newcomer,) = fleet.start()
    newcomer.ask(hold, size, None)
    newcomer.answer()
    newcomer.ask(move)
    newcomer.ask(activate)  # a word: it and the others end when it takes part itself
    way = newcomer.answer(3 * HANG_S)
    newcomer.answer()
    others = [peer.answer() for peer in servers]
    peaks = ask_all(servers, memory, False)
    if {one["crc"] for one in others} != {way["crc"]}:
        raise RuntimeError("the newcomer's state is not the run's")
    newcomer.ask(depart)
    newcomer.answer()
    newcomer.end()
    fleet.team.remove(newcomer)
    before = intervals(others[0]["done"], began_s + SETTLE_S, way["start_s"])
    during = intervals(others[0]["done"], way["start_s"], way["fetched_s"])
    return {
        "fetch_s": way["fetched_s"] - way["start_s"],
        "versions_meanwhile": len(during),
        "fetches": way["fetches"],
        "round_before_ms": statistics.median(before) * 1e3,
        "round_during_ms": statistics.median(during) * 1e3,
        "longest_before_ms": max(before) * 1e3,
        "longest_during_ms": max(during) * 1e3,
        "servers_growth_mib": max(
            now["VmHWM"] - then["VmRSS"] for now, then in zip(peaks, base, strict=True)
        ) / MIB,
    }  # fmt: skip


def run(settings: Settings) -> Report:
    """The suite."""
    report = Report("join", "A newcomer fetches the state of a live run", settings)
    mib = float(settings.option("mib", "256" if settings.quick else "1024"))
    round_mib = float(settings.option("round_mib", "4"))
    peers = int(settings.option("peers", "3"))
    size = int(mib * MIB)
    with Fleet(peers) as fleet:
        fleet.start(peers)
        fleet.all(hold, size, settings.seed)
        fleet.all(enter)
        crc = fleet.all(checksum)[0]
        for others, elements in (("idle", 0), ("in rounds", int(round_mib * MIB / 4))):
            rows: dict[str, list[float]] = {}
            for _ in range(settings.repeats):
                figures = sample(fleet, size, elements, crc)
                log(f"  {others}: { ({k: round(v, 3) for k, v in figures.items()}) }")
                for name, value in figures.items():
                    rows.setdefault(name, []).append(value)
            report.add({"MiB": mib, "servers": peers, "others": others}, **rows)
        rows = {}
        for _ in range(settings.repeats):
            figures = moving(fleet, size)
            log(f"  moving: { ({k: round(v, 3) for k, v in figures.items()}) }")
            for name, value in figures.items():
                rows.setdefault(name, []).append(value)
        report.add({"MiB": mib, "servers": peers, "others": "moving the state"}, **rows)
    report.table(
        "fetch",
        ["fetch_s", "gib_per_s", "active_after_fetch_ms", "servers_growth_mib"],
        title="The newcomer",
    )
    report.table(
        "others",
        ["round_before_ms", "round_during_ms", "longest_before_ms", "longest_during_ms",
         "rounds_during_over_before"],
        title="The others' rounds, before and while it fetches", where={"others": "in rounds"},
    )  # fmt: skip
    return report
