"""`SPSA(model, comm, ...)`: fine-tuning with forward passes only and one byte for each sample.

    spsa = SPSA(model, comm, lr=1e-5, samples=4, log="run.seedlog")
    for batch in loader:
        spsa.step(lambda: loss(model, batch))

A step measures how the loss changes along a few random directions, sends one byte for each, and
applies the ordered record of what all peers sent: the same bits everywhere. A peer that is missing
is a missing entry. With staleness s the record of step t is waited for only after step t + s was
measured, so that up to s round trips hide behind forward passes; which record is applied when is
fixed by its number, never by its arrival.

Does not decide membership, and keeps no optimizer state: theta and the number of records applied
are all there is.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from decotrain.errors import ConfigError, RoundError, StateError
from decotrain.rounds import Result
from decotrain.spsa import code, history, kernels, replay, seedlog
from decotrain.spsa.forward import Perturbed
from decotrain.spsa.pool import Pool
from decotrain.spsa.recipe import Recipe, Update
from decotrain.spsa.record import HEAD, Record, entries_of, payload
from decotrain.spsa.space import Select, Space

TAG = 3000  # of SPSA's rounds, unless the caller names another
LossFn = Callable[[], Any]  # returns a scalar tensor or a number


@dataclass(frozen=True)
class Step:
    """What one `step()` did here. `loss` is the mean over its own samples."""

    step: int  # number of the record this peer contributed to
    loss: float
    scalars: tuple[float, ...]  # measured, before they became bytes
    applied: tuple[int, ...]  # records applied during the call
    samples: int  # counted in the records applied, all peers
    peers: int  # in the last record applied


class SPSA:
    def __init__(
        self,
        model: torch.nn.Module,
        comm: Any = None,  # decotrain.communicator.Communicator; None: alone
        *,
        recipe: Recipe | None = None,
        select: Select = "all",  # "norms_and_biases", "adapters", a pattern of names, a function
        log: Path | str | None = None,
        tag: int = TAG,
        eval_mode: bool = True,  # measure without dropout and without touching running statistics
        compute_dtype: torch.dtype | None = None,
        threads: int = 1,
        **options: Any,  # fields of Recipe
    ) -> None:
        if recipe is not None and options:
            raise ConfigError("SPSA: give a recipe or its fields, not both")
        self.recipe = recipe if recipe is not None else Recipe(**options)
        self.model, self.comm, self.tag, self.eval_mode = model, comm, tag, eval_mode
        self.space = Space(model, select)
        self.threads = kernels.Threads(threads)
        self.perturbed = Perturbed(model, self.space, self.recipe, compute_dtype, self.threads)
        self.pool = Pool(self.recipe, self.space.masters) if self.recipe.pool else None
        self._base_digest = self.space.digest()
        self._probed = False
        self._flying: deque[Any] = deque()  # works of records not applied yet, oldest first
        self.waited_s = 0.0  # for records, all in all
        self._applied = 0  # records whose effect the parameters contain, when alone
        self._last: list[tuple[int, int, int]] = []  # (step, counted, peers) of records applied
        self._log_path = None if log is None else Path(log)
        self._log: seedlog.Writer | None = None
        self._held = 0  # records in the parameters, whether they are the run's or not
        self._chain = torch.zeros(1, dtype=torch.int64)  # of the history, for who fetches the state
        self._begin_history(0)
        self._resume()
        if comm is not None:
            # A pool is no matter of single elements: with one, state that moves is fetched anew.
            effect = self._move if self.pool is None else None
            shortcut = history.Offer(self.tag + 1, self.history, self._replay)
            comm.register_state(self.tag, self._shared_state(), self._applied, effect, shortcut)

    def _shared_state(self) -> dict[str, torch.Tensor]:
        state = {**self.space.state(), "spsa.chain": self._chain}
        return state if self.pool is None else {**state, **self.pool.state()}

    # --- the number of records applied

    @property
    def version(self) -> int:
        """Records whose effect the parameters contain."""
        return self._applied if self.comm is None else int(self.comm.version(self.tag))

    @property
    def next_step(self) -> int:
        """Number of the record that the next `step()` contributes to."""
        return self.version + len(self._flying)

    def digest(self) -> str:
        """SHA-256 of the float32 parameters: equal on all peers of equal version."""
        return self.space.digest()

    # --- a step

    def step(self, loss_fn: LossFn) -> Step:
        """Measure, send, and apply what is due. `loss_fn` runs the model's forward and returns
        the loss; it is called 2 * samples times (samples + 1 when one-sided) on one batch."""
        self._last.clear()
        self.catch_up()
        step = self.next_step
        loss, scalars = self.measure(step, loss_fn)
        data = payload(step, self._lineage(step), code.encode(scalars))
        self._flying.append(self._collect(step, data))
        while len(self._flying) > self.recipe.staleness:
            self._land()
        return Step(
            step,
            loss,
            tuple(scalars),
            tuple(number for number, _, _ in self._last),
            sum(counted for _, counted, _ in self._last),
            self._last[-1][2] if self._last else 0,
        )

    def finish(self) -> None:
        """Apply the records still in flight and close the log. The last call of a run."""
        self._last.clear()
        while self._flying:
            self._land()
        if self._log is not None:
            self._log.close()

    def _lineage(self, step: int) -> int:
        """16 bits of what we were told; in the first steps of a run, of the base too."""
        text = f"{self.recipe.digest()} {self.space.layout.to_json()}"
        if step <= self.recipe.staleness:
            text += self._base_digest
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:2], "little")

    def _collect(self, step: int, data: bytes) -> Any:
        if self.comm is None:
            return _Alone(step, {0: data})
        size = HEAD.size + code.SAMPLES_MAX
        return self.comm.collect(data, tag=self.tag, max_bytes=size, ahead=self.recipe.staleness)

    def _land(self) -> None:
        """Apply the oldest record in flight; or, when rounds went by without us, all that we can
        get, each by its number. Results of ours that are already there must not be dropped: nobody
        sends them again."""
        began_s = time.perf_counter()
        result = self._flying.popleft().wait()
        self.waited_s += time.perf_counter() - began_s
        if result.outcome == "stable" and result.seq == self.version:
            self._apply(result)
            return
        held: dict[int, Result] = {}
        incarnation = self.comm.peer
        # What follows on our state moves it at once: others may wait for us to serve it.
        while True:
            if result.outcome == "stable":
                held[result.seq] = result
            if self.comm.peer != incarnation:
                held.clear()  # a newcomer since: they may be of a branch that is no more
            self._apply_held(held)
            if not self._flying:
                break
            result = self._flying.popleft().wait()
        self.catch_up()
        if self.comm.peer != incarnation:
            return
        self._apply_held(held)
        if any(seq > self.version for seq in held):
            raise StateError(
                f"records before {min(seq for seq in held if seq > self.version)} are missing here "
                f"(version {self.version}) and nobody offers them: restart this peer"
            )

    def _apply_held(self, held: dict[int, Result]) -> None:
        """Results of ours, and between them those of rounds that we did not begin."""
        version = -1
        while version != (version := self.version):
            while (ours := held.get(self.version)) is not None:
                self._apply(ours)
            self.comm.catch_up(self.tag, self._apply, fetch=False)

    def catch_up(self) -> None:
        """Rounds that went on without us, or the state of the others. With rounds of ours in
        flight this waits: the communicator answers the next of them with "lost" if need be."""
        if self.comm is None or self._flying:
            return
        self.comm.catch_up(self.tag, self._apply, wait=True)
        self._notice_fetch()

    def _notice_fetch(self) -> None:
        chain = self._chain.numpy().tobytes()  # it comes with the parameters
        if self._held == self.version and chain == self.history.chain:
            return
        self.space.publish()
        self._held = self.version
        self.history.restart(self.version, chain)
        self._fetched()

    def _fetched(self) -> None:
        """The parameters came from the others: a log that was begun cannot go on."""
        if self._log is not None:
            self._log.close()
            self._log = None

    # --- measuring

    def measure(
        self, step: int, loss_fn: LossFn, slot: int | None = None
    ) -> tuple[float, list[float]]:
        """The scalars of a slot (None: ours) for a step, and the mean loss; changes nothing."""
        recipe = self.recipe
        if slot is None:
            slot = 0 if self.comm is None else int(self.comm.slot)
        losses: list[Any] = []
        with self._measuring() as rewind:
            if not self._probed:
                self.perturbed.probe(loss_fn)
                self._probed = True
            if recipe.one_sided:
                rewind()
                losses.append(self._plain(loss_fn))
            for sample in range(recipe.samples):
                words = code.stream(step, slot, sample)
                if recipe.pool:
                    words = code.pool_stream(recipe.key, recipe.pool, words)
                signs = (1.0,) if recipe.one_sided else (1.0, -1.0)
                for sign in signs:
                    rewind()
                    with self.perturbed.at(words, sign * recipe.epsilon):
                        losses.append(_scalar(loss_fn()))
        values = _to_floats(losses)
        if recipe.one_sided:
            scalars = [(value - values[0]) / recipe.epsilon for value in values[1:]]
        else:
            pairs = zip(values[0::2], values[1::2], strict=True)
            scalars = [(plus - minus) / (2 * recipe.epsilon) for plus, minus in pairs]
        return sum(values) / len(values), scalars

    def _plain(self, loss_fn: LossFn) -> Any:
        with torch.no_grad():
            return _scalar(loss_fn())

    @contextmanager
    def _measuring(self) -> Iterator[Callable[[], None]]:
        """Evaluation mode; or else the same dropout for all evaluations, and buffers kept."""
        if self.eval_mode:
            training = [module for module in self.model.modules() if module.training]
            self.model.eval()
            try:
                yield lambda: None
            finally:
                for module in training:
                    module.training = True
            return
        devices = sorted({m.device.index or 0 for m in self.space.masters if m.is_cuda})
        buffers = [(buffer, buffer.detach().clone()) for buffer in self.model.buffers()]
        random = torch.get_rng_state()
        cuda = [torch.cuda.get_rng_state(device) for device in devices]

        def rewind() -> None:
            torch.set_rng_state(random)
            for device, state in zip(devices, cuda, strict=True):
                torch.cuda.set_rng_state(state, device)

        try:
            yield rewind
        finally:
            with torch.no_grad():
                for buffer, saved in buffers:
                    buffer.copy_(saved)

    # --- applying

    def _apply(self, result: Any) -> None:
        """The effect of one record: the same bits on every peer."""
        entries, lineage = entries_of(result.seq, result.parts)
        if lineage is not None and lineage != self._lineage(result.seq):
            raise ConfigError(
                f"this peer and most others disagree about the recipe, the parameters or the base "
                f"(record {result.seq}): start all peers with the same options and model"
            )
        self._notice_fetch()
        record = Record(result.seq, entries)
        if record.step != self.version:
            raise RoundError(f"record {record.step} does not follow version {self.version}")
        update = self.recipe.update(record.step, record.entries)
        log = self._writer(record.step)
        with self._updating(record.step + 1):
            self.apply([update], record.step)
            self._note(record)
        self.space.publish()
        if log is not None:
            log.append(record)
        self._last.append((record.step, update.counted, len(record.entries)))

    def _move(self, result: Any) -> None:
        """What a record does to the parameters, element by element, and nothing else."""
        entries, _ = entries_of(result.seq, result.parts)
        self.apply([self.recipe.update(result.seq, entries)], result.seq)
        self._set_chain(history.after(self._chain.numpy().tobytes(), entries))

    def _note(self, record: Record) -> None:
        """A record that the parameters contain now."""
        self.history.append(record)
        self._set_chain(self.history.chain)
        self._held = record.step + 1

    def _set_chain(self, chain: bytes) -> None:
        self._chain[0] = int.from_bytes(chain, "little", signed=True)

    def _begin_history(self, step: int) -> None:
        """From what the parameters are now."""
        size = history.size_for(4 * self.space.layout.elements)
        text = f"{self.recipe.digest()} {self.space.layout.to_json()} {self._base_digest} {step}"
        self.history = history.History(size, step, history.root(text))
        self._set_chain(self.history.chain)
        self._held = step

    def _replay(self, found: history.Bytes, seconds: float) -> int | None:
        """Another peer's history in place of its parameters, when it follows ours and is cheaper;
        the number of records then held."""
        if self._chain.numpy().tobytes() != self.history.chain:
            self._notice_fetch()  # the parameters came a moment ago, and are behind already
        records = history.records_from(found, self._held, self.history.chain)
        if records is None or not self._worth_replaying(records, found.nbytes, seconds):
            return None
        log = self._writer(self._held)
        updates = [self.recipe.update(record.step, record.entries) for record in records]
        self.apply(updates, self._held)
        for record in records:
            self._note(record)
            if log is not None:
                log.append(record)
        self.space.publish()
        return self._held

    def _worth_replaying(self, records: Sequence[Record], came_bytes: int, came_s: float) -> bool:
        samples = sum(record.samples for record in records)
        adds_per_s = replay.measured_adds_per_s(self.space, self.threads)
        if samples * self.space.layout.elements < history.REPLAY_FREE_S * adds_per_s:
            return True
        rate_mbps = came_bytes * 8 / max(came_s, 1e-6) / 1e6
        return replay.cheaper_by_replay(samples, rate_mbps, adds_per_s)

    def apply(self, updates: Sequence[Update], first_step: int) -> None:
        """Apply updates in order, without exchange. A replay does it for many at once."""
        replay.run(self.space, self.recipe, updates, first_step, self.pool, self.threads)

    @contextmanager
    def _updating(self, version: int) -> Iterator[None]:
        if self.comm is None:
            yield
            self._applied = version
        else:
            with self.comm.updating(self.tag, version):
                yield

    # --- the log

    def _writer(self, step: int) -> seedlog.Writer | None:
        """For the record of this step, the next to be applied. It is opened before the first one:
        its base is what the parameters are now."""
        if self._log is not None and self._log.next_step != step:
            self._fetched()
        if self._log is None and self._log_path is not None:
            if self.pool is not None and step:
                return None  # the sums over the pool's seeds began before this log would
            path = self._log_path
            if path.exists():  # the run goes on from a state that was fetched
                path = path.with_name(f"{path.stem}.{step}{path.suffix}")
            header = seedlog.Header(self.recipe, self.space.layout, self.digest(), step)
            self._log = seedlog.Writer(path, header)
        return self._log

    def _resume(self) -> None:
        """A log of this base is there already: replay it, and go on where it ends."""
        if self._log_path is None or not self._log_path.exists():
            return
        log = seedlog.read(self._log_path)
        header = seedlog.Header(
            self.recipe, self.space.layout, self.digest(), log.header.first_step
        )
        self._log = seedlog.Writer(self._log_path, header)
        updates = [self.recipe.update(record.step, record.entries) for record in log]
        self.apply(updates, log.header.first_step)
        self._begin_history(log.header.first_step)
        for record in log:
            self._note(record)
        self.space.publish()
        self._applied = log.next_step


@dataclass
class _Alone:
    """The round of a run with one peer."""

    seq: int
    parts: dict[int, bytes]
    outcome: str = "stable"

    def wait(self) -> _Alone:
        return self


def _scalar(loss: Any) -> Any:
    if isinstance(loss, torch.Tensor):
        if loss.numel() != 1:
            raise ConfigError(f"loss_fn returned a tensor of shape {tuple(loss.shape)}")
        return loss.detach().reshape(())
    return loss


def _to_floats(losses: list[Any]) -> list[float]:
    """Floats with one synchronisation with the device, not one for each evaluation."""
    if all(isinstance(loss, torch.Tensor) for loss in losses):
        return [float(value) for value in torch.stack(losses).double().cpu().tolist()]
    return [float(loss) for loss in losses]
