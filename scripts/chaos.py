#!/usr/bin/env python3
"""Real processes under seeded faults; their histories are judged by the simulator's checker.

Peers train on shared state while they are killed, stopped and woken, told to leave, and replaced,
while their connections are cut, and while the coordinator is killed and started again from its
record. Then everything is healed, and each peer that lives must complete more rounds. Faults come
from the seed; what they meet does not. It measures nothing (bench/storm.py does).
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.fleet import Fleet, Peer  # noqa: E402
from tests.chaos_peer import live, nothing  # noqa: E402
from tests.sim.checker import Checker, Violation  # noqa: E402

if TYPE_CHECKING:
    from bench.wan.lab import Lab

HEAL_S = 90.0  # within which everybody that lives must have made progress
ROUNDS_AFTER = 3
ROOM_AGAIN_S = 0.5
STEADY = 2  # so many peers are neither stopped nor dead at any time
FAULTS = {"kill": 4, "stop": 3, "cut": 3, "leave": 2, "join": 2, "coordinator": 2, "kill_two": 1}


class Storm:
    def __init__(
        self,
        folder: Path,
        seed: int,
        peers: int,
        elements: int,
        mean_s: float,
        elders: int = 0,  # so many peers are neither killed nor told to leave
        coordinator_s: float = 0.0,  # it is killed so often, and not by chance; 0: by chance
        lab: Lab | None = None,  # everybody at a site of their own, the coordinator at site 0
    ) -> None:
        self.dice = random.Random(seed)
        self.coordinator_s, self.elders = coordinator_s, elders
        self.faults = {k: n for k, n in FAULTS.items() if k != "coordinator" or not coordinator_s}
        self.folder, self.peers, self.elements, self.mean_s = folder, peers, elements, mean_s
        self.fleet = Fleet(peers, reports=lab is None, record=folder / "record", lab=lab)
        self.later: list[tuple[float, Any]] = []  # (when, what to do)
        self.stopped: set[Peer] = set()
        self.leaving: list[Peer] = []
        self.counts: Counter[str] = Counter()
        self.coordinator_up = True

    def join(self) -> None:
        if not self.fleet.has_room():  # who was told to leave is slow to: a busy machine
            self.after(ROOM_AGAIN_S, self.join)
            return
        peer = self.fleet.launch()
        peer.ask(live, str(self.folder), self.elements, 0.0)

    def steady(self) -> list[Peer]:
        return [p for p in self.fleet.team if p.process.is_alive() and p not in self.stopped]

    def after(self, delay_s: float, action: Any) -> None:
        self.later.append((time.monotonic() + delay_s, action))

    def run(self, seconds: float) -> None:
        self.begin()
        self.disturb(seconds)
        self.heal()

    def begin(self) -> None:
        for _ in range(self.peers):
            self.join()
        self.wait_for_rounds(1, HEAL_S)

    def disturb(self, seconds: float, look: Callable[[], None] = lambda: None) -> None:
        """Faults for so long; `look` is called all the time."""
        end_s = time.monotonic() + seconds
        next_s = time.monotonic() + self.dice.expovariate(1 / self.mean_s)
        coordinator_s = time.monotonic() + (self.coordinator_s or seconds)
        while time.monotonic() < end_s:
            self.act()
            if time.monotonic() >= next_s:
                self.fault(self.dice.choices(list(self.faults), list(self.faults.values()))[0])
                next_s += self.dice.expovariate(1 / self.mean_s)
            if time.monotonic() >= coordinator_s:
                self.fault("coordinator")
                coordinator_s += self.coordinator_s
            look()
            time.sleep(0.01)  # the clock of the faults: nothing waits for anybody by it

    def act(self) -> None:
        now_s = time.monotonic()
        due = [one for one in self.later if one[0] <= now_s]
        self.later = [one for one in self.later if one[0] > now_s]
        for peer in [one for one in self.leaving if one.pipe.poll()]:
            if peer.answer() == "left":  # its process, and its site, are free
                self.leaving.remove(peer)
                peer.end()
        for _, action in due:
            action()

    def fault(self, kind: str) -> None:
        alive = self.steady()
        elders = self.fleet.team[: self.elders]  # the list is in order of age
        mortal = [peer for peer in alive if peer not in elders]
        victims = alive if kind in ("stop", "cut") else mortal
        count = 2 if kind == "kill_two" else 1
        delay_s = self.dice.random() * 2
        if kind == "coordinator":
            if not self.coordinator_up:
                return
            self.fleet.kill_coordinator()
            self.coordinator_up = False
            self.after(delay_s * 1.5, self.restart_coordinator)
        elif kind == "join":
            if len(self.fleet.team) > self.peers + 1:
                return
            self.join()
        elif len(victims) < count or (kind != "cut" and len(alive) - STEADY < count):
            return
        else:
            for victim in self.dice.sample(victims, count):
                self.hit(kind, victim, delay_s)
        self.counts[kind] += 1

    def hit(self, kind: str, victim: Peer, delay_s: float) -> None:
        if kind == "cut":
            if self.file(victim).exists():  # it has got so far that it knows this signal
                victim.signal(signal.SIGUSR1)
        elif kind == "stop":
            victim.signal(signal.SIGSTOP)
            self.stopped.add(victim)
            self.after(0.1 + delay_s * 3, lambda: self.wake(victim))
        elif kind == "leave":
            victim.ask(nothing)
            self.fleet.team.remove(victim)
            self.leaving.append(victim)
            self.after(delay_s, self.join)
        else:
            self.kill(victim)
            self.after(delay_s, self.join)

    def kill(self, peer: Peer) -> None:
        peer.signal(signal.SIGKILL)
        peer.process.join()
        self.fleet.team.remove(peer)

    def wake(self, peer: Peer) -> None:
        self.stopped.discard(peer)
        if peer.process.is_alive():
            peer.signal(signal.SIGCONT)

    def restart_coordinator(self) -> None:
        self.fleet.start_coordinator()
        self.coordinator_up = True

    # --- afterwards

    def heal(self) -> None:
        for _, action in sorted(self.later, key=lambda one: one[0]):
            action()
        self.later.clear()
        started_s = time.monotonic()
        self.wait_for_rounds(ROUNDS_AFTER, HEAL_S)
        self.counts["heal_ms"] = int((time.monotonic() - started_s) * 1e3)
        for peer in [*self.fleet.team, *self.leaving]:
            if peer not in self.leaving:
                peer.ask(nothing)
        for peer in [*self.fleet.team, *self.leaving]:
            word = peer.answer()
            if isinstance(word, int):  # that it has joined
                word = peer.answer()
            if word != "left":
                raise RuntimeError(f"{peer.name} did not leave")

    def wait_for_rounds(self, rounds: int, limit_s: float) -> None:
        """Everybody in the team returns so many more rounds."""
        team = list(self.fleet.team)
        base = {peer: self.done(peer) for peer in team}
        deadline_s = time.monotonic() + limit_s
        while waiting := [p.name for p in team if self.done(p) < base[p] + rounds]:
            dead = [p.name for p in team if not p.process.is_alive()]
            if dead or time.monotonic() > deadline_s:
                raise RuntimeError(
                    f"no progress of {waiting} in {limit_s:g} s; ended by themselves: {dead}"
                )
            time.sleep(0.1)  # between looks at files; what is waited for is in them

    def done(self, peer: Peer) -> int:
        path = self.file(peer)
        return path.read_bytes().count(b'{"ev": "return"') if path.exists() else 0

    def file(self, peer: Peer) -> Path:
        return self.folder / f"{peer.name}.jsonl"

    def close(self) -> None:
        for peer in self.stopped:
            peer.signal(signal.SIGKILL)
        for peer in self.leaving:
            peer.end()
        self.fleet.close()


def events(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines only: the last one of a killed peer may be torn."""
    if path.exists():
        for line in path.read_bytes().split(b"\n")[:-1]:
            yield json.loads(line)


