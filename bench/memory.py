"""Memory of a round: what a peer needs beside its tensors, as a multiple of the encoded size.

Each case is a group of fresh processes, so that nothing kept from rounds before hides it. Beside
the tensor, which is there before: the most that the core's buffers held at once (its own counter),
and how far the process's resident memory rose above what it was (VmHWM, reset by clear_refs).
The encoded size is the mean of a contribution's and a result's; a round is to need twice that and
what is in flight (DESIGN, R5). Gloo, in the same processes, is given the same tensor.

Variants: a borrowed f32 tensor; a snapshot of it; codecs; a peer that begins late, so that the
others' contributions wait for its own; a peer killed at half of the round; shared memory, which the
others do without, as peers on machines of their own do: what is lent to the others is beside the
core's buffers there, and its pages count in the resident memory of each peer that reads them.
Kernel buffers of sockets count for nobody.

The cases come in the order of what they tell, so that a bound on the time (`seconds`) leaves out
the least: 256 MiB at every number of peers, then all variants at 64 MiB, Gloo, and small sizes.
What it leaves out is named in the report.

Options (`--set`): peers=8,4,2, mib=256,64,16,1, rounds=3 (from 256 MiB up one), gloo=0 (without
torch), seconds=330.
"""

from __future__ import annotations

import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.common import Report, Settings, log
from bench.fleet import HANG_S, Fleet, Peer, ask_all, sleep_until

MIB = 1 << 20
LEAD_S = 0.02
LATE = 2.0  # median rounds after which the late peer begins
LET_GO_S = 1.0  # what is in use this long after a round stays
TINY = 16
TINY_TAG = 1  # of the round that makes links and loads what is loaded at the first one
VARIANTS_MIB = 64  # all variants are measured from here to below LARGE_MIB
LARGE_MIB = 256
SECONDS = 330.0
SHARED = "DECOTRAIN_SHARED_MEMORY"


@dataclass(frozen=True)
class Variant:
    name: str
    codec: str = "f32"
    result_codec: str = "f32"
    borrow: bool = False
    fault: str = ""  # "late" or "killed"
    shared: bool = False  # payloads pass through memory that peers of one host share


VARIANTS = (
    Variant("f32 borrowed", borrow=True),
    Variant("f32"),
    Variant("int8", "int8", "int8"),
    Variant("e2m1+int8", "e2m1", "int8"),
    Variant("f32, one late", fault="late"),
    Variant("f32, one killed", fault="killed"),
    Variant("f32 borrowed, shared", borrow=True, shared=True),
)


# --- in a peer's process


def resident_kib(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"no {name} in /proc/self/status")


def prepare(state: SimpleNamespace, elements: int) -> bool:
    """The tensor, and everything that only the first round of a process needs.

    Returns whether our links pass payloads through shared memory.
    """
    import numpy as np

    state.buffer = np.full(elements, 1.0, np.float32)
    state.comm.all_reduce(np.ones(TINY, np.float32), tag=TINY_TAG).wait(HANG_S)
    return any(link["shared"] for link in state.comm._agent.shared.node.links())


def prepare_gloo(state: SimpleNamespace, elements: int, store: str, rank: int, peers: int) -> None:
    import numpy as np
    import torch
    import torch.distributed as gloo

    torch.set_num_threads(1)
    gloo.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=peers)
    gloo.all_reduce(torch.ones(TINY))
    state.buffer = np.full(elements, 1.0, np.float32)


def mark(state: SimpleNamespace) -> None:
    from decotrain import _core

    Path("/proc/self/clear_refs").write_text("5")
    state.before_kib = resident_kib("VmRSS")
    state.held_bytes = _core.pool_figures(reset_peak=True)["in_use_bytes"]


