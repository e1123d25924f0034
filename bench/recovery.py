"""What a peer's death in the middle of a round costs the others, against redoing the round.

One of 4 peers is killed at 50 % of a round in place. Measured: from the kill to the last survivor's
result; to the end seen by the launcher, and to the survivors' view without the dead. Beside it, in
turns in the same processes: the undisturbed round, and the whole round of the survivors alone. Redo
from the start, the way of the field, is then that view plus that round (its abort taken as free).
Peers are also stopped (SIGSTOP), and killed with no launcher that reports it: then the silence
counts, with `bound_ms` the time after which the coordinator suspects a peer.

Options (`--set`): mib=256, peers=4, stops=3. Values are checked by bench.kills' judge throughout.
"""

from __future__ import annotations

import random
import signal
import statistics
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING

from bench.common import Report, Settings, log
from bench.fleet import Fleet, Peer, ask_all, sleep_until
from bench.kills import LEAD_S, MIB, judge, prepare, reduce

if TYPE_CHECKING:
    from bench.wan.lab import Lab

AT = 0.5  # of the median round
WARMUP = 3
TRIES = 5  # a fault that comes when the round is over already tells nothing


# --- in a peer's process


def watch(state: SimpleNamespace) -> None:
    """From now on note when this peer got which view."""
    state.views = []
    shared = state.comm._agent.shared

    def note() -> None:
        last = 0
        while True:
            with shared.changed:
                while shared.view == last:
                    shared.changed.wait()
                last = shared.view
                ids = [row[0] for row in shared.members]
            state.views.append((time.monotonic(), ids))

    threading.Thread(target=note, daemon=True).start()


def views(state: SimpleNamespace) -> list[tuple[float, list[int]]]:
    return list(state.views)


# --- in the parent


class Bed:
    """A group of processes and the rounds it runs."""

    def __init__(self, fleet: Fleet, elements: int, seed: int) -> None:
        self.fleet, self.elements = fleet, elements
        self.dice = random.Random(seed)
        self.turn = 0

    def fill(self) -> None:
        self.fleet.fill()
        self.fleet.all(watch)

    def begin(self) -> tuple[dict[int, int], float]:
        team = self.fleet.team
        self.turn += 1
        given = {peer.id: 1 << (self.turn * 4 + rank) % 20 for rank, peer in enumerate(team)}
        for peer in team:
            peer.ask(prepare, self.elements, float(given[peer.id]))
        for peer in team:
            peer.answer()
        start_s = time.monotonic() + LEAD_S
        for peer in team:
            peer.ask(reduce, start_s, False)
        return given, start_s

    def finish(self, team: list[Peer], given: dict[int, int]) -> float:
        """When the last one had its result."""
        answers = [peer.answer() for peer in team]
        wrong = judge(answers, given, [peer.id for peer in team])
        if wrong:
            raise RuntimeError(f"wrong result: {wrong}")
        return float(max(one["done_s"] for one in answers))

    def whole(self) -> float:
        """Seconds of an undisturbed round."""
        given, start_s = self.begin()
        return self.finish(self.fleet.team, given) - start_s

    def try_disturbed(self, number: int, median_s: float) -> dict[str, float]:
        """Until the fault hits a round that is not over for the survivors."""
        for _ in range(TRIES):
            taken = self.disturbed(number, AT * median_s)
            if "view" in taken:
                break
            log("  the round was over already; once more")
            self.fill()
            self.whole()
        return taken

    def disturbed(self, number: int, delay_s: float) -> dict[str, float]:
        """A round in which one peer gets a signal; seconds since then."""
        victim = self.dice.choice(self.fleet.team)
        survivors = [peer for peer in self.fleet.team if peer is not victim]
        given, start_s = self.begin()
        sleep_until(start_s + delay_s)
        hit_s = victim.signal(number)
        taken = {"result": self.finish(survivors, given) - hit_s, "delay": delay_s}
        seen = ask_all(survivors, views)
        without = [
            [at_s for at_s, ids in one if at_s > hit_s and victim.id not in ids] for one in seen
        ]
        if all(without):
            taken["view"] = max(min(one) for one in without) - hit_s
        if number == signal.SIGKILL:
            victim.process.join()
        else:
            victim.signal(signal.SIGKILL)
            victim.process.join()
        if victim.ended_s is not None:
            taken["seen"] = victim.ended_s - hit_s
        self.fleet.team.remove(victim)
        victim.end()
        return taken


