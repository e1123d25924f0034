"""Processes of a local run: the coordinator and the peers, each with a log of its own.

They form process groups of their own, so that Ctrl-C on the terminal reaches the launcher alone,
which then ends them in order. It knows nothing of what they say.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from decotrain.errors import ConfigError, Error

READY = " listens on "  # in the coordinator's first line, before its address
READY_S = 30.0
LOG_TAIL_BYTES = 8192


@dataclass
class Child:
    """A process we started."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self.process.poll()

    def last_line(self) -> str:
        """The last thing it printed to its log, which is where errors end up."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(self.log.stat().st_size - LOG_TAIL_BYTES, 0))
                lines = file.read().decode(errors="replace").split("\n")
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def start_peer(
    worker: str, folder: Path, name: str, arguments: Iterable[str], launch: str
) -> Child:
    """A peer: the module `worker`; what it prints is appended to <name>.log."""
    environment = {
        **os.environ,
        "DECOTRAIN_LAUNCH": launch,  # equal for the process that replaces it
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "-m", worker, str(folder), "--peer", name, *arguments]
    log = folder / f"{name}.log"
    with log.open("ab") as out:
        process = subprocess.Popen(  # noqa: S603 - our own program, no shell
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment,
            start_new_session=True,
        )  # fmt: skip
    return Child(name, process, log)


def start_coordinator(folder: Path, arguments: Iterable[str]) -> tuple[Child, str]:
    """The coordinator and the address it listens on, once it does."""
    log = folder / "coordinator.log"
    command = [sys.executable, "-m", "decotrain.cli", "coordinator", "--with-parent", *arguments]
    with log.open("ab") as out:
        process = subprocess.Popen(  # noqa: S603 - our own program, no shell
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=out,
            start_new_session=True,
        )  # fmt: skip
    child = Child("coordinator", process, log)
    line = _first_line(process)
    if READY in line:
        return child, line.rpartition(READY)[2].strip()
    stop([child], 1.0)
    reason = (
        child.last_line().removeprefix("decotrain: ") or f"it said nothing within {READY_S:.0f} s"
    )
    kind = ConfigError if child.code == 2 else Error
    raise kind(reason if child.code == 2 else f"the coordinator did not start: {reason}")


def _first_line(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(READY_S):
            return ""
    return process.stdout.readline().decode(errors="replace")


def stop(children: Iterable[Child], grace_s: float) -> None:
    """Asks them to end, waits, and ends those that do not."""
    living = [child for child in children if child.code is None]
    for child in living:
        child.process.send_signal(signal.SIGTERM)
    deadline_s = time.monotonic() + grace_s
    for child in living:
        try:
            child.process.wait(max(deadline_s - time.monotonic(), 0.01))
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()
    for child in living:
        if child.process.stdout is not None:
            child.process.stdout.close()


def describe_exit(code: int) -> str:
    """How a process ended, for people."""
    if code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    return f"exit code {code}"
