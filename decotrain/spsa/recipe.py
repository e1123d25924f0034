"""What all peers of a run must agree on before the first step, and nothing else.

A `Recipe` turns a record (who sent which bytes for a step) into terms, a rate and a decay: pure
functions of integers and IEEE doubles, rounded to float32 once, with no call of libm that could
differ between machines (math.sqrt and math.fsum are correctly rounded everywhere). The seed log
keeps the recipe in its header, so that a replay needs nothing but the base and the log.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from decotrain.errors import ConfigError
from decotrain.spsa import code

NOISES = ("rademacher", "gaussian")
SCHEDULES = ("constant", "linear", "cosine")
NORMALISATIONS = ("mean", "sqrt", "std")
STALENESS_MAX = 15  # rounds that the core keeps open before the newest

# cos(pi x) for |x| <= 1/2, as a polynomial in x^2: plain products and sums are the same everywhere.
_COSINE = [(-1) ** k * math.pi ** (2 * k) / math.factorial(2 * k) for k in range(11)]


def cosine(x: float) -> float:
    """cos(pi x) for x in [0, 1], to 1e-15, with the same bits on every machine."""
    if x > 0.5:
        return -cosine(1.0 - x)
    total = 0.0
    for coefficient in reversed(_COSINE):
        total = total * (x * x) + coefficient
    return total


@dataclass(frozen=True)
class Term:
    """One scalar and the stream of its noise."""

    c2: int
    c3: int
    value: float


@dataclass(frozen=True)
class Update:
    """theta <- theta * decay - rate * sum of value * z; rate and decay are float32 values."""

    terms: tuple[Term, ...]
    rate: float
    decay: float
    counted: int  # samples that were not skipped


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of a run. `seed` makes the key of all noise."""

    lr: float = 1e-6
    epsilon: float = 1e-3
    samples: int = 1  # of one peer in one step
    seed: int = 0
    noise: str = "rademacher"
    normalise: str = "mean"  # rate = lr / n, lr / sqrt(n), or lr / n / std of the scalars (FZOO)
    one_sided: bool = False  # (L(theta + eps z) - L(theta)) / eps: n + 1 evaluations, not 2 n
    schedule: str = "constant"
    total_steps: int = 0  # where linear and cosine end; constant: not used
    warmup_steps: int = 0
    final_fraction: float = 0.0  # of lr, at total_steps and after
    weight_decay: float = 0.0
    staleness: int = 0  # record t takes effect after step t + staleness was measured
    pool: int = 0  # number of seeds in the pool (a power of two); 0: every sample has its own
    rebase_every: int = 256  # steps after which a run with a pool starts again from the base

    def __post_init__(self) -> None:
        for ok, text in self._checks():
            if not ok:
                raise ConfigError(f"SPSA: {text}")

    def _checks(self) -> list[tuple[bool, str]]:
        finite = (self.lr, self.epsilon, self.weight_decay, self.final_fraction)
        decaying = self.schedule != "constant"
        pool_ok = self.pool == 0 or (2 <= self.pool <= 1 << 16 and self.pool.bit_count() == 1)
        return [
            (all(map(math.isfinite, finite)), "every number has to be finite"),
            (self.lr >= 0, f"lr {self.lr} is negative"),
            (self.epsilon > 0, f"epsilon {self.epsilon} is not above 0"),
            (1 <= self.samples <= code.SAMPLES_MAX, f"samples is 1 to 255, not {self.samples}"),
            (0 <= self.seed < 1 << 64, "seed is a 64-bit number"),
            (self.noise in NOISES, f"noise is one of {NOISES}, not '{self.noise}'"),
            (self.normalise in NORMALISATIONS, f"normalise is one of {NORMALISATIONS}"),
            (self.schedule in SCHEDULES, f"schedule is one of {SCHEDULES}"),
            (not decaying or self.total_steps > 0, f"{self.schedule} needs total_steps"),
            (self.warmup_steps >= 0, "warmup_steps is negative"),
            (0 <= self.final_fraction <= 1, "final_fraction is a part of lr, 0 to 1"),
            (0 <= self.lr * self.weight_decay < 1, "lr * weight_decay has to be below 1"),
            (0 <= self.staleness <= STALENESS_MAX, f"staleness is 0 to {STALENESS_MAX}"),
            (pool_ok, "pool is 0 or a power of two up to 65536"),
            (self.rebase_every >= 1, "rebase_every is at least 1"),
            (self.pool == 0 or self.weight_decay == 0, "a seed pool excludes weight decay"),
        ]

    # --- the key, and the text that travels in logs

    @property
    def key(self) -> int:
        """The Philox key: a digest, so that near seeds do not give near keys."""
        text = f"decotrain spsa {self.seed}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Recipe:
        known = {f.name: f.type for f in fields(cls)}
        kinds: dict[str, tuple[type, ...]] = {
            "int": (int,),
            "float": (int, float),
            "str": (str,),
            "bool": (bool,),
        }
        for name, value in values.items():
            if name not in known:
                raise ConfigError(f"unknown SPSA option '{name}': written by a newer decotrain")
            if not isinstance(value, kinds[str(known[name])]):
                raise ConfigError(f"SPSA option '{name}' is {value!r}, not {known[name]}")
        return cls(**values)

    def digest(self) -> str:
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    # --- a record becomes an update

    def lr_at(self, step: int) -> float:
        """The learning rate of a step: a double that is the same on every machine."""
        if step < self.warmup_steps:
            return self.lr * ((step + 1) / (self.warmup_steps + 1))
        if self.schedule == "constant":
            return self.lr
        span = max(1, self.total_steps - self.warmup_steps)
        x = min(1.0, (step - self.warmup_steps) / span)
        shape = 1.0 - x if self.schedule == "linear" else 0.5 * (1.0 + cosine(x))
        return self.lr * (self.final_fraction + (1.0 - self.final_fraction) * shape)

    def update(self, step: int, entries: Mapping[int, bytes]) -> Update:
        """What the record of a step does: `entries` are the codes by slot."""
        terms = []
        values = []
        for slot in sorted(entries):
            for sample, byte in enumerate(entries[slot]):
                if byte == code.SKIP:
                    continue
                value = float(code.VALUES[byte])
                values.append(value)
                if byte != code.ZERO:
                    words = code.stream(step, slot, sample)
                    if self.pool:
                        words = code.pool_stream(self.key, self.pool, words)
                    terms.append(Term(*words, value))
        lr = self.lr_at(step)
        rate = self._rate(lr, values)
        decay = float(np.float32(1.0 - lr * self.weight_decay))
        return Update(tuple(terms), rate, decay, len(values))

    def _rate(self, lr: float, values: list[float]) -> float:
        n = len(values)
        if n == 0:
            return 0.0
        rate = lr / math.sqrt(n) if self.normalise == "sqrt" else lr / n
        if self.normalise == "std" and n > 1:
            mean = math.fsum(values) / n
            variance = math.fsum([(v - mean) * (v - mean) for v in values]) / n
            if variance > 0:
                rate /= math.sqrt(variance)
        return float(np.float32(rate))