def killed(
    report: Report, settings: Settings, mib: float, peers: int, lab: Lab | None = None
) -> None:
    """Death against the undisturbed remainder and against redoing."""
    where = {"profile": lab.profile.name} if lab is not None else {}
    names = ("round", "round_of_survivors", "delay", "result", "redo", "seen", "view")
    rows: dict[str, list[float]] = {name: [] for name in names}
    with Fleet(peers, reports=lab is None, lab=lab) as fleet:
        bed = Bed(fleet, int(mib * MIB / 4), settings.seed)
        bed.fill()
        rounds = [bed.whole() for _ in range(WARMUP + 1)][WARMUP:]
        for _ in range(settings.repeats):
            rounds.append(bed.whole())
            taken = bed.try_disturbed(signal.SIGKILL, statistics.median(rounds[-5:]))
            alone_s = min(bed.whole() for _ in range(2))
            bed.fill()
            bed.whole()
            if "view" not in taken:
                continue
            taken |= {"round": rounds[-1], "round_of_survivors": alone_s}
            taken["redo"] = taken["view"] + alone_s
            for name in names:
                rows[name].append(taken[name])
            log(f"  { ({name: round(found[-1], 3) for name, found in rows.items()}) }")
    if not rows["result"]:
        report.skip({**where, "fault": "kill -9"}, "every round was over before the kill")
        return
    delays, round_s = rows.pop("delay"), statistics.median(rounds)
    rows["remainder"] = [max(0.0, round_s - delay_s) for delay_s in delays]
    middle = {name: statistics.median(found) for name, found in rows.items()}
    millis = {f"{name}_ms": [s * 1e3 for s in found] for name, found in rows.items()}
    if middle["redo"] > middle["remainder"]:
        extra_s = middle["result"] - middle["remainder"]
        millis["extra_over_redo"] = [extra_s / (middle["redo"] - middle["remainder"])]
    report.add({**where, "peers": peers, "MiB": mib, "fault": "kill -9"}, **millis)


def silent(report: Report, settings: Settings, mib: float, peers: int, stops: int) -> None:
    """Peers whose end nobody reports: killed, or stopped."""
    from decotrain.control.coordinator import Options

    bound_ms = Options().suspect_timeout_s * 1e3
    with Fleet(peers, reports=False) as fleet:
        bed = Bed(fleet, int(mib * MIB / 4), settings.seed)
        bed.fill()
        rounds = [bed.whole() for _ in range(WARMUP + 3)][WARMUP:]
        for name, number in (("kill -9, no launcher", signal.SIGKILL), ("stop", signal.SIGSTOP)):
            found: dict[str, list[float]] = {"result_ms": [], "view_ms": []}
            for _ in range(stops):
                taken = bed.try_disturbed(number, statistics.median(rounds[-5:]))
                bed.fill()
                rounds.append(bed.whole())
                for key in ("result", "view"):
                    if key in taken:
                        found[f"{key}_ms"].append(taken[key] * 1e3)
                log(f"  {name}: { ({k: round(v, 3) for k, v in taken.items()}) }")
            figures = {key: samples for key, samples in found.items() if samples}
            report.add({"peers": peers, "MiB": mib, "fault": name}, bound_ms=bound_ms, **figures)


def table_of(report: Report) -> None:
    report.table(
        "redo",
        ["round_ms", "round_of_survivors_ms", "remainder_ms", "result_ms", "redo_ms",
         "extra_over_redo"],
        title="From the kill to the last result, ms", where={"fault": "kill -9"},
    )  # fmt: skip


def run(settings: Settings) -> Report:
    """The suite."""
    report = Report("recovery", "A peer dies at half of a round", settings)
    mib = float(settings.option("mib", "8" if settings.quick else "256"))
    peers = int(settings.option("peers", "4"))
    stops = int(settings.option("stops", "1" if settings.quick else "3"))
    killed(report, settings, mib, peers)
    if stops:
        silent(report, settings, min(mib, 32.0), peers, stops)
    table_of(report)
    report.table(
        "detection",
        ["bound_ms", "seen_ms", "view_ms", "result_ms"],
        title="From the fault to: its sight, the view without the peer, the result; ms",
    )
    report.note(
        "extra_over_redo: what the death added to the undisturbed remainder, as a share of what"
        " redoing the round would have added; of medians. Nothing when the survivors' whole round,"
        " with a peer less on this machine, is shorter than the remainder."
    )
    return report
