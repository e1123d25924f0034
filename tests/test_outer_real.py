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
from decotrain.errors import LeftError
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

    def __init__(self, number: int, enter: Callable[[int], Communicator], **options: Any) -> None:
        self.number, self.enter, self.options = number, enter, options
        self.dies = threading.Event()  # in its next round, with the others in the middle of it
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
            if not (self.dies.is_set() and isinstance(error, LeftError)):
                self.error = error
        with self.moved:
            self.moved.notify_all()

    def _train(self) -> None:
        model = make_model(seed=1)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        comm = self.enter(self.number)
        self._may_die_in_a_round(comm)
        options = {"sync_every": SYNC_EVERY, "lr": 0.7, "momentum": 0.9, **self.options}
        outer = make("diloco", model, inner, comm, **options)
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

    def _may_die_in_a_round(self, comm: Communicator) -> None:
        begin = comm.all_reduce

        def all_reduce(*values: Any, **options: Any) -> Any:
            work = begin(*values, **options)
            if self.dies.is_set():
                comm.close()  # no farewell
            return work

        comm.all_reduce = all_reduce  # type: ignore[method-assign]

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


@pytest.mark.parametrize("codec", ["int8", "e2m1+int8"])
def test_with_few_bits_all_hold_the_same_though_one_dies_in_a_round(
    enter: Callable[[int], Communicator], codec: str
) -> None:
    """A3: each state of the outer parameters is one, whoever came or went before it."""
    options = {"codec": codec, "error_feedback": True}
    first, dying, third, newcomer = peers = [Peer(n, enter, **options) for n in (1, 2, 3, 4)]
    for peer in (first, dying, third):
        peer.start()
    first.wait_for(lambda: len(first.digests) >= 3)
    newcomer.start()
    newcomer.wait_for(lambda: len(newcomer.digests) >= 3)
    dying.dies.set()
    dying.join()
    died = max(dying.digests)
    alive = [peer for peer in peers if peer is not dying]
    for peer in alive:
        peer.wait_for(lambda peer=peer: max(peer.digests) >= died + 4)
    last = max(max(peer.digests) for peer in alive) + 40
    for peer in alive:
        peer.until = last * SYNC_EVERY
    for peer in alive:
        peer.join()
    for number in range(1, last + 1):
        held = {peer.digests[number] for peer in peers if number in peer.digests}
        assert len(held) <= 1, f"round {number} differs"
    shared = set(first.digests) & set(third.digests) & set(newcomer.digests)
    assert len([number for number in shared if number < died]) >= 1
    assert len([number for number in shared if number > died + 1]) >= 3
    assert len(set(first.digests.values())) == len(first.digests), "the state never moved"
    for peer in alive:
        assert peer.outer is not None
        assert len(peer.outer.last_contributors) == 3
        assert peer.outer.residuals[0].any(), "nothing was lost: the codec is not used"
