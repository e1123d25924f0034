"""Which parts of the model synchronise after which inner step.

A schedule is a function of the *global* step alone, so no peer ever waits on another fragment
than the others do, and a newcomer that adopts the step has the schedule too. It sends nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from decotrain.errors import ConfigError
from decotrain.outer_options import check_overlap


class Schedule(Protocol):
    """The first of the four choices."""

    @property
    def overlap(self) -> int:
        """Inner steps between the beginning of a round and the use of its result."""
        ...

    @property
    def late(self) -> bool:
        """The result is used when the fragment's next round begins, and not earlier."""
        ...

    @property
    def hurry(self) -> bool:
        """A peer enters a round as soon as another one has opened it, with the steps it has."""
        ...

    def fragments(self, names: Sequence[str]) -> list[list[str]]:
        """Parts the parameter names into fragments; each name is in exactly one. Asked once."""
        ...

    def sends(self, step: int) -> Sequence[tuple[int, int]]:
        """(fragment, number) of the rounds (1, 2, ...) that begin after global step `step`."""
        ...

    def sent_at(self, fragment: int, number: int) -> int:
        """The global step after which that round begins."""
        ...


@dataclass(frozen=True)
class EveryH:
    """Everything, every `steps` inner steps. overlap = steps: one round late."""

    steps: int
    overlap: int = 0
    hurry: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.overlap <= self.steps:
            raise ConfigError(
                f"sync_every={self.steps} with overlap={self.overlap}: a round begins every"
                " sync_every >= 1 steps, and its result is used within as many"
            )

    @property
    def late(self) -> bool:
        return self.overlap == self.steps

    def fragments(self, names: Sequence[str]) -> list[list[str]]:
        return [list(names)]

    def sends(self, step: int) -> Sequence[tuple[int, int]]:
        return [(0, step // self.steps)] if step % self.steps == 0 else []

    def sent_at(self, fragment: int, number: int) -> int:
        assert fragment == 0
        return number * self.steps


LAYER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass
class Staggered:
    """Fragments of a few layers each, one after the other (Streaming DiLoCo, arXiv 2501.18512).

    Fragment p of P is sent at steps t_p + k H, t_p = floor(p H / P), k = 1, 2, ... What belongs to
    no layer (embeddings, last norm, head) is a fragment of its own, the first.
    """

    steps: int  # H
    layers: int = 3  # in a fragment
    pattern: str = "strided"  # layer l in fragment l mod P, or "sequential": l div `layers`
    overlap: int = 1  # tau
    offsets: list[int] = field(default_factory=list)  # t_p; known when the names are
    late: ClassVar[bool] = False
    hurry: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.layers < 1 or self.overlap < 0:
            raise ConfigError("sync_every and layers are at least 1, overlap at least 0")
        if self.pattern not in ("strided", "sequential"):
            raise ConfigError(f"pattern={self.pattern!r}: strided or sequential")

    def fragments(self, names: Sequence[str]) -> list[list[str]]:
        layer_of = layers_of(names)
        count = max(layer_of.values(), default=-1) + 1
        parts = -(-count // self.layers)
        found: list[list[str]] = [[] for _ in range(parts + 1)]
        for name in names:
            layer = layer_of.get(name)
            if layer is None:
                found[0].append(name)
            else:
                part = layer % parts if self.pattern == "strided" else layer // self.layers
                found[1 + part].append(name)
        found = [part for part in found if part]
        self.offsets = [p * self.steps // len(found) for p in range(len(found))]
        check_overlap(self.steps, len(found), self.overlap)
        return found

    def sends(self, step: int) -> Sequence[tuple[int, int]]:
        since = [(p, step - offset) for p, offset in enumerate(self.offsets)]
        return [
            (p, passed // self.steps)
            for p, passed in since
            if passed >= self.steps and passed % self.steps == 0
        ]

    def sent_at(self, fragment: int, number: int) -> int:
        return self.offsets[fragment] + number * self.steps


def layers_of(names: Sequence[str]) -> dict[str, int]:
    """Layer number (0, 1, ...) by parameter name, of those that are in a numbered list of modules.

    `blocks.3.attention.qkv.weight` is in layer 3 of `blocks`; of several lists the longest counts.
    """
    lists: dict[str, dict[str, int]] = {}
    for name in names:
        if match := LAYER.search(name):
            lists.setdefault(name[: match.start(1)], {})[name] = int(match[1])
    if not lists:
        return {}
    longest = max(lists.values(), key=lambda numbers: len(set(numbers.values())))
    order = {number: place for place, number in enumerate(sorted(set(longest.values())))}
    return {name: order[number] for name, number in longest.items()}
