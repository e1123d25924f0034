"""The communicator over real sockets: peers are threads of this process, each with its own node."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from decotrain.communicator import Communicator, Result, join
from decotrain.control import client
from decotrain.control.coordinator import Options
from decotrain.control.server import ServerThread
from decotrain.errors import (
    ConfigError,
    LeftError,
    NotFiniteError,
    RefusedError,
    RoundError,
    StateError,
    UnreachableError,
    WaitTimeoutError,
)

WAIT_S = 60.0


@pytest.fixture
def coordinator() -> Iterator[ServerThread]:
    server = ServerThread(Options(min_peers=2))
    yield server
    server.stop()


def together(*actions: Callable[[], Any]) -> list[Any]:
    """Runs each action in a thread of its own; their results, or the first exception."""
    results: list[Any] = [None] * len(actions)
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            results[index] = actions[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive(), "an action hangs"
    if errors:
        raise errors[0]
    return results


class Trainer:
    """Adds every result to its state: a round's effect is visible and depends on the order."""

    def __init__(self, comm: Communicator, value: float) -> None:
        self.comm, self.value = comm, value
        self.weights = np.zeros(1000, dtype=np.float32)
        comm.register_state(0, {"weights": self.weights})
        self.seen: list[tuple[int, int]] = []  # seq, digest
        self.stop = threading.Event()

    def apply(self, result: Result) -> None:
        self.seen.append((result.seq, result.digest))
        with self.comm.updating(0):
            if result.contributors:
                self.weights *= 0.5
                self.weights += np.asarray(result.tensor)

    def round(self, until: int = 1 << 62) -> Result | None:
        """None: by catching up we hold `until` rounds, and nobody begins another one with us."""
        threading.Event().wait(0.005)  # its inner steps
        if self.comm.catch_up(0, self.apply) >= until:
            return None
        values = np.full(1000, self.value, dtype=np.float32)
        result = self.comm.all_reduce(values, op="sum").wait(WAIT_S)
        if result.outcome == "stable":
            self.apply(result)
        else:
            self.comm.catch_up(0, self.apply, wait=True, timeout_s=WAIT_S)
        return result

    def rounds(self, until: int) -> None:
        self.comm.catch_up(0, self.apply, wait=True, timeout_s=WAIT_S)
        while self.comm.version(0) < until and not self.stop.is_set():
            self.round(until)


def make(address: str, value: float, **options: Any) -> Trainer:
    return Trainer(join(address, timeout_s=WAIT_S, **options), value)


def agree(*trainers: Trainer) -> None:
    """Equal digests for every round that two of them have seen, and equal state."""
    known: dict[int, int] = {}
    for trainer in trainers:
        for seq, digest in trainer.seen:
            assert known.setdefault(seq, digest) == digest, f"round {seq} has two results"
    for trainer in trainers:
        assert np.array_equal(trainer.weights, trainers[0].weights)


def test_a_run_of_one_needs_no_coordinator() -> None:
    with join("local") as comm:
        values = np.arange(5, dtype=np.float32)
        result = comm.all_reduce(values).wait(WAIT_S)
        assert result.contributors == (comm.peer,)
        assert result.tensor is values
        assert comm.slot == 0
        assert comm.active
        assert comm.members[0].peer == comm.peer


def test_everybody_gets_the_sum_and_the_names(coordinator: ServerThread) -> None:
    def peer(value: float) -> tuple[Any, ...]:
        with join(coordinator.address) as comm:
            one = np.full(3, value, dtype=np.float32)
            two = np.full((2, 2), 2 * value, dtype=np.float32)
            result = comm.all_reduce([one, two], op="sum").wait(WAIT_S)
            parts = comm.collect(bytes([int(value)]), tag=1).wait(WAIT_S).parts
            names = tuple(member.peer for member in comm.members)
            assert result.contributors == names
            return one.tolist(), two.tolist(), result.digest, parts

    a, b = together(lambda: peer(1.0), lambda: peer(2.0))
    assert a == b
    assert a[0] == [3.0] * 3
    assert a[1] == [[6.0, 6.0]] * 2
    assert sorted(a[3].values()) == [b"\1", b"\2"]


def test_what_nobody_contributes_to_is_zero_for_everybody(coordinator: ServerThread) -> None:
    """And not each peer's own values: those would differ."""

    def peer(value: float) -> tuple[list[float], tuple[int, ...]]:
        with join(coordinator.address) as comm:
            result = comm.all_reduce(np.full(3, value, np.float32), weight=0.0).wait(WAIT_S)
            return result.tensor.tolist(), result.contributors

    assert together(lambda: peer(1.0), lambda: peer(2.0)) == [([0.0] * 3, ())] * 2


