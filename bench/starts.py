"""Many peers started at once, again and again: does every start end in a round of all of them?

A start is a fresh coordinator and its peers, all launched together; it is complete when every peer
has the right sum of one round that names them all. It measures how long that takes as well.

Options (`--set`): starts=100, peers=8.
"""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

from bench.common import Report, Settings, log
from bench.fleet import HANG_S, Fleet


def first_round(state: SimpleNamespace, value: int) -> dict[str, Any]:
    import numpy as np

    buffer = np.full(1000, float(value), np.float32)
    result = state.comm.all_reduce(buffer, op="sum").wait(HANG_S)
    return {"sum": buffer.tolist()[0], "even": bool((buffer == buffer[0]).all()),
            "contributors": len(result.contributors), "done_s": time.monotonic()}  # fmt: skip


def start(peers: int) -> tuple[bool, float]:
    """Is it complete, and after how many seconds?"""
    with Fleet(peers) as fleet:
        start_s = time.monotonic()
        team = [fleet.launch() for _ in range(peers)]
        for number, peer in enumerate(team):
            peer.ask(first_round, 1 << number)
        said = []
        for peer in team:
            peer.answer()  # that it has joined
            said.append(peer.answer())
    good = all(
        one["sum"] == (1 << peers) - 1 and one["even"] and one["contributors"] == peers
        for one in said
    )
    return good, max(one["done_s"] for one in said) - start_s


def run(settings: Settings) -> Report:
    """The suite."""
    report = Report("starts", "Peers started at once", settings)
    peers = int(settings.option("peers", "8"))
    starts = int(settings.option("starts", "3" if settings.quick else "100"))
    taken_s, complete, failed = [], 0, 0
    for number in range(starts):
        try:
            good, seconds = start(peers)
        except RuntimeError as error:
            log(f"  start {number}: {error}")
            failed += 1
            continue
        complete += good
        taken_s.append(seconds)
    log(f"  {complete} of {starts} complete, {failed} failed")
    report.add({"peers": peers}, starts=starts, complete=complete, hangs_or_errors=failed,
               first_round_s=taken_s or [0.0])  # fmt: skip
    return report
