"""4 peers sum 32 MiB in place, one is killed at a random instant of the round: are the sums right?

Each contribution is one power of two, another one in the next trials, so that a sum names who is in
it. Every survivor's buffer is read whole: each element must be the sum of a set of this round's
contributors, with all survivors in it; the sets make `result.contributors`; all survivors hold the
same bits. A replacement joins the running group after each trial.

Options (`--set`): trials=1000, mib=32, peers=4. Speed after a kill is bench.recovery's subject.
"""

from __future__ import annotations

import random
import signal
import statistics
import time
import zlib
from collections import Counter
from types import SimpleNamespace
from typing import Any

from bench.common import Report, Settings, log
from bench.fleet import HANG_S, DeadError, Fleet, HangError, sleep_until

MIB = 1 << 20
LEAD_S = 0.01  # from the word to the start of the round
PAST = 1.1  # kills fall in 0 .. so many median rounds
LATE = 0.5  # in every second pair of trials peers begin up to so many median rounds late
BITS = 20  # powers of two in use; sums of them are exact in f32
CALIBRATE_EVERY = 50
TRIALS, TRIALS_QUICK = 1000, 10


# --- in a peer's process


def prepare(state: SimpleNamespace, elements: int, value: float) -> None:
    import numpy as np

    if getattr(state, "buffer", None) is None or state.buffer.size != elements:
        state.buffer = np.empty(elements, np.float32)
    state.buffer.fill(value)


def reduce(state: SimpleNamespace, start_s: float, borrow: bool) -> dict[str, Any]:
    """One round, and what is in the buffer then."""
    import numpy as np

    buffer = state.buffer
    sleep_until(start_s)
    result = state.comm.all_reduce(buffer, op="sum", borrow=borrow).wait(HANG_S * 0.9)
    done_s = time.monotonic()
    cuts = np.flatnonzero(buffer[1:] != buffer[:-1])
    return {
        "done_s": done_s,
        "outcome": result.outcome,
        "begun": result.begun,
        "seq": result.seq,
        "contributors": list(result.contributors),
        "partial": result.partial,
        "digest": result.digest,
        "values": sorted({float(buffer[0]), *map(float, buffer[cuts + 1])}),
        "crc": zlib.crc32(buffer),
    }


# --- in the parent


def judge(answers: list[dict[str, Any]], given: dict[int, int], survivors: list[int]) -> list[str]:
    """What is wrong with what the survivors hold. given: peer id -> its power of two."""
    wrong = []
    for key in ("outcome", "begun", "seq", "contributors", "partial", "digest", "crc"):
        if len({str(one[key]) for one in answers}) > 1:
            wrong.append(f"{key} differs: {[one[key] for one in answers]}")
    for one in answers:
        if one["outcome"] != "stable" or not one["begun"]:
            wrong.append(f"outcome {one['outcome']}, begun {one['begun']}")
        masks = [int(value) for value in one["values"]]
        union = 0
        for mask, value in zip(masks, one["values"], strict=True):
            union |= mask
            named = {peer for peer, bit in given.items() if mask & bit}
            if float(mask) != value or sum(given[peer] for peer in named) != mask:
                wrong.append(f"{value} is no sum of {sorted(given.values())}")
            elif not named.issuperset(survivors):
                wrong.append(f"{value} lacks a survivor, of {sorted(given.values())}")
        if union != sum(given.get(peer, 1 << 40) for peer in one["contributors"]):
            wrong.append(f"values {one['values']} are not those of result.contributors")
        if one["partial"] != (len(masks) > 1):
            wrong.append(f"partial is {one['partial']} with values {one['values']}")
    return sorted(set(wrong))