def test_a_broadcast_brings_the_bits_of_the_root_in_every_tensor(coordinator: ServerThread) -> None:
    def peer(value: float) -> tuple[list[list[float]], int]:
        with join(coordinator.address) as comm:
            root = max(one.peer for one in comm.members)
            tensors = [np.full(3, value, np.float32), np.full((2, 1), value / 3, np.float32)]
            comm.broadcast(tensors, root=root).wait(WAIT_S)
            assert (tensors[0][0] == value) or comm.peer != root
            return [tensor.reshape(-1).tolist() for tensor in tensors], root

    one, other = together(lambda: peer(1.0), lambda: peer(5.0))
    assert one == other
    assert one[0][0] in ([1.0] * 3, [5.0] * 3)
    assert one[0][1] == [float(np.float32(one[0][0][0] / 3))] * 2


def test_weights_and_torch_tensors(coordinator: ServerThread) -> None:
    torch = pytest.importorskip("torch")

    def peer(value: float, weight: float) -> Any:
        with join(coordinator.address) as comm:
            given = torch.full((4,), value, requires_grad=True)
            out = torch.empty(4, dtype=torch.float32)
            comm.all_reduce(given, weight=weight, out=out).wait(WAIT_S)
            half = torch.full((2, 3), value, dtype=torch.bfloat16).t()  # not contiguous
            comm.all_reduce(half, codec="bf16", tag=1).wait(WAIT_S)
            sent = comm.broadcast(torch.full((2,), value), tag=2).wait(WAIT_S)
            return out.tolist(), half.float().tolist(), sent.tensor.tolist(), comm.slot

    results = together(lambda: peer(1.0, 1.0), lambda: peer(5.0, 3.0))
    assert results[0][0] == results[1][0] == [4.0] * 4
    assert results[0][1] == results[1][1] == [[3.0] * 2] * 3
    first = next(index for index, result in enumerate(results) if result[3] == 0)
    assert results[0][2] == results[1][2] == [(1.0, 5.0)[first]] * 2


def test_a_poisoned_contribution_is_refused_here_and_waits_for_nobody(
    coordinator: ServerThread,
) -> None:
    def poisoned() -> None:
        with join(coordinator.address) as comm:
            values = [np.ones(2, np.float32), np.array([np.nan], np.float32)]
            with pytest.raises(NotFiniteError, match="tensor 1 contains NaN"):
                comm.all_reduce(values)
            comm.collect(None, tag=1).wait(WAIT_S)

    def healthy() -> Any:
        with join(coordinator.address) as comm:
            result = comm.all_reduce(np.ones(3, np.float32)).wait(WAIT_S)
            comm.collect(None, tag=1).wait(WAIT_S)
            return result, comm.peer

    result, name = together(healthy, poisoned)[0]
    assert result.contributors == (name,)
    assert result.tensor.tolist() == [1.0] * 3


def test_a_poisoned_borrowed_tensor_is_refused_at_the_latest_by_wait(
    coordinator: ServerThread,
) -> None:
    elements = 1_000_000

    def poisoned() -> None:
        with join(coordinator.address) as comm:
            values = np.zeros(elements, np.float32)
            values[-1] = np.inf
            work = comm.all_reduce(values, borrow=True)
            for _ in range(2):
                with pytest.raises(NotFiniteError, match="tensor 0 contains NaN"):
                    work.wait(WAIT_S)
            assert np.isinf(values).sum() == 1
            assert comm.all_reduce(np.ones(1, np.float32)).wait(WAIT_S).seq == 1
            comm.collect(None, tag=1).wait(WAIT_S)

    def healthy() -> Any:
        with join(coordinator.address) as comm:
            result = comm.all_reduce(np.ones(elements, np.float32)).wait(WAIT_S)
            comm.all_reduce(np.ones(1, np.float32)).wait(WAIT_S)
            comm.collect(None, tag=1).wait(WAIT_S)
            return result

    result = together(healthy, poisoned)[0]
    assert np.isfinite(result.tensor).all()
    assert result.tensor[-1] == 1.0


def test_a_newcomer_fetches_what_the_others_hold_and_takes_part(coordinator: ServerThread) -> None:
    a, b = make(coordinator.address, 1.0), make(coordinator.address, 2.0)
    together(lambda: a.rounds(5), lambda: b.rounds(5))
    late: list[Trainer] = []

    def newcomer() -> None:
        late.append(make(coordinator.address, 4.0))
        late[0].comm.catch_up(0, late[0].apply, wait=True, timeout_s=WAIT_S)
        while not late[0].comm.active:
            late[0].round()
        for _ in range(5):
            late[0].round()
        a.stop.set()
        b.stop.set()

    def until_told(trainer: Trainer) -> None:
        trainer.rounds(10**9)
        trainer.comm.leave()  # the other may have begun a round more already

    threads = [threading.Thread(target=until_told, args=(t,)) for t in (a, b)]
    for thread in threads:
        thread.start()
    together(newcomer)
    version = late[0].comm.version(0)
    late[0].comm.leave()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert version >= 10
    seen = dict(late[0].seen)
    assert seen
    for trainer in (a, b):
        both = [(seen[seq], digest) for seq, digest in trainer.seen if seq in seen]
        assert both
        assert all(one == other for one, other in both)
        trainer.comm.leave()


