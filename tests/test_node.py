"""Node from Python: rounds on arrays, shared state, and many starts at once."""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from decotrain import _core

VIEW = 1 << 32 | 1


def plan(nodes: list[_core.Node]) -> dict[str, Any]:
    """The first view, with everybody active."""
    return {
        "view": {"id": VIEW, "members": [[n.peer, i, True, 1.0] for i, n in enumerate(nodes)]},
        "answers": [1, 1],
        "reported": (1 << len(nodes)) - 1,
        "tags": [],
        "rounds": [],
        "names": [],
    }


@contextmanager
def team(
    count: int,
    listen: tuple[str, ...] = ("unix://",),
    key: bytes = b"",
    shared_memory: bool = True,
) -> Iterator[list[_core.Node]]:
    nodes = [
        _core.Node(
            10 + i, list(listen), run_fingerprint=5, tls_key=key, shared_memory=shared_memory
        )
        for i in range(count)
    ]
    try:
        everybody = [(n.peer, i, n.addresses) for i, n in enumerate(nodes)]
        for node in nodes:
            node.set_peers(everybody)
            node.freeze(1, 1)
        for node in nodes:
            assert node.install(plan(nodes))
        yield nodes
    finally:
        for node in nodes:
            node.close()


def results(works: list[_core.Work]) -> list[_core.Result]:
    out = []
    for work in works:
        assert work.wait(30.0)
        result = work.result()
        assert result is not None
        out.append(result)
    assert len({r.digest for r in out}) == 1
    return out


def test_a_round_through_tls() -> None:
    with team(3, ("tcp://127.0.0.1:0",), bytes(range(32))) as nodes:
        arrays = [np.full(300_000, float(i), np.float32) for i in range(3)]
        works = [n.begin([a]) for n, a in zip(nodes, arrays, strict=True)]
        for result, array in zip(results(works), arrays, strict=True):
            result.decode_into([array])
            assert (array == 1.0).all()
        for node in nodes:
            assert all(link["tls"] and not link["unix"] for link in node.links())


def test_a_key_has_one_size() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        _core.Node(1, [], run_fingerprint=5, tls_key=b"short")


def test_a_mean_in_place() -> None:
    # A view needs a result in one piece: shared memory holds it chunk by chunk.
    with team(3, ("tcp://127.0.0.1:0", "unix://"), shared_memory=False) as nodes:
        arrays = [np.full(100_000, float(i), np.float32) for i in range(3)]
        works = [
            n.begin([a], borrow=True, weight=w)
            for n, a, w in zip(nodes, arrays, (1.0, 1.0, 2.0), strict=True)
        ]
        for result, array in zip(results(works), arrays, strict=True):
            assert (result.outcome, result.seq, result.begun) == ("stable", 0, True)
            assert result.contributors == [10, 11, 12]
            assert not result.partial
            view = result.view_f32()
            assert view is not None
            assert not view.flags.writeable
            result.decode_into([array])
            assert np.array_equal(view, array)
            assert array[0] == array[-1] == pytest.approx(5 / 4)


def test_segments_of_several_types_of_torch() -> None:
    with team(2) as nodes:
        tensors = [
            [
                torch.full((7, 3), 1.0 + i),
                torch.full((100,), 2.0 + i, dtype=torch.bfloat16),
                torch.full((5,), 4.0 + i, dtype=torch.float16),
            ]
            for i in range(2)
        ]
        works = [n.begin(t, op="sum") for n, t in zip(nodes, tensors, strict=True)]
        for result, mine in zip(results(works), tensors, strict=True):
            result.decode_into(mine)
            assert torch.equal(mine[0], torch.full((7, 3), 3.0))
            assert torch.equal(mine[1], torch.full((100,), 5.0, dtype=torch.bfloat16))
            assert torch.equal(mine[2], torch.full((5,), 9.0, dtype=torch.float16))


def test_what_begin_refuses() -> None:
    with team(1) as nodes:
        good, bad = np.zeros(3, np.float32), np.array([1.0, np.nan], np.float32)
        for borrow in (False, True):
            with pytest.raises(ValueError, match="buffer 1 contains NaN"):
                nodes[0].begin([good, bad], borrow=borrow)
        with pytest.raises(TypeError, match="buffer 0"):
            nodes[0].begin([np.zeros(3)])
        with pytest.raises(TypeError, match="buffer 0"):
            nodes[0].begin([np.zeros((4, 4), np.float32)[:, 1]])
        with pytest.raises(ValueError, match="codec"):
            nodes[0].begin([good], codec="f64")
        with pytest.raises(ValueError, match="weight"):
            nodes[0].begin([good], weight=-1.0)
        result = results([nodes[0].begin([good])])[0]
        with pytest.raises(ValueError, match="elements"):
            result.decode_into([np.zeros(4, np.float32)])
        readonly = np.zeros(3, np.float32)
        readonly.flags.writeable = False
        with pytest.raises(TypeError, match="writable"):
            result.decode_into([readonly])


