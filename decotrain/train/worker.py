"""One peer: the training loop, and what it tells and saves on the way.

    python -m decotrain.train.worker RUN_FOLDER --peer 2 --join 127.0.0.1:29400

Started by the launcher; what it prints goes to peer-2.log, what it measures to peer-2.jsonl. With
`--alone` it trains without a run, for comparison. Churn is not handled here: that is the library's.
"""

from __future__ import annotations

import argparse
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
from decotrain.data import LANES, Corpus, Numbers, SampleOrder, open_corpus, windows
from decotrain.errors import FileError, StateError
from decotrain.model import ModelConfig, Transformer, loss_of
from decotrain.outer import GradientAveraging, OuterOptimizer, make
from decotrain.outer.allotment import Portions
from decotrain.train import peer
from decotrain.train.inner import make_optimizers, set_rates
from decotrain.train.metrics import Journal
from decotrain.train.preset import check_distance, options
from decotrain.train.settings import SHARED, Settings, parse

Outer = OuterOptimizer | GradientAveraging

EVALUATION_BATCH = 32
ALONE = "alone"  # name of the peer that trains without a run
ANEW = "no round has counted what this peer learnt in {} steps: it forgets that, and goes on"


def make_model(settings: Settings) -> Transformer:
    """The example model, with the run's seed."""
    torch.manual_seed(settings.seed)
    model = settings.model
    return Transformer(
        ModelConfig(
            model.layers, model.width, model.heads, model.kv_heads, model.hidden, model.context
        )
    )


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

    portions: Portions  # of the run's samples, ours; none when it trains alone

    def __init__(self, settings: Settings, folder: Path, peer: str, journal: Journal) -> None:
        self.settings, self.folder, self.peer, self.journal = settings, folder, peer, journal
        self.corpus = open_corpus(settings.data.path, settings.model.context)
        context = settings.model.context
        self.order = SampleOrder(len(self.corpus.train), context, settings.seed)
        self.model = make_model(settings)
        self.inner = make_optimizers(self.model, settings.inner)
        self.tokens = settings.batch * context  # of one inner step
        self.told_s = time.perf_counter()
        self.computing_s = self.lr = 0.0  # computing: in inner steps
        self.told_steps = self.steps = 0
        self.losses: list[float] = []  # of steps, since the last line about progress
        self.uncounted: list[float] = []  # of steps that no counted contribution has carried yet
        self.slot: int | None = None  # whose samples these are; none when it trains alone

    @property
    def portion(self) -> int:
        """Samples that a peer trains on between two rounds."""
        outer = self.settings.outer
        return self.settings.batch * (1 if outer.preset == "ddp" else outer.sync_every)

    @property
    def epoch_portions(self) -> int:
        return -(-self.order.samples // self.portion)

    def inner_step(self, global_step: int, samples: Numbers, outer: Outer | None = None) -> None:
        """One step of the inner optimizer on these samples of the run's order."""
        started_s = time.perf_counter()
        starts = self.order.starts(samples)
        texts = windows(self.corpus.train, starts, self.settings.model.context)
        self.lr = set_rates(self.inner, global_step, self.settings.steps, self.settings.inner)
        loss = loss_of(self.model, torch.from_numpy(texts))
        loss.backward()  # type: ignore[no-untyped-call]
        if isinstance(outer, GradientAveraging):
            waited_s = outer.sync_s
            outer.average()
            started_s += outer.sync_s - waited_s
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.inner.clip)
        for optimizer in self.inner:
            optimizer.step()
            optimizer.zero_grad()
        self.losses.append(loss.item())
        self.uncounted.append(self.losses[-1])
        self.steps += 1
        self.computing_s += time.perf_counter() - started_s

    def progress(self, step: int, **values: Any) -> dict[str, Any]:
        """A line about the steps since the last one; the figures in it."""
        now_s = time.perf_counter()
        steps = self.steps - self.told_steps
        figures = {
            "step": step,
            "loss": sum(self.losses) / max(len(self.losses), 1),
            "tokens_per_s": steps * self.tokens / max(now_s - self.told_s, 1e-9),
            "lr": self.lr,
            **values,
        }
        self.journal.write("progress", **figures)
        self.told_s, self.told_steps, self.losses = now_s, self.steps, []
        return figures

    @property
    def due(self) -> bool:
        """Time for a line about progress."""
        return bool(self.losses) and time.perf_counter() - self.told_s >= peer.PROGRESS_S

    def save(self, folder: Path, round_number: int, outer: Outer | None) -> None:
        """A checkpoint; its model is the outer parameters."""
        tensors: dict[str, torch.Tensor] = {"torch_rng": torch.get_rng_state()}
        config = peer.config_of(self.folder)
        meta: dict[str, Any] = {"inner": [], "config": config, "portion": self.portion}
        for number, optimizer in enumerate(self.inner):
            moments, facts = checkpoint.pack_optimizer(optimizer, f"inner{number}")
            tensors |= moments
            meta["inner"].append(facts)
        if outer is None:
            model = dict(self.model.state_dict())
        else:
            saved = outer.state_dict()
            for kind in ("shared", "private"):
                tensors |= {f"{kind}.{key}": tensor for key, tensor in saved[kind].items()}
            meta |= {"outer": saved["facts"], "digest": outer.digest(), "slot": self.slot}
            with outer.swapped():
                model = {k: t.clone() for k, t in self.model.state_dict().items()}
        checkpoint.write(folder, round_number, model, tensors, meta, self.settings.keep)

    def load_inner(self, folder: Path) -> int:
        """Moments and generator from our own newest checkpoint; its round, or -1."""
        saved = checkpoint.newest(folder)
        if saved is None:
            return -1
        try:
            parts = zip(self.inner, saved.meta["inner"], strict=True)
            for number, (optimizer, facts) in enumerate(parts):
                checkpoint.unpack_optimizer(optimizer, saved.state, facts, f"inner{number}")
            torch.set_rng_state(saved.state["torch_rng"])
        except (FileError, KeyError, TypeError, ValueError):
            return -1  # of another configuration: start with fresh moments
        return saved.round_number


