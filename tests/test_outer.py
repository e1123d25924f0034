"""The outer optimizer against a naive reference: n replicas in a loop, float64, formulas only."""

from __future__ import annotations

import sys
import threading
import time
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from decotrain.errors import ConfigError, StateError
from decotrain.outer import (
    SGD,
    CodecChoice,
    EveryH,
    Mix,
    Nesterov,
    OuterOptimizer,
    make,
)
from decotrain.outer.background import in_background
from decotrain.outer.fragment import Fragment
from decotrain.outer.merge import Eager
from decotrain.outer.update import SPAN_ELEMENTS
from tests.fake_comm import WAIT_S, FakeRun
from tests.outer_runs import (
    Trained,
    assert_close,
    batch,
    flat,
    loss_of,
    make_model,
    reference,
    run_peers,
    train,
    train_all,
)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_diloco_equals_the_naive_reference_round_by_round(n: int) -> None:
    trained = train_all(n, 24, lambda m, o, c: make("diloco", m, o, c, sync_every=4, lr=0.7))
    expected = reference(n, 6, 4, 0.7, 0.9)
    for peer in trained.values():
        assert len(peer.theta) == 6
        for found, wanted in zip(peer.theta, expected, strict=True):
            assert_close(found, wanted)


def test_every_peer_holds_the_same_bits_after_each_round() -> None:
    trained = train_all(3, 20, lambda m, o, c: make("diloco", m, o, c, sync_every=5))
    histories = [peer.digests for peer in trained.values()]
    assert len(histories[0]) == 4
    assert len(set(histories[0])) == 4, "the outer state never moved"
    assert histories[0] == histories[1] == histories[2]


def test_contributions_are_weighted_by_tokens() -> None:
    tokens = float
    trained = train_all(
        3, 8, lambda m, o, c: make("diloco", m, o, c, sync_every=4, lr=0.7), tokens=tokens
    )
    expected = reference(3, 2, 4, 0.7, 0.9, tokens=tokens)
    assert_close(trained[1].theta[-1], expected[-1])


def test_sgd_every_step_equals_data_parallel_training() -> None:
    """A1: inner SGD, H = 1, eta = 1, no momentum is one optimizer on the union of the batches."""

    def make(model: nn.Module, inner: torch.optim.Optimizer, comm: Any) -> OuterOptimizer:
        return OuterOptimizer(model, inner, comm, schedule=EveryH(1), update=SGD(1.0))

    trained = train_all(4, 10, make)
    alone = make_model(seed=1).double()
    for step in range(10):
        alone.zero_grad()
        data = [batch(peer, step) for peer in range(1, 5)]
        union = (torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))
        loss_of(alone, union).backward()
        for parameter in alone.parameters():
            parameter.data -= 0.1 * parameter.grad
    assert_close(trained[1].theta[-1], flat(alone))


def test_nesterov_with_a_constant_pseudo_gradient() -> None:
    """A2: eta (1 + mu) at first, eta / (1 - mu) of it in each round at the end."""
    update = Nesterov(0.7, 0.9)
    theta, delta = torch.zeros(3, dtype=torch.float32), torch.full((3,), 0.25)
    buffers = {"momentum": torch.zeros(3)}
    update.apply(theta, delta, buffers, 2)
    assert theta.tolist() == pytest.approx([-1.33 * 0.25] * 3, rel=1e-6)
    for _ in range(59):
        before = theta.clone()
        update.apply(theta, delta, buffers, 2)
    assert (before - theta).tolist() == pytest.approx([6.99 * 0.25] * 3, rel=2e-3)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_nesterov_equals_torch_sgd(momentum: float) -> None:
    torch.manual_seed(0)
    elements = (1 << 18) + 17  # more than one span
    parameter = nn.Parameter(torch.randn(elements, dtype=torch.float64))
    options = {"nesterov": True} if momentum else {}
    twin = torch.optim.SGD([parameter], lr=0.7, momentum=momentum, **options)
    theta, buffers = parameter.detach().float(), {"momentum": torch.zeros(elements)}
    for _ in range(4):
        delta = torch.randn(elements)
        parameter.grad = delta.double()
        twin.step()
        Nesterov(0.7, momentum).apply(theta, delta, buffers, 2)
    assert_close(theta, parameter.detach())


