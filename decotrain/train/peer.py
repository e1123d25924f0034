"""What the process of any peer of a local run does: arguments, signals, journal, join and leave.

The work itself is a function that the worker modules hand in; they are started by the launcher.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from decotrain.communicator import Communicator, join
from decotrain.errors import Error
from decotrain.parent import end_with_parent
from decotrain.train.metrics import Journal

PROGRESS_S = 1.0  # between two lines about progress
LEAVE_S = 3.0  # less than the launcher's patience

Body = Callable[[argparse.Namespace, dict[str, Any], Journal], None]


class Stopped(BaseException):
    """The launcher asks us to end."""


def config_of(folder: Path) -> dict[str, Any]:
    """The run's configuration, as the launcher wrote it."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


@contextmanager
def joined(
    asked: argparse.Namespace,
    run: str,
    config: Mapping[str, Any],
    min_peers: int,
    slot: int | None = None,
) -> Iterator[Communicator]:
    """In the run while inside; an error of ours is no reason to let the others wait."""
    comm = join(asked.join, name=asked.peer, run=run, config=config, min_peers=min_peers, slot=slot)
    try:
        yield comm
    finally:
        comm.leave(LEAVE_S)


def _arguments(program: str, words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=program)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peer", required=True, help="name in logs, e.g. peer-2")
    parser.add_argument("--join", help="address of the coordinator")
    parser.add_argument("--alone", action="store_true", help="train without a run")
    parser.add_argument("--resume", type=Path, help="what was saved, to go on from")
    return parser.parse_args(words)


def _stop(*_: object) -> None:
    raise Stopped


def main(program: str, body: Body, words: list[str] | None = None) -> int:
    """Exit code 0: done or stopped; 2: an error that says what to do; else a crash."""
    end_with_parent()
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's
    asked = _arguments(program, words)
    journal = Journal(asked.folder / f"{asked.peer}.jsonl")
    try:
        body(asked, config_of(asked.folder), journal)
    except Stopped:
        journal.write("stopped")
    except Error as error:
        print(error, file=sys.stderr)
        return 2
    return 0