def test_a_newcomer_follows_state_that_moves_while_it_fetches(coordinator: ServerThread) -> None:
    """Rounds are several times as fast as the fetch; what was fetched moves along with them."""
    elements, joined = 8 << 20, threading.Event()

    def peer(late: bool) -> tuple[int, int, np.ndarray]:
        with join(coordinator.address) as comm:
            weights = np.full(elements, 7.0 if late else 0.0, np.float32)
            steps = np.zeros(1, np.int64)

            def effect(result: Result) -> None:
                np.add(weights, result.tensor[-1] + steps[0] % 8, out=weights)
                steps[0] += 1

            def apply(result: Result) -> None:
                with comm.updating(0):
                    effect(result)

            comm.register_state(0, {"weights": weights, "steps": steps}, effect=effect)
            while True:
                comm.catch_up(0, apply, wait=True, timeout_s=WAIT_S)
                ends = joined.is_set() or (late and comm.active)
                work = comm.all_reduce(np.array([ends, 1.0], np.float32), op="sum")
                result = work.wait(WAIT_S)
                if result.outcome != "stable":
                    continue
                apply(result)
                if result.tensor[0] > 0:
                    joined.set()
                    return comm._shared.restarts, int(steps[0]), weights

    def newcomer() -> tuple[int, int, np.ndarray]:
        threading.Event().wait(0.3)
        return peer(late=True)

    (_, _, a), (_, _, b), (restarts, steps, c) = together(
        lambda: peer(False), lambda: peer(False), newcomer
    )
    assert restarts == 0
    assert steps > 3
    assert np.array_equal(a, b)
    assert np.array_equal(a, c)


@pytest.mark.parametrize(
    ("version", "last_seq", "seq", "good"),
    [(5, -1, 5, True), (5, 4, 4, False), (5, 6, 7, True), (5, 4, 6, False), (5, -1, 8, False)],
)
def test_only_a_result_that_follows_on_the_state_is_handed_out(
    version: int, last_seq: int, seq: int, good: bool
) -> None:
    """A round that the fetched state contains, or one after rounds that never came, is lost."""
    with join("local") as comm:
        comm.register_state(0, {"w": np.zeros(2, np.float32)}, version=version)
        held = SimpleNamespace(tag=0, seq=seq, outcome="stable")
        if last_seq >= 0:
            comm._shared.versions.hand_out(0, last_seq)
        assert comm._shared.follows(held) is good
        behind = seq > version and not good
        assert comm._shared.behind(0) is behind  # then the state is fetched


def test_a_round_skipped_after_an_error_comes_before_the_next() -> None:
    """Its result moves the state: what was computed before it is not of the state that others have.
    It ends when the others have ended it, so catch_up waits for it."""

    class Skipped:
        ended = False

        def done(self) -> bool:
            return self.ended

        def result(self) -> None:
            return None

    with join("local") as comm:
        comm.register_state(0, {"w": np.zeros(2, np.float32)})
        bad = np.array([1.0, np.nan], np.float32)
        with pytest.raises(NotFiniteError):
            comm.all_reduce(bad)
        skipped = comm._shared.skipped[0]
        assert len(skipped) == 1
        open_round = Skipped()
        skipped.append((open_round, None))
        applied: list[int] = []

        def apply(result: Any) -> None:
            with comm.updating(0, result.seq + 1):
                applied.append(result.seq)

        assert comm.all_reduce(np.ones(2, np.float32)).wait().outcome == "lost"
        with pytest.raises(WaitTimeoutError):
            comm.catch_up(0, apply, wait=True, timeout_s=0.3)
        assert applied == [0]
        open_round.ended = True
        comm.catch_up(0, apply, wait=True, timeout_s=5.0)
        assert comm.all_reduce(np.ones(2, np.float32)).wait().outcome == "stable"


def test_the_survivors_of_a_death_agree(coordinator: ServerThread) -> None:
    trainers = [make(coordinator.address, float(2**n)) for n in range(3)]
    together(*(lambda t=t: t.rounds(3) for t in trainers))
    dead = trainers.pop()
    threads = [threading.Thread(target=t.rounds, args=(12,)) for t in trainers]
    for thread in threads:
        thread.start()
    name = dead.comm.peer
    dead.comm.close()
    assert client.exited(coordinator.address, "default", peer=name)
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive(), "the survivors wait for the dead"
    agree(*trainers)
    for trainer in trainers:
        trainer.comm.close()