def reduce(state: SimpleNamespace, start_s: float, variant: Variant) -> dict[str, Any]:
    buffer = state.buffer
    buffer.fill(1.0)
    sleep_until(start_s)
    result = state.comm.all_reduce(
        buffer, op="sum", codec=variant.codec, result_codec=variant.result_codec,
        borrow=variant.borrow,
    ).wait(HANG_S * 0.9)  # fmt: skip
    taken_s = time.monotonic() - start_s
    wanted = len(result.contributors)
    # Who died inside the round is in some chunks, and perhaps not in the last one.
    counts = [wanted, wanted - 1] if result.partial else [wanted]
    good = any(abs(float(buffer[-1]) / n - 1) < 0.2 for n in counts if n)
    return {"s": taken_s, "good": good, "peers": wanted}


def reduce_gloo(state: SimpleNamespace, start_s: float) -> dict[str, Any]:
    import torch
    import torch.distributed as gloo

    sleep_until(start_s)
    gloo.all_reduce(torch.from_numpy(state.buffer))
    return {"s": time.monotonic() - start_s, "good": True, "peers": 0}


def most(state: SimpleNamespace) -> dict[str, int]:
    """The most there was above the mark, what stays in use, and what is held for the next round.

    After `wait()` results may be in use while others are still sent theirs, or until the links of
    a peer that died are closed.
    """
    from decotrain import _core

    pool = _core.pool_figures()
    end_s = time.monotonic() + LET_GO_S
    while _core.pool_figures()["in_use_bytes"] > state.held_bytes and time.monotonic() < end_s:
        time.sleep(0.01)  # a look, not a wait: the core tells nobody when it lets memory go
    left_bytes = _core.pool_figures()["in_use_bytes"] - state.held_bytes
    return {
        "resident": 1024 * (resident_kib("VmHWM") - state.before_kib),
        "buffers": pool["peak_bytes"] - state.held_bytes,
        "left": left_bytes,
        "kept": pool["free_bytes"],
    }


# --- in the parent


def encoded_bytes(elements: int, codec: str) -> int:
    from decotrain import _core

    return _core.codec_bytes(codec, elements)


def whole(team: list[Peer], variant: Variant | None, late_s: float = 0.0) -> float:
    """One round; the last peer begins `late_s` after the others. Seconds it took."""
    start_s = time.monotonic() + LEAD_S
    for number, peer in enumerate(team):
        at_s = start_s + (late_s if number + 1 == len(team) else 0.0)
        if variant is None:
            peer.ask(reduce_gloo, at_s)
        else:
            peer.ask(reduce, at_s, variant)
    answers = [peer.answer() for peer in team]
    if not all(one["good"] for one in answers):
        raise RuntimeError(f"wrong values: {answers}")
    return max(float(one["s"]) for one in answers)


def killed(team: list[Peer], variant: Variant, median_s: float) -> list[Peer]:
    """One peer is killed at half of the round; the survivors."""
    start_s = time.monotonic() + LEAD_S
    for peer in team:
        peer.ask(reduce, start_s, variant)
    sleep_until(start_s + median_s / 2)
    team[-1].signal(signal.SIGKILL)
    for peer in team[:-1]:
        if not peer.answer()["good"]:
            raise RuntimeError("wrong values after the kill")
    return team[:-1]


def case(peers: int, elements: int, variant: Variant | None, rounds: int) -> list[dict[str, int]]:
    """What each peer needed at most."""
    shared = variant is not None and variant.shared
    fleet = Fleet(peers, environment={SHARED: str(int(shared))})
    with fleet, tempfile.TemporaryDirectory() as folder:
        fleet.fill()
        team = fleet.team
        if variant is None:
            for rank, peer in enumerate(team):
                peer.ask(prepare_gloo, elements, f"{folder}/store", rank, peers)
            for peer in team:
                peer.answer()
        elif any(one != shared for one in fleet.all(prepare, elements)):
            raise RuntimeError(f"peers that share memory: {not shared}, asked for {shared}")
        if variant is not None and variant.fault:
            taken_s = whole(team, variant)
            fleet.all(mark)
            if variant.fault == "late":
                for _ in range(rounds):
                    whole(team, variant, LATE * taken_s)
            else:
                team = killed(team, variant, taken_s)
            return ask_all(team, most)
        fleet.all(mark)
        for _ in range(rounds):
            whole(team, variant)
        return ask_all(team, most)


