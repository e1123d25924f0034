"""One peer of a fine-tune: measures, sends its bytes, applies the records, says what came of it.

    python -m decotrain.finetune.worker RUN_FOLDER --peer peer-2 --join 127.0.0.1:29400

Started by the launcher; what it prints goes to peer-2.log, what it measures to peer-2.jsonl, the
records to peer-2.seedlog, from which the process that replaces it goes on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from decotrain.communicator import Communicator
from decotrain.finetune.settings import Settings, parse
from decotrain.finetune.task import Task, open_task
from decotrain.spsa import SPSA, Recipe
from decotrain.spsa.replay import write_model
from decotrain.train import peer
from decotrain.train.metrics import Journal

BASE = "base.safetensors"  # in the run's folder: what its seed logs start from
WRITES_BASE = "peer-1"


class Tuner:
    """What one peer holds while it fine-tunes."""

    def __init__(
        self, settings: Settings, task: Task, comm: Communicator, log: Path, journal: Journal
    ) -> None:
        self.settings, self.task, self.comm, self.journal = settings, task, comm, journal
        recipe = Recipe(**settings.recipe_fields())
        self.spsa = SPSA(
            task.model, comm, recipe=recipe, select=settings.spsa.select, log=log,
            threads=settings.threads,
        )  # fmt: skip
        self.started_s = self.told_s = time.perf_counter()
        self.steps = self.told_steps = 0
        self.losses: list[float] = []

    def run(self) -> None:
        """Until the records of all steps are applied."""
        spsa, settings = self.spsa, self.settings
        self.journal.write(
            "start", step=spsa.version, round=spsa.version, slot=self.comm.slot,
            id=self.comm.peer, pid=os.getpid(),
        )  # fmt: skip
        while True:
            spsa.catch_up()
            if (step := spsa.next_step) >= settings.steps:
                break
            done = spsa.step(self.task.loss(step, self.comm.slot))
            self.losses.append(done.loss)
            self.steps += 1
            for number in done.applied:
                self._applied(number + 1)
            if time.perf_counter() - self.told_s >= peer.PROGRESS_S:
                self.comm.set_figures(self._progress())
        spsa.finish()
        self._applied(spsa.version)
        self._progress()
        self.journal.write(
            "end", step=spsa.version, digest=spsa.digest(), **self._figures()
        )  # fmt: skip

    def _applied(self, version: int) -> None:
        """All peers hold the same parameters: the one in the lowest slot measures them."""
        if version % self.settings.every.evaluation or version != self.spsa.version:
            return
        self.journal.write(
            "round", step=version, round=version, digest=self.spsa.digest(), id=self.comm.peer
        )
        active = [one.slot for one in self.comm.members if one.active]
        if self.comm.slot == min(active, default=-1):
            figures = self.task.evaluate()
            self.journal.write("evaluation", step=version, round=version, **figures)

    def _figures(self) -> dict[str, Any]:
        sent = int(self.comm.figures().get("bytes_out", 0))
        elapsed_s = max(time.perf_counter() - self.started_s, 1e-9)
        return {
            "round": self.spsa.version,
            "utilisation": 1.0 - self.spsa.waited_s / elapsed_s,
            "sent_bytes": sent,
            "bytes_per_step": sent / max(self.steps, 1),
        }

    def _progress(self) -> dict[str, Any]:
        """A line about the steps since the last one; the figures in it."""
        now_s = time.perf_counter()
        rate = (self.steps - self.told_steps) / max(now_s - self.told_s, 1e-9)
        figures = {
            "step": self.spsa.version,
            "steps_per_s": rate,
            "tokens_per_s": rate * self.task.tokens_of_step,
            "lr": self.spsa.recipe.lr_at(self.spsa.version),
            **self._figures(),
        }
        if self.losses:
            figures["loss"] = sum(self.losses) / len(self.losses)
        self.journal.write("progress", **figures)
        self.told_s, self.told_steps, self.losses = now_s, self.steps, []
        return figures


def log_of(asked: argparse.Namespace) -> Path:
    """Our log; when the run is resumed from another's, a copy of that."""
    ours: Path = asked.folder / f"{asked.peer}.seedlog"
    if asked.resume is not None and asked.resume != ours:
        draft = ours.with_suffix(".tmp")
        shutil.copyfile(asked.resume, draft)
        draft.replace(ours)
    return ours


def body(asked: argparse.Namespace, config: dict[str, Any], journal: Journal) -> None:
    """What this peer's process does."""
    settings = parse(config)
    torch.set_num_threads(settings.threads)
    task = open_task(settings)
    base = asked.folder / BASE
    if asked.peer == WRITES_BASE and not base.exists():
        write_model(base, task.model)
    with peer.joined(asked, settings.name, settings.shared(), _barrier(settings)) as comm:
        Tuner(settings, task, comm, log_of(asked), journal).run()


def _barrier(settings: Settings) -> int:
    """How many the first view waits for: ours; in somebody else's run, that is theirs to say."""
    return 0 if settings.join else settings.peers


if __name__ == "__main__":
    sys.exit(peer.main("decotrain.finetune.worker", body))