def test_the_update_gives_the_same_bits_wherever_a_span_starts() -> None:
    """Vector and scalar parts of torch's kernels must agree, or peers could disagree."""
    torch.manual_seed(0)
    theta, delta = torch.randn(1001), torch.randn(1001) * 1e-3
    whole, whole_m = theta.clone(), torch.zeros(1001)
    for _ in range(3):
        Nesterov(0.7, 0.9).apply(whole, delta, {"momentum": whole_m}, 2)
    one, one_m = theta.clone(), torch.zeros(1001)
    for _ in range(3):
        for at in range(1001):
            here = slice(at, at + 1)
            Nesterov(0.7, 0.9).apply(one[here], delta[here], {"momentum": one_m[here]}, 2)
    assert torch.equal(whole, one)
    assert torch.equal(whole_m, one_m)


def test_merge_keeps_a_part_of_the_local_parameters() -> None:
    def make(model: nn.Module, inner: torch.optim.Optimizer, comm: Any) -> OuterOptimizer:
        return OuterOptimizer(
            model, inner, comm, schedule=EveryH(4), update=Nesterov(0.7, 0.6), merge=Mix(0.5)
        )

    trained = train_all(2, 16, make)
    expected = reference(2, 4, 4, 0.7, 0.6, alpha=0.5)
    assert_close(trained[1].theta[-1], expected[-1])


# --- churn


def test_a_newcomer_adopts_state_and_step_and_joins_the_open_round() -> None:
    run = FakeRun(2)
    comms = {peer: run.comm(peer) for peer in (1, 2)}
    reached, joined = threading.Event(), threading.Event()

    def veteran(peer: int) -> Trained:
        model = make_model(peer)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        out = Trained(make("diloco", model, inner, comms[peer], sync_every=4), model)
        for step in range(24):
            if step == 8:
                reached.set()
                assert joined.wait(WAIT_S)
            loss_of(model, batch(peer, step)).backward()
            inner.step()
            inner.zero_grad()
            if out.outer.step(64):
                out.digests.append(out.outer.digest())
        return out

    def newcomer(peer: int) -> Trained:
        assert reached.wait(WAIT_S)
        model = make_model(peer)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        comm = run.comm(peer)
        out = Trained(make("diloco", model, inner, comm, sync_every=4), model)
        assert comm.fetches == 1
        assert out.outer.global_step == 8
        joined.set()
        step = 0
        while out.outer.global_step < 24:
            loss_of(model, batch(peer, step)).backward()
            inner.step()
            inner.zero_grad()
            step += 1
            if out.outer.step(64):
                out.digests.append(out.outer.digest())
        return out

    done = run_peers(run, [1, 2, 3], lambda p: newcomer(p) if p == 3 else veteran(p))
    assert done[1].digests == done[2].digests
    assert done[3].digests == done[1].digests[2:]
    assert 3 in run.rounds[0, 6].result.contributors
    assert done[3].outer.global_step == 24


def test_when_nobody_broadcasts_the_next_round_is_the_broadcast() -> None:
    """The peer that was to broadcast died: its round is empty, and counts."""
    run = FakeRun(3)
    comms = {peer: run.comm(peer) for peer in (2, 3)}
    reached = threading.Barrier(3)

    def body(peer: int) -> tuple[str, int, int]:
        if peer == 1:  # it is the first peer, and dies when the others have begun
            reached.wait(WAIT_S)
            with run.changed:
                assert run.changed.wait_for(
                    lambda: (0, 0) in run.rounds and len(run.rounds[0, 0].given) == 2, WAIT_S
                )
            run.remove(1)
            return "", 0, 0
        reached.wait(WAIT_S)
        model = make_model(peer)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        outer = make("diloco", model, inner, comms[peer], sync_every=2)
        loss_of(model, batch(peer, 0)).backward()
        for _ in range(2):
            inner.step()
            outer.step()
        return outer.digest(), outer.rounds(), outer.global_step

    done = run_peers(run, [1, 2, 3], body)
    assert run.rounds[0, 0].result.contributors == ()
    assert run.rounds[0, 1].result.contributors == (2,)
    assert done[2] == done[3]
    assert done[2][1:] == (1, 2)


