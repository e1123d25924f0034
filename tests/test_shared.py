"""Shared state between incarnations and generations, without a network: a fake node and agent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from decotrain.shared import SharedState
from decotrain.versions import VOID

TAG = 3


class FakeNode:
    """What SharedState asks of the core, as a list of what was asked."""

    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []
        self.results: list[Any] = []

    def publish(self, tag: int, arrays: list[Any], version: int, kind: int) -> None:
        self.said.append(("publish", tag, version))

    def withdraw(self, tag: int) -> None:
        self.said.append(("withdraw", tag))

    def set_covered(self, tag: int, seq: int) -> None:
        self.said.append(("covered", tag, seq))

    def take_missed(self, tag: int) -> list[Any]:
        taken, self.results = self.results, []
        return taken


def result(seq: int) -> Any:
    return SimpleNamespace(seq=seq, tag=TAG, outcome="stable")


@pytest.fixture
def shared() -> SharedState:
    node = FakeNode()
    agent = SimpleNamespace(node=node, shared=SimpleNamespace(node=node))
    shared = SharedState(SimpleNamespace(_agent=agent))  # type: ignore[arg-type]
    shared.register(TAG, {"w": np.zeros(4, np.float32)}, 0, None, None)
    shared.versions.version[TAG] = shared.fragments[TAG].version = 5
    return shared


def node_of(shared: SharedState) -> FakeNode:
    node: FakeNode = shared.comm._agent.node
    return node


def install(shared: SharedState, stable: int, void: bool = False, adopt: bool = False) -> bool:
    tags = [{"tag": TAG, "stable": stable, "digest": 0}]
    held = dict(shared.versions.declared())
    return shared.installed(7, tags, held, void, adopt)


def test_results_of_a_generation_that_has_ended_are_not_applied_to_the_next(
    shared: SharedState,
) -> None:
    """Everybody died but us, whose state is void: the run goes on from what we hold, as after the
    plan's last round. What the old generation left in our hands is not of that history."""
    shared.incarnated()
    node = node_of(shared)
    node.results = [result(6)]
    assert shared.take_missed(TAG) == [6]  # in our hands
    node.results = [result(7)]  # still in the engine's
    assert install(shared, stable=2, adopt=True)
    assert shared.fragments[TAG].version == 3
    assert not shared.fragments[TAG].void
    assert ("covered", TAG, 2) in node.said
    assert ("publish", TAG, 3) in node.said  # who comes fetches it from us
    assert shared.take_missed(TAG) == []
    assert not shared.behind(TAG)
    node.results = [result(3)]  # of the new generation
    assert shared.take_missed(TAG) == [3]
    assert shared.versions.next(TAG, [3]).do == "apply"


def test_what_is_void_is_served_to_nobody_and_fetched(shared: SharedState) -> None:
    assert install(shared, stable=4)
    assert not install(shared, stable=3)  # it holds round 4, which the view does not know
    assert shared.fragments[TAG].void
    assert ("withdraw", TAG) in node_of(shared).said
    assert shared.versions.declared() == [(TAG, VOID)]
    assert shared.behind(TAG)
    assert shared.versions.next(TAG, []).do == "fetch"
