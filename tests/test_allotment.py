"""Who trains on which samples: agreed by rounds, nothing skipped and nothing given out twice."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from decotrain.outer import make
from decotrain.outer.allotment import HELD, SLOTS, Allotment, Portions
from decotrain.train.worker import _after_round, draw
from tests.fake_comm import WAIT_S, FakeRun
from tests.outer_runs import make_model, run_peers

slots = st.sets(st.integers(0, SLOTS - 1), max_size=6)


@given(st.lists(slots, max_size=80), st.integers(0, 300), st.booleans())
@settings(max_examples=60, deadline=None, phases=(Phase.generate,))
def test_each_portion_is_done_once_or_held_by_one_slot(
    rounds: list[set[int]], epoch: int, carry: bool
) -> None:
    allotment = Allotment(epoch, carry)
    done: list[int] = []
    for counted in rounds:
        before = set(allotment.held.flat)
        allotment.count(counted)
        done += sorted(before - set(allotment.held.flat))
        held = [int(one) for one in allotment.held.flat]
        assert sorted(done + held) == list(range(allotment.following))


@given(st.lists(slots, max_size=40))
@settings(max_examples=30, deadline=None, phases=(Phase.generate,))
def test_a_copy_that_starts_in_the_middle_goes_on_alike(rounds: list[set[int]]) -> None:
    """All that matters is in the tensor: a newcomer fetches it, and follows."""
    whole, late = Allotment(50), Allotment(50)
    for number, counted in enumerate(rounds):
        if number == len(rounds) // 2:
            late.tensor.copy_(whole.tensor)
        whole.count(counted)
        if number >= len(rounds) // 2:
            late.count(counted)
    assert not rounds or torch.equal(whole.tensor, late.tensor)


class Trainer:
    """A peer as the rule sees it: it draws, and what it drew counts with its contribution."""

    def __init__(self, allotment: Allotment, slot: int, samples: int) -> None:
        self.portions, self.slot = Portions(allotment, samples), slot
        self.drawn: list[int] = []

    def train(self, samples: int) -> None:
        self.drawn += [int(n) for n in self.portions.take(self.slot, samples)]


@st.composite
def histories(draw: Any) -> list[dict[str, set[int]]]:
    """Rounds: who is there, whose contribution is waived. Nobody is waived twice in a row, or in
    its first round: what the rule cannot see."""
    here = set(range(draw(st.integers(1, 5))))
    following, rounds, waived_before, ever = len(here), [], set[int](), set[int]()
    for _ in range(draw(st.integers(1, 40))):
        gone = draw(st.sets(st.sampled_from(sorted(here)), max_size=1)) if len(here) > 1 else set()
        here -= gone
        if following < SLOTS and draw(st.integers(0, 4)) == 0:  # it came at the round's beginning
            here.add(following)
            following += 1
        known = sorted(here & ever)
        waived = set[int]()
        if known and len(here) > 1:
            waived = draw(st.sets(st.sampled_from(known), max_size=1)) - waived_before
        ever |= here
        waived_before = waived
        rounds.append({"here": set(here), "waived": waived})
    return rounds


@given(histories(), st.integers(1, 4), st.integers(700, 900))
@settings(max_examples=60, deadline=None, phases=(Phase.generate,))
def test_an_epoch_is_counted_whole_and_once_whoever_comes_and_goes(
    rounds: list[dict[str, set[int]]], batch: int, epoch: int
) -> None:
    """Peers that train a whole portion in each round, and die with one in their hands. (No newcomer
    comes in the very round in which an epoch's rest is given out: see the module.)"""
    steps = 3
    allotment = Allotment(epoch)
    trainers: dict[int, Trainer] = {}
    counted: Counter[int] = Counter()
    for one in rounds:
        for slot in sorted(one["here"]):
            trainers.setdefault(slot, Trainer(allotment, slot, steps * batch))
            for _ in range(steps):
                trainers[slot].train(batch)
        contributors = one["here"] - one["waived"]
        for slot in contributors:
            counted.update(trainers[slot].drawn)
            trainers[slot].drawn.clear()
        allotment.count(contributors)
    assert max(counted.values(), default=1) == 1, "a sample was counted twice"
    held = {int(one) for one in allotment.held.flat}
    for portion in set(range(allotment.following)) - held:
        first = portion * steps * batch
        assert all(counted[first + n] for n in range(steps * batch)), f"portion {portion} skipped"
    last = max(trainers, default=0)  # goes on alone, until the epoch is over
    while min(int(one) for one in allotment.held.flat) < epoch:
        if last in rounds[-1]["here"]:
            trainers[last].train(steps * batch)
            counted.update(trainers[last].drawn)
            trainers[last].drawn.clear()
        allotment.count({last})
        assert allotment.following < 4 * epoch, "the epoch is never over"
    samples = epoch * steps * batch
    if last in rounds[-1]["here"] and last not in rounds[-1]["waived"]:
        assert all(counted[number] == 1 for number in range(samples))


def test_who_is_not_heard_of_begins_its_portions_anew() -> None:
    """A newcomer that others hear late: no sample is in its first contribution twice."""
    allotment = Allotment(0)
    portions = Portions(allotment, 2)
    first = [list(portions.take(5, 2)) for _ in range(HELD)]
    assert portions.spent(5)
    portions.begin_anew()
    assert portions.uncounted == []
    assert not portions.spent(5)
    assert [list(portions.take(5, 2)) for _ in range(HELD)] == first
    allotment.count({5})
    assert not portions.spent(5)


def test_a_worker_that_is_not_heard_of_forgets_what_it_did() -> None:
    called: list[str] = []
    outer: Any = SimpleNamespace(
        finish=lambda: called.append("finish"), begin_anew=lambda: called.append("begin_anew")
    )
    notes: list[str] = []
    trainer: Any = SimpleNamespace(
        portions=Portions(Allotment(0), 2), uncounted=[], settings=SimpleNamespace(batch=1),
        journal=SimpleNamespace(write=lambda _, text: notes.append(text)),
    )  # fmt: skip
    for _ in range(HELD * 2 + 1):
        draw(trainer, outer, 5)
        trainer.uncounted.append(0.0)
    assert called == ["finish", "begin_anew"]
    assert len(notes) == 1
    assert f"learnt in {HELD * 2} steps: it forgets that" in notes[0]
    assert len(trainer.uncounted) == 1
    ((first, end),) = trainer.portions.uncounted
    assert end - first == 1


def test_gradients_that_did_not_count_are_made_again() -> None:
    allotment = Allotment(0, carry=False)
    portions = Portions(allotment, 4)
    first = portions.take(0, 4)
    allotment.count({1})
    assert np.array_equal(portions.take(0, 4), first)
    allotment.count({0, 1})
    assert not np.array_equal(portions.take(0, 4), first)


def test_gradients_that_are_made_again_are_told_once() -> None:
    allotment = Allotment(0, carry=False)
    trainer: Any = SimpleNamespace(
        portions=Portions(allotment, 4), uncounted=[], settings=SimpleNamespace(batch=4)
    )

    def step(counted: set[int]) -> None:
        draw(trainer, None, 0)
        trainer.uncounted.append(float(len(told)))
        told.append(sorted(trainer.portions.uncounted))
        allotment.count(counted)

    told: list[list[list[int]]] = []
    for counted in ({0}, {1}, {1}, {0, 1}, {0}):
        step(counted)
    first, second, third = [0, 4], [4 * SLOTS, 4 * SLOTS + 4], [8 * SLOTS, 8 * SLOTS + 4]
    assert told == [[first], [first, second], [first, second], [first, second], told[4]]
    assert told[4][:2] == [first, second]
    assert told[4][2] == third
    assert trainer.uncounted == [0.0, 3.0, 4.0], "losses of steps that did not count"


def test_half_a_portion_that_is_made_again_is_told_once() -> None:
    """Beside a neighbour in one interval."""
    allotment = Allotment(0, carry=False)
    portions = Portions(allotment, 4)
    allotment.held[0] = [6, 7]
    portions.take(0, 4)
    allotment.count({0})
    portions.take(0, 4)
    assert portions.uncounted == [[24, 32]]
    allotment.count({1})
    portions.take(0, 2)
    assert portions.uncounted == [[24, 30]]


@pytest.mark.parametrize("lost", [{3, 6}, {5}], ids=["at the end of a round", "within one"])
@pytest.mark.parametrize(
    "how", [{"waived"}, {"lost"}, {"waived", "lost"}], ids=["waived", "lost", "both"]
)
def test_ddp_tells_what_counted_and_nothing_twice(how: set[str], lost: set[int]) -> None:
    """By the worker's own lines, over steps whose gradients of peer 2 do not count, or whose result
    it never hears of."""
    run = FakeRun(2)
    comms: dict[int, Any] = {peer: run.comm(peer) for peer in (1, 2)}
    for misfortune in how:
        getattr(run, misfortune).update((2, seq) for seq in lost)
    lines: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    every = SimpleNamespace(evaluation=100, checkpoint=100)
    chosen = SimpleNamespace(batch=2, every=every, rounds=100)

    def body(peer: int) -> bool:
        model = make_model(peer)
        inner = torch.optim.SGD(model.parameters(), lr=0.01)
        comms[peer].figures = dict
        outer = make("ddp", model, inner, comms[peer])
        trainer: Any = SimpleNamespace(
            portions=Portions(outer.allotment, 2), settings=chosen, uncounted=[], tokens=8,
            journal=SimpleNamespace(write=lambda _, **line: lines[peer].append(line)),
        )  # fmt: skip
        number = 0
        while outer.global_step < 12:
            draw(trainer, outer, peer - 1)
            nn.functional.mse_loss(model(torch.ones(1, 5)), torch.ones(1, 3)).backward()
            inner.step()
            inner.zero_grad()
            trainer.uncounted.append(0.0)
            outer.step(1.0)
            if number != (number := outer.global_step // 3):
                _after_round(trainer, comms[peer], outer, Path(), number)
        return True

    run_peers(run, [1, 2], body)
    results = [r.result for (_, seq), r in run.rounds.items() if seq and r.result]
    for peer, told in lines.items():
        samples = [n for line in told for a, b in line["samples"] for n in range(a, b)]
        assert len(samples) == len(set(samples)), "told twice"
        assert len(samples) == 2 * sum(peer in result.contributors for result in results)
        assert sum(line["counted_tokens"] for line in told) == 4 * len(samples)


def test_what_a_silent_slot_had_not_begun_is_not_trained_on_by_it() -> None:
    """Others were given it: an epoch of few portions is over before the slot comes back."""
    allotment = Allotment(SLOTS * HELD)
    portions = Portions(allotment, 2)
    begun, had = int(allotment.held[0, 0]), int(allotment.held[0, 1])
    portions.take(0, 1)
    while had in allotment.held[0]:
        allotment.count({1})
    left = [int(n) // 2 for n in portions.take(0, 3)]
    assert left[0] == begun
    assert had not in left


@pytest.mark.parametrize("name", ["diloco", "streaming", "eager", "sparseloco", "ddp"])
def test_peers_hold_one_allotment_and_a_newcomer_fetches_it(name: str) -> None:
    """Over rounds of an optimizer: a peer dies, another comes, and who is there counts on."""
    run = FakeRun(3)
    comms = {peer: run.comm(peer) for peer in (1, 2, 3)}
    reached, joined = threading.Barrier(3), threading.Event()
    steps = 12

    def body(peer: int) -> Any:
        if peer == 4:
            reached.wait(WAIT_S)
            comms[4] = run.comm(4)
        model = make_model(peer)
        inner = torch.optim.SGD(model.parameters(), lr=0.01)
        options = {} if name == "ddp" else {"sync_every": 2}
        if name == "streaming":
            options |= {"overlap": 0}
        outer = make(name, model, inner, comms[peer], epoch_portions=1000, **options)
        if name != "ddp":  # a newcomer follows rounds while it fetches: see Fragment.state
            assert min(outer.fragments[0].state) == "allotted"
        if peer == 4:
            joined.set()
        while outer.global_step < (6 if peer == 3 else steps):
            if peer in (1, 2) and outer.global_step == 6 and not joined.is_set():
                reached.wait(WAIT_S)
                assert joined.wait(WAIT_S)
            nn.functional.mse_loss(model(torch.ones(1, 5)), torch.ones(1, 3)).backward()
            inner.step()
            inner.zero_grad()
            outer.step(1.0)
        outer.finish()
        if peer == 3:
            run.remove(3)
        return outer.allotment.tensor.clone()

    done = run_peers(run, [1, 2, 3, 4], body)
    assert torch.equal(done[1], done[2])
    assert torch.equal(done[1], done[4])
    reference = Allotment(1000, carry=name != "ddp")
    seen = sorted((seq, r) for (tag, seq), r in run.rounds.items() if tag == 0 and seq)
    for _, round_ in seen:
        reference.count(peer - 1 for peer in round_.result.contributors)
    assert torch.equal(done[1], reference.tensor)
    assert {3, 4} <= {p for _, r in seen for p in r.result.contributors}