def test_a_nan_in_a_large_borrowed_buffer_is_found_where_it_is_combined() -> None:
    elements = 1_000_000
    with team(2) as nodes:
        for place in (3, elements // 2, elements - 1):
            bad, good = np.zeros(elements, np.float32), np.ones(elements, np.float32)
            bad[place] = np.nan
            works = [n.begin([a], borrow=True) for n, a in zip(nodes, (bad, good), strict=True)]
            mine, others = results(works)
            assert mine.withdrawn
            assert not others.withdrawn
            assert others.chunk_contributors.count([11]) == 1
            others.decode_into([good])
            assert set(good.tolist()) <= {0.5, 1.0}
            assert np.isnan(bad).sum() == 1, "a borrowed buffer was written to"
        events = [e for node in nodes for e in node.events() if e["kind"] == "refused"]
        assert {e["peer"] for e in events} == {10}


def test_collect() -> None:
    with team(3) as nodes:
        works = [n.collect(b"peer %d" % n.peer if n.peer != 11 else None) for n in nodes]
        for result in results(works):
            assert result.parts() == {0: b"peer 10", 2: b"peer 12"}


@pytest.mark.parametrize("shared", [True, False])
def test_large_rounds_within_a_host(shared: bool) -> None:
    """Many rounds in place, so that memory is lent, given back and used again."""
    with team(3, shared_memory=shared) as nodes:
        arrays = [np.empty(1_000_003, np.float32) for _ in nodes]
        for turn in range(12):
            for i, array in enumerate(arrays):
                array[:] = np.arange(array.size, dtype=np.float32) % 1000 + 3 * i + turn
            wanted = arrays[1].copy()
            works = [n.begin([a], borrow=True) for n, a in zip(nodes, arrays, strict=True)]
            for result, array in zip(results(works), arrays, strict=True):
                result.decode_into([array])
                np.testing.assert_allclose(array, wanted, rtol=1e-6)
        assert all(link["shared"] == shared for node in nodes for link in node.links())


def test_a_result_outlives_who_summed_it() -> None:
    """Its chunks lie in memory of the peer that summed them, which is gone when they are read."""
    with team(2) as nodes:
        arrays = [np.full(1_000_000, float(i), np.float32) for i in range(2)]
        for _ in range(4):  # the first goes through the socket
            works = [n.begin([a]) for n, a in zip(nodes, arrays, strict=True)]
            kept = results(works)
        nodes[1].close()
        works.clear()
        last = kept.pop(0)
        kept.clear()
        last.decode_into([arrays[0]])
        assert (arrays[0] == 0.5).all()


def test_events_wake_the_control_thread() -> None:
    with team(2) as nodes:
        kinds = set()
        while "link_up" not in kinds:
            ready, _, _ = select.select([nodes[0].event_fd], [], [], 10.0)
            assert ready
            kinds |= {event["kind"] for event in nodes[0].events()}
        assert select.select([nodes[0].event_fd], [], [], 0.0)[0] == [] or nodes[0].events()
        link = nodes[0].links()[0]
        assert (link["peer"], link["up"], link["unix"]) == (11, True, True)


def test_state_comes_from_several_peers() -> None:
    with team(3) as nodes:
        weights = np.arange(3_000_000, dtype=np.float32)
        moments = torch.arange(70_001, dtype=torch.bfloat16)
        for node in nodes[:2]:
            node.publish(4, [weights, moments], version=9)
        into = [np.zeros_like(weights), torch.zeros_like(moments)]
        fetch = nodes[2].fetch(4, [10, 11], into)
        assert fetch.wait(30.0)
        assert fetch.version == 9
        assert fetch.bytes == fetch.total_bytes == weights.nbytes + 2 * 70_001
        assert np.array_equal(into[0], weights)
        assert torch.equal(into[1], moments)
        sent = [node.links()[1]["sent_bytes"] for node in nodes[:2]]
        assert min(sent) > 1 << 20, "one of them served nothing"


def test_state_is_not_served_while_it_is_written() -> None:
    with team(2) as nodes:
        array = np.zeros(1_000_000, np.float32)
        nodes[0].publish(4, [array], version=1)
        nodes[0].begin_update(4)
        into = np.ones_like(array)
        fetch = nodes[1].fetch(4, [10], [into])
        assert not fetch.wait(0.1)
        array.fill(7.0)
        nodes[0].end_update(4, 2)
        assert fetch.wait(30.0)
        assert fetch.version == 2
        assert (into == 7.0).all()


def test_a_fetch_can_be_cancelled() -> None:
    with team(2) as nodes:
        fetch = nodes[1].fetch(4, [10], [np.ones(10, np.float32)])
        nodes[1].cancel(fetch)
        with pytest.raises(RuntimeError, match="cancelled"):
            fetch.wait()


def starts(rounds: int) -> None:
    """Peers that start, meet, finish a round and end, all at once."""
    for _ in range(rounds):
        with team(8, ("tcp://127.0.0.1:0", "unix://")) as nodes:
            works: list[Any] = [None] * 8

            def begin(i: int, nodes: list[_core.Node] = nodes, works: list[Any] = works) -> None:
                works[i] = nodes[i].begin([np.full(64, float(i), np.float32)])

            threads = [threading.Thread(target=begin, args=(i,)) for i in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            view = results(works)[0].view_f32()
            assert view is not None
            assert view[0] == 3.5


def test_eight_peers_start_at_once() -> None:
    starts(3)


@pytest.mark.slow
def test_a_hundred_starts_of_eight_peers() -> None:
    starts(100)
