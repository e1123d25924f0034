"""One screen of status: what is known of a run, as a table on a terminal or as lines elsewhere.

`Board` gathers what peers, processes and the coordinator say; the views draw it. Nothing here
starts, stops or decides anything.
"""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from decotrain.units import size

EVENTS_SHOWN = 6
PLAIN_S = 5.0  # between two lines about progress when there is no terminal


@dataclass
class PeerRow:
    """What is known of one peer; counters of earlier incarnations are kept in `*_before`."""

    name: str
    state: str = "starting"  # training, lost, finished, too late
    role: str = ""
    step: int = 0
    round: int = 0
    loss: float = math.nan
    tokens_per_s: float = 0.0
    utilisation: float = 1.0
    sent_bytes: float = 0.0
    sent_bytes_before: float = 0.0
    incarnation: int = 0
    peer_id: int = 0
    digest: str = ""

    @property
    def sent_bytes_total(self) -> float:
        return self.sent_bytes + self.sent_bytes_before


@dataclass
class Board:
    """Everything a view may show."""

    run: str
    steps: int
    rounds: int
    unigram_nats: float
    rows: dict[str, PeerRow]
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (step, nats)
    events: deque[str] = field(default_factory=lambda: deque(maxlen=100))
    started_s: float = field(default_factory=time.monotonic)
    notes: int = 0  # events ever
    loss: float = math.nan  # of the last round, over all tokens that counted in it
    reference: str = "unigram"  # what unigram_nats is, in a word
    accuracy: float = math.nan  # on the held-out part, of a run that classifies

    def note(self, text: str) -> None:
        """Something worth a line."""
        minutes, seconds = divmod(int(time.monotonic() - self.started_s), 60)
        self.events.append(f"{minutes:02d}:{seconds:02d} {text}")
        self.notes += 1

    def take(self, name: str, event: dict[str, Any]) -> None:
        """A line of a peer's journal."""
        row = self.rows[name]
        kind = event["event"]
        shown = ("step", "round", "loss", "tokens_per_s", "utilisation", "sent_bytes")
        for key in shown if kind != "evaluation" else ():
            if isinstance(event.get(key), int | float):
                setattr(row, key, event[key])
        if isinstance(event.get("id"), int):
            row.peer_id = event["id"]
        if kind == "start":
            row.state = "training"
            if row.incarnation:
                self.note(f"{name} is back at step {row.step} with state from the others")
        elif kind == "evaluation":
            self.held_out.append((int(event["step"]), float(event["held_out"])))
            self.accuracy = float(event.get("accuracy", math.nan))
        elif kind == "note":
            self.note(f"{name}: {event.get('text', '')}")
        elif kind == "end":
            row.state, row.digest = "finished", str(event.get("digest", ""))

    def lost(self, name: str, why: str) -> None:
        """A peer's process is gone."""
        row = self.rows[name]
        row.state, row.role, row.tokens_per_s = "lost", "", 0.0
        row.sent_bytes_before, row.sent_bytes = row.sent_bytes_total, 0.0
        remain = sum(other.state in ("training", "starting") for other in self.rows.values())
        self.note(f"{name} lost ({why}), {remain} remain")

    @property
    def sent_bytes(self) -> float:
        return sum(row.sent_bytes_total for row in self.rows.values())

    @property
    def step(self) -> int:
        return max(row.step for row in self.rows.values())


def headline(board: Board) -> str:
    """One line about the whole run."""
    elapsed_s = int(time.monotonic() - board.started_s)
    parts = [
        board.run,
        f"{elapsed_s // 60}:{elapsed_s % 60:02d}",
        f"step {board.step}/{board.steps}",
    ]
    if board.rounds != board.steps:
        parts.append(f"round {max(row.round for row in board.rows.values())}/{board.rounds}")
    if not math.isnan(board.loss):
        parts.append(f"train loss {board.loss:.3f}")
    if board.held_out:
        parts.append(
            f"held-out {board.held_out[-1][1]:.3f} nats"
            f" ({board.reference} {board.unigram_nats:.3f})"
        )
    if not math.isnan(board.accuracy):
        parts.append(f"accuracy {board.accuracy:.1%}")
    parts.append(f"sent {size(board.sent_bytes)}")
    return " | ".join(parts)


def draw(board: Board) -> Group:
    """The table."""
    table = Table(expand=False)
    for title in ("peer", "state", "role"):
        table.add_column(title)
    for title in ("step", "tokens/s", "train loss", "rounds", "sent", "computing"):
        table.add_column(title, justify="right")
    styles = {"lost": "red", "starting": "yellow", "finished": "green"}
    for row in board.rows.values():
        loss = "" if math.isnan(row.loss) else f"{row.loss:.3f}"
        table.add_row(
            row.name, row.state, row.role, str(row.step), f"{row.tokens_per_s:,.0f}", loss,
            str(row.round), size(row.sent_bytes_total), f"{row.utilisation:.0%}",
            style=styles.get(row.state, ""),
        )  # fmt: skip
    lines = [Text(line) for line in list(board.events)[-EVENTS_SHOWN:]]
    return Group(Text(headline(board), style="bold"), table, *lines)


class View:
    """Shows a board again and again: in place on a terminal, as plain lines elsewhere."""

    def __init__(self, board: Board, console: Console | None = None) -> None:
        self._board = board
        self._console = console or Console(soft_wrap=True)
        self._live: Live | None = None
        self._told_s, self._told_notes = 0.0, 0
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=False)

    def __enter__(self) -> View:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.refresh(last=True)
        if self._live:
            self._live.stop()

    def refresh(self, last: bool = False) -> None:
        """Call it often; it draws when there is something to draw."""
        if self._live:
            self._live.update(draw(self._board), refresh=True)
            return
        new = self._board.notes - self._told_notes
        self._told_notes = self._board.notes
        if new:
            for line in list(self._board.events)[-new:]:
                self._console.out(line, highlight=False)
        if last or time.monotonic() - self._told_s >= PLAIN_S:
            self._told_s = time.monotonic()
            self._console.out(headline(self._board), highlight=False)
