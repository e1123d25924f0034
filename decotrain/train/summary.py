"""What a run comes to, read back from its newest checkpoint: what is praised is what is saved.

Measures the held-out loss, counts bytes, and lets the model write a little. It trains nothing.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from decotrain import checkpoint
from decotrain.data import open_corpus, unigram_entropy
from decotrain.errors import FileError
from decotrain.model import generate
from decotrain.train.settings import Settings
from decotrain.train.worker import held_out_loss, make_model
from decotrain.units import size


@dataclass(frozen=True)
class Summary:
    """The figures of a run that has ended."""

    rounds: int
    peers: int
    parameters: int
    held_out_nats: float
    unigram_nats: float
    alone_nats: float | None  # one peer, the same number of its own steps
    sent_bytes: float  # by all peers
    per_step_bytes: float  # what per-step gradient averaging would have sent
    digests: dict[str, str]  # SHA-256 of the outer state, of every peer that finished
    seconds: float
    sample: str

    @property
    def digests_equal(self) -> bool:
        return len(set(self.digests.values())) <= 1

    def as_values(self) -> dict[str, Any]:
        return asdict(self)


def per_step_bytes(parameters: int, peers: int, steps: int) -> float:
    """f32 gradients, all-reduced after every step: 2 (n - 1) / n of them, sent by each peer."""
    return steps * 2.0 * (peers - 1) * 4 * parameters


def summarise(
    settings: Settings, folder: Path, sent_bytes: float, digests: dict[str, str], seconds: float
) -> Summary:
    """Reads the newest checkpoints back and measures."""
    found = [
        saved
        for place in sorted((folder / "checkpoints").glob("peer-*"))
        if (saved := checkpoint.newest(place))
    ]
    if not found:
        raise FileError(f"no checkpoint can be read in {folder / 'checkpoints'}; train again")
    best = max(found, key=lambda saved: saved.round_number)
    corpus = open_corpus(settings.data.path, settings.model.context)
    model = make_model(settings)

    def measure() -> float:
        return held_out_loss(model, corpus, settings.model.context, settings.final_windows)

    alone = checkpoint.newest(folder / "baseline" / "checkpoints" / "alone")
    alone_nats = None
    if alone:
        model.load_state_dict(alone.model)
        alone_nats = measure()
    model.load_state_dict(best.model)
    parameters = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        text = generate(model, settings.prompt.encode(), settings.sample_bytes, seed=settings.seed)
    return Summary(
        rounds=best.round_number,
        peers=settings.peers,
        parameters=parameters,
        held_out_nats=measure(),
        unigram_nats=unigram_entropy(corpus.held_out),
        alone_nats=alone_nats,
        sent_bytes=sent_bytes,
        per_step_bytes=per_step_bytes(parameters, settings.peers, settings.steps),
        digests=digests,
        seconds=seconds,
        sample=settings.prompt + text.decode(errors="replace"),
    )


def printable(text: str) -> str:
    """What a model wrote may contain anything; a terminal should not obey it."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{MIDDLE DOT}" for c in text)


def describe(summary: Summary) -> list[str]:
    """The summary for people, line by line."""

    def nats(value: float) -> str:
        return f"{value:.3f} nats = {value / math.log(2):.3f} bits for each byte"

    part = summary.held_out_nats / max(summary.unigram_nats, 1e-9)
    lines = [
        f"held-out loss     {nats(summary.held_out_nats)}",
        f"unigram entropy   {nats(summary.unigram_nats)}; the loss is {part:.0%} of it",
    ]
    if summary.alone_nats is not None:
        word = "lower" if summary.held_out_nats < summary.alone_nats else "NOT lower"
        lines.append(
            f"one peer alone    {nats(summary.alone_nats)}, same steps; together is {word}"
        )
    sent = f"sent              {size(summary.sent_bytes)} in {summary.rounds} rounds"
    if summary.peers > 1 and summary.sent_bytes > 0:
        times = summary.per_step_bytes / summary.sent_bytes
        sent += f"; per-step averaging: {size(summary.per_step_bytes)}, {times:.1f} times as much"
    lines.append(sent)
    lines += [f"outer state       {name} sha256 {text}" for name, text in summary.digests.items()]
    if len(summary.digests) > 1:
        lines.append(
            "                  equal on all peers that finished"
            if summary.digests_equal
            else "                  NOT EQUAL: please report this"
        )
    lines += [
        "sample            (generated)",
        *("  " + x for x in printable(summary.sample).splitlines()),
    ]
    return lines
