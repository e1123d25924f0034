"""Starts a coordinator and N peers on this machine, watches them, and says what came of it.

A peer that dies is reported to the coordinator at once, and started again as a new incarnation that
fetches its state from the others. Ctrl-C ends everything in order and says how to go on. The
launcher trains nothing and decides no membership. What a run is about is its `Job`'s business:
decotrain/train/job.py, decotrain/finetune/job.py.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from decotrain.control.messages import ASKED_TO_LEAVE
from decotrain.errors import ConfigError, Error, RefusedError
from decotrain.train import control_link
from decotrain.train.metrics import RoundMeans, RunLog, Tail
from decotrain.train.processes import (
    Child,
    describe_exit,
    start_coordinator,
    start_peer,
    stop,
)
from decotrain.train.table import Board, PeerRow, View

POLL_S = 0.2
STATUS_S = 1.0
GRACE_S = 10.0  # for processes to end by themselves
ROOM_BYTES = 1 << 20  # less is none: figures of a second are thousands, a page is 4096
LAST_S = 30.0  # for the others, when one peer has finished


class Job(Protocol):
    """What a run is about: what its peers run, what is shown, saved and said at the end."""

    command: str  # the word after `decotrain` that starts such a run
    worker: str  # the module that is a peer's process
    name: str
    peers: int
    restarts: int  # of one peer
    listen: str  # of the coordinator
    join: str  # address of a coordinator that is there already; empty: start one
    resume: bool
    leftovers: Sequence[str]  # in the run's folder, of an earlier run of this name that is over

    def prepare(self) -> None:
        """Everything that can be wrong before a process is started."""

    def mapping(self) -> Mapping[str, Any]:
        """The configuration, as the peers read it."""

    def board(self, rows: dict[str, PeerRow]) -> Board:
        """What the views show."""

    def saved(self, folder: Path, board: Board) -> list[str]:
        """Arguments for peers that go on from what is saved in the folder; none when nothing is."""

    def finish(self, run: Launcher, seconds: float) -> tuple[Mapping[str, Any], list[str]]:
        """When all peers have ended: the summary, as values and as lines for people."""


class Launcher:
    """One run."""

    def __init__(self, job: Job, folder: Path, overrides: Sequence[str]) -> None:
        self.job, self.folder, self.overrides = job, folder, list(overrides)
        self.names = [f"peer-{number}" for number in range(1, job.peers + 1)]
        self.launches = {name: secrets.token_hex(8) for name in self.names}
        self.restarts = dict.fromkeys(self.names, 0)
        self.began = dict.fromkeys(self.names, 0)  # step at which the last restart came
        self.children: dict[str, Child] = {}
        self.tails: dict[str, Tail] = {}
        self.coordinator: Child | None = None
        self.address = ""
        self.status_asked_s = 0.0
        self.full = False  # no room in the folder
        self.finished_s: float | None = None  # when the first peer finished

    # --- before and after

    def run(self) -> int:
        """The exit code: 0, or 130 when the user ended it."""
        self._prepare()
        self.log, self.means = RunLog(self.folder), RoundMeans()
        self.board = self.job.board({name: PeerRow(name) for name in self.names})
        # SIGINT too: a shell that starts us in the background has it ignored.
        handlers = {s: signal.signal(s, _interrupt) for s in (signal.SIGTERM, signal.SIGINT)}
        started_s = time.monotonic()
        try:
            arguments = self.job.saved(self.folder, self.board) if self.job.resume else []
            if self.job.resume and not arguments:
                self.board.note("nothing saved to resume from: starting from the beginning")
            with View(self.board) as view:
                self._start(arguments)
                while not self._ended():
                    self._look(view)
            if any(row.state == "finished" for row in self.board.rows.values()):
                self._summarise(time.monotonic() - started_s)
            else:  # an operator has asked the last one to leave
                self.log.note("interrupted")
                print(f"no peer is left; to go on: {self._resume_command()}")
        except KeyboardInterrupt:  # said first: who presses again wants to know too
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            self.log.note("interrupted")
            print(f"\nstopping; to go on: {self._resume_command()}", flush=True)
            signal.signal(signal.SIGINT, _interrupt)
            self._stop_all()
            return 130
        finally:
            self._stop_all()
            self.log.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return 0

    def _prepare(self) -> None:
        try:
            import torch  # noqa: F401 - only whether it can be
        except ImportError as error:
            raise ConfigError(
                f"torch is not installed, and training needs it: pip install torch ({error})"
            ) from error
        self.job.prepare()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            old = ["coordinator"]  # its record is of peers that are gone
            if not self.job.resume:
                old += self.job.leftovers
            for path in [path for pattern in old for path in self.folder.glob(pattern)]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            write_config(self.folder, self.job.mapping())
        except OSError as error:
            raise ConfigError(
                f"folder {self.folder} cannot be written: {error.strerror}; choose another with"
                " folder=..."
            ) from error

    # --- processes

    def _start(self, arguments: Sequence[str]) -> None:
        if self.job.join:
            self.address = self.job.join
        else:
            self._start_coordinator(self.job.listen)
        for name in self.names:
            self._start_peer(name, arguments)

    def _start_coordinator(self, listen: str) -> None:
        record = self.folder / "coordinator"
        self.coordinator, self.address = start_coordinator(
            self.folder,
            ["--listen", listen, "--run", self.job.name, "--record", str(record)],
        )
        self._note(f"coordinator at {self.address.removeprefix('tcp://')}")

    def _start_peer(self, name: str, more: Sequence[str] = ()) -> None:
        self.tails.setdefault(name, Tail(self.folder / f"{name}.jsonl"))
        arguments = ["--join", self.address, *more]
        self.children[name] = start_peer(
            self.job.worker, self.folder, name, arguments, self.launches[name]
        )

    def _look(self, view: View) -> None:
        """One turn: what was said, who has ended, what the coordinator knows."""
        self._read()
        for name in self.names:
            child = self.children.get(name)
            if child is not None and child.code is not None:
                self._on_exit(name, child)
        self._end_the_late()
        if self.coordinator is not None and self.coordinator.code is not None:
            why = describe_exit(self.coordinator.code)
            self._note(f"coordinator lost ({why}), rounds go on; it is started again")
            self._start_coordinator(self.address)
        if time.monotonic() - self.status_asked_s >= STATUS_S:
            self.status_asked_s = time.monotonic()
            for peer in control_link.peers(self.address, self.job.name):
                row = self.board.rows.get(peer["name"])
                if row is not None and peer["peer"] == f"{row.peer_id:016x}":
                    row.role = peer["role"]
            self._look_for_room()
        view.refresh()
        time.sleep(POLL_S)

    def _look_for_room(self) -> None:
        """Journals and checkpoints that find no room are lost without a word: theirs is one too."""
        try:
            full = shutil.disk_usage(self.folder).free < ROOM_BYTES
        except OSError:
            return
        if full and not self.full:
            self._note(f"no room in {self.folder}: figures and checkpoints are lost, rounds go on")
        elif self.full and not full:
            self._note("there is room again")
        self.full = self.log.full = full

    def _read(self) -> None:
        for name, tail in self.tails.items():
            for event in tail.read():
                self.log.take(name, event)
                self.board.take(name, event)
                for mean in self.means.take(event):
                    self.log.mean(mean)
                    self.board.loss = mean["loss"]

    def _on_exit(self, name: str, child: Child) -> None:
        """A peer's process is gone: finished, wrong from the start, or lost."""
        self._read()
        row, code = self.board.rows[name], child.code
        assert code is not None
        del self.children[name]
        if row.state in ("finished", "too late"):
            return
        last = child.last_line()
        if code > 0 and row.state == "starting" and row.incarnation == 0:
            if code == 2:
                raise ConfigError(last)
            raise Error(f"{name} did not start: {last}; more in {child.log}")
        why = describe_exit(code) + (f": {last}" if code > 0 and last else "")
        self.board.lost(name, why)
        self.log.note("lost", peer=name, why=why)
        control_link.exited(self.address, self.job.name, row.peer_id, self.launches[name], why)
        row.peer_id = 0
        if ASKED_TO_LEAVE in last:
            row.state = "left"
            self._note(f"{name} has left, as it was asked to")
        else:
            self._replace(name, why, final=code == 2)

    def _replace(self, name: str, why: str, final: bool) -> None:
        rows = self.board.rows.values()
        if any(row.state == "finished" for row in rows):
            return  # the run is about to end; there would be nobody to fetch state from
        row = self.board.rows[name]
        # Crashing again where it began, it would crash for ever.
        hopeless = "exit code" in why and row.incarnation and row.step <= self.began[name]
        if self.restarts[name] >= self.job.restarts or hopeless or final:
            if not self.children:
                kind = RefusedError if final else Error
                raise kind(f"all peers are lost; the last was {name} ({why}); see {self.folder}")
            return
        self.restarts[name] += 1
        self.began[name] = row.step
        row.state, row.incarnation = "starting", row.incarnation + 1
        alone = not self.children
        self._start_peer(name, self.job.saved(self.folder, self.board) if alone else ())
        self._note(f"{name} is started again")

    def _end_the_late(self) -> None:
        """Who is still on its way when the others have finished finds nobody to train with."""
        states = [row.state for row in self.board.rows.values()]
        if "finished" not in states:
            return
        self.finished_s = self.finished_s or time.monotonic()
        over = time.monotonic() - self.finished_s > LAST_S
        for name in list(self.children):
            row = self.board.rows[name]
            if row.state == "starting" or (over and row.state == "training"):
                row.state = "too late"
                self._note(f"{name} did not get in again before the end")
                stop([self.children[name]], GRACE_S)

    def _note(self, text: str) -> None:
        self.board.note(text)
        self.log.note("note", text=text)

    def _ended(self) -> bool:
        return not self.children

    def _stop_all(self) -> None:
        stop(self.children.values(), GRACE_S)
        if self.coordinator:
            stop([self.coordinator], GRACE_S)

    # --- the end

    def watch_alone(self, folder: Path, name: str, arguments: Sequence[str], board: Board) -> None:
        """One more process of the job, by itself, until it ends."""
        tail = Tail(folder / f"{name}.jsonl")
        child = start_peer(self.job.worker, folder, name, arguments, secrets.token_hex(8))
        self.children = {name: child}
        with View(board) as view:
            while child.code is None:
                for event in tail.read():
                    board.take(name, event)
                view.refresh()
                time.sleep(POLL_S)
        self.children = {}
        if child.code != 0:
            raise Error(f"{name} failed: {child.last_line()}; more in {child.log}")

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the shared state, of every peer that finished."""
        return {name: row.digest for name, row in self.board.rows.items() if row.digest}

    def _summarise(self, seconds: float) -> None:
        values, lines = self.job.finish(self, round(seconds, 1))
        (self.folder / "summary.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
        self.log.note("summary", **values)
        print()
        for line in lines:
            print(line)
        print(f"everything is in {self.folder}")
        if len(set(self.digests.values())) > 1:
            raise Error("the peers that finished hold different outer states")

    def _resume_command(self) -> str:
        kept = [o for o in self.overrides if not o.startswith(("name=", "resume="))]
        words = [_program(), self.job.command, f"name={self.job.name}", "resume=auto", *kept]
        return " ".join(shlex.quote(word) for word in words)


def _program() -> str:
    """`decotrain` as this shell finds it again: the demo calls it where it lies, on no path."""
    called = Path(sys.argv[0])
    if called.name != "decotrain" or shutil.which("decotrain"):
        return "decotrain"
    near = os.path.relpath(called)
    return str(called) if near.startswith("..") else near


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def write_config(folder: Path, mapping: Mapping[str, Any]) -> None:
    """Where the worker of a peer looks."""
    (folder / "config.json").write_text(json.dumps(mapping, indent=1), encoding="utf-8")


def newest_run(folder: Path, saved: str) -> Path | None:
    """The run in the folder whose saved files (a pattern) were changed last."""
    found = [(path.stat().st_mtime, path) for path in folder.glob(f"*/{saved}")]
    depth = 1 + saved.count("/")
    return max(found)[1].parents[depth - 1] if found else None
