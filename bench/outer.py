"""Every outer optimizer on the same tokens: loss, bytes and peak, in one process.

Peers are threads, each with a `Communicator` of a run on the loopback: rounds, codecs and bytes are
the real ones, and computing is all that takes time. Each variant trains the example model on the
default text for the same number of steps of the same number of peers, from the same first
parameters, on the same samples; its loss is that of the outer parameters on held-out text, relative
to `ddp` with the same seed. Bytes are what all peers sent. `peak_step_bytes` is the most that one
peer's rounds move within one inner step (encoded, each way): the bandwidth that a link needs when a
step takes a second. `utilisation` is computing / (computing + waiting); peers that wait for each
other's turn on the processor are in it, so it is in the JSON and in no table.

`naive delay` (results one round late, nothing else) and `diloco, 30 % dropped` (each contribution
left out with probability 0.3) are there to compare with.

Options (`--set`): peers=4, steps=1200, every=24, seeds=3, width=160, layers=4, context=64, batch=4,
lr=3e-3, variants=a;b (names from the table, with options behind them; last may come `seeds=N` for
fewer seeds than the others and `steps=N` for another length, compared with `ddp` and `diloco` of
that length; default: all), data=PATH (default: Python's sources), keep=FOLDER (each
case's figures are kept there and not measured again: a long run can be stopped and can be made in
pieces, `variants` and `--seed` at a time, before the one that draws the tables).
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import statistics
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.common import CannotRunError, Report, Settings, log
from decotrain.communicator import Communicator, join
from decotrain.control.coordinator import Options
from decotrain.control.server import ServerThread
from decotrain.data import Batches, SampleOrder, open_corpus
from decotrain.model import ModelConfig, Transformer, loss_of
from decotrain.outer import (
    EveryH,
    GradientAveraging,
    Nesterov,
    OuterOptimizer,
    make,
)
from decotrain.train.inner import make_optimizers, set_rates
from decotrain.train.settings import InnerSettings
from decotrain.train.worker import held_out_loss

WAIT_S = 3600.0  # a machine may be busy with other things
DROPPED = 0.3
GOALS = {  # of the medians, in percent
    "diloco": ("ddp", 6.0),
    "eager": ("ddp", 10.0),
    "streaming e2m1+int8": ("diloco", 1.0),
    "diloco, 30 % dropped": ("diloco", 2.0),
}
BASES = ("ddp", "diloco")  # what the others are compared with, seed by seed
HELD_OUT_WINDOWS = 512


def naive_delay(*args: Any, sync_every: int, lr: float, momentum: float) -> OuterOptimizer:
    schedule = EveryH(sync_every, overlap=sync_every)
    return OuterOptimizer(*args, schedule=schedule, update=Nesterov(lr, momentum))


FEW = {"momentum": 0.6}  # for fewer than 100 rounds
THIN = FEW | {"layers": 1, "error_feedback": True}
VARIANTS: dict[str, tuple[str, dict[str, Any], str]] = {  # preset, options, inner optimizer
    "ddp": ("ddp", {}, "adamw"),
    "local_sgd": ("local_sgd", {}, "adamw"),
    "diloco": ("diloco", FEW, "adamw"),
    "diloco, 30 % dropped": ("diloco", FEW, "adamw"),
    "streaming": ("streaming", FEW | {"layers": 1}, "adamw"),
    "streaming e2m1+int8": ("streaming", THIN | {"codec": "e2m1+int8"}, "adamw"),
    "streaming e2m1, owners": (
        "streaming",
        THIN | {"codec": "e2m1", "owner_feedback": True},
        "adamw",
    ),
    "streaming e3m0": ("streaming", THIN | {"codec": "e3m0"}, "adamw"),
    "eager": ("eager", FEW | {"lr": 0.4}, "adamw"),
    "naive delay": ("naive delay", FEW | {"lr": 0.4}, "adamw"),
    "co2": ("co2", {}, "adamw"),
    "sparseloco": ("sparseloco", {}, "adamw"),
    "delayed_nesterov": ("delayed_nesterov", FEW | {"delay": 4}, "adamw"),
    "muloco e2m1+int8": ("muloco", FEW, "muon"),
}


class Variant:
    """A name of the table, with options of its own behind it: "diloco lr=0.8 momentum=0.7".

    inner=RATE is the inner learning rate, every=STEPS the distance of rounds; the rest is the
    preset's.
    """

    def __init__(self, name: str, every: int, lr: float) -> None:
        words = name.split(" ")
        said = [word for word in words if re.fullmatch(r"\w+=\S+", word)]
        base = " ".join(word for word in words if word not in said)
        if base not in VARIANTS:
            raise CannotRunError(f"no variant {base!r}; there are {'; '.join(VARIANTS)}")
        own = dict(word.split("=", 1) for word in said)
        self.lr, self.every = float(own.pop("inner", lr)), int(own.pop("every", every))
        self.preset, options, self.optimizer = VARIANTS[base]
        self.options = options | {key: _value(text) for key, text in own.items()}
        self.dropped = DROPPED if "dropped" in base else 0.0

    def make(self, model: nn.Module, inner: Any, comm: Any) -> OuterOptimizer | GradientAveraging:
        if self.preset == "ddp":
            return make("ddp", model, inner, comm, **self.options)
        options = self.options | {"sync_every": self.every}
        if self.preset == "naive delay":
            return naive_delay(model, inner, comm, **options)
        return make(self.preset, model, inner, comm, **options)


def _value(text: str) -> Any:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


class Counting:
    """A communicator that counts what its rounds move, by step, and drops contributions."""

    def __init__(self, comm: Communicator, dropped: float, seed: int) -> None:
        self._comm, self._dropped, self._random = comm, dropped, random.Random(seed)
        self.step = 0
        self.moved: dict[int, float] = defaultdict(float)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def all_reduce(self, values: Any, *, weight: float, **options: Any) -> Any:
        from decotrain import _core

        if self._dropped and self.step and self._random.random() < self._dropped:
            weight = 0.0
        codec = options.get("codec", "f32")
        peers = len(self._comm.members)
        each = _core.codec_bytes(codec, values.numel())
        back = _core.codec_bytes(options.get("result_codec") or codec, values.numel())
        self.moved[self.step] += (each + back) * (peers - 1) / peers
        return self._comm.all_reduce(values, weight=weight, **options)

    def collect(self, data: bytes | None, **options: Any) -> Any:
        self.moved[self.step] += len(data or b"") * (len(self._comm.members) - 1)
        return self._comm.collect(data, **options)


class Case:
    """One variant with one seed."""

    def __init__(self, settings: Settings, name: str, seed: int, steps: int) -> None:
        self.name, self.seed, self.steps = name, seed, steps
        small = settings.quick
        number = lambda key, default, quick: int(  # noqa: E731
            settings.option(key, str(quick if small else default))
        )
        self.peers = number("peers", 4, 2)
        self.every, self.batch = number("every", 24, 8), number("batch", 4, 1)
        width, layers = number("width", 160, 16), number("layers", 4, 2)
        context = number("context", 64, 16)
        self.config = ModelConfig(layers, width, 2, 1, 2 * width, context)
        self.variant = Variant(name, self.every, float(settings.option("lr", "3e-3")))
        self.inner = InnerSettings(
            self.variant.optimizer, self.variant.lr, 0.02, (0.9, 0.99), 0.1, 1.0,
            min(50, self.steps // 4), 0.1,
        )  # fmt: skip
        self.corpus = open_corpus(settings.options.get("data"), context)
        self.figures: dict[int, dict[str, float]] = {}
        self.errors: list[BaseException] = []

    def kept(self, folder: Path | None) -> dict[str, float]:
        """What a run of this very case has measured before; else run it, and keep that."""
        if folder is None:
            return self.run()
        facts = [self.name, self.variant.options, self.seed, self.peers, self.steps, self.every,
                 self.batch, repr(self.config), repr(self.inner), self.corpus.source]  # fmt: skip
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        path = folder / f"{key}.json"
        if path.is_file():
            figures: dict[str, float] = json.loads(path.read_text())["figures"]
            return figures
        figures = self.run()
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"case": facts, "figures": figures}, indent=1) + "\n")
        return figures

    def run(self) -> dict[str, float]:
        """Metrics: the mean of peers, or their sum for bytes."""
        options = Options(
            run="bench", min_peers=self.peers, suspect_timeout_s=WAIT_S, closed_timeout_s=WAIT_S,
            report_timeout_s=WAIT_S, install_timeout_s=WAIT_S, link_bound_s=WAIT_S,
        )  # fmt: skip
        server = ServerThread(options)
        threads = [
            threading.Thread(target=self._guarded, args=(peer, server.address), daemon=True)
            for peer in range(self.peers)
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(WAIT_S)
        finally:
            server.stop()
        if self.errors:
            raise self.errors[0]
        assert len(self.figures) == self.peers, f"{self.name}: a peer hangs"
        each = list(self.figures.values())
        assert all(one["sent_bytes"] > 0 for one in each), f"{self.name}: who sent nothing?"
        return {
            "held_out_nats": self.figures[0]["held_out_nats"],
            "sent_megabytes": sum(one["sent_bytes"] for one in each) / 1e6,
            "peak_step_kilobytes": max(one["peak"] for one in each) / 1e3,
            "utilisation": sum(one["utilisation"] for one in each) / len(each),
        }

    def _guarded(self, peer: int, address: str) -> None:
        try:
            self._peer(peer, address)
        except BaseException as error:
            self.errors.append(error)

    def _peer(self, peer: int, address: str) -> None:
        model = self._model()
        inner = make_optimizers(model, self.inner)
        raw = join(address, name=f"peer-{peer}", run="bench", listen="127.0.0.1", timeout_s=WAIT_S)
        comm = Counting(raw, self.variant.dropped, 100 * self.seed + peer)
        outer = self.variant.make(model, inner, comm)
        order = SampleOrder(len(self.corpus.train), self.config.context, self.seed)
        batches = Batches(self.corpus, order, self.config.context, self.batch, self.peers)
        computing_s, view = 0.0, raw.view
        while outer.global_step < self.steps:
            assert raw.view == view, f"{self.name}: a peer was lost; is the machine too busy?"
            comm.step = outer.global_step + 1
            started_s, waited_s = time.perf_counter(), outer.sync_s
            set_rates(inner, outer.global_step, self.steps, self.inner)
            loss_of(model, torch.from_numpy(batches.at(outer.global_step, peer))).backward()
            if isinstance(outer, GradientAveraging):
                outer.average()
            nn.utils.clip_grad_norm_(model.parameters(), self.inner.clip)
            for one in inner:
                one.step()
                one.zero_grad()
            computing_s += time.perf_counter() - started_s - (outer.sync_s - waited_s)
            outer.step(self.batch * self.config.context)
        outer.finish()
        loss = 0.0
        if peer == 0:
            with outer.swapped() as tested:
                loss = held_out_loss(tested, self.corpus, self.config.context, HELD_OUT_WINDOWS)
        moved = [bytes_ for step, bytes_ in comm.moved.items() if step]
        self.figures[peer] = {
            "held_out_nats": loss,
            "sent_bytes": raw.figures()["bytes_out"],
            "peak": max(moved),
            "utilisation": computing_s / (computing_s + outer.sync_s),
        }
        raw.leave()

    def _model(self) -> Transformer:
        with MAKING:
            torch.manual_seed(self.seed)
            return Transformer(self.config)


MAKING = threading.Lock()  # torch's generator is one for the process


@dataclass
class Turn:
    """One line of the table: a variant, how many seeds it gets and how many steps."""

    name: str
    seeds: int
    steps: int

    @staticmethod
    def of(text: str, seeds: int, steps: int) -> Turn:
        """From "eager seeds=1 steps=2100"."""
        turn = Turn(text, seeds, steps)
        while match := re.fullmatch(r"(.+) (seeds|steps)=(\d+)", turn.name):
            turn.name, number = match[1], int(match[3])
            if match[2] == "seeds":
                turn.seeds = min(number, seeds)
            else:
                turn.steps = number
        return turn


def goal(name: str, metrics: dict[str, list[float]]) -> str:
    """What this variant is to reach, and whether it does: "6 % over ddp: missed"."""
    base, most = GOALS.get(re.sub(r" \w+=\S+", "", name), ("", 0.0))  # whatever its options
    over = metrics.get(f"over_{base}_percent")
    if not over:
        return ""
    return f"{most:g} % over {base}: {'met' if statistics.median(over) <= most else 'missed'}"


def run(settings: Settings) -> Report:
    report = Report("outer", "Outer optimizers: loss, bytes and peak on equal tokens", settings)
    quick = ["ddp", "diloco", "streaming e2m1+int8", "sparseloco"] if settings.quick else VARIANTS
    chosen = settings.option("variants", ";".join(quick)).split(";")
    seeds = int(settings.option("seeds", "1" if settings.quick else "3"))
    folder = Path(kept) if (kept := settings.option("keep", "")) else None
    steps = int(settings.option("steps", "16" if settings.quick else "1200"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    turns = [Turn.of(text, seeds, steps) for text in chosen]
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    try:
        for seed in range(settings.seed, settings.seed + seeds):  # variants in turns
            for turn in [turn for turn in turns if seed < settings.seed + turn.seeds]:
                started_s = time.perf_counter()
                case = Case(settings, turn.name, seed, turn.steps)
                figures = case.kept(folder)
                for base in BASES:
                    known = found.get((base, turn.steps), {}).get("held_out_nats", [])
                    if turn.name == base or len(known) > seed - settings.seed:
                        least = figures["held_out_nats"] if turn.name == base else known[-1]
                        over = 100 * (figures["held_out_nats"] / least - 1)
                        figures[f"over_{base}_percent"] = over
                for key, value in figures.items():
                    lists = found.setdefault((turn.name, turn.steps), {})
                    lists.setdefault(key, []).append(value)
                log(f"{turn}, seed {seed}: {figures}, {time.perf_counter() - started_s:.0f} s")
    finally:
        torch.set_num_threads(threads)
    for (name, length), metrics in found.items():
        every = Variant(name, case.every, case.variant.lr).every
        row = {"variant": name, "rounds": length // every, "goal": goal(name, metrics)}
        report.add(row | {"seeds": len(metrics["held_out_nats"])}, **metrics)
    parameters = sum(p.numel() for p in case._model().parameters())
    report.note(
        f"{case.peers} peers, {parameters:,} parameters, steps of"
        f" {case.batch} x {case.config.context} bytes each, a round every {case.every}, inner rate"
        f" {case.variant.lr:g}, seeds from {settings.seed}."
    )
    report.note(
        "peak_step_kilobytes is the most that one peer moves each way in any one inner step, by the"
        " lengths of what it encodes: in any"
        " one second, when a step takes one. The part of the time that peers compute is in the JSON"
        " only: here they are threads that wait for each other's turn on the processor, and it says"
        " more of that than of the links. `python -m bench wan-utilisation` measures it on links."
    )
    over = [f"over_{base}_percent" for base in BASES]
    columns = ["held_out_nats", *over, "sent_megabytes", "peak_step_kilobytes"]
    report.table("all", columns)
    rounds = turns[0].steps // case.every
    report.plot("loss", "variant", "held_out_nats", where={"rounds": rounds},
                title=f"Held-out loss of the outer parameters after {rounds} rounds")  # fmt: skip
    return report
