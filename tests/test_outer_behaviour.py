"""What a rule is for: late results without a correction are worse; feedback that fades; arrivals of
unequal speed; Adam outside."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from decotrain import _core
from decotrain.outer import AdamW, Eager, EveryH, Nesterov, OuterOptimizer, Replace, make
from tests import outer_naive as naive
from tests.fake_comm import WAIT_S, FakeRun
from tests.outer_naive import INNER_LR, Script, deep, vector
from tests.outer_runs import (
    assert_close,
    batch,
    flat,
    loss_of,
    make_model,
    put,
    run_peers,
    train_all,
)
from tests.test_outer_presets import lockstep, same, three, wait_for_round

# --- late results


def distances(merge: Any) -> list[float]:
    """Of theta from the minimum of a quadratic, after each round: curvatures 0.1 to 1, two peers
    that pull to either side of it."""
    curvature, sides = torch.linspace(0.1, 1.0, 10), torch.linspace(-1.0, 1.0, 10)
    run = FakeRun(2)
    for peer in (1, 2):
        run.comm(peer)

    def body(peer: int) -> list[float]:
        model = nn.Linear(10, 1, bias=False)
        nn.init.ones_(model.weight)
        inner = torch.optim.SGD(model.parameters(), lr=0.3)
        update = Nesterov(0.7, 0.9)
        outer = OuterOptimizer(
            model,
            inner,
            run.comms[peer],
            schedule=EveryH(2, overlap=2),
            update=update,
            merge=merge(),
        )
        found = []
        target = sides if peer == 1 else -sides
        for _ in range(60):
            (curvature * (model.weight[0] - target) ** 2).sum().div(2).backward()
            inner.step()
            inner.zero_grad()
            if outer.step():
                outer.settle()
                found.append(float(outer.fragments[0].theta.norm()))
        return found

    return run_peers(run, [1, 2], body)[1]


def test_naive_delay_is_clearly_worse_than_eager() -> None:
    """The same rounds one round late, with our own part of them at once and without it."""
    eager, late = distances(Eager), distances(Replace)
    assert eager[-1] < 0.2 * eager[0]
    assert max(eager) < 1.5 * eager[0]
    assert late[-1] > 4 * late[0], "late results alone do no harm: what is the correction for?"
    assert min(late[-5:]) > 10 * max(eager[-5:])


# --- error feedback that fades


def lossy(comm: Any) -> Any:
    """A fake communicator whose contributions lose what the codec loses; results lose nothing."""
    begin = comm.all_reduce

    def all_reduce(values: Tensor, *, out: Any = None, residual: Any = None, **options: Any) -> Any:
        sent = values
        if residual is not None:
            codec = options["codec"]
            data = np.empty(_core.codec_bytes(codec, values.numel()), np.uint8)
            assert _core.codec_encode_with_feedback(codec, values.numpy(), residual.numpy(), data)
            sent = torch.empty_like(values)
            assert _core.codec_decode(codec, data, sent.numpy())
        return begin(sent, out=values if out is None else out, **options)

    comm.all_reduce = all_reduce
    return comm


@pytest.mark.parametrize("codec", ["e2m1", "int2"])
def test_muloco_keeps_nine_tenths_of_what_was_lost(codec: str) -> None:
    script = Script(36, three, tokens=float)
    found, outers = lockstep(
        script,
        lambda m, o, c: make("muloco", m, o, lossy(c), sync_every=6, codec=f"{codec}+f32"),
    )
    same(found, naive.muloco(script, 6, codec, 0.8, 0.9, decay=0.9))
    assert outers[1].residuals[0].any()


# --- peers of unequal speed


def test_in_a_hurry_each_peer_brings_the_steps_it_has() -> None:
    """The faster one opens a round after its H steps, and the other enters it after the step that
    it is in: weighted by their tokens it is one mean, and both are at one global step then."""
    taken = [{1: 6, 2: 3}, {1: 6, 2: 1}, {1: 4, 2: 6}, {1: 2, 2: 6}]  # H_i, by round
    run = FakeRun(2)
    for peer in (1, 2):
        run.comm(peer)
    barrier = threading.Barrier(2, timeout=WAIT_S)

    def body(peer: int) -> list[Tensor]:
        model, found, done = deep(peer), [], 0
        inner = torch.optim.SGD(model.parameters(), lr=INNER_LR)
        outer = make(
            "delayed_nesterov", model, inner, run.comms[peer], sync_every=6, delay=2, lr=0.6,
            momentum=0.8,
        )  # fmt: skip
        for number, steps in enumerate(taken, 1):
            for left in reversed(range(steps[peer])):
                loss_of(model, batch(peer, done)).backward()
                inner.step()
                inner.zero_grad()
                done += 1
                if not left:
                    barrier.wait()
                    if steps[peer] < 6:
                        wait_for_round(run, but=peer)
                assert outer.step() == (not left), "a round too early or too late"
            assert outer.global_step == 6 * number
            found.append(vector(model))
        return found

    found = run_peers(run, [1, 2], body)
    expected = unequal(taken, naive.nesterov(0.6, 0.8))
    for peer in (1, 2):
        for one, other in zip(found[peer], expected, strict=True):
            assert_close(one, other)


def unequal(taken: list[dict[int, int]], apply: Any) -> list[Tensor]:
    """theta after each round, in float64."""
    replicas = {peer: deep(1).double() for peer in (1, 2)}
    theta, memory, out = vector(replicas[1]), dict[str, Any](), []
    done = dict.fromkeys(replicas, 0)
    for steps in taken:
        mean = torch.zeros_like(theta)
        for peer, model in replicas.items():
            naive.assign(model, theta)
            for _ in range(steps[peer]):
                model.zero_grad()
                loss_of(model, batch(peer, done[peer])).backward()
                for parameter in model.parameters():
                    parameter.data -= INNER_LR * parameter.grad
                done[peer] += 1
            mean += (theta - vector(model)) * steps[peer] / sum(steps.values())
        theta = apply(theta, mean, memory)
        out.append(theta)
    return out


# --- Adam outside


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_equals_torch_adamw(decay: float) -> None:
    torch.manual_seed(0)
    elements = (1 << 18) + 17  # more than one span
    parameter = nn.Parameter(torch.randn(elements, dtype=torch.float64))
    update = AdamW(0.3, (0.8, 0.95), 0.1, decay)
    twin = torch.optim.AdamW([parameter], lr=0.3, betas=(0.8, 0.95), eps=0.1, weight_decay=decay)
    theta = parameter.detach().float()
    state = {name: torch.zeros(elements) for name in update.buffers}
    state |= {name: torch.zeros(1, dtype=torch.float64) for name in update.scalars}
    for _ in range(5):
        delta = torch.randn(elements)
        parameter.grad = delta.double()
        twin.step()
        update.apply(theta, delta, state, 3)
        assert_close(theta, parameter.detach())


def test_adamw_outside_moves_by_the_mean_pseudo_gradient() -> None:
    """Peers hold the same bits, scalars included, and theta is torch's on the mean."""
    trained = train_all(
        2, 12, lambda m, o, c: OuterOptimizer(m, o, c, schedule=EveryH(4), update=AdamW())
    )
    assert trained[1].digests == trained[2].digests
    replicas = {peer: make_model(seed=1).double() for peer in (1, 2)}
    theta = nn.Parameter(flat(replicas[1]))
    twin = torch.optim.AdamW([theta], lr=0.3, betas=(0.9, 0.95), eps=0.1, weight_decay=0.0)
    for number, found in enumerate(trained[1].theta):
        mean = torch.zeros_like(theta)
        for peer, model in replicas.items():
            put(model, theta.detach())
            for step in range(4 * number, 4 * number + 4):
                model.zero_grad()
                loss_of(model, batch(peer, step)).backward()
                for parameter in model.parameters():
                    parameter.data -= 0.1 * parameter.grad
            mean += (theta.detach() - flat(model)) / 2
        theta.grad = mean
        twin.step()
        assert_close(found, theta.detach())
    assert len(trained[1].theta) == 3
