"""One peer: the training loop, and what it tells and saves on the way.

    python -m decotrain.train.worker RUN_FOLDER --peer 2 --join 127.0.0.1:29400

Started by the launcher; what it prints goes to peer-2.log, what it measures to peer-2.jsonl. With
`--alone` it trains without a run, for comparison. Churn is not handled here: that is the library's.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from decotrain import checkpoint
from decotrain.communicator import Communicator
from decotrain.data import Batches, Corpus, SampleOrder, open_corpus
from decotrain.errors import FileError
from decotrain.model import ModelConfig, Transformer, loss_of
from decotrain.outer import DiLoCo, OuterOptimizer
from decotrain.train import peer
from decotrain.train.metrics import Journal
from decotrain.train.settings import InnerSettings, Settings, parse

EVALUATION_BATCH = 32


def make_model(settings: Settings) -> Transformer:
    """The example model, with the run's seed."""
    torch.manual_seed(settings.seed)
    model = settings.model
    return Transformer(
        ModelConfig(
            model.layers, model.width, model.heads, model.kv_heads, model.hidden, model.context
        )
    )


def make_optimizer(model: nn.Module, inner: InnerSettings) -> torch.optim.AdamW:
    """AdamW; matrices decay, gains do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    gains = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": inner.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=inner.lr, betas=inner.betas, fused=True)


def lr_at(step: int, steps: int, inner: InnerSettings) -> float:
    """Linear warm-up, then a cosine down to a fraction."""
    warm = min(1.0, (step + 1) / max(inner.warmup_steps, 1))
    cosine = 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))
    return inner.lr * warm * (inner.final_lr + (1 - inner.final_lr) * cosine)


@torch.no_grad()
def held_out_loss(model: nn.Module, corpus: Corpus, context: int, windows: int) -> float:
    """Nats for each byte over the same windows on every peer."""
    texts = torch.from_numpy(corpus.held_out_windows(windows, context))
    total = 0.0
    for at in range(0, len(texts), EVALUATION_BATCH):
        texts_now = texts[at : at + EVALUATION_BATCH]
        total += float(loss_of(model, texts_now)) * len(texts_now)
    return total / len(texts)


class Trainer:
    """What one peer holds while it trains."""

    def __init__(self, settings: Settings, folder: Path, peer: str, journal: Journal) -> None:
        self.settings, self.folder, self.peer, self.journal = settings, folder, peer, journal
        self.corpus = open_corpus(settings.data.path, settings.model.context)
        context = settings.model.context
        order = SampleOrder(len(self.corpus.train), context, settings.seed)
        self.batches = Batches(
            self.corpus, order, context, settings.batch, settings.outer.sync_every
        )
        self.model = make_model(settings)
        self.inner = make_optimizer(self.model, settings.inner)
        self.tokens = settings.batch * context  # of one inner step
        self.started_s = self.told_s = time.perf_counter()
        self.told_steps = self.steps = 0
        self.losses: list[float] = []

    def inner_step(self, global_step: int, windows: np.ndarray[Any, Any]) -> None:
        """One step of the inner optimizer on one batch."""
        lr = lr_at(global_step, self.settings.steps, self.settings.inner)
        for group in self.inner.param_groups:
            group["lr"] = lr
        loss = loss_of(self.model, torch.from_numpy(windows))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.inner.clip)
        self.inner.step()
        self.inner.zero_grad()
        self.losses.append(loss.item())
        self.steps += 1

    def progress(self, step: int, **values: Any) -> dict[str, Any]:
        """A line about the steps since the last one; the figures in it."""
        now_s = time.perf_counter()
        steps = self.steps - self.told_steps
        figures = {
            "step": step,
            "loss": sum(self.losses) / max(len(self.losses), 1),
            "tokens_per_s": steps * self.tokens / max(now_s - self.told_s, 1e-9),
            "lr": self.inner.param_groups[0]["lr"],
            **values,
        }
        self.journal.write("progress", **figures)
        self.told_s, self.told_steps, self.losses = now_s, self.steps, []
        return figures

    @property
    def due(self) -> bool:
        """Time for a line about progress."""
        return bool(self.losses) and time.perf_counter() - self.told_s >= peer.PROGRESS_S

    def save(self, folder: Path, round_number: int, outer: OuterOptimizer | None) -> None:
        """A checkpoint; its model is the outer parameters."""
        tensors, facts = checkpoint.pack_optimizer(self.inner)
        tensors["torch_rng"] = torch.get_rng_state()
        meta: dict[str, Any] = {"inner": facts, "config": peer.config_of(self.folder)}
        if outer is None:
            model = dict(self.model.state_dict())
        else:
            saved = outer.state_dict()
            tensors |= {f"outer.{key}": tensor for key, tensor in saved["tensors"].items()}
            meta["outer"] = {key: saved[key] for key in ("versions", "tokens")}
            meta["digest"] = outer.digest()
            with outer.swapped():
                model = {k: t.clone() for k, t in self.model.state_dict().items()}
        checkpoint.write(folder, round_number, model, tensors, meta, self.settings.keep)

    def load_inner(self, folder: Path) -> int:
        """Moments and generator from our own newest checkpoint; its round, or -1."""
        saved = checkpoint.newest(folder)
        if saved is None:
            return -1
        try:
            checkpoint.unpack_optimizer(self.inner, saved.state, saved.meta["inner"])
            torch.set_rng_state(saved.state["torch_rng"])
        except (FileError, KeyError, ValueError):
            return -1  # of another configuration: start with fresh moments
        return saved.round_number


def train_alone(trainer: Trainer) -> None:
    """One peer without others: the same number of steps, no rounds."""
    settings, sync_every = trainer.settings, trainer.settings.outer.sync_every
    for step in range(settings.steps):
        trainer.inner_step(step, trainer.batches.at(step // sync_every, 0, step % sync_every))
        if trainer.due:
            trainer.progress(step + 1)
    trainer.save(trainer.folder / "checkpoints" / trainer.peer, settings.rounds, None)
    trainer.journal.write("end", step=settings.steps)


def train_together(trainer: Trainer, comm: Communicator, resume: Path | None) -> None:
    """The loop of a peer in a run."""
    settings, journal = trainer.settings, trainer.journal
    place = trainer.folder / "checkpoints" / trainer.peer
    inner_round = trainer.load_inner(place)
    outer = DiLoCo(
        trainer.model,
        trainer.inner,
        comm,
        sync_every=settings.outer.sync_every,
        lr=settings.outer.lr,
        momentum=settings.outer.momentum,
        codec=settings.codec.name,
        error_feedback=settings.codec.error_feedback,
        state=_outer_state(resume),
    )
    journal.write(
        "start", step=outer.global_step, round=outer.rounds(), slot=comm.slot, id=comm.peer,
        inner_from_round=inner_round, pid=os.getpid(),
    )  # fmt: skip
    step_of_round = 0
    while outer.global_step < settings.steps:
        windows = trainer.batches.at(outer.rounds(), comm.slot, step_of_round)
        trainer.inner_step(outer.global_step, windows)
        step_of_round += 1
        if outer.step(trainer.tokens):
            step_of_round = 0
            _after_round(trainer, comm, outer, place)
        if trainer.due:
            comm.set_figures(trainer.progress(outer.global_step, **_figures(trainer, outer)))
    trainer.progress(outer.global_step, **_figures(trainer, outer))
    trainer.save(place, outer.rounds(), outer)
    journal.write(
        "end", step=outer.global_step, digest=outer.digest(), **_figures(trainer, outer)
    )  # fmt: skip


def _after_round(trainer: Trainer, comm: Communicator, outer: OuterOptimizer, place: Path) -> None:
    """What a round brings: a line, sometimes an evaluation, sometimes a checkpoint."""
    settings, number = trainer.settings, outer.rounds()
    trainer.journal.write(
        "round", step=outer.global_step, round=number, digest=outer.digest(), id=comm.peer,
        contributors=len(outer.last_contributors), counted=comm.peer in outer.last_contributors,
        sent_bytes=comm.figures().get("bytes_out", 0),
    )  # fmt: skip
    # All peers hold the same outer parameters: one of them measures, another if that one dies.
    ours = outer.last_contributors[:1] == (comm.peer,)
    if ours and (number % settings.every.evaluation == 0 or number >= settings.rounds):
        with outer.swapped() as model:
            loss = held_out_loss(
                model, trainer.corpus, settings.model.context, settings.held_out_windows
            )
        trainer.journal.write("evaluation", step=outer.global_step, round=number, held_out=loss)
    if number % settings.every.checkpoint == 0 and number < settings.rounds:
        trainer.save(place, number, outer)


def _figures(trainer: Trainer, outer: OuterOptimizer) -> dict[str, Any]:
    elapsed_s = max(time.perf_counter() - trainer.started_s, 1e-9)
    return {
        "round": outer.rounds(),
        "sync_fraction": outer.sync_s / elapsed_s,
        "sent_bytes": outer.comm.figures().get("bytes_out", 0),
    }


def _outer_state(resume: Path | None) -> dict[str, Any] | None:
    """What the outer optimizer starts from, when the run goes on from a checkpoint."""
    if resume is None:
        return None
    saved = checkpoint.read(resume)
    tensors = {
        key.removeprefix("outer."): t for key, t in saved.state.items() if key.startswith("outer.")
    }
    return {**saved.meta["outer"], "tensors": tensors}


def body(asked: argparse.Namespace, config: dict[str, Any], journal: Journal) -> None:
    """What this peer's process does."""
    settings = parse(config)
    torch.set_num_threads(settings.threads)
    trainer = Trainer(settings, asked.folder, asked.peer, journal)
    if asked.alone:
        train_alone(trainer)
        return
    shared = {key: config[key] for key in ("model", "outer")}
    with peer.joined(asked, settings.name, shared, settings.peers) as comm:
        train_together(trainer, comm, asked.resume)


if __name__ == "__main__":
    sys.exit(peer.main("decotrain.train.worker", body))
