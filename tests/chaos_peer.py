"""A peer under chaos: rounds on state that everybody shares, and a history of what it did and saw.

Runs in a process of bench.fleet. Each event is one line of JSON in one write, so that a kill loses
nothing that was said; what tests/sim/checker.py needs of an event is in its header. What a peer
gives to a round is written down before the round begins, and is a function of peer and round.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import threading
import time
import zlib
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

TAG = 0
CHUNK_ELEMENTS = 1 << 13
WAIT_S = 90.0  # for a round or a state: more is a hang


def gift(peer: int, seq: int) -> int:
    """What a peer gives to a round: sums of 64 of them are exact in f32."""
    return 1 + zlib.crc32(f"{peer}/{seq}".encode()) % (1 << 17)


class History:
    def __init__(self, path: Path) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.lock = threading.Lock()

    def say(self, ev: str, at_s: float | None = None, **fields: Any) -> None:
        now_s = time.monotonic() if at_s is None else at_s
        with self.lock:
            line = json.dumps({"ev": ev, "at_s": now_s, **fields})
            os.write(self.file, line.encode() + b"\n")


def watch(comm: Any, history: History) -> None:
    """Every view this peer installs, with what it holds then."""
    agent = comm._agent
    install = agent._install

    def wrapped(effect: Any) -> None:
        install(effect)
        view = effect.install["view"]
        if agent.member.view != view["id"]:
            return
        report = agent.node.freeze(0, 0)  # an old FREEZE stops nothing
        history.say(
            "install",
            peer=agent.member.me.peer,
            view=view["id"],
            generation=agent.member.generation,
            members=[[int(row[0]), int(row[1]), bool(row[2])] for row in view["members"]],
            held={tag["tag"]: tag["covered"] for tag in report["tags"] if tag["state"]},
        )

    agent._install = wrapped


class Trainer:
    def __init__(self, comm: Any, history: History, elements: int) -> None:
        self.comm, self.history = comm, history
        self.state = np.zeros(elements, np.float32)
        self.buffer = np.zeros(elements, np.float32)
        self.held: Any = None
        self.peer = 0
        result = comm._result

        def wrapped(held: Any, *others: Any, **named: Any) -> Any:
            self.held = held
            return result(held, *others, **named)

        comm._result = wrapped
        comm.register_state(TAG, {"w": self.state}, version=0)

    def returned(self, result: Any, peer: int) -> None:
        values = result.tensor.reshape(-1)
        chunks = []
        for chunk, contributors in enumerate(self.held.chunk_contributors):
            part = values[chunk * CHUNK_ELEMENTS : (chunk + 1) * CHUNK_ELEMENTS]
            value = int(part[0]) if (part == part[0]).all() else str(np.unique(part)[:8])
            chunks.append([list(contributors), value])
        self.history.say(
            "return",
            peer=peer,
            view=self.held.view,
            generation=self.comm._agent.shared.generation,
            tag=result.tag,
            seq=result.seq,
            digest=result.digest,
            chunks=chunks,
        )

    def apply(self, result: Any) -> None:
        """A result, own or missed, becomes state."""
        shared = self.comm._agent.shared
        peer, view, generation = shared.peer, shared.view, shared.generation
        self.returned(result, peer)
        values = result.tensor.reshape(-1)
        with self.comm.updating(TAG, result.seq + 1):
            self.state *= np.float32(0.5)
            self.state += values
        self.say_state(peer, view, generation)

    def say_state(self, peer: int, view: int, generation: int) -> None:
        self.history.say(
            "state",
            peer=peer,
            view=view,
            generation=generation,
            tag=TAG,
            version=self.comm.version(TAG),
            digest=zlib.crc32(self.state),
        )

    def round(self) -> None:
        shared = self.comm._agent.shared
        fetches = self.comm._shared.fetches
        self.comm.catch_up(TAG, self.apply, wait=True, timeout_s=WAIT_S)
        peer, view, generation = shared.peer, shared.view, shared.generation
        if self.comm._shared.fetches != fetches:
            self.say_state(peer, view, generation)
        seq = self.comm.version(TAG)
        value = gift(peer, seq)
        self.buffer.fill(value)
        self.history.say("begin", peer=peer, generation=generation, tag=TAG, seq=seq, give=value)
        work = self.comm.all_reduce(self.buffer, tag=TAG, op="sum", chunk_elements=CHUNK_ELEMENTS)
        result = work.wait(WAIT_S)
        if result.outcome == "stable":
            self.apply(result)


def cut_connections(keep: int) -> None:
    """Breaks about half of this process's connections, but for the one of that descriptor."""
    for entry in list(Path("/proc/self/fd").iterdir()):
        descriptor = int(entry.name)
        if descriptor == keep or not entry.is_socket() or random.random() < 0.5:
            continue
        with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as one:
            if one.type == socket.SOCK_STREAM and one.getpeername():
                one.shutdown(socket.SHUT_RDWR)


def live(state: SimpleNamespace, folder: str, elements: int, pause_s: float) -> str:
    """Rounds until the parent has another word; then a clean leave. Returns how it ended."""
    signal.signal(signal.SIGUSR1, lambda *_: cut_connections(state.pipe.fileno()))
    history = History(Path(folder) / f"{state.name}.jsonl")  # from now on we may be cut off
    watch(state.comm, history)
    trainer = Trainer(state.comm, history, elements)
    try:
        while not state.pipe.poll(pause_s):
            trainer.round()
        state.comm.leave()
    except Exception as error:
        history.say("error", peer=trainer.peer, text=f"{type(error).__name__}: {error}")
        raise
    return "left"


def nothing(state: SimpleNamespace) -> None:
    """Another word."""