def measure(report: Report, peers: int, mib: int, variant: Variant | None, rounds: int) -> None:
    elements = mib * MIB // 4
    name = "gloo" if variant is None else variant.name
    said = case(peers, elements, variant, rounds)
    encoded = 4.0 * elements
    if variant is not None:
        both = encoded_bytes(elements, variant.codec), encoded_bytes(elements, variant.result_codec)
        encoded = sum(both) / 2
    resident = max(one["resident"] for one in said)
    metrics = {"resident_mib": resident / MIB, "resident_times_encoded": resident / encoded}
    if variant is not None:
        buffers = max(one["buffers"] for one in said)
        metrics |= {"buffers_mib": buffers / MIB, "buffers_times_encoded": buffers / encoded}
        metrics |= {"left_mib": max(one["left"] for one in said) / MIB}
    if variant is not None and variant.fault:  # a round came before the mark: its memory is reused
        del metrics["resident_mib"], metrics["resident_times_encoded"]
    report.add({"peers": peers, "MiB": mib, "variant": name}, **metrics)
    log(f"  n={peers} {mib} MiB {name}: { ({k: round(v, 2) for k, v in metrics.items()}) }")


def cases(peers: list[int], sizes: list[int], gloo: bool) -> list[tuple[int, int, Variant | None]]:
    """(peers, MiB, what; None: Gloo), the most telling first."""
    plain = [one for one in VARIANTS if one.codec == "f32" and not (one.fault or one.shared)]
    large = [mib for mib in sizes if mib >= LARGE_MIB]
    middle = [mib for mib in sizes if VARIANTS_MIB <= mib < LARGE_MIB]
    small = [mib for mib in sizes if mib < VARIANTS_MIB]
    found: list[tuple[int, int, Variant | None]] = []
    found += [(n, mib, one) for mib in large for n in peers for one in plain]
    found += [(n, mib, one) for mib in middle for one in VARIANTS for n in peers]
    if gloo:
        found += [(n, mib, None) for mib in middle for n in peers]
    found += [(n, mib, one) for mib in small for one in plain for n in peers]
    return found


def run(settings: Settings) -> Report:
    """The suite."""
    report = Report("memory", "Memory of a round beside its tensor", settings)
    quick, began_s = settings.quick, time.monotonic()
    peers = [int(n) for n in settings.option("peers", "3" if quick else "8,4,2").split(",")]
    sizes = [int(n) for n in settings.option("mib", "4" if quick else "256,64,16,1").split(",")]
    rounds = int(settings.option("rounds", "3"))
    bound_s = float(settings.option("seconds", str(SECONDS)))
    wanted = cases(peers, sizes, settings.option("gloo", "0" if quick else "1") == "1")
    if quick:  # every variant, at whatever size
        wanted = [(n, mib, one) for n in peers for mib in sizes for one in VARIANTS]
    for n, mib, variant in wanted:
        if time.monotonic() - began_s > bound_s:
            name = "gloo" if variant is None else variant.name
            report.skip({"peers": n, "MiB": mib, "variant": name}, f"no time left of {bound_s:g} s")
        else:
            measure(report, n, mib, variant, 1 if mib >= LARGE_MIB else rounds)
    report.table(
        "buffers", "buffers_times_encoded", columns="variant",
        title="Most bytes in the core's buffers at once, times the encoded size",
    )  # fmt: skip
    report.table(
        "resident", "resident_times_encoded", columns="variant",
        title="Rise of resident memory, times the encoded size",
    )  # fmt: skip
    report.note("Each figure is of the peer that needed most. Borrowed: results only, no snapshot.")
    return report
