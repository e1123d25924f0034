"""The loop that all outer optimizers share: inner steps, now and then a round, an outer step.

    outer = OuterOptimizer(model, optimizer, comm, schedule=..., codec=..., update=..., merge=...)
    for batch in loader:
        loss(model, batch).backward(); optimizer.step(); optimizer.zero_grad()
        outer.step(tokens=batch.numel())

Each fragment of the schedule is a tag of the communicator. Its first round that brings anything is
a broadcast of the first parameters, so every peer starts from the same bits; each later one
averages pseudo-gradients and is one outer step. The version of a fragment counts all of them.

Churn is handled here and not in the training script: a newcomer fetches state, adopts the global
step and enters the next round with the tokens it has; a peer whose contribution was not counted
keeps its progress; a round that was lost costs a fetch of the fragment and no inner step.

Parameters that need no gradient are left alone: they are the caller's, equal everywhere or not.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from decotrain.communicator import Communicator, Result, Work
from decotrain.errors import ConfigError, StateError
from decotrain.outer.codec import CodecChoice
from decotrain.outer.fragment import Fragment
from decotrain.outer.merge import Merge, Replace
from decotrain.outer.schedule import Schedule
from decotrain.outer.update import Update


class OuterOptimizer:
    """See the module. `state` (of `state_dict`) resumes; all peers then start from that round."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        comm: Communicator,
        *,
        schedule: Schedule,
        update: Update,
        codec: CodecChoice | None = None,
        merge: Merge | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        _check_optimizer(optimizer, trained)
        self.model, self.inner, self.comm = model, optimizer, comm
        self.schedule, self.update = schedule, update
        self.codec, self.merge = codec or CodecChoice(), merge or Replace()
        self.fragments = [
            Fragment(tag, {name: trained[name] for name in names}, update.buffers)
            for tag, names in enumerate(schedule.fragments(list(trained)))
        ]
        self.residuals = {
            f.tag: torch.zeros(f.elements) for f in self.fragments if self.codec.error_feedback
        }
        self.global_step = 0
        self.sync_s = 0.0  # wall time of this trainer inside rounds
        self.last_contributors: tuple[int, ...] = ()
        self._works: dict[int, Work] = {}
        self._late: set[int] = set()  # fragments that take part again when others open a round
        self._versions = self._load(state) if state else [0] * len(self.fragments)
        for fragment, version in zip(self.fragments, self._versions, strict=True):
            comm.register_state(fragment.tag, fragment.state, version, self._effect_on(fragment))
        self._start()

    # --- starting

    def _start(self) -> None:
        """Hold what the others hold: fetched from them, or broadcast when nobody has begun."""
        for fragment in self.fragments:
            loaded = self.rounds(fragment.tag)
            self.comm.catch_up(fragment.tag, self._applier(fragment), wait=True)
            while not fragment.started.item():
                result = self._broadcast(fragment).wait()
                if result.outcome != "lost":
                    self._take(fragment, result)
                self.comm.catch_up(fragment.tag, self._applier(fragment), wait=True)
            fragment.write(fragment.theta)
            if self.rounds(fragment.tag) > loaded:
                self._late.add(fragment.tag)
        self.global_step = self._step_of_state()

    def _broadcast(self, fragment: Fragment) -> Work:
        """The first active peer's parameters. Nobody's, when that one dies: then once more."""
        root = next((one.peer for one in self.comm.members if one.active), 0)
        return self.comm.all_reduce(
            fragment.workspace.copy_(fragment.theta),
            tag=fragment.tag,
            weight=1.0 if root == self.comm.peer else 0.0,
        )

    def _step_of_state(self) -> int:
        steps = [0]
        for fragment in self.fragments:
            if rounds := self.rounds(fragment.tag):
                steps.append(self.schedule.step_after(fragment.tag, rounds))
        return max(steps)

    # --- the loop

    def step(self, tokens: float = 1.0) -> bool:
        """Call it after each inner step, with what the step was worth. True after a round."""
        self.global_step += 1
        for fragment in self.fragments:
            fragment.tokens += tokens
        sends = self.schedule.sends(self.global_step)
        receives = self.schedule.receives(self.global_step)
        started_s = time.perf_counter()
        synced = self._rejoin(sends) if self._late else False
        for tag in sends:
            if tag not in self._works:
                self._begin(self.fragments[tag])
        for tag in receives:
            if tag in self._works:
                self._finish(self.fragments[tag])
                synced = True
        self.sync_s += time.perf_counter() - started_s
        return synced

    def _rejoin(self, sends: Any) -> bool:
        """A fragment that was behind enters a round as soon as the others have opened it."""
        synced = False
        for tag in sorted(self._late - set(sends)):
            fragment = self.fragments[tag]
            if tag in self._works:
                continue
            self._catch_up(fragment)
            if self.comm.pending(tag):
                self._begin(fragment)
                self._finish(fragment)
                self.global_step = self.schedule.step_after(tag, self.rounds(tag))
                synced = True
        return synced

    def _begin(self, fragment: Fragment) -> None:
        """Sends the pseudo-gradient, computed from the newest outer parameters there are."""
        self._catch_up(fragment)
        delta = fragment.drift(fragment.workspace)
        fragment.tokens_sent = fragment.tokens
        self._works[fragment.tag] = self.comm.all_reduce(
            delta,
            tag=fragment.tag,
            codec=self.codec.contribution,
            result_codec=self.codec.result,
            weight=fragment.tokens,
            residual=self.residuals.get(fragment.tag),
            state_digest=self._state_digest(fragment),
        )

    def _finish(self, fragment: Fragment) -> None:
        """Applies the round's result to the outer parameters, and those to the model."""
        result = self._works.pop(fragment.tag).wait()
        if result.outcome == "lost":
            self._late.add(fragment.tag)
            self._catch_up(fragment, wait=True)
            return
        counted = self.comm.peer in result.contributors
        drift = None if counted else fragment.drift(torch.empty_like(fragment.theta))
        self._take(fragment, result)
        if drift is not None:
            self._late.add(fragment.tag)
            fragment.write(fragment.theta - drift)
            return
        self._late.discard(fragment.tag)
        fragment.tokens -= fragment.tokens_sent
        local = fragment.read_local(fragment.workspace)
        fragment.write(self.merge.mix(local, fragment.theta))

    def _catch_up(self, fragment: Fragment, wait: bool = False) -> None:
        """Rounds that went on without us: the outer parameters move, and our progress with them."""
        before = self.comm.version(fragment.tag)
        drift = fragment.drift(torch.empty_like(fragment.theta))
        after = self.comm.catch_up(fragment.tag, self._applier(fragment), wait=wait)
        if after == before:
            return
        fragment.write(fragment.theta - drift)
        self._late.add(fragment.tag)
        step = self._step_of_state()  # lower when the run began again from an older state
        self.global_step = step if after < before else max(self.global_step, step)

    def _applier(self, fragment: Fragment) -> Any:
        return lambda result: self._take(fragment, result)

    def _take(self, fragment: Fragment, result: Result) -> None:
        """One round's effect on the shared state: the same on every peer, whoever it is."""
        with self.comm.updating(fragment.tag):
            self._move(fragment, result)
        self.last_contributors = result.contributors

    def _move(self, fragment: Fragment, result: Result) -> None:
        """Element by element, so that a newcomer can follow rounds while it fetches the state."""
        if not result.contributors:
            return
        value = torch.as_tensor(result.tensor)
        if not fragment.started.item():
            fragment.theta.copy_(value)
            fragment.started.fill_(result.seq + 1)
        else:
            self.update.apply(fragment.theta, value, fragment.buffers)

    def _effect_on(self, fragment: Fragment) -> Callable[[Result], None]:
        return lambda result: self._move(fragment, result)

    # --- what others may ask

    def rounds(self, tag: int = 0) -> int:
        """Outer steps that the fragment has made."""
        started = int(self.fragments[tag].started.item())
        return self.comm.version(tag) - started if started else 0

    def digest(self) -> str:
        """SHA-256 of the shared state of all fragments (parameters, buffers, versions)."""
        total = hashlib.sha256()
        for fragment in self.fragments:
            total.update(self.comm.version(fragment.tag).to_bytes(8, "little"))
            for tensor in fragment.state.values():
                total.update(tensor.numpy().tobytes())
        return total.hexdigest()

    def _state_digest(self, fragment: Fragment) -> int:
        total = hashlib.sha256()
        for tensor in fragment.state.values():
            total.update(tensor.numpy().tobytes())
        return int.from_bytes(total.digest()[:8], "little")

    @contextmanager
    def swapped(self) -> Iterator[nn.Module]:
        """Inside, the model holds the outer parameters: what to evaluate and to save."""
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
        """Everything a resume needs beside the inner optimizer. Take it between rounds."""
        assert not self._works, "a round is in flight"
        tensors = {f"{f.tag}.{key}": t for f in self.fragments for key, t in f.state.items()}
        tensors |= {f"{tag}.residual": t for tag, t in self.residuals.items()}
        return {
            "versions": [self.comm.version(f.tag) for f in self.fragments],
            "tokens": [f.tokens for f in self.fragments],
            "tensors": tensors,
        }

    def _load(self, state: dict[str, Any]) -> list[int]:
        tensors: dict[str, Tensor] = state["tensors"]
        versions = [int(version) for version in state["versions"]]
        if len(versions) != len(self.fragments):
            raise StateError(
                f"the saved state has {len(versions)} fragments, this schedule has "
                f"{len(self.fragments)}; resume with the options the run was started with"
            )
        for fragment in self.fragments:
            places = {f"{fragment.tag}.{key}": t for key, t in fragment.state.items()}
            if fragment.tag in self.residuals:
                places[f"{fragment.tag}.residual"] = self.residuals[fragment.tag]
            for key, place in places.items():
                saved = tensors.get(key)
                if saved is None or saved.shape != place.shape:
                    found = "nothing" if saved is None else f"shape {tuple(saved.shape)}"
                    raise StateError(
                        f"the saved state has {found} for {key}, expected {tuple(place.shape)};"
                        " resume with the options the run was started with"
                    )
                place.copy_(saved)
            fragment.tokens = float(state["tokens"][fragment.tag])
        return versions


def _check_optimizer(optimizer: torch.optim.Optimizer, trained: dict[str, nn.Parameter]) -> None:
    if not trained:
        raise ConfigError("the model has no parameter that needs a gradient; nothing to train")
    known = {id(p) for p in trained.values()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad and id(parameter) not in known:
                raise ConfigError(
                    f"the optimizer trains a parameter of shape {tuple(parameter.shape)} that is "
                    "not the model's: it would never be synchronised; give the module that owns it"
                )