def train_alone(trainer: Trainer) -> None:
    """One peer without others: the same number of steps, no rounds."""
    settings, batch = trainer.settings, trainer.settings.batch
    for step in range(settings.steps):
        trainer.inner_step(step, np.arange(step * batch, (step + 1) * batch))
        if trainer.due:
            trainer.progress(step + 1)
    trainer.save(trainer.folder / "checkpoints" / trainer.peer, settings.rounds, None)
    trainer.journal.write("end", step=settings.steps)


def make_outer(trainer: Trainer, comm: Communicator, resume: Path | None) -> Outer:
    """The preset of the configuration, with the options it has."""
    settings = trainer.settings
    place = trainer.folder / "checkpoints" / trainer.peer
    outer = make(
        settings.outer.preset,
        trainer.model,
        trainer.inner,
        comm,
        state=_outer_state(resume, place, trainer.portion),
        epoch_portions=trainer.epoch_portions,
        **options(settings),
    )
    if isinstance(outer, OuterOptimizer):
        check_distance(outer.schedule, settings.outer.sync_every)
    return outer


def train_together(trainer: Trainer, comm: Communicator, resume: Path | None) -> None:
    """The loop of a peer in a run."""
    settings, journal = trainer.settings, trainer.journal
    place = trainer.folder / "checkpoints" / trainer.peer
    inner_round = trainer.load_inner(place)
    outer = make_outer(trainer, comm, resume)
    trainer.portions = Portions(outer.allotment, trainer.portion)
    trainer.slot = comm.slot
    number = outer.global_step // settings.outer.sync_every
    journal.write(
        "start", step=outer.global_step, round=number, slot=trainer.slot, id=comm.peer,
        inner_from_round=inner_round, pid=os.getpid(),
    )  # fmt: skip
    while outer.global_step < settings.steps:
        trainer.inner_step(outer.global_step, draw(trainer, outer, trainer.slot), outer)
        if outer.step(trainer.tokens):
            trainer.slot = comm.slot
        if number != (number := outer.global_step // settings.outer.sync_every):
            _after_round(trainer, comm, outer, place, number)
        if trainer.due:
            comm.set_figures(trainer.progress(outer.global_step, **_figures(trainer, outer)))
    outer.finish()
    trainer.progress(outer.global_step, **_figures(trainer, outer))
    _save(trainer, place, number, outer)
    journal.write(
        "end", step=outer.global_step, digest=outer.digest(), **_figures(trainer, outer)
    )  # fmt: skip


def draw(trainer: Trainer, outer: Outer, slot: int) -> Numbers:
    """The samples of the next step. Who has used all it was given, and was not heard of since,
    forgets what did not count: no sample is in its contribution twice."""
    portions = trainer.portions
    if portions.spent(slot):
        outer.finish()  # what is under way may count
    if portions.spent(slot):
        trainer.journal.write("note", text=ANEW.format(len(trainer.uncounted)))
        outer.begin_anew()
        portions.begin_anew()
        trainer.uncounted = []
    batch = trainer.settings.batch
    samples = portions.take(slot, batch)
    del trainer.uncounted[portions.untold // batch - 1 :]  # of a step that is made again (ddp)
    return samples


def _after_round(
    trainer: Trainer, comm: Communicator, outer: Outer, place: Path, number: int
) -> None:
    """What `sync_every` steps bring: a line, sometimes an evaluation, sometimes a checkpoint."""
    settings = trainer.settings
    counted = comm.peer in outer.last_contributors
    losses, samples = (trainer.uncounted, trainer.portions.uncounted) if counted else ([], [])
    trainer.journal.write(
        "round", step=outer.global_step, round=number, digest=outer.digest(), id=comm.peer,
        contributors=len(outer.last_contributors), counted=counted,
        samples=samples, counted_tokens=len(losses) * trainer.tokens,
        counted_loss=sum(losses) / max(len(losses), 1),
        sent_bytes=comm.figures().get("bytes_out", 0),
    )  # fmt: skip
    if counted:
        trainer.uncounted, trainer.portions.uncounted = [], []
    # All peers hold the same outer parameters: one of them measures, another if that one dies.
    ours = outer.last_contributors[:1] == (comm.peer,)
    if ours and (number % settings.every.evaluation == 0 or number >= settings.rounds):
        with outer.swapped() as model:
            loss = held_out_loss(
                model, trainer.corpus, settings.model.context, settings.held_out_windows
            )
        trainer.journal.write("evaluation", step=outer.global_step, round=number, held_out=loss)
    if number % settings.every.checkpoint == 0 and number < settings.rounds:
        _save(trainer, place, number, outer)


def _save(trainer: Trainer, place: Path, number: int, outer: Outer) -> None:
    """A full disk ends no training: the checkpoint before stands, and people are told."""
    try:
        trainer.save(place, number, outer)
    except FileError as error:
        trainer.journal.write("note", text=f"{error}; what was saved before stands")


def _figures(trainer: Trainer, outer: Outer) -> dict[str, Any]:
    """utilisation: computing, as a part of computing and waiting for others."""
    return {
        "round": outer.global_step // trainer.settings.outer.sync_every,
        "utilisation": trainer.computing_s / max(trainer.computing_s + outer.sync_s, 1e-9),
        "sent_bytes": outer.comm.figures().get("bytes_out", 0),
    }


def _outer_state(resume: Path | None, place: Path, portion: int) -> dict[str, Any] | None:
    """What the outer optimizer starts from, when the run goes on from a checkpoint: our own of the
    same round if there is one, with our local parameters, else the shared part of another's."""
    if resume is None:
        return None
    saved = checkpoint.read(resume)
    own = checkpoint.newest(place)
    same = own is not None and own.meta.get("digest") == saved.meta["digest"]
    if own is not None and same and own.round_number == saved.round_number:
        saved = own
    if (was := saved.meta.get("portion", portion)) != portion:
        raise StateError(
            f"{resume} is of a run whose peers train on {was} samples between rounds (batch times"
            f" outer.sync_every), here {portion}; resume with the options the run was started with"
        )
    kinds: dict[str, dict[str, torch.Tensor]] = {"shared": {}, "private": {}}
    for key, tensor in saved.state.items():
        kind, _, rest = key.partition(".")
        if kind in kinds:
            kinds[kind][rest] = tensor
    if saved.path.parent != place:
        del kinds["private"]
    return {"facts": saved.meta["outer"], **kinds}


def slot_before(resume: Path | None, place: Path) -> int | None:
    """The slot that our checkpoint of the same state was made in: samples and sums go by it, so
    the run goes on with the same bits in no other. None: there is no such checkpoint."""
    if resume is None:
        return None
    try:
        own = checkpoint.meta_of(place / resume.name)
        if own.get("digest") != checkpoint.meta_of(resume).get("digest"):
            return None
    except FileError:
        return None  # of that round we have none; what is wrong with `resume` is said later
    slot = own.get("slot")  # none in those of older versions
    return slot if type(slot) is int and 0 <= slot < LANES else None


def body(asked: argparse.Namespace, config: dict[str, Any], journal: Journal) -> None:
    """What this peer's process does."""
    settings = parse(config)
    torch.set_num_threads(settings.threads)
    trainer = Trainer(settings, asked.folder, asked.peer, journal)
    if asked.alone:
        train_alone(trainer)
        return
    shared = {key: config[key] for key in SHARED}
    slot = slot_before(asked.resume, trainer.folder / "checkpoints" / trainer.peer)
    with peer.joined(asked, settings.name, shared, settings.peers, slot) as comm:
        train_together(trainer, comm, asked.resume)


if __name__ == "__main__":
    sys.exit(peer.main("decotrain.train.worker", body))
