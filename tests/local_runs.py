"""Runs of `decotrain train` and `decotrain finetune` with real processes, for tests of both."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WAIT_S = 100.0


class Running:
    """A `decotrain` of ours, told what to do."""

    def __init__(self, place: Path, *arguments: str) -> None:
        self.output = place / f"output-{len(list(place.glob('output-*')))}"
        with self.output.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "decotrain.cli", *arguments],
                cwd=place,
                env={
                    **os.environ,
                    "PYTHONPATH": str(Path(__file__).parent.parent),
                    "DECOTRAIN_CACHE": str(place / "cache"),
                },
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    @property
    def text(self) -> str:
        return self.output.read_text()

    def until(self, true: Callable[[], Any], what: str) -> Any:
        """What `true` returns once it is something."""
        deadline_s = time.monotonic() + WAIT_S
        while not (found := true()):
            assert self.process.poll() is None, f"it ended before {what}:\n{self.text}"
            assert time.monotonic() < deadline_s, f"no {what}:\n{self.text}"
            time.sleep(0.05)  # between two looks at a file of another process
        return found

    def end(self) -> str:
        """Waits for the end; what it printed."""
        assert self.process.wait(WAIT_S) == 0, self.text
        return self.text


@contextmanager
def running(place: Path, *words: str) -> Iterator[Callable[..., Running]]:
    """Starts runs whose first words are these, and leaves none behind."""
    runs: list[Running] = []

    def make(*arguments: str) -> Running:
        runs.append(Running(place, *words, *arguments))
        return runs[-1]

    yield make
    for run in runs:
        if run.process.poll() is None:
            run.process.send_signal(signal.SIGINT)
            try:
                run.process.wait(30)
            except subprocess.TimeoutExpired:
                run.process.kill()
                run.process.wait()


def journal(folder: Path, peer: str, kind: str) -> list[dict[str, Any]]:
    """Whole lines of one kind that a peer has written."""
    try:
        lines = (folder / f"{peer}.jsonl").read_text().split("\n")[:-1]
    except FileNotFoundError:
        return []
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def processes_of(folder: Path) -> dict[int, str]:
    """Command lines, by process id, of living processes that name the folder (Linux)."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line:
            found[int(entry.parent.name)] = line
    return found