def judge(folder: Path) -> Counter[str]:
    """All histories of a folder by the clock of the machine; raises Violation."""
    history = [event for path in folder.glob("*.jsonl") for event in events(path)]
    history.sort(key=lambda event: event["at_s"])
    checker = Checker(expect=lambda tag, given, chunk: sum(given), check_persist=False)
    for event in history:
        if event["ev"] == "install":  # processes write down a view at different times
            checker._view(event)
            checker.was_active |= {row[0] for row in event["members"] if row[2]}
            event["held"] = {int(tag): last for tag, last in event["held"].items()}
    begun = set()
    for event in history:
        if event["ev"] == "error":
            raise Violation("error", event["text"])
        if event["ev"] == "begin":  # said again when the round had not begun after all
            key = (event["peer"], event["generation"], event["tag"], event["seq"])
            if key in begun:
                continue
            begun.add(key)
        checker.take(event)
    counts = Counter(checker.counts)
    counts["rounds"] = len(checker.returned)
    return counts


def storm(seconds: float, seed: int, peers: int, kib: int, mean_s: float, folder: Path) -> str:
    """One storm and its judgement, in a line."""
    one = Storm(folder, seed, peers, kib * 256, mean_s)
    try:
        one.run(seconds)
    finally:
        one.close()
    return f"seed {seed}: faults {dict(one.counts)}, judged {dict(judge(folder))}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--kib", type=int, default=1024, help="of state and of a contribution")
    parser.add_argument("--mean-s", type=float, default=2.0, help="between faults")
    parser.add_argument("--keep", type=Path, help="an empty folder for the histories")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = asked.keep or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            print(storm(asked.seconds, asked.seed, asked.peers, asked.kib, asked.mean_s, folder))
        except (Violation, RuntimeError) as error:
            print(f"seed {asked.seed}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
