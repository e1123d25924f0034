"""Each preset equals its own formulas (tests/outer_naive.py), step by step, for every peer."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decotrain.errors import ConfigError
from decotrain.outer import Eager, EveryH, Fragment, Nesterov, OuterOptimizer, Staggered, make
from tests import outer_naive as naive
from tests.fake_comm import WAIT_S, FakeRun
from tests.outer_naive import Script, deep, vector
from tests.outer_runs import assert_close, batch, loss_of, run_peers
from tests.tree import ROOT

Make = Callable[[nn.Module, torch.optim.Optimizer, Any], Any]


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
            dies = script.dies.get(peer) == t
            here = peer in script.present(t)
            if not here and not dies and peer in run.active:
                run.remove(peer)
            if here and peer not in outers:
                comm = run.comms.get(peer) or run.comm(peer)
                outers[peer] = make_outer(model, inner, comm)
                assert outers[peer].global_step == t - 1
            barrier.wait()
            if here:
                loss_of(model, batch(peer, t - 1)).backward()
                inner.step()
                inner.zero_grad()
            barrier.wait()
            if dies:
                wait_for_round(run, but=peer)
                run.remove(peer)
            if here:
                outers[peer].step(script.tokens(peer))
                if isinstance(outers[peer], OuterOptimizer):
                    outers[peer].settle()
                assert outers[peer].global_step == t
                history[t - 1][peer] = vector(model)
            barrier.wait()
        return True

    run_peers(run, everybody, body)
    return history, outers


def wait_for_round(run: FakeRun, but: int) -> None:
    """Until everybody else has begun a round that cannot end yet."""

    def begun() -> bool:
        others = run.active - {but}
        return any(r.result is None and others <= set(r.given) for r in run.rounds.values())

    with run.changed:
        assert run.changed.wait_for(begun, WAIT_S)


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


def test_a_peer_that_dies_in_a_round_is_in_no_mean_and_moves_no_schedule() -> None:
    """A7: the survivors' mean is that of the survivors, and the other fragments' steps stay."""
    script = Script(40, lambda t: [1] + [2] * (t < 24) + [3], dies={2: 24})
    found, outers = lockstep(
        script,
        lambda m, o, c: make(
            "streaming", m, o, c, sync_every=12, layers=2, overlap=2, lr=0.6, momentum=0.9
        ),
    )
    same(found, naive.streaming(script, STRIDED, 12, 2, 0.5, 0.6, 0.9))
    assert [outers[1].rounds(tag) for tag in range(3)] == [3, 2, 2]
    contributors = [r.result.contributors for r in outers[1].comm.run.rounds.values() if r.result]
    assert (1, 2, 3) in contributors
    assert (1, 3) in contributors


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


@pytest.mark.parametrize(
    ("present", "waived"),
    [(three, set()), (changing, set()), (three, {(2, 2), (1, 3), (2, 4)}), (changing, {(3, 4)})],
    ids=["all", "membership", "waived", "waived and membership"],
)
def test_eager(present: Any, waived: set[tuple[int, int]]) -> None:
    script = Script(36, present, waived, tokens=lambda peer: float(1 + peer) if waived else 1.0)
    found, _ = lockstep(
        script, lambda m, o, c: make("eager", m, o, c, sync_every=6, lr=0.4, momentum=0.9)
    )
    same(found, naive.eager(script, 6, 0.4, 0.9))


@pytest.mark.parametrize(
    ("present", "waived"),
    [(three, set()), (three, {(1, 2), (3, 2), (2, 4)}), (changing, {(3, 4)})],
    ids=["all", "waived", "membership"],
)
@pytest.mark.parametrize("clip", [1.0, 0.01])
def test_co2_penalty_and_clip_included(
    present: Any, waived: set[tuple[int, int]], clip: float
) -> None:
    script = Script(36, present, waived)
    found, outers = lockstep(
        script, lambda m, o, c: make("co2", m, o, c, sync_every=6, momentum=0.5, clip=clip)
    )
    same(found, naive.late(script, 6, naive.co2(0.5, clip)))
    held = outers[1].fragments[0].buffers["momentum"].abs().max()
    assert (float(held) == pytest.approx(0.01)) == (clip == 0.01), "the clip is a no-op"


def test_naive_delay_is_late_and_nothing_else() -> None:
    script = Script(30, three, {(2, 3)})
    found, _ = lockstep(
        script,
        lambda m, o, c: OuterOptimizer(
            m, o, c, schedule=EveryH(5, overlap=5), update=Nesterov(0.4, 0.9)
        ),
    )
    same(found, naive.late(script, 5, naive.nesterov(0.4, 0.9)))


@pytest.mark.parametrize("name", ["local_sgd", "diloco", "muloco", "delayed_nesterov"])
def test_presets_that_synchronise_everything_at_once(name: str) -> None:
    """One fragment of streaming without overlap is their common formula."""
    script = Script(30, changing, {(1, 2), (3, 1)})
    lr, momentum = (1.0, 0.0) if name == "local_sgd" else (0.6, 0.8)
    options: dict[str, Any] = {"sync_every": 6}
    if name != "local_sgd":
        options |= {"lr": lr, "momentum": momentum}
    if name == "muloco":
        options["codec"] = "f32"
    if name == "delayed_nesterov":  # with all of `delay` peers in each round it is Nesterov
        script = Script(30, three)
        options["delay"] = 3
    found, _ = lockstep(script, lambda m, o, c: make(name, m, o, c, **options))
    groups = [["embed", "blocks", "head"]]
    same(found, naive.streaming(script, groups, 6, 0, 0.0, lr, momentum))


@pytest.mark.parametrize(
    ("present", "waived"),
    [(three, {(1, 1), (2, 1), (3, 2), (1, 3), (3, 3)}), (changing, {(1, 3)})],
    ids=["waived", "membership"],
)
def test_delayed_nesterov_takes_arrivals_one_by_one(
    present: Any, waived: set[tuple[int, int]]
) -> None:
    """Rounds in which some are late: k contributors are k arrivals of the published rule."""
    script = Script(36, present, waived)
    found, outers = lockstep(
        script,
        lambda m, o, c: make(
            "delayed_nesterov", m, o, c, sync_every=6, delay=3, lr=0.5, momentum=0.9
        ),
    )
    expected = naive.delayed(script, 6, 3, 0.5, 0.9)
    assert_close(vector(outers[1].model), expected[-1][1])
    same(found, expected)


@pytest.mark.parametrize("present", [three, changing])
def test_sparseloco(present: Any) -> None:
    """Top-k by the core (its own tests say what that is), everything else by the formula."""
    script = Script(36, present)
    found, outers = lockstep(
        script, lambda m, o, c: make("sparseloco", m, o, c, sync_every=6, keep=20, decay=0.9)
    )
    same(found, naive.sparse(script, 6, 20, 0.9))
    assert outers[1].residuals[0].any()


def test_sparseloco_keeps_what_was_waived() -> None:
    script = Script(8, three, {(2, 1)})
    _, outers = lockstep(script, lambda m, o, c: make("sparseloco", m, o, c, sync_every=8, keep=20))
    assert not outers[2].residuals[0].any(), "the residual holds progress that is also in w"
    assert outers[2].fragments[0].tokens == 4
    assert outers[1].residuals[0].any()


# --- ddp


@pytest.mark.parametrize("present", [three, changing])
def test_ddp_is_data_parallel_training(present: Any) -> None:
    script = Script(26, present)
    found, _ = lockstep(script, lambda m, o, c: make("ddp", m, o, c, bucket_elements=60))
    same(found, naive.data_parallel(script))


def test_ddp_shares_moments_with_a_newcomer() -> None:
    script = Script(12, lambda t: [1, 2] + [3] * (t > 6))

    def adam(model: nn.Module, inner: torch.optim.Optimizer, comm: Any) -> Any:
        moments = torch.optim.AdamW(model.parameters(), lr=1e-2)
        inner.register_step_pre_hook(lambda *_: moments.step())
        for group in inner.param_groups:  # lockstep's own optimizer only starts ours
            group["lr"] = 0.0
        return make("ddp", model, moments, comm)

    found, outers = lockstep(script, adam)
    assert torch.equal(found[-1][1], found[-1][3])
    assert outers[1].digest() == outers[3].digest()


def test_ddp_wants_one_backward_pass_for_each_step() -> None:
    run = FakeRun(1)
    model = deep()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    make("ddp", model, inner, run.comm(1))
    loss_of(model, batch(1, 0)).backward()
    with pytest.raises(ConfigError, match="one backward pass"):
        loss_of(model, batch(1, 1)).backward()


# --- the outer optimizer of the documentation


def test_the_example_in_the_documentation() -> None:
    text = (ROOT / "docs/outer.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(code.splitlines()) < 50
    place: dict[str, Any] = {}
    exec(compile(code, "docs/outer.md", "exec", dont_inherit=True), place)
    _, outers = lockstep(
        Script(20, three), lambda m, o, c: place["heavy_ball"](m, o, c, sync_every=4)
    )
    assert outers[1].digest() == outers[2].digest() == outers[3].digest()
    assert outers[1].rounds() == 4, "the fifth is under way"
    one, sent = outers[1].fragments[0], deepcopy(outers[1].state_dict())["private"]["0.sent"]
    assert one.buffers["velocity"].any()
    assert sent.shape == one.theta.shape


# --- bounds


def test_fragments_lower_the_peak_and_not_the_sum() -> None:
    """A5 and A6: H / P steps apart, the same for a newcomer; P times less in any one step."""
    names = [f"blocks.{layer}.weight" for layer in range(8)]
    whole, parts = Staggered(32, layers=8, overlap=1), Staggered(32, layers=2, overlap=1)
    assert [len(schedule.fragments(names)) for schedule in (whole, parts)] == [1, 4]
    sizes = [2, 2, 2, 2]
    moved = [sum(sizes[tag] for tag, _ in parts.sends(step)) for step in range(1, 32 * 21)]
    once = [8 * len(whole.sends(step)) for step in range(1, 32 * 21)]
    assert sum(moved) == sum(once)
    assert max(once) == 4 * max(moved)
    steps = [step for step in range(1, 32 * 21) if parts.sends(step)]
    assert {b - a for a, b in pairwise(steps)} == {8}
    assert all(
        parts.sent_at(tag, number) == step for step in steps for tag, number in parts.sends(step)
    )
    with pytest.raises(ConfigError, match="too long"):
        Staggered(32, layers=2, overlap=8).fragments(names)


def test_eager_peers_stay_close() -> None:
    """A8: the distance of two peers' parameters has a bound and does not grow."""
    lr, momentum, n = 0.4, 0.9, 3
    run = FakeRun(n)
    update, merge = Nesterov(lr, momentum), Eager()
    bases: dict[int, list[Tensor]] = {1: [], 2: []}
    largest = 0.0
    fragments = {}
    for peer in bases:
        part = nn.Parameter(torch.zeros(40))
        fragments[peer] = Fragment(0, {"w": part}, update.buffers, update.scalars)
    merges = {1: merge, 2: Eager()}
    torch.manual_seed(0)
    common = torch.randn(40)
    for _ in range(1000):
        deltas = {peer: common + torch.randn(40) for peer in bases}
        largest = max(largest, float((deltas[1] - deltas[2]).norm()))
        for peer, fragment in fragments.items():
            merges[peer].enter(fragment, update, deltas[peer], 1 / n, n)
            bases[peer].append(fragment.base.clone())
    assert not run.rounds
    gaps = [float((a - b).norm()) for a, b in zip(bases[1], bases[2], strict=True)]
    assert max(gaps) <= lr / (n * (1 - momentum)) * largest
    assert max(gaps[500:]) < 1.5 * max(gaps[:500])