class Trials:
    def __init__(self, settings: Settings, fleet: Fleet, elements: int) -> None:
        self.fleet, self.elements = fleet, elements
        self.dice = random.Random(settings.seed)
        self.turn = 0
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.rounds_s: list[float] = []
        self.kills_s: list[float] = []

    def begin(self, late_s: float = 0.0) -> tuple[dict[int, int], float]:
        """Everybody starts the same round: (peer id -> power of two, when)."""
        team = self.fleet.team
        first = self.turn * len(team)
        self.turn += 1
        given = {peer.id: 1 << (first + rank) % BITS for rank, peer in enumerate(team)}
        for peer in team:
            peer.ask(prepare, self.elements, float(given[peer.id]))
        for peer in team:
            peer.answer()
        start_s, borrow = time.monotonic() + LEAD_S, bool(self.turn % 2)
        for peer in team:
            peer.ask(reduce, start_s + late_s * self.dice.random(), borrow)
        return given, start_s

    def calibrate(self, rounds: int) -> None:
        for _ in range(rounds):
            given, start_s = self.begin()
            answers = [peer.answer() for peer in self.fleet.team]
            self._note("undisturbed", judge(answers, given, list(given)))
            self.rounds_s.append(max(one["done_s"] for one in answers) - start_s)

    def trial(self) -> None:
        median_s = statistics.median(self.rounds_s[-15:])
        victim = self.dice.choice(self.fleet.team)
        survivors = [peer for peer in self.fleet.team if peer is not victim]
        delay_s = self.dice.random() * PAST * median_s
        given, start_s = self.begin(median_s * LATE * (self.turn % 4 // 2))
        sleep_until(start_s + delay_s)
        killed_s = victim.signal(signal.SIGKILL)
        self.counts["trials"] += 1
        try:
            answers = [peer.answer() for peer in survivors]
        except HangError as error:
            self.counts["hangs"] += 1
            self._note("hang", [str(error)])
            raise
        self._note(f"kill after {delay_s:.4f} s", judge(answers, given, [p.id for p in survivors]))
        last_s = max(one["done_s"] for one in answers)
        before = last_s <= killed_s
        self.counts["finished_before_kill" if before else "completed_by_survivors"] += 1
        mixed = "without" if victim.id not in answers[0]["contributors"] else "with"
        self.counts["partial" if answers[0]["partial"] else f"{mixed}_the_dead"] += 1
        if not before:
            self.kills_s.append(last_s - killed_s)
        victim.process.join(HANG_S)
        self.fleet.fill()

    def _note(self, where: str, wrong: list[str]) -> None:
        self.counts["wrong"] += bool(wrong)
        for text in wrong:
            self.problems.append(f"trial {self.counts['trials']}, {where}: {text}")
            log("  WRONG " + self.problems[-1])


def session(settings: Settings, trials: Trials, wanted: int) -> None:
    """One group of processes, until all trials are done or one of them hangs."""
    trials.fleet.fill()
    trials.calibrate(5)
    while trials.counts["trials"] < wanted:
        trials.trial()
        done = trials.counts["trials"]
        if done % CALIBRATE_EVERY == 0:
            trials.calibrate(3)
            log(f"  {dict(trials.counts)}")


def run(settings: Settings) -> Report:
    """The suite."""
    report = Report("kills", "One of the peers killed at a random instant of a round", settings)
    wanted = int(settings.option("trials", str(TRIALS_QUICK if settings.quick else TRIALS)))
    mib = float(settings.option("mib", "32"))
    peers = int(settings.option("peers", "4"))
    trials: Trials | None = None
    while trials is None or trials.counts["trials"] < wanted:
        with Fleet(peers) as fleet:
            trials = trials or Trials(settings, fleet, int(mib * MIB / 4))
            trials.fleet = fleet
            try:
                session(settings, trials, wanted)
            except (HangError, DeadError, RuntimeError) as error:
                trials.counts["broken_groups"] += 1
                trials.problems.append(f"trial {trials.counts['trials']}: {error}")
                log(f"  group given up: {error}")
                if trials.counts["broken_groups"] > 10:
                    break
    counts = {name: trials.counts[name] for name in (
        "trials", "finished_before_kill", "completed_by_survivors", "with_the_dead",
        "without_the_dead", "partial", "wrong", "hangs", "broken_groups")}  # fmt: skip
    case = {"peers": peers, "MiB": mib}
    report.add(case, **counts)
    report.add(case, round_ms=[s * 1e3 for s in trials.rounds_s])
    if trials.kills_s:
        report.add(case, kill_to_result_ms=[s * 1e3 for s in trials.kills_s])
    report.table("trials", list(counts), title="Trials")
    report.table("time", ["round_ms", "kill_to_result_ms"], title="Time, ms")
    for text in trials.problems[:50]:
        report.note(text)
    return report
