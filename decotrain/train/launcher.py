"""Starts a coordinator and N peers on this machine, watches them, and says what came of it.

A peer that dies is reported to the coordinator at once, and started again as a new incarnation that
fetches its state from the others. Ctrl-C ends everything in order and says how to go on. The
launcher trains nothing and decides no membership; torch is imported only when the run has ended.
"""

from __future__ import annotations

import json
import secrets
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from decotrain.data import Corpus, open_corpus, unigram_entropy
from decotrain.errors import ConfigError, Error
from decotrain.train import control_link
from decotrain.train.metrics import RunLog, Tail
from decotrain.train.processes import (
    Child,
    describe_exit,
    start_coordinator,
    start_peer,
    stop,
)
from decotrain.train.settings import Settings, to_mapping
from decotrain.train.table import Board, PeerRow, View

POLL_S = 0.2
STATUS_S = 1.0
GRACE_S = 10.0  # for processes to end by themselves
LAST_S = 30.0  # for the others, when one peer has finished
ALONE = "alone"


class Launcher:
    """One run."""

    def __init__(self, settings: Settings, folder: Path, overrides: Sequence[str]) -> None:
        self.settings, self.folder, self.overrides = settings, folder, list(overrides)
        self.names = [f"peer-{number}" for number in range(1, settings.peers + 1)]
        self.launches = {name: secrets.token_hex(8) for name in self.names}
        self.restarts = dict.fromkeys(self.names, 0)
        self.began = dict.fromkeys(self.names, 0)  # step at which the last restart came
        self.children: dict[str, Child] = {}
        self.tails: dict[str, Tail] = {}
        self.coordinator: Child | None = None
        self.address = ""
        self.status_asked_s = 0.0
        self.finished_s: float | None = None  # when the first peer finished

    # --- before and after

    def run(self) -> int:
        """The exit code: 0, or 130 when the user ended it."""
        corpus = self._prepare()
        self.log = RunLog(self.folder)
        rows = {name: PeerRow(name) for name in self.names}
        self.board = self._board(corpus, rows)
        # SIGINT too: a shell that starts us in the background has it ignored.
        handlers = {s: signal.signal(s, _interrupt) for s in (signal.SIGTERM, signal.SIGINT)}
        started_s = time.monotonic()
        try:
            resume = self._newest_checkpoint() if self.settings.resume == "auto" else None
            with View(self.board) as view:
                self._start(resume)
                while not self._ended():
                    self._look(view)
            seconds = time.monotonic() - started_s
            if self.settings.baseline:
                self._baseline(corpus)
            self._summarise(seconds)
        except KeyboardInterrupt:
            self._stop_all()
            self.log.note("interrupted")
            print(f"stopped; to go on: {self._resume_command()}")
            return 130
        finally:
            self._stop_all()
            self.log.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return 0

    def _prepare(self) -> Corpus:
        """Everything that can be wrong before a process is started."""
        try:
            import torch  # noqa: F401 - only whether it can be
        except ImportError as error:
            raise ConfigError(
                f"torch is not installed, and training needs it: pip install torch ({error})"
            ) from error
        corpus = open_corpus(self.settings.data.path, self.settings.model.context)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            old = ["coordinator"]  # its record is of peers that are gone
            if self.settings.resume == "never":
                old += ["checkpoints", "baseline"]
            for name in old:
                shutil.rmtree(self.folder / name, ignore_errors=True)
            text = json.dumps(to_mapping(self.settings), indent=1)
            (self.folder / "config.json").write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"folder {self.folder} cannot be written: {error.strerror}; choose another with"
                " folder=..."
            ) from error
        return corpus

    def _board(self, corpus: Corpus, rows: dict[str, PeerRow]) -> Board:
        settings = self.settings
        board = Board(
            settings.name, settings.steps, settings.rounds, unigram_entropy(corpus.held_out), rows
        )
        megabytes = (len(corpus.train) + len(corpus.held_out)) / 1e6
        board.note(f"text: {corpus.files} files, {megabytes:.1f} MB from {corpus.source}")
        return board

    def _newest_checkpoint(self) -> Path | None:
        """The most advanced checkpoint of any peer."""
        from decotrain import checkpoint

        places = (self.folder / "checkpoints").glob("peer-*")
        found = [saved for place in places if (saved := checkpoint.newest(place))]
        if not found:
            self.board.note("no checkpoint to resume from: starting from the beginning")
            return None
        best = max(found, key=lambda saved: saved.round_number)
        self.board.note(f"resuming from round {best.round_number}")
        return best.path

    # --- processes

    def _start(self, resume: Path | None) -> None:
        self._start_coordinator(self.settings.listen)
        for name in self.names:
            self._start_peer(name, resume)

    def _start_coordinator(self, listen: str) -> None:
        settings, record = self.settings, self.folder / "coordinator"
        self.coordinator, self.address = start_coordinator(
            self.folder,
            ["--listen", listen, "--run", settings.name, "--record", str(record)],
        )
        self._note(f"coordinator at {self.address.removeprefix('tcp://')}")

    def _start_peer(self, name: str, resume: Path | None = None) -> None:
        self.tails.setdefault(name, Tail(self.folder / f"{name}.jsonl"))
        arguments = ["--join", self.address]
        if resume:
            arguments += ["--resume", str(resume)]
        self.children[name] = start_peer(self.folder, name, arguments, self.launches[name])

    def _look(self, view: View) -> None:
        """One turn: what was said, who has ended, what the coordinator knows."""
        self._read()
        for name in self.names:
            child = self.children.get(name)
            if child is not None and child.code is not None:
                self._on_exit(name, child)
        self._end_the_late()
        assert self.coordinator is not None
        if self.coordinator.code is not None:
            why = describe_exit(self.coordinator.code)
            self._note(f"coordinator lost ({why}), rounds go on; it is started again")
            self._start_coordinator(self.address)
        if time.monotonic() - self.status_asked_s >= STATUS_S:
            self.status_asked_s = time.monotonic()
            for peer in control_link.peers(self.address, self.settings.name):
                row = self.board.rows.get(peer["name"])
                if row is not None and peer["peer"] == f"{row.peer_id:016x}":
                    row.role = peer["role"]
        view.refresh()
        time.sleep(POLL_S)

    def _read(self) -> None:
        for name, tail in self.tails.items():
            for event in tail.read():
                self.log.take(name, event)
                self.board.take(name, event)

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
        control_link.exited(self.address, self.settings.name, row.peer_id, self.launches[name], why)
        row.peer_id = 0
        self._replace(name, why)

    def _replace(self, name: str, why: str) -> None:
        rows = self.board.rows.values()
        if any(row.state == "finished" for row in rows):
            return  # the run is about to end; there would be nobody to fetch state from
        row = self.board.rows[name]
        # Crashing again where it began, it would crash for ever.
        hopeless = "exit code" in why and row.incarnation and row.step <= self.began[name]
        if self.restarts[name] >= self.settings.restarts or hopeless:
            if not self.children:
                raise Error(f"all peers are lost; the last was {name} ({why}); see {self.folder}")
            return
        self.restarts[name] += 1
        self.began[name] = row.step
        row.state, row.incarnation = "starting", row.incarnation + 1
        alone = not self.children
        self._start_peer(name, self._newest_checkpoint() if alone else None)
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

    def _baseline(self, corpus: Corpus) -> None:
        """One peer alone, the same number of steps: what being together is compared with."""
        folder = self.folder / "baseline"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        text = json.dumps(to_mapping(self.settings))
        (folder / "config.json").write_text(text, encoding="utf-8")
        tail = Tail(folder / f"{ALONE}.jsonl")
        child = start_peer(folder, ALONE, ["--alone"], secrets.token_hex(8))
        self.children = {ALONE: child}
        board = self._board(corpus, {ALONE: PeerRow(ALONE)})
        board.note("baseline: one peer alone, for the same number of its own steps")
        with View(board) as view:
            while child.code is None:
                for event in tail.read():
                    board.take(ALONE, event)
                view.refresh()
                time.sleep(POLL_S)
        self.children = {}
        if child.code != 0:
            raise Error(f"the baseline failed: {child.last_line()}; more in {child.log}")

    def _summarise(self, seconds: float) -> None:
        from decotrain.train.summary import describe, summarise

        digests = {n: row.digest for n, row in self.board.rows.items() if row.digest}
        summary = summarise(
            self.settings, self.folder, self.board.sent_bytes, digests, round(seconds, 1)
        )
        values: dict[str, Any] = summary.as_values()
        (self.folder / "summary.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
        self.log.note("summary", **values)
        print()
        for line in describe(summary):
            print(line)
        print(f"everything is in {self.folder}")
        if not summary.digests_equal:
            raise Error("the peers that finished hold different outer states")

    def _resume_command(self) -> str:
        kept = [o for o in self.overrides if not o.startswith(("name=", "resume="))]
        words = ["decotrain", "train", f"name={self.settings.name}", "resume=auto", *kept]
        return " ".join(shlex.quote(word) for word in words)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def newest_run(folder: Path, matches: Callable[[Path], bool] = Path.is_dir) -> Path | None:
    """The run in the folder that was changed last and has checkpoints."""
    if not folder.is_dir():
        return None
    found = [p for p in folder.iterdir() if matches(p) and (p / "checkpoints").is_dir()]
    return max(found, key=lambda p: (p / "checkpoints").stat().st_mtime, default=None)
