"""Stopped and resumed equals never stopped; nobody begins a round that the others have made."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from decotrain.outer import PRESETS, make
from tests.fake_comm import FakeRun
from tests.outer_naive import deep, vector
from tests.outer_runs import batch, loss_of, run_peers

OPTIONS: dict[str, dict[str, Any]] = {
    "streaming": {"sync_every": 12, "layers": 2, "overlap": 3},
    "sparseloco": {"sync_every": 4, "keep": 20},
    "ddp": {},
}
STOP, STEPS = 14, 30  # after step 14: streaming has a round under way


def begin(run: FakeRun, peer: int, name: str, saved: Any = None) -> tuple[nn.Module, Any, Any]:
    model = deep(1 if peer == 1 else 60)
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if saved is not None:
        inner.load_state_dict(saved[1])
    options = OPTIONS.get(name, {"sync_every": 4})
    state = None if saved is None else saved[0]
    return model, inner, make(name, model, inner, run.comms[peer], state=state, **options)


def go(model: nn.Module, inner: Any, outer: Any, peer: int, until: int) -> None:
    while outer.global_step < until:
        loss_of(model, batch(peer, outer.global_step)).backward()
        inner.step()
        inner.zero_grad()
        outer.step(3.0)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_resume_has_the_bits_of_never_stopping(name: str) -> None:
    # Peers of unequal speed enter rounds when others do: only alone do they do the same again.
    peers = [1] if name == "delayed_nesterov" else [1, 2]

    def run_from(saved: Any, until: int) -> Any:
        run = FakeRun(len(peers))
        for peer in peers:
            run.comm(peer)

        def body(peer: int) -> Any:
            model, inner, outer = begin(run, peer, name, saved and saved[peer][0])
            go(model, inner, outer, peer, until)
            return (deepcopy((outer.state_dict(), inner.state_dict())), vector(model),
                    outer.digest(), len(getattr(outer, "_flights", ())))  # fmt: skip

        return run_peers(run, peers, body)

    whole = run_from(None, STEPS)
    half = run_from(None, STOP)
    if name in ("streaming", "eager", "co2"):
        assert half[1][3] == 1, "no round was under way"
    rest = run_from(half, STEPS)
    for peer in peers:
        assert torch.equal(rest[peer][1], whole[peer][1])
        assert rest[peer][2] == whole[peer][2]


def test_a_peer_that_catches_up_begins_no_round_of_its_own() -> None:
    """It was slow; the others have made rounds without it, the last one of the run included."""
    run = FakeRun(2)
    for peer in (1, 2):
        run.comm(peer)
    made = run_peers(run, [1, 2], lambda peer: begin(run, peer, "diloco"))
    run.active = {1}
    go(*made[1], 1, 12)  # three rounds
    model, inner, outer = made[2]
    for step in range(4):
        loss_of(model, batch(2, step)).backward()
        inner.step()
        inner.zero_grad()
        outer.step(3.0)
        if outer.global_step >= 12:
            break
    assert step == 3
    assert outer.global_step == 12, "the schedule was not looked at again"
    assert max(seq for _, seq in run.rounds) == 3, "a round that nobody else begins"
    assert outer.rounds() == 3
    assert outer.digest() == made[1][2].digest()
    drift = outer.fragments[0].base.double() - vector(model)
    assert drift.any(), "its own progress is gone"
    assert outer.fragments[0].tokens == 12 / 8, "half for each round that it missed"


def test_a_missed_round_of_one_fragment_fetches_that_fragment_only() -> None:
    """Streaming: a round of fragment 0 is lost; the others' schedule does not move."""
    run = FakeRun(2)
    for peer in (1, 2):
        run.comm(peer)
    run.lost.add((2, 2))  # only fragment 0 comes to a second round here

    def body(peer: int) -> Any:
        model, inner, outer = begin(run, peer, "streaming")
        fetched = []
        catch_up = run.comms[peer].catch_up

        def noted(tag: int, *rest: Any, **options: Any) -> int:
            before = run.comms[peer].fetches
            version = catch_up(tag, *rest, **options)
            fetched.extend([tag] * (run.comms[peer].fetches - before))
            return version

        run.comms[peer].catch_up = noted  # type: ignore[method-assign]
        go(model, inner, outer, peer, 27)
        return fetched, outer.global_step, [outer.rounds(tag) for tag in range(3)]

    done = run_peers(run, [1, 2], body)
    assert done[1] == ([], 27, [2, 1, 1])
    assert done[2] == ([0], 27, [2, 1, 1])
