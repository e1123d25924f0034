"""Per-step averaging of gradients (preset `ddp`): what every outer optimizer is compared with.

    outer = make("ddp", model, optimizer, comm)
    loss.backward(); outer.average(); clip(...); optimizer.step(); optimizer.zero_grad()
    outer.step(tokens)

Gradients travel in buckets, each a tag of the communicator, whose rounds begin as soon as the
backward pass has filled them. `optimizer.step()` waits for the means; `average()` does so earlier,
for who looks at gradients in between. Parameters and the optimizer's moments are the shared state.

An update cannot be replayed from a mean alone (the learning rate is the caller's), so who missed
one fetches; and as each step moves the state, the others wait a while for a newcomer. Parity needs
the inner optimizer to give the same bits on all peers: the same kind of machine. A step weighs what
the one before was worth, because rounds begin before `step()` is told. It is not of the family of
`OuterOptimizer`: there is no local progress.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from decotrain.communicator import Communicator
from decotrain.errors import ConfigError
from decotrain.outer import saved
from decotrain.outer.allotment import Allotment
from decotrain.outer.codec import CodecChoice, Contribution
from decotrain.outer.moments import make_state
from decotrain.outer.optimizer import check_optimizers
from decotrain.rounds import Work

BUCKET_ELEMENTS = 1 << 20
NEWCOMER_S = 60.0  # how long a newcomer is waited for, once
LOOK_AGAIN_S = 0.2  # results that were missed are no change that is told of


class Bucket:
    """Parameters whose gradients travel together, and what is shared of them."""

    def __init__(self, tag: int, parameters: dict[str, nn.Parameter]) -> None:
        self.tag = tag
        self.parameters = parameters
        self.values = torch.zeros(sum(p.numel() for p in parameters.values()))
        self.started = torch.zeros(1, dtype=torch.int64)  # version after the broadcast; 0: not yet
        self.state: dict[str, Tensor] = {"started": self.started}
        self.missing = set(parameters)  # gradients that are not there yet in this step
        self.work: Work | None = None
        self.before: Tensor | None = None  # the residual, should this step's round not count

    def gather(self) -> Tensor:
        """values <- gradients; zero where no loss reaches."""
        at = 0
        for parameter in self.parameters.values():
            part = self.values[at : at + parameter.numel()].view(parameter.shape)
            part.zero_() if parameter.grad is None else part.copy_(parameter.grad)
            at += parameter.numel()
        return self.values

    def scatter(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        at = 0
        for parameter in self.parameters.values():
            yield parameter, self.values[at : at + parameter.numel()].view(parameter.shape)
            at += parameter.numel()


class GradientAveraging:
    """See the module. The same calls as `OuterOptimizer`, with rounds inside the step."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        comm: Communicator,
        *,
        codec: CodecChoice,
        bucket_elements: int = BUCKET_ELEMENTS,
        epoch_portions: int = 0,
        state: dict[str, Any] | None = None,
    ) -> None:
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.model, self.comm, self.codec = model, comm, codec
        self.optimizers = check_optimizers(optimizer, trained)
        self.buckets = _buckets(trained, bucket_elements)
        for one in self.optimizers:
            make_state(one)
        self._collect_state()
        self.allotment = Allotment(epoch_portions, carry=False)
        self.buckets[0].state["allotted"] = self.allotment.tensor
        self._slots: tuple[int, ...] = ()  # of the first bucket's contributors in this step
        kept = {b.tag: codec.new_residual(b.values) for b in self.buckets}
        self.residuals = {tag: one for tag, one in kept.items() if one is not None}
        owed = {b.tag: codec.new_owner_residual(b.values) for b in self.buckets}
        self.owner_residuals = {tag: one for tag, one in owed.items() if one is not None}
        self.global_step = 0
        self.sync_s = 0.0
        self.last_contributors: tuple[int, ...] = ()
        self.tokens = 1.0  # of the last step: the weight of the next
        self._patience: dict[int, float] = {}  # newcomer -> until when it is waited for
        self._averaged = False  # this step's gradients are the means
        self._updating: ExitStack | None = None  # while optimizers write to the shared state
        self._stepped: set[int] = set()  # optimizers that have made this step
        versions = self._load(state) if state else [0] * len(self.buckets)
        for bucket, version in zip(self.buckets, versions, strict=True):
            comm.register_state(bucket.tag, bucket.state, version)
        self._start()
        for bucket in self.buckets:
            for name, parameter in bucket.parameters.items():
                hook = self._on_gradient(bucket, name)
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        for one in self.optimizers:
            one.register_step_pre_hook(lambda *_: self._before_update())
            one.register_step_post_hook(lambda done, *_: self._after_update(done))

    def _collect_state(self) -> None:
        for bucket in self.buckets:
            for name, parameter in bucket.parameters.items():
                bucket.state[f"p.{name}"] = parameter.data
                for number, one in enumerate(self.optimizers):
                    for key, value in one.state.get(parameter, {}).items():
                        if not isinstance(value, Tensor):
                            raise ConfigError(
                                f"ddp cannot share {key} of {type(one).__name__}: it is no tensor"
                            )
                        bucket.state[f"{number}.{key}.{name}"] = value

    def _start(self) -> None:
        """Hold what the others hold, all of it of one step."""
        while True:
            seen = self._surroundings()
            for bucket in self.buckets:
                self.comm.catch_up(bucket.tag, None, wait=True)
                while not bucket.started.item():
                    self._broadcast(bucket)
                    self.comm.catch_up(bucket.tag, None, wait=True)
            if len({self._rounds(bucket) for bucket in self.buckets}) == 1 and self.comm.active:
                break
            self._wait_for_change(self._surroundings, seen, LOOK_AGAIN_S)
        self.global_step = self._rounds(self.buckets[0])

    @torch.no_grad()
    def _broadcast(self, bucket: Bucket) -> None:
        root = next((one.peer for one in self.comm.members if one.active), 0)
        for parameter, part in bucket.scatter():
            part.copy_(parameter)
        weight = 1.0 if root == self.comm.peer else 0.0
        result = self.comm.all_reduce(bucket.values, tag=bucket.tag, weight=weight).wait()
        if result.outcome == "lost":
            return
        with self.comm.updating(bucket.tag):
            if result.contributors:
                for parameter, part in bucket.scatter():
                    parameter.copy_(part)
                bucket.started.fill_(result.seq + 1)

    def _rounds(self, bucket: Bucket) -> int:
        return self.comm.version(bucket.tag) - int(bucket.started.item())

    # --- one step

    def _on_gradient(self, bucket: Bucket, name: str) -> Any:
        def hook(parameter: Tensor) -> None:
            if name not in bucket.missing:
                raise ConfigError(
                    "ddp averages the gradients of one backward pass for each step; add up"
                    " micro-batches in one loss, or use another outer optimizer"
                )
            bucket.missing.discard(name)
            if not bucket.missing:
                self._begin(bucket)

        return hook

    def _begin(self, bucket: Bucket) -> None:
        residual = self.residuals.get(bucket.tag)
        with torch.no_grad():
            values = bucket.gather()
            owed = self.owner_residuals.get(bucket.tag)
            bucket.before = None if residual is None else residual.clone()
            given = Contribution(
                values, self.tokens, values, residual, owner_residual=owed, before=bucket.before
            )
            bucket.work = self.codec.begin(self.comm, bucket.tag, given)

    def average(self) -> None:
        """Waits until the gradients are the mean of all peers'; who has lost the round fetches the
        others' parameters instead. Doing it twice does nothing more."""
        if self._averaged:
            return
        started_s = time.perf_counter()
        for bucket in self.buckets:
            if bucket.work is None:  # a parameter in it has no gradient
                self._begin(bucket)
        for bucket in self.buckets:
            assert bucket.work is not None
            result = bucket.work.wait()
            lost = result.outcome == "lost"
            mean = None if lost else self.codec.mean(result, bucket.values.numel())
            if bucket.before is not None and (lost or self.comm.peer not in result.contributors):
                self.residuals[bucket.tag].copy_(bucket.before)  # what was sent has not counted
            for parameter, part in bucket.scatter():
                parameter.grad = None if mean is None else part.to(parameter, copy=True)
            if bucket is self.buckets[0]:  # samples go by it
                self._slots = result.slots
                self.last_contributors = () if lost else tuple(result.contributors)
            if lost:
                self.comm.catch_up(bucket.tag, None, wait=True)
        self._averaged = True
        self.sync_s += time.perf_counter() - started_s

    def _before_update(self) -> None:
        self.average()
        if self._updating is None:
            self._updating = ExitStack()
            for bucket in self.buckets:
                if self._rounds(bucket) == self.global_step:  # else it was fetched
                    self._updating.enter_context(self.comm.updating(bucket.tag))
                    if bucket is self.buckets[0]:
                        self.allotment.count(self._slots)

    def _after_update(self, done: torch.optim.Optimizer) -> None:
        self._stepped.add(id(done))
        if self._updating is not None and len(self._stepped) == len(self.optimizers):
            self._updating.close()
            self._updating = None

    def step(self, tokens: float = 1.0) -> bool:
        """Call it after `optimizer.step()`, with what the step was worth."""
        started_s = time.perf_counter()
        if len(self._stepped) != len(self.optimizers):
            raise ConfigError("ddp: every optimizer makes its step before outer.step()")
        self._averaged, self._stepped = False, set()
        self.tokens = tokens
        for bucket in self.buckets:
            bucket.work, bucket.missing = None, set(bucket.parameters)
        self._let_newcomers_in()
        self.global_step += 1
        if len({self._rounds(bucket) for bucket in self.buckets}) != 1:
            self._start()  # the others went on while we fetched a part
        self.sync_s += time.perf_counter() - started_s
        return True

    def _let_newcomers_in(self) -> None:
        """The state stands still while they fetch it; each is waited for once."""
        now_s = time.monotonic()
        while True:
            waiting = self._observers()
            for peer in waiting:
                self._patience.setdefault(peer, now_s + NEWCOMER_S)
            if not self.comm.active:
                return self._start()
            patience_s = max((self._patience[p] for p in waiting), default=0.0) - time.monotonic()
            if patience_s <= 0:
                return None
            self._wait_for_change(self._observers, waiting, patience_s)

    def _wait_for_change(self, look: Callable[[], Any], seen: Any, timeout_s: float) -> None:
        """Until what is to be seen is no longer what was seen."""
        self.comm.wait_until(lambda: look() != seen, timeout_s)

    def _observers(self) -> list[int]:
        return [one.peer for one in self.comm.members if not one.active]

    def _surroundings(self) -> tuple[Any, ...]:
        """What moves when others do something that may concern us."""
        return self.comm.view, [self.comm.pending(bucket.tag) for bucket in self.buckets]

    # --- what others may ask

    def finish(self) -> None:
        """Nothing is under way between steps."""

    def begin_anew(self) -> None:
        """Nothing that did not count is kept."""

    def rounds(self, tag: int = 0) -> int:
        """Steps that were averaged."""
        return self._rounds(self.buckets[tag])

    def digest(self) -> str:
        """SHA-256 of the shared state and its versions."""
        total = hashlib.sha256()
        for bucket in self.buckets:
            total.update(self.comm.version(bucket.tag).to_bytes(8, "little"))
            for name in sorted(bucket.state):
                total.update(bucket.state[name].reshape(-1).view(torch.uint8).numpy().tobytes())
        return total.hexdigest()

    @contextmanager
    def swapped(self) -> Iterator[nn.Module]:
        """The model: all peers hold the same."""
        yield self.model

    def state_dict(self) -> dict[str, Any]:
        """As of `OuterOptimizer`; take it between steps."""
        shared = {f"{b.tag}.{key}": t.clone() for b in self.buckets for key, t in b.state.items()}
        return {
            "shared": shared,
            "private": saved.residuals_of(self),
            "facts": {
                "versions": [self.comm.version(b.tag) for b in self.buckets],
                "tokens": self.tokens,
            },
        }

    @torch.no_grad()
    def _load(self, state: dict[str, Any]) -> list[int]:
        versions = [int(version) for version in state["facts"]["versions"]]
        for bucket in self.buckets:
            saved.put(state["shared"], {f"{bucket.tag}.{k}": t for k, t in bucket.state.items()})
        if "private" in state:
            saved.load_residuals(self, state["private"])
            self.tokens = float(state["facts"]["tokens"])
        return versions


def _buckets(trained: dict[str, nn.Parameter], elements: int) -> list[Bucket]:
    """In the order in which a backward pass is likely to fill them."""
    groups: list[dict[str, nn.Parameter]] = [{}]
    for name, parameter in reversed(list(trained.items())):
        if sum(p.numel() for p in groups[-1].values()) >= elements:
            groups.append({})
        groups[-1][name] = parameter
    return [Bucket(tag, group) for tag, group in enumerate(groups)]