def test_an_evicted_peer_comes_back_by_itself(coordinator: ServerThread) -> None:
    a, b = make(coordinator.address, 1.0), make(coordinator.address, 2.0)
    together(lambda: a.rounds(3), lambda: b.rounds(3))
    before = b.comm.peer
    threads = [threading.Thread(target=t.rounds, args=(10**9,)) for t in (a, b)]
    for thread in threads:
        thread.start()
    client.exited(coordinator.address, "default", peer=before)  # a mistake: it lives
    for _ in range(int(WAIT_S / 0.05)):
        if b.comm.peer != before and b.comm.active and a.comm.active:
            break
        threading.Event().wait(0.05)
    assert b.comm.peer != before
    assert b.comm.active
    version = a.comm.version(0)
    for _ in range(int(WAIT_S / 0.05)):
        if min(a.comm.version(0), b.comm.version(0)) > version + 3:
            break
        threading.Event().wait(0.05)
    assert min(a.comm.version(0), b.comm.version(0)) > version + 3
    a.stop.set()
    b.stop.set()
    for trainer, thread in zip((a, b), threads, strict=True):
        while thread.is_alive():  # whoever is a round behind is released by the other's leaving
            thread.join(0.5)
            if thread.is_alive():
                other = b if trainer is a else a
                other.comm.leave()
    known = dict(a.seen)
    assert all(known.get(seq, digest) == digest for seq, digest in b.seen)
    a.comm.close()
    b.comm.close()


def test_leaving_takes_no_timeout_and_ends_everything(coordinator: ServerThread) -> None:
    a, b = join(coordinator.address), join(coordinator.address)
    together(lambda: a.members, lambda: b.members)
    b.leave()
    result = a.all_reduce(np.ones(2, np.float32)).wait(2.0)  # a suspicion would take 3 s
    assert result.contributors == (a.peer,)
    with pytest.raises(LeftError, match="has left"):
        b.all_reduce(np.ones(2, np.float32))
    a.close()


def test_what_is_wrong_is_said(coordinator: ServerThread) -> None:
    with pytest.raises(ConfigError, match="no coordinator to join"):
        join()
    with join("local") as comm:
        with pytest.raises(RoundError, match="int64"):
            comm.all_reduce(np.ones(2, np.int64))
        with pytest.raises(RoundError, match="not a torch tensor or numpy array"):
            comm.all_reduce("values")
        with pytest.raises(RoundError, match="at least one value"):
            comm.all_reduce([])
        with pytest.raises(RoundError, match="tag 9999"):
            comm.all_reduce(np.ones(2, np.float32), tag=9999)
        with pytest.raises(RoundError, match="weight"):
            comm.all_reduce(np.ones(2, np.float32), weight=-1.0)
        with pytest.raises(ConfigError, match="did you mean int8"):
            comm.all_reduce(np.ones(2, np.float32), codec="int7")
        with pytest.raises(RoundError, match="other sizes"):
            comm.all_reduce(np.ones(2, np.float32), out=np.ones(3, np.float32))
        with pytest.raises(RoundError, match="max_bytes"):
            comm.collect(b"x" * 10, max_bytes=5)
        with pytest.raises(StateError, match="register_state first"):
            comm.version(3)
        comm.all_reduce(np.ones(2, np.float32)).wait(WAIT_S)
        with pytest.raises(StateError, match="after the first round"):
            comm.register_state(0, {"w": np.ones(2, np.float32)})
    alone = join(coordinator.address)  # min_peers is 2
    with pytest.raises(WaitTimeoutError, match="no view yet"):
        alone.all_reduce(np.ones(2, np.float32)).wait(0.1)
    alone.close()


def test_a_configuration_that_does_not_fit_is_refused(coordinator: ServerThread) -> None:
    first = join(coordinator.address, config={"width": 64})
    with join(coordinator.address) as second:
        assert second.config == {"width": 64}
    with pytest.raises(RefusedError, match="width: the run has 64, this peer 32"):
        join(coordinator.address, config={"width": 32})
    first.close()


def test_nobody_answers(coordinator: ServerThread) -> None:
    address = coordinator.address
    coordinator.stop()
    with pytest.raises(UnreachableError, match="no coordinator answers"):
        join(address, timeout_s=0.3)


def test_rounds_go_on_without_the_coordinator() -> None:
    server = ServerThread(Options(min_peers=2))
    a, b = make(server.address, 1.0), make(server.address, 2.0)
    together(lambda: a.rounds(2), lambda: b.rounds(2))
    server.stop()
    together(lambda: a.rounds(20), lambda: b.rounds(20))
    agree(a, b)
    a.comm.close()
    b.comm.close()
