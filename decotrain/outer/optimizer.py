"""The loop that all outer optimizers share: inner steps, now and then a round, an outer step.

    outer = OuterOptimizer(model, optimizer, comm, schedule=..., codec=..., update=..., merge=...)
    for batch in loader:
        loss(model, batch).backward(); optimizer.step(); optimizer.zero_grad()
        outer.step(tokens=batch.numel())

Each fragment of the schedule is a tag of the communicator. Its first round that brings anything is
a broadcast of the first parameters, so every peer starts from the same bits; each later one
averages pseudo-gradients and is one outer step. The version of a fragment counts all of them.

A round is a *flight*: the trainer's thread takes the pseudo-gradient, a background thread encodes
it, waits for the mean and makes the outer step; when the result is due the trainer's thread brings
it into the local parameters. So theta contains every round that was sent and has come back, while
a fragment's `base`, `version` and `digest` say what the local parameters know.

Churn is handled here and not in the training script: a newcomer fetches state, adopts the global
step and enters the next round with the tokens it has; a peer whose contribution was not counted
keeps half of its progress; a round that was lost costs a fetch of the fragment and no inner step.

Parameters that need no gradient are left alone: they are the caller's, equal everywhere or not.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from decotrain.communicator import Communicator
from decotrain.errors import ConfigError
from decotrain.outer import saved
from decotrain.outer.allotment import Allotment
from decotrain.outer.background import in_background
from decotrain.outer.codec import Codec, CodecChoice, Contribution
from decotrain.outer.flight import Flight, Landed
from decotrain.outer.fragment import KEPT_SHARE, Fragment
from decotrain.outer.merge import Eager, Merge, Replace
from decotrain.outer.schedule import Schedule
from decotrain.outer.spare import Spare
from decotrain.outer.update import Update
from decotrain.rounds import Result, Work

LOOKS_MAX = 100  # at the schedule within one step: each look moves the global step forward


class OuterOptimizer:
    """See the module. `state` (of `state_dict`) resumes; all peers then start from that round.

    Outer steps are made in host memory, or on `device` (and what they gave is copied to the host,
    from where newcomers fetch it): less time for each step, 4 bytes more for each value of it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        comm: Communicator,
        *,
        schedule: Schedule,
        update: Update,
        codec: Codec | None = None,
        merge: Merge | None = None,
        device: torch.device | str | None = None,
        epoch_portions: int = 0,  # of samples, for who draws them by `allotment`
        state: dict[str, Any] | None = None,
    ) -> None:
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        check_optimizers(optimizer, trained)
        self.model, self.comm = model, comm
        self.schedule, self.update = schedule, update
        self.codec, self.merge = codec or CodecChoice(), merge or Replace()
        linear = update.linear and not update.scalars
        if isinstance(self.merge, Eager) and not (linear and schedule.late):
            raise ConfigError(
                "the eager merge needs a linear update without scalars (SGD, Nesterov) and a"
                " schedule whose results come one round late (EveryH with overlap = steps)"
            )
        self.fragments = [
            Fragment(tag, {n: trained[n] for n in names}, update.buffers, update.scalars, device)
            for tag, names in enumerate(schedule.fragments(list(trained)))
        ]
        self.allotment = Allotment(epoch_portions)
        self.fragments[0].allotment = self.allotment  # its rounds say who contributed
        kept = {f.tag: self.codec.new_residual(f.theta) for f in self.fragments}
        self.residuals = {tag: one for tag, one in kept.items() if one is not None}
        owed = {f.tag: self.codec.new_owner_residual(f.theta) for f in self.fragments}
        self.owner_residuals = {tag: one for tag, one in owed.items() if one is not None}
        self._spare = Spare(max(fragment.elements for fragment in self.fragments))
        self.global_step = 0
        self.sync_s = 0.0  # wall time of this trainer inside rounds
        self.last_contributors: tuple[int, ...] = ()
        self._flights: dict[int, Flight] = {}
        self._late: set[int] = set()  # fragments that take part again when others open a round
        versions = saved.load(self, state) if state else [0] * len(self.fragments)
        for fragment, version in zip(self.fragments, versions, strict=True):
            effect = self._effect_on(fragment) if update.elementwise else None
            layout = fragment.layout
            comm.register_state(fragment.tag, fragment.state, version, effect, layout=layout)
        self._start(versions)

    # --- starting

    def _start(self, versions: Sequence[int]) -> None:
        """Hold what the others hold: fetched from them, or broadcast when nobody has begun."""
        moved = False
        for fragment, loaded in zip(self.fragments, versions, strict=True):
            now = self._follow(fragment, wait=True)
            while not fragment.started.item():
                result = self._broadcast(fragment).wait()
                if result.outcome != "lost":
                    self._take(fragment, result)
                now = self._follow(fragment, wait=True)
            if loaded and now == loaded:  # as saved, our own progress included
                continue
            self._flights.pop(fragment.tag, None)
            self.merge.forget(fragment)
            fragment.adopt()
            self._holds(fragment, now)
            moved |= bool(loaded)
            if self.rounds(fragment.tag):
                self._late.add(fragment.tag)
        if moved or not any(versions):
            self.global_step = self._step_of_state()

    def _broadcast(self, fragment: Fragment) -> Work:
        """The first active peer's parameters. Nobody's, when that one dies: then once more."""
        root = next((one.peer for one in self.comm.members if one.active), 0)
        return self.comm.all_reduce(
            fragment.theta.clone(),
            tag=fragment.tag,
            weight=1.0 if root == self.comm.peer else 0.0,
        )

    def _step_of_state(self) -> int:
        """Where the others are at least, by the newest round that we know of."""
        known = [(f.tag, self.rounds(f.tag)) for f in self.fragments]
        return max(self.schedule.sent_at(tag, number) if number else 0 for tag, number in known)

    # --- the loop

    def step(self, tokens: float = 1.0) -> bool:
        """Call it after each inner step, with what the step was worth. True after a round."""
        self.global_step += 1
        for fragment in self.fragments:
            fragment.tokens += tokens
        started_s = time.perf_counter()
        synced = self._enter_open_rounds()
        for _ in range(LOOKS_MAX):
            step = self.global_step
            synced |= self._turn(step)
            if self.global_step == step:  # else we learned that the others are further: look again
                break
        self.sync_s += time.perf_counter() - started_s
        return synced

    def _enter_open_rounds(self) -> bool:
        """A fragment that was behind enters a round as soon as the others have opened it."""
        synced = False
        tags = range(len(self.fragments)) if self.schedule.hurry else sorted(self._late)
        for tag in tags:
            fragment = self.fragments[tag]
            if tag in self._flights:
                continue
            if tag in self._late:
                self._catch_up(fragment)
            if self.comm.pending(tag):
                number = self.rounds(tag) + 1
                self.global_step = max(self.global_step, self.schedule.sent_at(tag, number))
                synced |= self._exchange(fragment, number)
        return synced

    def _turn(self, step: int) -> bool:
        """What the schedule says of this step. Each round is begun once, whoever looks again."""
        synced = False
        sends = self.schedule.sends(step)
        relayed = {tag for tag, _ in sends} if self.schedule.late else set()
        for tag in self._due(step, relayed):
            synced |= self._land(self.fragments[tag])
        for tag, number in sends:
            synced |= self._exchange(self.fragments[tag], number)
        for tag in self._due(step, set()):
            synced |= self._land(self.fragments[tag])
        return synced

    def _due(self, step: int, but: set[int]) -> list[int]:
        return sorted(
            t for t, flight in self._flights.items() if flight.due <= step and t not in but
        )

    def _exchange(self, fragment: Fragment, number: int) -> bool:
        """The fragment's round `number`: sends, and takes what was sent one round ago."""
        tag, synced = fragment.tag, False
        flight = self._flights.get(tag)
        if flight is not None and self.rounds(tag) + 1 >= number:
            return False  # begun already
        landed = None
        delta = fragment.drift(self._spare.take(fragment.theta))
        if flight is not None:
            del self._flights[tag]
            landed = self._arrive(fragment, flight)
            synced = True
        if landed is None:
            self._catch_up(fragment)
            if self.rounds(tag) >= number:
                self._spare.give(delta, *(flight.lent if flight is not None else ()))
                return synced  # the others have made this round without us
            fragment.drift(delta)  # it may have grown by what was lost
        again = flight if landed is not None and not landed.counted(self.comm.peer) else None
        began = None
        if again is not None:
            began = self._spare.take(fragment.base).copy_(fragment.base)
        if self.schedule.late:  # before the flight: it moves theta when it comes back
            self._enter(fragment, delta, len(landed.contributors) if landed else 0)
        if again is not None and began is not None:  # goes with the next round: see close_in
            fragment.move(began.sub_(fragment.base).sub_(again.delta), KEPT_SHARE)
            self._restore(fragment, again)
        self._spare.give(began, *(flight.lent if flight is not None else ()))
        self._send(fragment, delta)
        fragment.tokens += KEPT_SHARE * again.tokens if again is not None else 0.0
        return synced

    def _send(self, fragment: Fragment, delta: Tensor) -> None:
        """A round takes off with this pseudo-gradient."""
        tag, residual = fragment.tag, self.residuals.get(fragment.tag)
        out = self._spare.take(delta) if self.schedule.late else delta
        digest = int.from_bytes(fragment.digest[:8], "little")
        tokens, fragment.tokens = fragment.tokens, 0.0
        before = self._spare.take(residual) if residual is not None else None
        owed = self.owner_residuals.get(tag)
        given = Contribution(delta, tokens, out, residual, digest, owed, before)
        ready = torch.cuda.Event() if delta.is_cuda else None  # type: ignore[no-untyped-call]
        if ready is not None:
            ready.record()

        def fly() -> Landed:
            if ready is not None:  # of the trainer's stream, which need not be this thread's
                ready.wait()
            if residual is not None and before is not None:  # the trainer leaves both alone
                before.copy_(residual)
            result = self.codec.begin(self.comm, tag, given).wait()
            if result.outcome == "lost":
                return Landed(lost=True)
            result = self._take(fragment, result)
            return Landed(
                contributors=tuple(result.contributors),
                version=self.comm.version(tag),
                digest=fragment.state_digest(),
            )

        self._flights[tag] = Flight(
            due=self.global_step + self.schedule.overlap,
            tokens=tokens,
            delta=delta,
            residual=before,
            out=out,
            done=in_background(fly, f"round of fragment {tag}"),
        )

    def _arrive(self, fragment: Fragment, flight: Flight) -> Landed | None:
        """Waits for the flight's end and takes note of it. None: it was lost to us."""
        landed = flight.done.result()
        if landed.lost:
            self._late.add(fragment.tag)
            self._give_back(fragment, flight)
            if self.schedule.late:
                fragment.move(flight.delta, -1.0)
            self._catch_up(fragment, wait=True)
            return None
        fragment.version, fragment.digest = landed.version, landed.digest
        self.last_contributors = landed.contributors
        if landed.counted(self.comm.peer):
            self._late.discard(fragment.tag)
        else:
            self._late.add(fragment.tag)
        return landed

    def _land(self, fragment: Fragment) -> bool:
        """A result enters the local parameters, and no other round of the fragment begins."""
        flight = self._flights.pop(fragment.tag)
        landed = self._arrive(fragment, flight)
        if landed is not None:
            self._use(fragment, flight, landed)
        self._spare.give(*flight.lent)
        return True

    def _use(self, fragment: Fragment, flight: Flight, landed: Landed) -> None:
        counted, late = landed.counted(self.comm.peer), self.schedule.late
        if counted and not late:
            self._enter(fragment, None, len(landed.contributors))
            return
        if late:
            self.merge.forget(fragment)
        if counted:
            fragment.follow()
            return
        self._give_back(fragment, flight)
        if late:
            fragment.move(flight.delta, -1.0)
        fragment.close_in(1)

    def _enter(self, fragment: Fragment, sent: Tensor | None, peers: int) -> None:
        active = max(sum(one.active for one in self.comm.members), 1)
        with torch.no_grad():
            self.merge.enter(fragment, self.update, sent, 1.0 / active, peers or active)

    def _give_back(self, fragment: Fragment, flight: Flight) -> None:
        """Its progress counts later: it was in nobody's mean."""
        fragment.tokens += flight.tokens
        self._restore(fragment, flight)

    def _restore(self, fragment: Fragment, flight: Flight) -> None:
        if flight.residual is not None:
            self.residuals[fragment.tag].copy_(flight.residual)

    def _catch_up(self, fragment: Fragment, wait: bool = False) -> None:
        """Rounds that went on without us: the outer parameters moved, and we come to them."""
        before = fragment.version
        after = self._follow(fragment, wait)
        if after == before:
            return
        fragment.close_in(after - before)
        self.merge.forget(fragment)
        self._holds(fragment, after)
        self._late.add(fragment.tag)
        step = self._step_of_state()  # lower when the run began again from an older state
        self.global_step = step if after < before else max(self.global_step, step)

    def _follow(self, fragment: Fragment, wait: bool) -> int:
        """The shared state comes to where the others' is, by results or whole; its version."""
        version = self.comm.catch_up(fragment.tag, self._applier(fragment), wait=wait)
        fragment.pull()
        return version

    def _holds(self, fragment: Fragment, version: int) -> None:
        fragment.version, fragment.digest = version, fragment.state_digest()

    def _applier(self, fragment: Fragment) -> Any:
        def apply(result: Result) -> None:
            fragment.pull()  # what came before it may have been fetched
            result = self._take(fragment, result)
            self.last_contributors = tuple(result.contributors)

        return apply

    def _take(self, fragment: Fragment, result: Result) -> Result:
        """One round's effect on the shared state: the same on every peer, whoever it is. The round
        as it counts."""
        result = self.codec.sound(result, fragment.elements)
        with self.comm.updating(fragment.tag):
            self._move(fragment, result, {"theta": fragment.theta, **fragment.buffers})
            fragment.push()
        result.name_refused(self.comm)
        return result

    @torch.no_grad()
    def _move(self, fragment: Fragment, result: Result, state: dict[str, Tensor]) -> None:
        value, theta = self.codec.mean(result, fragment.elements), state["theta"]
        if value is None:
            return
        if not fragment.started.item():
            theta.copy_(value)
            fragment.started.fill_(result.seq + 1)
        else:
            if fragment.allotment is not None:
                fragment.allotment.count(result.slots)
            state = {**state, **fragment.scalars}
            self.update.apply(theta, value.to(theta.device), state, len(result.contributors))

    def _effect_on(self, fragment: Fragment) -> Callable[[Result], None]:
        """For a newcomer that follows rounds while it fetches the state."""

        def effect(result: Result) -> None:
            self._move(fragment, self.codec.sound(result, fragment.elements), fragment.served)

        return effect

    # --- the end, and what others may ask

    def finish(self) -> None:
        """Waits for every round under way and takes its result: call it after the last step."""
        started_s = time.perf_counter()
        for tag in sorted(self._flights):
            self._land(self.fragments[tag])
        self.sync_s += time.perf_counter() - started_s

    def begin_anew(self) -> None:
        """Forgets the progress that no round has counted: the local parameters are the outer ones.
        Not for rounds under way: see `finish`."""
        for fragment in self.fragments:
            self.merge.forget(fragment)
            fragment.adopt()
            fragment.tokens = 0.0

    def settle(self) -> None:
        """Waits until theta holds every round that was sent; the local parameters stay."""
        for flight in self._flights.values():
            flight.done.result()

    def rounds(self, tag: int = 0) -> int:
        """Outer steps of the fragment that the local parameters know of."""
        fragment = self.fragments[tag]
        started = int(fragment.started.item())
        return fragment.version - started if started else 0

    def digest(self) -> str:
        """SHA-256 of versions and shared state of all fragments, as the local parameters know it:
        equal on all peers at one global step. What is on its way is not waited for."""
        total = hashlib.sha256()
        for fragment in self.fragments:
            total.update(fragment.version.to_bytes(8, "little"))
            total.update(fragment.digest)
        return total.hexdigest()

    @contextmanager
    def swapped(self) -> Iterator[nn.Module]:
        """Inside, the model holds the outer parameters: what to evaluate and to save. Every round
        that was sent is in them, so all peers at one global step see the same."""
        self.settle()
        local = [
            fragment.read_local(torch.empty_like(fragment.theta)) for fragment in self.fragments
        ]
        for fragment in self.fragments:
            fragment.write(fragment.theta)
        try:
            yield self.model
        finally:
            for fragment, values in zip(self.fragments, local, strict=True):
                fragment.write(values)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resume needs beside the inner optimizer, rounds under way included."""
        return saved.save(self)


def check_optimizers(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    trained: dict[str, nn.Parameter],
) -> list[torch.optim.Optimizer]:
    """The optimizers as a list, when all they train is the model's."""
    listed = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
    if not trained:
        raise ConfigError("the model has no parameter that needs a gradient; nothing to train")
    known = {id(p) for p in trained.values()}
    for one in listed:
        for group in one.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad and id(parameter) not in known:
                    raise ConfigError(
                        f"the optimizer trains a parameter of shape {tuple(parameter.shape)} that"
                        " is not the model's: it would never be synchronised; give the module that"
                        " owns it"
                    )
    return listed
