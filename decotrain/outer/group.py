"""An outer optimizer for a peer of several processes: the first one speaks for all of them.

    dist.init_process_group("gloo")             # of processes that torchrun or `decotrain run` made
    model = DistributedDataParallel(model)      # or fully_shard(model)
    outer = LocalGroup("diloco", model, optimizer, sync_every=100)
    ...
    outer.step(tokens=batch.numel())            # on every process, after its inner step

Outside, the peer is one: process 0 joins, holds the outer state and runs the rounds; so peers of
one process and of eight can be in one run. The others obey it while they are in a call of this
object: they hand in their part of a parameter when it is read and take theirs when it is written,
and nothing else crosses the local network. All of a peer's processes share its uplink, so that one
process of them communicates costs little; the outer state has to fit into its memory.

Which parameters are whole on every process (DDP) and which are sharded (FSDP2's DTensor) is seen
from themselves. A process that dies takes the peer with it: the launcher starts all again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from decotrain.communicator import Communicator, join
from decotrain.errors import ConfigError, Error
from decotrain.outer.optimizer import OuterOptimizer, check_optimizers
from decotrain.outer.presets import make

DONE, READ, WRITE, FAILED = range(4)
# The others wait while process 0 is in a round; the run's own deadlines apply there.
PATIENCE = timedelta(days=30)


class LocalGroup:
    """See the module. The name and its options are those of `make`."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        join: Callable[[], Communicator] = join,
        **options: Any,
    ) -> None:
        if not dist.is_initialized():
            raise ConfigError(
                "there is no process group: call torch.distributed.init_process_group first, and"
                " start the script with `decotrain run --nproc N` (or torchrun)"
            )
        if name == "ddp":
            raise ConfigError("a peer of several processes averages gradients inside itself only;"
                              " choose diloco, streaming or another between peers")  # fmt: skip
        check_optimizers(optimizer, {n: p for n, p in model.named_parameters() if p.requires_grad})
        self._commands = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.model, self.leads = model, dist.get_rank() == 0
        self._names, self._parameters = [], []
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._names.append(key.removeprefix("module.") if _is_ddp(model) else key)
                self._parameters.append(parameter)
        self.global_step = 0
        self.outer: OuterOptimizer | None = None  # on process 0
        self.comm: Communicator | None = None

        def begin() -> None:
            self.comm = join()
            made = make(name, _WholeModel(self), [], self.comm, **options)
            assert isinstance(made, OuterOptimizer)
            self.outer = made

        self._together(begin)

    # --- what every process calls at the same place of its script

    def step(self, tokens: float = 1.0) -> bool:
        """After each inner step, with what it was worth on this process. True after a round."""
        total = torch.tensor([tokens], dtype=torch.float64)
        dist.all_reduce(total, group=self._commands)
        return self._together(lambda: self._led().step(float(total)))

    @contextmanager
    def swapped(self) -> Iterator[nn.Module]:
        """Inside, every process holds the outer parameters: what to evaluate and to save."""
        with ExitStack() as stack:
            self._together(lambda: stack.enter_context(self._led().swapped()))
            try:
                yield self.model
            finally:
                self._together(stack.close)

    def leave(self) -> None:
        """The peer leaves the run in order."""

        def end() -> None:
            if self.comm is not None:
                self.comm.leave()

        self._together(end)

    def _led(self) -> OuterOptimizer:
        assert self.outer is not None, "only process 0 has it"
        return self.outer

    # --- process 0 acts, the others obey

    def _together(self, act: Callable[[], Any]) -> bool:
        """Process 0 runs `act`, the others do what it needs of them; the result's truth."""
        if not self.leads:
            return self._obey()
        try:
            result = bool(act())
        except BaseException as error:
            self._tell(FAILED)
            text = [f"process 0 of this peer: {type(error).__name__}: {error}"]
            dist.broadcast_object_list(text, src=0, group=self._commands)
            raise
        self.global_step = self.outer.global_step if self.outer is not None else 0
        self._tell(DONE, int(result), self.global_step)
        return result

    def _tell(self, command: int, first: int = 0, second: int = 0) -> None:
        dist.broadcast(torch.tensor([command, first, second]), src=0, group=self._commands)

    def _obey(self) -> bool:
        while True:
            said = torch.zeros(3, dtype=torch.int64)
            dist.broadcast(said, src=0, group=self._commands)
            command, first, second = said.tolist()
            if command == READ:
                self.read(first)
            elif command == WRITE:
                self.write(first, None)
            elif command == DONE:
                self.global_step = second
                return bool(first)
            else:
                text = [""]
                dist.broadcast_object_list(text, src=0, group=self._commands)
                raise Error(text[0])

    # --- parameters, whole

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters, in the model's order; those of a shard with their whole shape."""
        return zip(self._names, self._parameters, strict=True)

    @torch.no_grad()
    def read(self, index: int) -> Tensor:
        """The parameter's value, all parts of it."""
        parameter = self._parameters[index]
        if not isinstance(parameter, DTensor):
            return parameter.detach()  # equal on all processes
        if self.leads:
            self._tell(READ, index)
        return parameter.full_tensor().detach()

    @torch.no_grad()
    def write(self, index: int, values: Tensor | None) -> None:
        """The parameter takes process 0's values, on every process its part."""
        parameter = self._parameters[index]
        if self.leads:
            self._tell(WRITE, index)
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        if values is not None:
            whole.copy_(values)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            parameter.copy_(distribute_tensor(whole, mesh, placements))
        else:
            dist.broadcast(whole, src=0)
            parameter.copy_(whole)


class _Whole:
    """What an outer optimizer needs of a parameter, when its parts lie in several processes."""

    requires_grad = True

    def __init__(self, group: LocalGroup, index: int, parameter: nn.Parameter) -> None:
        self.shape, self.device = parameter.shape, parameter.device
        self._group, self._index = group, index

    def numel(self) -> int:
        return self.shape.numel()

    def detach(self) -> Tensor:
        return self._group.read(self._index)

    def copy_(self, values: Tensor) -> None:
        self._group.write(self._index, values)


class _WholeModel(nn.Module):
    """The model as process 0's outer optimizer sees it."""

    def __init__(self, group: LocalGroup) -> None:
        super().__init__()
        self._wholes = [
            (name, _Whole(group, index, parameter))
            for index, (name, parameter) in enumerate(group.parameters())
        ]

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, Any]]:
        return iter(self._wholes)


def _is_ddp(model: nn.Module) -> bool:
    return isinstance(model, nn.parallel.DistributedDataParallel)
