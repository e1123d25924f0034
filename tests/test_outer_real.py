"""The outer optimizer over the real core: threads with a `Communicator` each, loopback links."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from decotrain.communicator import Communicator, join
from decotrain.control.coordinator import Options
from decotrain.control.server import ServerThread
from decotrain.outer import OuterOptimizer, make
from tests.outer_runs import assert_close, batch, loss_of, make_model, reference

WAIT_S = 60.0
SYNC_EVERY = 4


@pytest.fixture
def enter() -> Iterator[Callable[[int], Communicator]]:
    """Joins one run of at least three peers; everybody is out at the end."""
    server = ServerThread(Options(run="test", min_peers=3))
    comms: list[Communicator] = []

    def make(peer: int) -> Communicator:
        comm = join(
            server.address, name=f"peer-{peer}", run="test", listen="127.0.0.1", timeout_s=WAIT_S
        )
        comms.append(comm)
        return comm

    yield make
    for comm in comms:
        comm.close()
    server.stop()


class Peer:
    """A trainer in a thread: inner SGD on its own batches until the global step is reached."""

    def __init__(self, number: int, enter: Callable[[int], Communicator]) -> None:
        self.number, self.enter = number, enter
        self.digests: dict[int, str] = {}
        self.theta: list[torch.Tensor] = []
        self.sent: list[float] = []  # bytes, after each round
        self.error: BaseException | None = None
        self.outer: OuterOptimizer | None = None
        self.until = 1 << 30
        self.moved = threading.Condition()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self.thread.start()

    def _run(self) -> None:
        try:
            self._train()
        except BaseException as error:
            self.error = error
        with self.moved:
            self.moved.notify_all()

    def _train(self) -> None:
        model = make_model(seed=1)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        comm = self.enter(self.number)
        outer = make("diloco", model, inner, comm, sync_every=SYNC_EVERY, lr=0.7, momentum=0.9)
        self.outer = outer
        step = 0
        while outer.global_step < self.until:
            loss_of(model, batch(self.number, step)).backward()
            inner.step()
            inner.zero_grad()
            step += 1
            if outer.step(tokens=8):
                with self.moved:
                    self.digests[outer.rounds()] = outer.digest()
                    self.theta.append(outer.fragments[0].theta.clone())
                    self.sent.append(comm.figures()["bytes_out"])
                    self.moved.notify_all()
        comm.leave()

    def wait_for(self, true: Callable[[], Any]) -> None:
        with self.moved:
            assert self.moved.wait_for(lambda: self.error or true(), WAIT_S)
        if self.error:
            raise self.error

    def join(self) -> None:
        self.thread.join(WAIT_S)
        if self.error:
            raise self.error
        assert not self.thread.is_alive(), f"peer {self.number} hangs"


def test_three_peers_equal_the_reference(enter: Callable[[int], Communicator]) -> None:
    peers = [Peer(number, enter) for number in (1, 2, 3)]
    for peer in peers:
        peer.until = 6 * SYNC_EVERY
        peer.start()
    for peer in peers:
        peer.join()
    assert len(peers[0].digests) == 6
    assert peers[0].digests == peers[1].digests == peers[2].digests
    for found, expected in zip(peers[0].theta, reference(3, 6, 4, 0.7, 0.9), strict=True):
        assert_close(found, expected)


def test_a_newcomer_holds_what_the_others_hold(enter: Callable[[int], Communicator]) -> None:
    peers = [Peer(number, enter) for number in (1, 2, 3)]
    for peer in peers:
        peer.start()
    peers[0].wait_for(lambda: len(peers[0].digests) >= 3)
    newcomer = Peer(4, enter)
    newcomer.start()
    newcomer.wait_for(lambda: len(newcomer.digests) >= 3)
    last = max(newcomer.digests) + 200
    for peer in (*peers, newcomer):
        peer.until = last * SYNC_EVERY
    for peer in (*peers, newcomer):
        peer.join()
    assert min(newcomer.digests) > 3
    for number, digest in newcomer.digests.items():
        known = {peer.digests[number] for peer in peers if number in peer.digests}
        assert known <= {digest}, f"round {number} differs"
    assert peers[0].sent == sorted(peers[0].sent), "bytes that were sent are forgotten"
    assert newcomer.outer is not None
    assert newcomer.outer.comm.peer in newcomer.outer.last_contributors