def test_a_waived_peer_goes_half_of_the_way_and_half_of_its_tokens_stay() -> None:
    run = FakeRun(2)
    comms = {peer: run.comm(peer) for peer in (1, 2)}
    run.waived.add((2, 1))

    def body(peer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
        model = make_model(1)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        outer = make("diloco", model, inner, comms[peer], sync_every=1)
        loss_of(model, batch(peer, 0)).backward()
        inner.step()
        trained = flat(model)
        outer.step(tokens=10)
        theta = outer.fragments[0].theta.double()
        return flat(model), trained, theta, outer.fragments[0].tokens

    done = run_peers(run, [1, 2], body)
    assert run.rounds[0, 1].result.contributors == (1,)
    local, _, theta, tokens = done[1]
    assert torch.equal(local, theta)
    assert tokens == 0
    local, trained, theta, tokens = done[2]
    assert_close(local, (trained + theta) / 2, 1e-5)
    assert tokens == 5


def test_who_was_away_for_long_comes_back_to_the_others() -> None:
    model = make_model()
    fragment = Fragment(0, dict(model.named_parameters()), (), ())
    began = flat(model)
    with torch.no_grad():
        fragment.theta.add_(8.0)
    fragment.close_in(3)
    theta = fragment.theta.double()
    assert_close(theta - flat(model), (theta - began) / 8, 1e-5)
    assert torch.equal(fragment.base, fragment.theta)


def test_a_lost_round_costs_a_fetch_and_no_inner_step() -> None:
    run = FakeRun(2)
    for peer in (1, 2):
        run.comm(peer)
    run.lost.add((2, 2))

    def body(peer: int) -> tuple[str, int, float]:
        model = make_model(1)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        outer = make("diloco", model, inner, run.comms[peer], sync_every=3)
        ahead, step = 0.0, -1
        while outer.global_step < 12:  # who was behind may enter a round before its last step
            step += 1
            loss_of(model, batch(peer, step)).backward()
            inner.step()
            inner.zero_grad()
            trained = flat(model)
            outer.step(5)
            if peer == 2 and step == 5:  # the lost round: half of what is ours stays ours
                theta = outer.fragments[0].theta.double()
                drift = flat(model) - theta
                assert_close(drift, (trained - theta) / 2, 1e-5)
                assert outer.fragments[0].tokens == 7.5
                ahead = float(drift.norm())
        return outer.digest(), outer.global_step, ahead

    done = run_peers(run, [1, 2], body)
    assert run.comms[2].fetches == 1
    assert done[1][:2] == done[2][:2]
    assert done[1][1] == 12
    assert done[2][2] > 0


# --- what others may ask


def test_swapped_shows_the_outer_parameters_and_gives_the_local_ones_back() -> None:
    run = FakeRun(1)
    model = make_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    outer = make("diloco", model, inner, run.comm(1), sync_every=10)
    theta = flat(model)
    loss_of(model, batch(1, 0)).backward()
    inner.step()
    local = flat(model)
    with outer.swapped() as shown:
        assert torch.equal(flat(shown), theta)
    assert torch.equal(flat(model), local)
    assert not torch.equal(local, theta)


def test_resume_gives_the_same_bits_as_never_stopping() -> None:
    def diloco(model: nn.Module, inner: torch.optim.Optimizer, comm: Any) -> OuterOptimizer:
        return make("diloco", model, inner, comm, sync_every=4)

    whole = train_all(1, 16, diloco)[1]

    run = FakeRun(1)
    run.comm(1)
    half = train(run, 1, 8, diloco)
    saved = deepcopy(half.outer.state_dict())
    run = FakeRun(1)
    model = make_model(seed=9)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    outer = make("diloco", model, inner, run.comm(1), sync_every=4, state=saved)
    assert outer.global_step == 8
    for step in range(8, 16):
        loss_of(model, batch(1, step)).backward()
        inner.step()
        inner.zero_grad()
        outer.step()
    assert outer.digest() == whole.digests[-1]


@pytest.mark.parametrize("every", [1, 2, 8])
def test_state_of_another_schedule_is_refused(every: int) -> None:
    """The step would not tell how many rounds there were: peers would begin them apart."""
    trained = train_all(1, 8, lambda m, o, c: make("diloco", m, o, c, sync_every=4))
    saved, model = trained[1].outer.state_dict(), make_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    said = rf"after steps 4\+8, and this schedule's begin after {every}\+{2 * every} .*resume with"
    with pytest.raises(StateError, match=said):
        make("diloco", model, inner, FakeRun(1).comm(1), sync_every=every, state=saved)


@pytest.mark.parametrize(
    ("buffers", "scalars", "odd"),
    [
        (("accumulated",), (), "accumulated"),
        (("started",), (), "started"),
        (("velocity",), ("theta",), "theta"),
        (("velocity",), ("velocity",), "velocity"),
    ],
)
def test_names_that_would_be_mixed_up_are_refused(
    buffers: tuple[str, ...], scalars: tuple[str, ...], odd: str
) -> None:
    update = Nesterov()
    object.__setattr__(update, "buffers", buffers)
    object.__setattr__(update, "scalars", scalars)
    model = make_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=f"the update keeps '{odd}'"):
        OuterOptimizer(model, inner, FakeRun(1).comm(1), schedule=EveryH(2), update=update)


