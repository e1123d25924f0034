"""`decotrain train` as a job of the launcher: its files, its table, its baseline, its summary.

Trains nothing and starts no process by itself; torch is imported when the run has ended.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from decotrain.data import Corpus, open_corpus, unigram_entropy
from decotrain.outer_options import is_own
from decotrain.train.asked import as_the_run_says
from decotrain.train.launcher import Launcher, write_config
from decotrain.train.settings import SHARED, Settings, parse, to_mapping
from decotrain.train.table import Board, PeerRow

ALONE = "alone"


class TrainJob:
    """Peers pre-train one model on a text."""

    command = "train"
    worker = "decotrain.train.worker"
    saved_as = "checkpoints"  # in a run's folder: what makes it one that can be resumed
    leftovers = (saved_as, "baseline")

    def __init__(self, settings: Settings, named: Sequence[str] = ()) -> None:
        self.settings, self.named = settings, named  # named: overrides of the command line
        self.name, self.peers, self.listen = settings.name, settings.peers, settings.listen
        self.restarts, self.resume = settings.restarts, settings.resume == "auto"
        self.join = settings.join or ""

    @classmethod
    def of(cls, config: Mapping[str, Any], named: Sequence[str] = ()) -> TrainJob:
        """ConfigError names the first key that is wrong."""
        return cls(parse(as_the_run_says(config, named, SHARED, cls.command)), named)

    def prepare(self) -> None:
        from decotrain.train import preset  # imports torch

        self.outer = preset.options(self.settings)
        self.corpus: Corpus = open_corpus(self.settings.data.path, self.settings.model.context)

    def mapping(self) -> dict[str, Any]:
        return to_mapping(self.settings)

    def board(self, rows: dict[str, PeerRow]) -> Board:
        settings, corpus = self.settings, self.corpus
        unigram_nats = unigram_entropy(corpus.held_out)
        board = Board(settings.name, settings.steps, settings.rounds, unigram_nats, rows)
        megabytes = (len(corpus.train) + len(corpus.held_out)) / 1e6
        board.note(f"text: {corpus.files} files, {megabytes:.1f} MB from {corpus.source}")
        for word in self._unused():
            board.note(word)
        return board

    def _unused(self) -> Iterator[str]:
        """What was asked for and means nothing to the preset. No error: a sweep over presets and
        codecs comes to such pairs."""
        preset = self.settings.outer.preset
        for word in self.named:
            group, _, key = word.partition("=")[0].lstrip("+").partition(".")
            if "codec" not in self.outer and re.match(r"\+*codec[.=@]", word):
                yield f"{word} is not used: outer={preset} has a codec of its own"
            key = key.removeprefix("own.")
            if group == "outer" and key and is_own(preset) and key not in ("preset", *self.outer):
                yield f"{word} is not used: {preset} takes no {key}"
        if is_own(preset) and "codec" in self.outer:
            for key, value in vars(self.settings.codec).items():
                if key != "name" and value not in (False, "f32") and key not in self.outer:
                    yield f"codec.{key}={value} is not used: {preset} takes no {key}"

    def saved(self, folder: Path, board: Board) -> list[str]:
        """The most advanced checkpoint of any peer."""
        from decotrain import checkpoint

        places = (folder / self.saved_as).glob("peer-*")
        found = [saved for place in places if (saved := checkpoint.newest(place))]
        if not found:
            return []
        best = max(found, key=lambda saved: saved.round_number)
        board.note(f"resuming from round {best.round_number}")
        return ["--resume", str(best.path)]

    def finish(self, run: Launcher, seconds: float) -> tuple[dict[str, Any], list[str]]:
        from decotrain.train.summary import describe, summarise

        if self.settings.baseline:
            self._baseline(run)
        summary = summarise(self.settings, run.folder, run.board.sent_bytes, run.digests, seconds)
        return summary.as_values(), describe(summary)

    def _baseline(self, run: Launcher) -> None:
        """One peer alone, the same number of steps: what being together is compared with."""
        folder = run.folder / "baseline"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_config(folder, self.mapping())
        board = self.board({ALONE: PeerRow(ALONE)})
        board.note("baseline: one peer alone, for the same number of its own steps")
        run.watch_alone(folder, ALONE, ["--alone"], board)
