"""Stochastic rounding in rounds: means are kept, no two contributions draw the same numbers.

The rounding itself, level by level, is in tests/test_codecs.py.
"""

from __future__ import annotations

import numpy as np
import pytest

from decotrain.communicator import Communicator, join
from decotrain.control.coordinator import Options
from decotrain.control.server import ServerThread
from decotrain.errors import ConfigError
from decotrain.outer.codec import CodecChoice
from tests.test_communicator import WAIT_S, together

ROUNDS = 400
BLOCK = 32  # values of e2m1 that share a scale


def between_levels(blocks: int) -> np.ndarray:
    """Each block's largest value is a level; the others lie a quarter of the way to the next."""
    values = np.full((blocks, BLOCK), 1.125, np.float32)
    values[:, 0] = 6.0
    return values.reshape(-1)


def sent(comm: Communicator, values: np.ndarray, stochastic: bool) -> np.ndarray:
    work = comm.all_reduce(
        values, codec="e2m1+f32", out=np.empty_like(values), stochastic=stochastic
    )
    return np.asarray(work.wait(WAIT_S).tensor)


def test_the_mean_over_rounds_is_what_was_meant() -> None:
    values = between_levels(4)
    with join("local") as comm:
        nearest = sent(comm, values, stochastic=False)
        total = np.zeros(values.shape, np.float64)
        for _ in range(ROUNDS):
            total += sent(comm, values, stochastic=True)
    inner = values != 6.0
    assert np.abs(nearest - values)[inner].min() > 0.1, "the nearest level is meant to be wrong"
    # a draw is 1.0 or 1.5: its standard deviation is sqrt(3) / 8, and the mean's that / sqrt(n)
    off = (total / ROUNDS - values)[inner]
    sigma = np.sqrt(3) / 8 / np.sqrt(ROUNDS)
    assert np.abs(off).max() < 5 * sigma
    assert abs(off.mean()) < 4 * sigma / np.sqrt(off.size)


def test_rounds_and_peers_draw_other_numbers() -> None:
    """Peers with equal values: were their draws equal, the mean would be a level itself."""
    values = between_levels(64)
    server = ServerThread(Options(min_peers=2))

    def peer() -> list[np.ndarray]:
        with join(server.address, insecure=True, listen="127.0.0.1") as comm:
            return [sent(comm, values, stochastic=True) for _ in range(2)]

    try:
        (first, second), others = together(peer, peer)
    finally:
        server.stop()
    assert np.array_equal(first, others[0]), "peers hold different bits"
    assert not np.array_equal(first, second), "two rounds drew the same"
    inner = values != 6.0
    apart = np.mean(first[inner] == 1.25)  # one peer sent 1.0 and the other one 1.5
    assert 0.3 < apart < 0.45, "3/8 of the values, when draws are independent"


def test_what_has_no_stochastic_rounding_is_refused() -> None:
    values = np.ones(8, np.float32)
    with join("local") as comm:
        for options in ({"codec": "bf16"}, {"codec": "int8", "residual": np.zeros_like(values)}):
            with pytest.raises(
                ConfigError, match="int8, e2m1, e3m0 without error feedback, not for"
            ):
                comm.all_reduce(values, stochastic=True, **options)
        assert comm.all_reduce(values, codec="int8", stochastic=True).wait(WAIT_S)
    with pytest.raises(ConfigError, match=r"codec\.error_feedback=false"):
        CodecChoice.named("e2m1+int8", error_feedback=True, stochastic=True)
    with pytest.raises(ConfigError, match="not for f32"):
        CodecChoice.named("f32", stochastic=True)
