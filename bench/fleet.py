"""Real processes for the benchmarks of churn: a coordinator, and peers that do as they are told.

Peers are forked from one warm process, so that a replacement is there in milliseconds. The parent
plays the launcher: it sees a process end and tells the coordinator. It measures and judges nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from bench.common import ROOT

if TYPE_CHECKING:
    from bench.wan.lab import Lab

HANG_S = 60.0  # without an answer: the peer hangs
PRELOAD = ["numpy", "decotrain.communicator", "bench.fleet"]
REPORT_TRIES = 10
CLONE_NEWNET = 0x40000000


class HangError(RuntimeError):
    """A peer did not answer in HANG_S."""


class DeadError(RuntimeError):
    """A peer's process has ended."""


# --- in a peer's process


def worker(
    address: str,
    name: str,
    peers: int,
    pipe: Connection,
    site: tuple[str, str] | None,
    environment: dict[str, str],
    options: dict[str, Any],
) -> None:
    """Calls what the parent sends, (function, arguments), and sends back what it returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, and we end with it
    os.environ.update(environment)
    if site is not None:
        enter(*site)
    from decotrain.communicator import join

    os.environ["DECOTRAIN_LAUNCH"] = name  # the parent reports our end by it
    comm = join(address, name=name, min_peers=peers, timeout_s=HANG_S, **options)
    state = SimpleNamespace(comm=comm, name=name, pipe=pipe)
    pipe.send((True, comm.peer))
    with contextlib.suppress(EOFError):  # the parent has ended
        while (task := pipe.recv()) is not None:
            function, arguments = task
            try:
                answer = (True, function(state, *arguments))
            except Exception as error:
                answer = (False, f"{type(error).__name__}: {error}")
            pipe.send(answer)
    comm.close()


def enter(namespace: str, listen: str) -> None:
    """Into a network namespace of the lab, where we listen on that address."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(namespace, os.O_RDONLY)
    if libc.setns(descriptor, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    os.close(descriptor)
    os.environ["DECOTRAIN_LISTEN"] = listen
    os.environ["DECOTRAIN_INSECURE"] = "1"  # no packet leaves the lab


def spin(state: SimpleNamespace, elements: int, tag: int = 0) -> dict[str, Any]:
    """Rounds back to back, and when each was done; ends for all when one has a new word."""
    import numpy as np

    buffer = np.zeros(elements, np.float32)
    done: list[float] = []
    lost = 0
    while True:
        buffer.fill(0.0)
        buffer[0] = float(state.pipe.poll(0))
        result = state.comm.all_reduce(buffer, tag=tag, op="sum").wait(HANG_S)
        done.append(time.monotonic())
        lost += result.outcome != "stable"
        if result.outcome == "stable" and buffer[0] > 0:
            members = [(one.peer, one.active) for one in state.comm.members]
            return {"done": done, "lost": lost, "members": members}


def nothing(state: SimpleNamespace) -> None:
    """A new word."""


def activate(state: SimpleNamespace) -> int:
    """Returns our id when we are active in a view."""
    comm, shared = state.comm, state.comm._agent.shared
    while not comm.active:
        with shared.changed:
            shared.changed.wait(0.01)
    return int(comm.peer)


def sleep_until(instant_s: float) -> None:
    while (left_s := instant_s - time.monotonic()) > 0:
        time.sleep(left_s)


# --- in the parent


class Peer:
    """One process. `ended_s` is when its end was seen, by the monotonic clock."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        context = fleet.context
        self.fleet, self.name = fleet, name
        self.pipe, there = context.Pipe()
        self.process = context.Process(
            target=worker,
            args=(
                fleet.address, name, fleet.peers, there, fleet.next_site(), fleet.environment,
                fleet.options,
            ),
            daemon=True,
        )  # fmt: skip
        self.process.start()
        there.close()
        self.id = 0
        self.ended_s: float | None = None
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        from decotrain.control.client import exited
        from decotrain.errors import Error

        wait([self.process.sentinel])
        self.ended_s = time.monotonic()
        host = socket.gethostname()
        for _ in range(REPORT_TRIES):  # the coordinator may be down
            if not self.fleet.reports or self.fleet.closing:
                return
            with contextlib.suppress(Error):
                exited(self.fleet.address, self.fleet.run, host=host, launch=self.name)
                return

    def ask(self, function: Callable[..., Any], *arguments: Any) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send((function, arguments))

    def answer(self, limit_s: float = HANG_S) -> Any:
        try:
            if not self.pipe.poll(limit_s):
                raise HangError(f"{self.name} did not answer in {limit_s:g} s")
            good, value = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            raise DeadError(f"{self.name} has ended") from None
        if not good:
            raise RuntimeError(f"{self.name}: {value}")
        return value

    def signal(self, number: int) -> float:
        """Sends it; when that was."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        return time.monotonic()

    def end(self) -> None:
        if self.process.is_alive():
            self.signal(signal.SIGKILL)
        self.process.join(10)
        self.pipe.close()


class Fleet:
    """A coordinator process and its peers. `with Fleet(4) as fleet:`"""

    def __init__(
        self,
        peers: int,
        reports: bool = True,  # the coordinator is told of ended processes
        record: Path | None = None,  # folder of its durable record
        lab: Lab | None = None,  # the coordinator at site 0, peers at 1, 2, ...
        log: Path | None = None,  # what the coordinator says
        environment: dict[str, str] | None = None,  # of peers: ours stays with the first fleet
        **options: Any,  # of every peer's join()
    ) -> None:
        os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)
        self.peers, self.reports, self.record, self.run = peers, reports, record, "default"
        self.log, self.environment, self.options = log, environment or {}, options
        self.closing = False
        self.count = 0
        self.lab = lab
        self.housed: dict[int, Peer] = {}  # site -> who lives there, or did last
        self.address = "127.0.0.1:0" if lab is None else f"{lab.address(0)}:0"
        self.team: list[Peer] = []
        self.start_coordinator()

    def start_coordinator(self) -> None:
        """Also again, after it was killed: same address, same record."""
        command = [sys.executable, "-m", "decotrain.cli", "coordinator", "--listen", self.address]
        command += ["--with-parent"]
        if self.record is not None:
            command += ["--record", str(self.record)]
        options: dict[str, Any] = {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True}
        with (self.log or Path(os.devnull)).open("ab") as errors:
            if self.lab is None:
                self.coordinator = subprocess.Popen(command, stderr=errors, **options)
            else:
                command.append("--insecure")
                self.coordinator = self.lab.popen(0, command, stderr=errors, **options)
        assert self.coordinator.stdout is not None
        line = self.coordinator.stdout.readline()
        if not line:
            raise RuntimeError("the coordinator did not start")
        self.address = line.split()[-1]

    def next_site(self) -> tuple[str, str] | None:
        """Where the next peer lives: namespace and address of a site where nobody does."""
        if self.lab is None:
            return None
        site = self.free_site()
        return self.lab.namespace(site), self.lab.address(site)

    def free_site(self) -> int:
        return next(
            n
            for n in itertools.count(1)
            if n not in self.housed or not self.housed[n].process.is_alive()
        )

    def has_room(self) -> bool:
        """Is there a site for one more peer?"""
        return self.lab is None or self.free_site() < len(self.lab.names)

    def kill_coordinator(self) -> None:
        self.coordinator.kill()
        self.coordinator.wait()
        assert self.coordinator.stdout is not None
        self.coordinator.stdout.close()

    def start(self, count: int = 1) -> list[Peer]:
        """New peers that have joined, not active yet."""
        fresh = [self.launch() for _ in range(count)]
        for peer in fresh:
            peer.id = peer.answer()
        return fresh

    def launch(self) -> Peer:
        """A new peer's process; its first answer comes when it has joined."""
        site = self.free_site()
        peer = self.housed[site] = Peer(self, f"p{self.count}")
        self.count += 1
        self.team.append(peer)
        return peer

    def fill(self) -> None:
        """Replaces what is missing; returns when everybody is active."""
        for peer in [one for one in self.team if not one.process.is_alive()]:
            peer.end()
            self.team.remove(peer)
        self.start(self.peers - len(self.team))
        for peer, number in zip(self.team, self.all(activate), strict=True):
            peer.id = number

    def all(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        return ask_all(self.team, function, *arguments)

    def close(self) -> None:
        self.closing = True
        for peer in self.team:
            peer.end()
        self.kill_coordinator()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def ask_all(team: Sequence[Peer], function: Callable[..., Any], *arguments: Any) -> list[Any]:
    for peer in team:
        peer.ask(function, *arguments)
    return [peer.answer() for peer in team]
