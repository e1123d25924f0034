"""What a fine-tune comes to: the longest log replayed onto the base, and both measured.

What is praised is what the two files give anybody, and has to be what the peers held. Trains
nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from decotrain.errors import Error, FileError
from decotrain.finetune import base as bases
from decotrain.finetune.job import longest_log
from decotrain.finetune.settings import Settings
from decotrain.finetune.task import Task
from decotrain.finetune.worker import BASE
from decotrain.spsa import replay, seedlog
from decotrain.train.table import Board
from decotrain.units import size

TUNED = "tuned.safetensors"


@dataclass(frozen=True)
class Summary:
    """The figures of a fine-tune that has ended."""

    steps: int
    peers: int
    samples: int  # of all peers, in all steps
    parameters: int
    reference: str  # what reference_nats is
    reference_nats: float
    base: dict[str, float]  # held_out, and accuracy when it classifies
    tuned: dict[str, float]
    log: str
    log_bytes: int
    sent_bytes: float  # by our peers, headers and control of links included
    bytes_per_step: float  # of one peer
    digests: dict[str, str]  # SHA-256 of the parameters, of every peer that finished
    replayed: str  # of base and log, replayed here
    seconds: float


def summarise(
    settings: Settings,
    task: Task,
    folder: Path,
    board: Board,
    digests: dict[str, str],
    seconds: float,
) -> Summary:
    """Replays, writes the tuned model, measures."""
    best = longest_log(folder)
    if best is None:
        raise FileError(f"no seed log that starts from the base can be read in {folder}")
    path, steps = best
    # The last record of a peer that was killed may be torn; what is before it counts.
    replayed = replay.replay(
        folder / BASE, path, folder / TUNED, to_step=steps, threads=settings.threads
    )
    ahead = {name: text for name, text in digests.items() if text != replayed}
    if ahead and steps >= settings.steps:
        raise Error(
            f"{', '.join(ahead)} ended with other parameters than base and log give: please report"
        )
    log = seedlog.read(path)
    bases.load(task.model, folder / BASE)
    before = task.evaluate()
    bases.load(task.model, folder / TUNED)
    return Summary(
        steps=steps,
        peers=settings.peers,
        samples=sum(record.samples for record in log),
        parameters=log.header.layout.elements,
        reference=task.word,
        reference_nats=task.reference_nats,
        base=before,
        tuned=task.evaluate(),
        log=str(path),
        log_bytes=path.stat().st_size,
        sent_bytes=board.sent_bytes,
        bytes_per_step=board.sent_bytes / max(steps, 1) / settings.peers,
        digests=digests,
        replayed=replayed,
        seconds=seconds,
    )


def describe(summary: Summary) -> list[str]:
    """The summary for people, line by line."""

    def loss(figures: dict[str, float]) -> str:
        nats = figures["held_out"]
        text = f"{nats:.4f} nats = {nats / math.log(2):.4f} bits"
        return text + (f", accuracy {figures['accuracy']:.1%}" if "accuracy" in figures else "")

    word = f"{summary.reference} entropy"
    return [
        f"held-out before   {loss(summary.base)}",
        f"held-out after    {loss(summary.tuned)}",
        f"{word:<17} {summary.reference_nats:.4f} nats",
        f"seed log          {size(summary.log_bytes)}: {summary.steps} steps,"
        f" {summary.samples} samples, {summary.parameters:,} parameters ({summary.log})",
        f"sent              {size(summary.sent_bytes)}, {summary.bytes_per_step:.0f} bytes for each"
        " peer and step, headers included",
        f"parameters        sha256 {summary.replayed}, of base and log",
        *(
            f"                  {name}: {'the same' if text == summary.replayed else text}"
            for name, text in summary.digests.items()
        ),
    ]