def test_the_eager_merge_takes_no_scalars() -> None:
    update = Nesterov()
    object.__setattr__(update, "scalars", ("steps",))
    model = make_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = EveryH(2, overlap=2)
    with pytest.raises(ConfigError, match="a linear update without scalars"):
        OuterOptimizer(
            model, inner, FakeRun(1).comm(1), schedule=schedule, update=update, merge=Eager()
        )


def test_state_of_another_model_is_refused() -> None:
    run = FakeRun(1)
    trained = train_all(1, 4, lambda m, o, c: make("diloco", m, o, c, sync_every=2))
    saved = trained[1].outer.state_dict()
    model = nn.Linear(2, 2)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(StateError, match="expected"):
        make("diloco", model, inner, run.comm(1), sync_every=2, state=saved)


def test_an_optimizer_of_another_model_is_refused() -> None:
    other = torch.optim.SGD(make_model().parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="never be synchronised"):
        make("diloco", make_model(), other, FakeRun(1).comm(1))


def test_codec_names() -> None:
    assert CodecChoice.named("int8") == CodecChoice("int8", "int8")
    assert CodecChoice.named("e2m1+int8") == CodecChoice("e2m1", "int8")
    with pytest.raises(ConfigError, match="A codec is one of"):
        CodecChoice.named("f33")


def test_schedule_is_a_function_of_the_global_step() -> None:
    schedule = EveryH(30)
    sent = {step: schedule.sends(step)[0] for step in range(1, 121) if schedule.sends(step)}
    assert sent == {30: (0, 1), 60: (0, 2), 90: (0, 3), 120: (0, 4)}
    assert [schedule.sent_at(0, k) for k in (1, 2, 3, 4)] == list(sent)
    assert schedule.fragments(["a", "b"]) == [["a", "b"]]


def test_an_outer_step_leaves_the_interpreter_to_the_trainer() -> None:
    """Span by span, and within a span: nobody is made to give way here, so what the trainer's
    thread sees in between it sees because the step lets go of the GIL."""
    spans = 16
    update, elements = Nesterov(0.7, 0.9), spans * SPAN_ELEMENTS
    theta, delta, m = torch.zeros(elements), torch.ones(elements), torch.zeros(elements)
    seen: set[int] = set()
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    try:
        done = in_background(lambda: update.apply(theta, delta, {"momentum": m}, 3), "a step")
        while not done.done():
            seen.add(int(torch.count_nonzero(m[::SPAN_ELEMENTS])))
            time.sleep(0)  # lets go of the GIL, once
    finally:
        sys.setswitchinterval(interval_s)
    done.result()
    assert torch.equal(m, delta)
    assert len(seen - {0, spans}) >= 3, f"spans done, as the trainer saw it: {sorted(seen)}"


@pytest.mark.parametrize("name", ["diloco", "streaming", "eager", "sparseloco"])
def test_progress_that_is_forgotten_moves_nobody(name: str) -> None:
    """Who begins anew holds the outer parameters, and its next contribution holds nothing older."""
    run = FakeRun(1)
    model = make_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    outer = make(name, model, inner, run.comm(1), sync_every=4)
    for _ in range(6):
        nn.functional.mse_loss(model(torch.ones(1, 5)), torch.ones(1, 3)).backward()
        inner.step()
        inner.zero_grad()
        outer.step(1.0)
    outer.finish()
    outer.begin_anew()
    theta = torch.cat([fragment.theta for fragment in outer.fragments])
    local = torch.cat([f.read_local(torch.empty_like(f.theta)) for f in outer.fragments])
    assert torch.equal(local, theta)
    assert not any(f.drift(torch.empty_like(f.theta)).any() for f in outer.fragments)
    assert not any(f.tokens for f in outer.fragments)
