"""Each preset equals its own formulas (tests/outer_naive.py), step by step, for every peer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decotrain.outer import OuterOptimizer, make
from tests import outer_naive as naive
from tests.fake_comm import WAIT_S, FakeRun
from tests.outer_naive import Script, vector
from tests.outer_runs import batch, loss_of, run_peers

Make = Callable[[nn.Module, torch.optim.Optimizer, Any], OuterOptimizer]


def lockstep(script: Script, make_outer: Make) -> tuple[list[dict[int, Tensor]], dict[int, Any]]:
    """Trains by the script, all peers step by step together: local parameters after each step, and
    the outer optimizers."""
    everybody = sorted({i for t in range(1, script.steps + 1) for i in script.present(t)})
    first = script.present(1)
    run = FakeRun(len(first))
    run.waived = set(script.waived)
    for peer in first:
        run.comm(peer)
    barrier = threading.Barrier(len(everybody), timeout=WAIT_S)
    history: list[dict[int, Tensor]] = [{} for _ in range(script.steps)]
    outers: dict[int, Any] = {}

    def body(peer: int) -> bool:
        model = script.make(1 if peer == 1 else 50 + peer)
        inner = torch.optim.SGD(model.parameters(), lr=naive.INNER_LR)
        for t in range(1, script.steps + 1):
            here = peer in script.present(t)
            if here and peer not in outers:
                comm = run.comms.get(peer) or run.comm(peer)
                outers[peer] = make_outer(model, inner, comm)
                assert outers[peer].global_step == t - 1
            if here:
                loss_of(model, batch(peer, t - 1)).backward()
                inner.step()
                inner.zero_grad()
            barrier.wait()
            if not here and peer in run.active:
                run.remove(peer)
            barrier.wait()
            if here:
                outers[peer].step(script.tokens(peer))
                outers[peer].settle()
                assert outers[peer].global_step == t
                history[t - 1][peer] = vector(model)
            barrier.wait()
        return True

    run_peers(run, everybody, body)
    return history, outers


def same(found: list[dict[int, Tensor]], expected: list[dict[int, Tensor]]) -> None:
    for step, (one, other) in enumerate(zip(found, expected, strict=True), 1):
        assert one.keys() == other.keys()
        for peer in one:
            error = float((one[peer] - other[peer]).norm() / other[peer].norm())
            assert error < 1e-6, f"step {step}, peer {peer}: relative error {error:.2e}"


def three(step: int) -> list[int]:
    return [1, 2, 3]


def changing(step: int) -> list[int]:
    """Peer 4 comes while a round is under way, after step 12; peer 2 is gone from step 23 on."""
    return [1] + [2] * (step < 23) + [3] + [4] * (step >= 13)


STRIDED = [["embed", "head"], ["blocks.0", "blocks.2"], ["blocks.1", "blocks.3"]]
SEQUENTIAL = [["embed", "head"], ["blocks.0", "blocks.1"], ["blocks.2", "blocks.3"]]


@pytest.mark.parametrize(
    ("groups", "overlap", "alpha", "present", "waived"),
    [
        (STRIDED, 1, 0.5, three, set()),
        (SEQUENTIAL, 3, 0.5, three, set()),
        (STRIDED, 0, 0.0, three, set()),
        (STRIDED, 2, 0.25, changing, set()),
        (STRIDED, 2, 0.5, three, {(2, 1), (1, 2), (3, 2)}),
    ],
    ids=["strided", "sequential", "at once", "membership", "waived"],
)
def test_streaming(
    groups: Any, overlap: int, alpha: float, present: Any, waived: set[tuple[int, int]]
) -> None:
    script = Script(40, present, waived, tokens=lambda peer: float(1 + peer))
    pattern = "strided" if groups is STRIDED else "sequential"
    found, outers = lockstep(
        script,
        lambda m, o, c: make(
            "streaming", m, o, c, sync_every=12, layers=2, pattern=pattern, overlap=overlap,
            alpha=alpha, lr=0.6, momentum=0.9,
        ),
    )  # fmt: skip
    same(found, naive.streaming(script, groups, 12, overlap, alpha, 0.6, 0.9))
    names = [sorted(f.parameters) for f in outers[1].fragments]
    for group, of_fragment in zip(groups, names, strict=True):
        assert all(name.startswith(tuple(group)) for name in of_fragment)


def test_streaming_of_one_fragment_without_overlap_is_diloco_to_the_bit() -> None:
    """A4."""
    script = Script(24, three)

    def layers_only(seed: int) -> nn.Module:
        return nn.Sequential(*(nn.Linear(5, 5) for _ in range(2)), nn.Linear(5, 3))

    def make_model(seed: int) -> nn.Module:
        with naive.MAKING:
            torch.manual_seed(seed)
            return layers_only(seed)

    script.make = make_model
    one, _ = lockstep(
        script,
        lambda m, o, c: make(
            "streaming", m, o, c, sync_every=6, layers=9, overlap=0, alpha=0.0, momentum=0.9
        ),
    )
    other, _ = lockstep(script, lambda m, o, c: make("diloco", m, o, c, sync_every=6))
    for found, expected in zip(one, other, strict=True):
        for peer in found:
            assert torch.equal(found[peer], expected[peer])


def test_eager() -> None:
    script = Script(30, three)
    found, _ = lockstep(
        script, lambda m, o, c: make("eager", m, o, c, sync_every=5, lr=0.4, momentum=0.9)
    )
    same(found, naive.eager(script, 5, 0.4, 0.9))
