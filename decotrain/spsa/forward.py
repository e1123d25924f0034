"""Evaluates a model at theta + epsilon z without ever writing to theta.

While `Perturbed.at(...)` is active, each module that owns chosen parameters sees, during its own
forward only, perturbed copies in one scratch buffer; afterwards its own parameters are back.
The scratch holds what one module (and the modules around it that own parameters) needs, not the
model. The first evaluation is watched: a parameter that some other module's forward uses
directly (attention that calls `F.linear` with its child's weight, a head that reads the embedding)
is found and perturbed there too; one that is used outside every module is an error, because the
estimate would be wrong without a sign of it.

Not covered: torch.compile of the whole model, torch.nn.DataParallel, modules that keep derived
copies of their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from decotrain.errors import ConfigError
from decotrain.spsa import kernels
from decotrain.spsa.recipe import Recipe
from decotrain.spsa.space import Entry, Space

ALIGN = 64  # elements; scratch slices start on cache lines
PROBES_MAX = 8

# What may be asked of an original parameter without using its values.
_HARMLESS = frozenset(
    [
        *("size", "dim", "numel", "nelement", "stride", "is_floating_point", "is_complex"),
        *("is_contiguous", "element_size", "data_ptr", "storage_offset", "untyped_storage"),
        *("get_device", "__len__", "__hash__", "__repr__", "requires_grad_", "register_hook"),
    ]
)
_VIEWS = frozenset(["data", "T", "mT", "H", "mH", "real", "imag"])


@dataclass(frozen=True)
class Site:
    """A parameter to perturb during a module's forward: `owner._parameters[name]`."""

    owner: torch.nn.Module
    name: str
    index: int  # in the space


@dataclass
class Frame:
    """A module's forward that is under way, and what was swapped for it."""

    module: torch.nn.Module
    swapped: list[tuple[torch.nn.Module, str, torch.nn.Parameter]] = field(default_factory=list)
    base: tuple[int, int] = (0, 0)  # what of the scratch was in use before


