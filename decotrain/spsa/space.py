"""The parameter space: which parameters SPSA moves, where each one's noise starts, and the digest.

Every chosen parameter gets a span of element numbers that begins on a tile (2,048 elements), in
the order of `model.named_parameters()`; tied parameters share one span. The float32 values that
the updates apply to ("masters") are the parameters themselves, or float32 copies for models kept
in a shorter type.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from decotrain.errors import ConfigError, FileError

TILE = 2048
Select = str | Callable[[str, torch.nn.Parameter], bool]

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One parameter of the space."""

    name: str
    aliases: tuple[str, ...]  # other names of the same tensor (tied weights)
    shape: tuple[int, ...]
    dtype: str  # as stored in the model: F32, BF16 or F16
    first: int  # number of its first element in the space
    decay: bool  # weight decay applies

    @property
    def size(self) -> int:
        size = 1
        for extent in self.shape:
            size *= extent
        return size

    def to_json(self) -> list[Any]:
        return [self.name, list(self.aliases), list(self.shape), self.dtype, self.decay]


@dataclass(frozen=True)
class Layout:
    """The entries of a space, in order."""

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, items: Sequence[tuple[str, Sequence[str], Sequence[int], str, bool]]) -> Layout:
        entries = []
        first = 0
        for name, aliases, shape, dtype, decay in items:
            entry = Entry(name, tuple(aliases), tuple(shape), dtype, first, decay)
            entries.append(entry)
            first += -(-entry.size // TILE) * TILE
        return cls(tuple(entries))

    @property
    def elements(self) -> int:
        return sum(entry.size for entry in self.entries)

    def to_json(self) -> list[Any]:
        return [entry.to_json() for entry in self.entries]

    @classmethod
    def from_json(cls, items: Any) -> Layout:
        """Checks every field: the bytes come from a file that somebody may have sent us."""
        checked: list[tuple[str, list[str], list[int], str, bool]] = []
        for item in items if isinstance(items, list) else [None]:
            if not isinstance(item, list) or len(item) != 5:
                raise FileError("the list of parameters in the seed log is malformed")
            ok = (
                isinstance(item[0], str)
                and isinstance(item[1], list)
                and all(isinstance(alias, str) for alias in item[1])
                and isinstance(item[2], list)
                and all(isinstance(n, int) and 0 <= n < 1 << 40 for n in item[2])
                and item[3] in DTYPES
                and isinstance(item[4], bool)
            )
            if not ok:
                raise FileError("the list of parameters in the seed log is malformed")
            checked.append((item[0], item[1], item[2], item[3], item[4]))
        layout = cls.of(checked)
        if layout.entries and layout.entries[-1].first + layout.entries[-1].size >= 1 << 47:
            raise FileError("the seed log names a parameter space beyond all bounds")
        return layout


def chooser(select: Select, model: torch.nn.Module) -> Callable[[str, torch.nn.Parameter], bool]:
    """The test that says which parameters are moved; frozen ones never are."""
    if callable(select):
        return select
    if select == "all":
        return lambda name, parameter: True
    if select == "norms_and_biases":
        norms = {
            id(parameter)
            for module in model.modules()
            if "norm" in type(module).__name__.lower()
            for parameter in module.parameters(recurse=False)
        }
        return lambda name, parameter: id(parameter) in norms or name.endswith("bias")
    if select == "adapters":
        return lambda name, parameter: re.search("lora_|adapter", name) is not None
    try:
        pattern = re.compile(select)
    except re.error as error:
        raise ConfigError(f"select '{select}' is no pattern of names: {error}") from error
    return lambda name, parameter: pattern.search(name) is not None


class Space:
    """A model's chosen parameters with their masters."""

    def __init__(self, model: torch.nn.Module, select: Select = "all") -> None:
        wanted = chooser(select, model)
        names: dict[int, list[str]] = {}
        parameters: dict[int, torch.nn.Parameter] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
            parameters.setdefault(id(parameter), parameter)
        items = []
        self.parameters: list[torch.nn.Parameter] = []
        for key, parameter in parameters.items():
            if not parameter.requires_grad or not wanted(names[key][0], parameter):
                continue
            first, *aliases = names[key]
            dtype = DTYPE_NAMES.get(parameter.dtype)
            if dtype is None:
                raise ConfigError(f"{first} is {parameter.dtype}: float32, bfloat16 or float16")
            items.append((first, aliases, tuple(parameter.shape), dtype, parameter.dim() > 1))
            self.parameters.append(parameter)
        if not items:
            raise ConfigError(f"select '{select}' chooses no parameter that requires grad")
        self.layout = Layout.of(items)
        self.masters = [self._master(parameter) for parameter in self.parameters]

    @staticmethod
    def _master(parameter: torch.nn.Parameter) -> torch.Tensor:
        data = parameter.detach()
        if data.dtype == torch.float32 and data.is_contiguous():
            return data.view(-1)
        return data.float().contiguous().view(-1)

    def publish(self) -> None:
        """Round the masters into parameters that are not float32 themselves."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter.data_ptr() != master.data_ptr():
                parameter.detach().copy_(master.view(parameter.shape))

    def state(self) -> dict[str, torch.Tensor]:
        """The masters by name: what peers share."""
        return {
            entry.name: master
            for entry, master in zip(self.layout.entries, self.masters, strict=True)
        }

    def digest(self) -> str:
        return digest(self.layout, self.state())


def digest(layout: Layout, tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes and float32 values, in the order of the layout."""
    total = hashlib.sha256()
    for entry in layout.entries:
        total.update(f"{entry.name} {entry.shape}\n".encode())
        values = tensors[entry.name].detach().float().contiguous().cpu()
        total.update(values.view(-1).numpy().view(np.uint8).data)
    return total.hexdigest()
