"""Top-k in rounds: who lies is named and counts nowhere, and a NaN costs nobody a fetch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from decotrain import _core
from decotrain.communicator import Communicator, Result, join
from decotrain.control import client
from decotrain.control.coordinator import Options
from decotrain.control.server import ServerThread
from decotrain.errors import NotFiniteError
from decotrain.outer import make
from decotrain.outer.allotment import NEVER
from decotrain.outer.codec import HEAD, TopK
from tests.control.test_shells import until
from tests.outer_naive import deep
from tests.outer_runs import batch, loss_of, take_steps
from tests.test_communicator import WAIT_S, together

Lie = Callable[[bytes], bytes]


def weighing(weight: float) -> Lie:
    return lambda data: HEAD.pack(weight) + data[HEAD.size :]


LIES: dict[str, Lie] = {
    "a byte is missing": lambda data: data[:-1],
    "no whole weight": lambda data: data[: HEAD.size - 1],
    "weight and nothing else": lambda data: data[: HEAD.size],
    "an index twice": lambda data: data[: HEAD.size] + bytes(3) + data[HEAD.size + 3 :],
    "a level is NaN": lambda data: data[:-2] + b"\xff\x7f",
    "the weight is NaN": weighing(float("nan")),
    "the weight is infinite": weighing(float("inf")),
    "the weight is 0": weighing(0.0),
    "the weight is negative": weighing(-1.0),
    "all bits": lambda data: b"\xff" * len(data),
}


@dataclass(frozen=True)
class Liar(TopK):
    """Tells these, one each round, and the truth when there are none left."""

    lies: list[Lie] = field(default_factory=list)

    def _take_largest(self, values: Tensor, weight: float) -> bytes | None:
        data = super()._take_largest(values, weight)
        assert data is not None
        return self.lies.pop(0)(data) if self.lies else data


def packed(seed: int, weight: float, codec: TopK) -> tuple[bytes, np.ndarray[Any, Any]]:
    """A contribution, and what it stands for."""
    values = np.random.default_rng(seed).standard_t(4, 5000).astype(np.float32)
    data = codec._take_largest(torch.from_numpy(values.copy()), weight)
    assert data is not None
    out = np.zeros(5000, np.float32)
    assert _core.topk_add(np.frombuffer(data, np.uint8, offset=HEAD.size), codec.keep, 1.0, out)
    return data, out


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_what_is_no_contribution_is_in_no_mean_and_no_contributor(lie: Lie) -> None:
    codec = TopK(64)
    (first, a), (second, b), (third, _) = (packed(n, n + 1.0, codec) for n in range(3))
    parts = {0: first, 1: lie(third), 3: second}
    result = Result(7, 5, "stable", (10, 11, 13), False, 0, [], parts, slots=(0, 1, 3))
    sound = codec.sound(result, 5000)
    assert sound.contributors == (10, 13)
    assert sound.slots == (0, 3)
    assert sound.refused == (11,)
    mean = codec.mean(sound, 5000)
    assert mean is not None
    assert np.allclose(mean.numpy(), (a + 2 * b) / 3, rtol=1e-6, atol=0)
    result.parts = dict.fromkeys(result.parts, lie(third))
    nobody = codec.sound(result, 5000)
    assert (nobody.contributors, nobody.slots, nobody.refused) == ((), (), (10, 11, 13))
    assert codec.mean(nobody, 5000) is None


@pytest.fixture
def enter() -> Iterator[Callable[[int], list[Communicator]]]:
    """So many peers of one run; everybody is out at the end."""
    with ExitStack() as stack:

        def make_peers(count: int) -> list[Communicator]:
            server = ServerThread(Options(min_peers=count))
            stack.callback(server.stop)
            names = [f"peer-{n}" for n in range(count)]
            comms = [join(server.address, name=name, late_s=0) for name in names]
            for comm in comms:
                stack.callback(comm.close)
            return comms

        yield make_peers


def test_a_liar_is_named_to_everybody(
    enter: Callable[[int], list[Communicator]], caplog: pytest.LogCaptureFixture
) -> None:
    comms = enter(3)
    lies = list(LIES.values())
    rounds = len(lies) + 1  # and one that is true

    def trainer(number: int) -> Any:
        comm, model = comms[number], deep(1)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        outer = make("sparseloco", model, inner, comm, sync_every=1, keep=20)
        if number == 2:
            outer.codec = Liar(20, lies=list(lies))
        seen = []
        for _ in range(rounds):
            take_steps(model, inner, outer, 1)
            counted = [int(outer.allotment.silent[one.slot]) for one in comms]
            seen.append((set(outer.last_contributors), counted, outer.digest()))
        return seen

    done = together(*(lambda n=n: trainer(n) for n in range(3)))
    everybody = [comm.peer for comm in comms]
    for seen in done:
        for who, counted, _ in seen[:-1]:
            assert who == set(everybody[:2])
            assert counted == [0, 0, NEVER], "what a liar is given would be trained on by nobody"
        assert seen[-1][:2] == (set(everybody), [0, 0, 0])
        assert [digest for *_, digest in seen] == [digest for *_, digest in done[0]]

    def told(seq: int) -> list[str]:
        lines = [one.getMessage() for one in caplog.records if one.name == "decotrain.peer"]
        return [line for line in lines if line.startswith(f"refused in round 0/{seq}: ")]

    lied = range(1, rounds)  # round 0 is the broadcast
    assert comms[0].wait_until(lambda: all(len(told(seq)) >= 3 for seq in lied), WAIT_S)
    for seq in lied:
        assert len(told(seq)) == 3, "each peer sees it by itself"
        assert all(f"the contribution of {everybody[2]:016x}" in line for line in told(seq))
    assert not told(rounds)

    def known() -> bool:
        events = client.status(comms[0]._agent.address)["events"]
        return any(e["kind"] == "refused" and e["text"].startswith("peer-2") for e in events)

    until(known)  # nothing changes here when the coordinator has heard of it


@pytest.mark.parametrize("preset", ["diloco", "sparseloco"])
def test_a_nan_costs_no_fetch(preset: str, enter: Callable[[int], list[Communicator]]) -> None:
    """The round that its sender skipped comes to it as a missed one."""
    comms = enter(2)
    rounds, bad_round = 6, 3
    options: dict[str, Any] = {"codec": "e2m1+int8", "error_feedback": True}
    if preset == "sparseloco":
        options = {"keep": 20}

    def trainer(number: int) -> Any:
        comm, model = comms[number], deep(1)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        outer = make(preset, model, inner, comm, sync_every=1, **options)
        poisoned = False
        while outer.rounds() < rounds:
            loss_of(model, batch(number, outer.global_step)).backward()
            inner.step()
            inner.zero_grad()
            if number == 1 and outer.rounds() == bad_round and not poisoned:
                poisoned, kept = True, outer.residuals[0].clone()
                with torch.no_grad():
                    next(model.parameters()).fill_(float("nan"))
                with pytest.raises(NotFiniteError):
                    outer.step(1.0)
                assert torch.equal(outer.residuals[0], kept)
                outer.begin_anew()
            else:
                outer.step(1.0)
        return outer.digest(), comm.figures()["fetches"]

    first, second = together(lambda: trainer(0), lambda: trainer(1))
    assert first[0] == second[0]
    assert (first[1], second[1]) == (0, 0)
