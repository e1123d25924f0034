"""A pool of seeds (FedKSeed): the whole history of a run is one scalar for each seed.

With a pool, theta = base - sum of a_k z_k over the seeds, where a_k adds up rate * value of every
term that used seed k. Adding in another order would round differently, so the peers agree on when
to add: after every `rebase_every` steps theta is made anew from the base and the sums. A newcomer
then needs the base and the log, adds up scalars, and replays at most `pool` seeds and
`rebase_every` steps, however long the run.

The price is a copy of the base. Weight decay is excluded (Recipe says so).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from decotrain.spsa import kernels
from decotrain.spsa.code import POOL_MARK
from decotrain.spsa.recipe import Recipe, Term, Update
from decotrain.spsa.space import Layout


class Pool:
    def __init__(self, recipe: Recipe, masters: Sequence[torch.Tensor]) -> None:
        self.recipe = recipe
        self.sums = np.zeros(recipe.pool, dtype=np.float64)
        self.base = [master.clone() for master in masters]

    def state(self) -> dict[str, torch.Tensor]:
        """What a newcomer that fetches state needs besides the parameters."""
        bases = {f"spsa.base.{index}": base for index, base in enumerate(self.base)}
        # As float32 pairs of bits: shared state is made of float32 tensors.
        return {**bases, "spsa.sums": torch.from_numpy(self.sums.view(np.float32))}

    def note(self, update: Update) -> None:
        for term in update.terms:
            assert term.c2 == POOL_MARK, term
            self.sums[term.c3] += update.rate * term.value

    def rebase(
        self,
        layout: Layout,
        masters: Sequence[torch.Tensor],
        threads: kernels.Threads | None = None,
    ) -> None:
        """theta from the base and the sums, seeds in order."""
        terms = tuple(
            Term(POOL_MARK, index, float(np.float32(total)))
            for index, total in enumerate(self.sums)
            if total != 0.0
        )
        for master, base in zip(masters, self.base, strict=True):
            master.copy_(base)
        batch = kernels.Batch.of(self.recipe, [Update(terms, 1.0, 1.0, len(terms))])
        kernels.replay(layout, masters, batch, threads)
