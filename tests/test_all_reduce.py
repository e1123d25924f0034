"""The mean over real sockets: every size at every number of peers, against float64, to the bit
equal on all peers.

The bound is that of a sum of n float32 in order and one product: n roundings of at most half a unit
in the last place of the sum of magnitudes.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.test_node import results, team

CHUNK = 4096  # elements of the smallest chunk
ROUND = 16 * CHUNK  # elements up to which a round has such chunks
LARGEST_CHUNK = 262_144
SIZES = [0, 1, 7919, CHUNK - 1, CHUNK, CHUNK + 1, ROUND - 1, ROUND, ROUND + 1, 1_299_709]


def check_mean(peers: int, elements: int, transport: str) -> None:
    rng = np.random.default_rng(1000 * peers + elements)
    values = [
        (rng.standard_normal(elements) * 10.0 ** rng.integers(-3, 4)).astype(np.float32)
        for _ in range(peers)
    ]
    total = np.zeros(elements, np.float64)
    magnitude = np.zeros(elements, np.float64)
    for one in values:
        total += one
        magnitude += np.abs(one)
    with team(peers, (transport,)) as nodes:
        works = [n.begin([v], borrow=True) for n, v in zip(nodes, values, strict=True)]
        for result, mine in zip(results(works), values, strict=True):
            assert result.outcome == "stable"
            # Without elements there is no chunk that anybody could be in.
            assert result.contributors == [n.peer for n in nodes if elements > 0]
            result.decode_into([mine])
    first = values[0]
    for other in values[1:]:
        assert first.tobytes() == other.tobytes()
    bound = (peers + 1) * 2.0**-24 * magnitude / peers + 2.0**-149
    assert bool(np.all(np.abs(first - total / peers) <= bound))


@pytest.mark.parametrize("peers", [1, 2, 3, 5, 8])
def test_every_size_gives_the_mean_and_the_same_bits(peers: int) -> None:
    for elements in SIZES:
        check_mean(peers, elements, "tcp://127.0.0.1:0")


@pytest.mark.parametrize("peers", [2, 3])
def test_a_hundred_megabytes(peers: int) -> None:
    check_mean(peers, 25_000_000, "tcp://127.0.0.1:0")


def test_around_the_largest_chunk() -> None:
    for elements in (16 * LARGEST_CHUNK - 1, 16 * LARGEST_CHUNK, 16 * LARGEST_CHUNK + 1):
        check_mean(3, elements, "unix://")


# Bits of a value, scales included: the table of docs/codecs.md.
BITS = {
    "f32": 32,
    "bf16": 16,
    "f16": 16,
    "int8": 8 + 32 / 256,
    "e2m1": 4 + 8 / 32 + 8 / 1024,
    "e3m0": 4 + 8 / 128,
    "int2": 2 + 32 / 256,
}


@pytest.mark.parametrize(
    "pair", ["f32", "bf16", "f16", "int8", "e2m1", "e3m0", "int2", "e2m1+int8"]
)
def test_the_wire_carries_what_the_codec_promises_and_half_a_percent(pair: str) -> None:
    elements = 16 << 20  # 64 MiB of f32
    there, _, back = pair.partition("+")
    values = np.random.default_rng(1).standard_normal(elements, np.float32)
    with team(2) as nodes:
        works = [n.begin([values], codec=there, result_codec=back or there) for n in nodes]
        results(works)
        sent = sum(link["sent_bytes"] for node in nodes for link in node.links())
    promised = elements * (BITS[there] + BITS[back or there]) / 8
    assert promised <= sent <= 1.005 * promised
