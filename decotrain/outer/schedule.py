"""Which parts of the model synchronise after which inner step.

A schedule is a function of the *global* step alone, so no peer ever waits on another fragment
than the others do, and a newcomer that adopts the step has the schedule too. It sends nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    """The first of the four choices."""

    def fragments(self, names: Sequence[str]) -> list[list[str]]:
        """Parts the parameter names into fragments; each name is in exactly one."""
        ...

    def sends(self, step: int) -> Sequence[int]:
        """Fragments whose round begins after global step `step` (1, 2, ...), in this order."""
        ...

    def receives(self, step: int) -> Sequence[int]:
        """Fragments whose result is applied after global step `step`; it may have to wait."""
        ...

    def step_after(self, fragment: int, rounds: int) -> int:
        """The global step at which the fragment's round number `rounds` (1, 2, ...) is applied."""
        ...


@dataclass(frozen=True)
class EveryH:
    """Everything, every `steps` inner steps, and the result at once: DiLoCo's own schedule."""

    steps: int

    def __post_init__(self) -> None:
        assert self.steps >= 1, f"a round every {self.steps} steps"

    def fragments(self, names: Sequence[str]) -> list[list[str]]:
        return [list(names)]

    def sends(self, step: int) -> Sequence[int]:
        return [0] if step % self.steps == 0 else []

    def receives(self, step: int) -> Sequence[int]:
        return self.sends(step)

    def step_after(self, fragment: int, rounds: int) -> int:
        assert fragment == 0
        return rounds * self.steps
