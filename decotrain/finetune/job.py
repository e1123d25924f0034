"""`decotrain finetune` as a job of the launcher: its files, its table, its summary.

Starts no process by itself; what needs torch is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from decotrain.errors import ConfigError, FileError
from decotrain.finetune.settings import SHARED, Settings, parse
from decotrain.train.asked import as_the_run_says
from decotrain.train.launcher import Launcher
from decotrain.train.table import Board, PeerRow


class FinetuneJob:
    """Peers fine-tune one model, a byte for each sample."""

    command = "finetune"
    worker = "decotrain.finetune.worker"
    saved_as = "peer-*.seedlog"  # in a run's folder: what makes it one that can be resumed
    leftovers = ("*.seedlog", "*.safetensors")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.name, self.peers, self.listen = settings.name, settings.peers, settings.listen
        self.restarts, self.resume = settings.restarts, settings.resume == "auto"
        self.join = settings.join or ""

    @classmethod
    def of(cls, config: Mapping[str, Any], named: Sequence[str] = ()) -> FinetuneJob:
        """ConfigError names the first key that is wrong."""
        return cls(parse(as_the_run_says(config, named, SHARED, cls.command)))

    def prepare(self) -> None:
        """Finds, builds and loads everything once, so that what is wrong is said here."""
        from decotrain.finetune.task import open_task
        from decotrain.spsa import Recipe
        from decotrain.spsa.space import Space

        Recipe(**self.settings.recipe_fields())
        self.task = open_task(self.settings)
        Space(self.task.model, self.settings.spsa.select)

    def mapping(self) -> dict[str, Any]:
        return asdict(self.settings)

    def board(self, rows: dict[str, PeerRow]) -> Board:
        steps = self.settings.steps
        board = Board(self.name, steps, steps, self.task.reference_nats, rows)
        board.reference = self.task.word
        board.note(self.task.describe())
        return board

    def saved(self, folder: Path, board: Board) -> list[str]:
        """The longest log that starts from the run's base."""
        best = longest_log(folder)
        if best is None:
            return []
        path, steps = best
        if steps > self.settings.steps:
            raise ConfigError(f"{path} has {steps} steps, steps={self.settings.steps} are fewer")
        board.note(f"resuming from step {steps}")
        return ["--resume", str(path)]

    def finish(self, run: Launcher, seconds: float) -> tuple[dict[str, Any], list[str]]:
        from decotrain.finetune.summary import describe, summarise

        summary = summarise(self.settings, self.task, run.folder, run.board, run.digests, seconds)
        return asdict(summary), describe(summary)


def longest_log(folder: Path) -> tuple[Path, int] | None:
    """The log in a run's folder that begins with step 0 and goes furthest, and how far."""
    from decotrain.spsa import seedlog

    found = []
    for path in folder.glob(FinetuneJob.saved_as):
        try:
            log = seedlog.read(path)
        except FileError:
            continue  # torn at its very start, or damaged: another peer's will do
        if log.header.first_step == 0:
            found.append((log.next_step, path))
    return max(found)[::-1] if found else None
