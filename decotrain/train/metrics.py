"""Figures on their way: peers write journals, the launcher reads them and keeps the run's log.

- `Journal`: one JSON object for each line, appended and flushed, by one process.
- `Tail`: what others have appended to a journal since the last look; half lines wait.
- `RoundMeans`: what peers say of a round, as one figure of the run.
- `RunLog`: everything that happened in a run, in one JSONL file and as TensorBoard scalars.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

Event = dict[str, Any]
LINE_BYTES_MAX = 1 << 20
LATE_ROUNDS = 2  # further than a round: who has not spoken of it will not


class Journal:
    """Appends events to a file; each has `event` (its kind) and `time_s` (of the wall clock). What
    finds no room is lost."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._late = ""  # after a line that was written in part

    def write(self, event: str, **values: Any) -> Event:
        line = {"time_s": round(time.time(), 3), "event": event, **values}
        text = self._late + json.dumps(line) + "\n"
        try:
            done = os.write(self._file, text.encode())
        except OSError:  # no room: nothing stops a run, and readers know lines that lack a part
            done = 0
        self._late = "" if done == len(text.encode()) else "\n"
        return line

    def close(self) -> None:
        os.close(self._file)


class Tail:
    """Reads a journal from where it was; at first from its present end, or the whole of it."""

    def __init__(self, path: Path, whole: bool = False) -> None:
        self._path = path
        self._at = path.stat().st_size if path.exists() and not whole else 0

    def read(self) -> Iterator[Event]:
        """Whole lines since the last call. A line that is no event is left out."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._at)
                data = file.read()
        except FileNotFoundError:
            return
        end = data.rfind(b"\n") + 1
        self._at += end
        for line in data[:end].splitlines():
            try:
                event = json.loads(line)
            except ValueError:  # torn by a kill in the middle of a write
                continue
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                yield event


class RoundMeans:
    """The training loss of each round, over all tokens that its mean of parameters was made from.

    Each peer that contributed says how many tokens its contribution held and their mean loss; who
    was not counted says so, and tells of those tokens with the contribution that counts. Thus the
    figure means the same however many peers there are. A round is told when all of its contributors
    have spoken, or when somebody is two rounds further (one of them died).
    """

    def __init__(self) -> None:
        self._open: dict[int, list[Event]] = {}  # round -> lines of those who contributed
        self._told = -1

    def take(self, event: Event) -> list[Event]:
        """Rounds that are complete by now: round, step, loss, tokens, peers."""
        number, tokens = event.get("round"), event.get("counted_tokens")
        if not isinstance(number, int):
            return []
        if event["event"] == "start" and number < self._told - LATE_ROUNDS:
            self._open, self._told = {}, number  # everybody goes on from what was saved
        if event["event"] != "round":
            return []
        if isinstance(tokens, int | float) and tokens > 0 and number > self._told:
            self._open.setdefault(number, []).append(event)
        due = [
            one for one, lines in sorted(self._open.items())
            if one <= number - LATE_ROUNDS or len(lines) >= int(lines[-1].get("contributors", 0))
        ]  # fmt: skip
        return [self._mean(one) for one in range(self._told + 1, max(due, default=-1) + 1)
                if one in self._open]  # fmt: skip

    def _mean(self, number: int) -> Event:
        lines = self._open.pop(number)
        self._told = number
        tokens = sum(line["counted_tokens"] for line in lines)
        return {
            "round": number,
            "step": int(lines[0].get("step", 0)),
            "loss": sum(x["counted_loss"] * x["counted_tokens"] for x in lines) / tokens,
            "tokens": tokens,
            "peers": len(lines),
        }


class RunLog:
    """The log of a run. TensorBoard is imported when the first scalar comes."""

    SCALARS = (
        "loss", "held_out", "accuracy", "tokens_per_s", "steps_per_s", "utilisation",
        "sent_bytes", "bytes_per_step", "lr",
    )  # fmt: skip

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._journal = Journal(folder / "events.jsonl")
        self._writers: dict[str, Any] = {}
        self.full = False  # no room in the folder: TensorBoard's thread would not survive a write
        self._hook, threading.excepthook = threading.excepthook, self._thread_ended

    def note(self, event: str, **values: Any) -> None:
        """Something the launcher itself saw."""
        self._journal.write(event, **values)

    def take(self, peer: str, event: Event) -> None:
        """Something a peer said."""
        values = {key: value for key, value in event.items() if key not in ("event", "time_s")}
        self._journal.write(event["event"], peer=peer, said_s=event.get("time_s"), **values)
        step = event.get("step")
        if not isinstance(step, int):
            return
        for key in self.SCALARS:
            if isinstance(event.get(key), int | float):
                self._scalar(peer, key, event[key], step, event.get("time_s"))

    def mean(self, figures: Event) -> None:
        """A round's figures over all who contributed: `run` in TensorBoard."""
        self._journal.write("mean", **figures)
        for key in ("loss", "tokens", "peers"):
            self._scalar("run", key, figures[key], figures["step"], None)

    def _scalar(self, peer: str, key: str, value: float, step: int, time_s: float | None) -> None:
        """Lost when there is no room, as a line of the journal is."""
        if self.full:
            return
        try:
            self._writer(peer).add_scalar(key, value, step, time_s)
        except OSError:  # its thread ended so, and says it with every call: the next has a new one
            self._writers.pop(peer, None)

    def _thread_ended(self, told: threading.ExceptHookArgs) -> None:
        if not isinstance(told.exc_value, OSError):
            self._hook(told)

    def _writer(self, peer: str) -> Any:
        if peer not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            folder = self._folder / "tensorboard" / peer.replace(" ", "-")
            self._writers[peer] = SummaryWriter(str(folder), flush_secs=10)
        return self._writers[peer]

    def close(self) -> None:
        for writer in self._writers.values():
            with suppress(OSError):
                writer.close()
        self._journal.close()
        threading.excepthook = self._hook