def put(owner: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Past nn.Module's bookkeeping; recurrent modules also keep a flat list of weights."""
    owner._parameters[name] = value  # type: ignore[assignment]
    if isinstance(owner, torch.nn.RNNBase):
        owner._flat_weights = [owner._parameters.get(n) for n in owner._flat_weights_names]


class Scratch:
    """A stack of slices of one buffer for each (device, dtype), as large as was ever needed."""

    def __init__(self) -> None:
        self.used = 0
        self.needed = 0
        self.buffers: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}
        self.spill: list[torch.Tensor] = []

    def take(self, like: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
        start = self.used
        self.used += -(-size // ALIGN) * ALIGN
        self.needed = max(self.needed, self.used)
        buffer = self.buffers.get((like.device, dtype))
        if buffer is not None and self.used <= buffer.numel():
            return buffer[start : start + size]
        spill = torch.empty(size, dtype=dtype, device=like.device)
        self.spill.append(spill)
        return spill

    def mark(self) -> tuple[int, int]:
        return self.used, len(self.spill)

    def release(self, mark: tuple[int, int]) -> None:
        """Give back what was taken since the mark."""
        self.used = mark[0]
        del self.spill[mark[1] :]

    def settle(self, kinds: set[tuple[torch.device, torch.dtype]]) -> None:
        """Nothing is in use: make the buffers as large as the last evaluation needed."""
        assert self.used == 0
        self.spill.clear()
        for device, dtype in kinds:
            buffer = self.buffers.get((device, dtype))
            if buffer is None or buffer.numel() < self.needed:
                self.buffers[device, dtype] = torch.empty(self.needed, dtype=dtype, device=device)

    def holds(self, tensor: torch.Tensor) -> bool:
        mine = [*self.buffers.values(), *self.spill]
        pointer = tensor.untyped_storage().data_ptr()
        return any(pointer == buffer.untyped_storage().data_ptr() for buffer in mine)


class Watch(TorchFunctionMode):
    """Notes every use of an original parameter while a perturbed evaluation runs."""

    def __init__(self, indices: Mapping[int, int], running: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        self.indices = indices  # id of a parameter -> index in the space
        self.running = running
        self.paused = False
        self.escaped: list[tuple[torch.nn.Module | None, int, str]] = []

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if not self.paused and not self._harmless(func):
            for leaf in tree_leaves((args, kwargs)):
                index = self.indices.get(id(leaf))
                if index is not None:
                    user = self.running[-1] if self.running else None
                    self.escaped.append((user, index, getattr(func, "__name__", str(func))))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _harmless(func: Any) -> bool:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return getattr(func.__self__, "__name__", "") not in _VIEWS
        return name in _HARMLESS


class Perturbed:
    """A model's forward at theta + epsilon z."""

    def __init__(
        self,
        model: torch.nn.Module,
        space: Space,
        recipe: Recipe,
        compute_dtype: torch.dtype | None = None,  # of perturbed copies; None: the parameter's
        threads: kernels.Threads | None = None,
    ) -> None:
        self.model, self.space, self.recipe = model, space, recipe
        self.compute_dtype, self.threads = compute_dtype, threads
        self.indices = {id(p): index for index, p in enumerate(space.parameters)}
        self.scratch = Scratch()
        self.frames: list[Frame] = []
        self.sites: dict[torch.nn.Module, list[Site]] = {}
        self.watch: Watch | None = None
        self.words = (0, 0)
        self.epsilon = 0.0
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if id(parameter) in self.indices:
                    self._add(module, Site(module, name, self.indices[id(parameter)]))

    def _add(self, user: torch.nn.Module, site: Site) -> None:
        sites = self.sites.setdefault(user, [])
        if site not in sites:
            sites.append(site)

    # --- hooks

    def _before(self, module: torch.nn.Module, args: Any) -> None:
        frame = Frame(module, base=self.scratch.mark())
        self.frames.append(frame)
        with self._unwatched():
            copies: dict[int, torch.Tensor] = {}  # tied names share one
            for site in self.sites.get(module, ()):
                held = site.owner._parameters[site.name]
                if held is None or id(held) not in self.indices:
                    continue  # a module around this one has perturbed it already
                if site.index not in copies:
                    copies[site.index] = self._copy(site.index)
                put(site.owner, site.name, copies[site.index])
                frame.swapped.append((site.owner, site.name, held))

    def _copy(self, index: int) -> torch.Tensor:
        entry: Entry = self.space.layout.entries[index]
        parameter, master = self.space.parameters[index], self.space.masters[index]
        out = self.scratch.take(master, entry.size, self.compute_dtype or parameter.dtype)
        kernels.perturb(self.recipe, self.words, self.epsilon, entry, master, out, self.threads)
        return out.view(parameter.shape)

    def _after(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        if not any(frame.module is module for frame in self.frames):
            return None
        with self._unwatched():
            # An exception below may have left frames of inner modules behind.
            while self.frames[-1].module is not module:
                self._restore(self.frames.pop())
            frame = self.frames.pop()
            kept = tree_map(self._owned, output) if frame.swapped else None
            self._restore(frame)
            return kept

    def _owned(self, value: Any) -> Any:
        """A module may return a view of its weight: that has to outlive the scratch."""
        if isinstance(value, torch.Tensor) and self.scratch.holds(value):
            return value.clone()
        return value

    def _restore(self, frame: Frame) -> None:
        for owner, name, parameter in reversed(frame.swapped):
            put(owner, name, parameter)
        self.scratch.release(frame.base)

    @contextmanager
    def _unwatched(self) -> Iterator[None]:
        if self.watch is None:
            yield
            return
        self.watch.paused = True
        try:
            yield
        finally:
            self.watch.paused = False

    # --- evaluation

    @contextmanager
    def at(self, words: tuple[int, int], epsilon: float) -> Iterator[None]:
        """Inside, forwards of the model see theta + epsilon z(words). Gradients are off."""
        assert not self.frames, "perturbed evaluations do not nest"
        self.words, self.epsilon = words, epsilon
        self._settle()
        modules = list(self.model.modules()) if self.watch is not None else list(self.sites)
        handles = []
        try:
            for module in modules:
                handles.append(module.register_forward_pre_hook(self._before))
                handles.append(module.register_forward_hook(self._after, always_call=True))
            with torch.no_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()
            while self.frames:
                self._restore(self.frames.pop())
            self._settle()

    def _settle(self) -> None:
        """At first the scratch is what the largest module needs by itself."""
        if not self.scratch.needed:
            entries = self.space.layout.entries
            self.scratch.needed = max(
                sum(-(-entries[index].size // ALIGN) * ALIGN for index in {s.index for s in sites})
                for sites in self.sites.values()
            )
        self.scratch.settle(
            {
                (m.device, self.compute_dtype or p.dtype)
                for p, m in zip(self.space.parameters, self.space.masters, strict=True)
            }
        )

    def probe(self, loss_fn: Callable[[], Any]) -> None:
        """Find out which forwards use which parameters; call once before the first `at`."""
        for _ in range(PROBES_MAX):
            running = _Running(self.frames)
            self.watch = Watch(self.indices, running)
            try:
                with self.at((0, 0), self.recipe.epsilon), self.watch:
                    loss_fn()
            finally:
                escaped, self.watch = self.watch.escaped, None
            if not escaped:
                return
            for user, index, function in escaped:
                name = self.space.layout.entries[index].name
                if user is None:
                    raise ConfigError(
                        f"SPSA cannot perturb {name}: {function} uses it outside of any module's "
                        "forward. Use it inside a module, or leave it out with select=..."
                    )
                for site in self._homes(index):
                    self._add(user, site)
        raise ConfigError("SPSA cannot find out which modules use which parameters of this model")

    def _homes(self, index: int) -> list[Site]:
        """Every name the parameter has: with tied weights nobody knows which one is read."""
        return [
            Site(module, name, index)
            for module in self.model.modules()
            for name, parameter in module._parameters.items()
            if parameter is self.space.parameters[index]
        ]


class _Running(Sequence[torch.nn.Module]):
    """The modules whose forward is under way, innermost last."""

    def __init__(self, frames: list[Frame]) -> None:
        self.frames = frames

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: Any) -> Any:
        return self.frames[index].module
