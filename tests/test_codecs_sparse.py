"""Top-k payloads, stochastic rounding, and residuals that survive a checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from decotrain import _core

F32 = NDArray[np.float32]


def topk(values: F32, k: int) -> NDArray[np.uint8]:
    out = np.full(_core.topk_bytes(values.size, k), 0xA5, np.uint8)
    assert _core.topk_encode(values, k, out)
    return out


def dense(data: NDArray[np.uint8], k: int, elements: int) -> F32:
    total = np.zeros(elements, np.float32)
    assert _core.topk_add(data, k, 1.0, total)
    return total


# --- top-k


def test_topk_takes_116_bytes_of_a_chunk() -> None:
    """A12: 64 of 4096 are 96 bytes of indices and 16 of values, and two levels of 2 bytes."""
    assert _core.topk_bytes(4096, 64) == 112 + 4
    assert _core.topk_bytes(4096 * 5 + 10, 64) == 5 * 116 + (15 + 3 + 4)


def test_topk_keeps_the_largest() -> None:
    values = np.random.default_rng(1).standard_t(4, 4096 * 3).astype(np.float32)
    got = dense(topk(values, 64), 64, values.size)
    for chunk, kept in zip(values.reshape(3, -1), got.reshape(3, -1), strict=True):
        expected = np.sort(np.argsort(-np.abs(chunk), kind="stable")[:64])
        assert (np.flatnonzero(kept) == expected).all()
        assert (np.sign(kept[expected]) == np.sign(chunk[expected])).all()
        error = np.square(kept[expected] - chunk[expected]).sum()
        assert error < 0.12 * np.square(chunk[expected]).sum()
        assert np.abs(kept).sum() == pytest.approx(np.abs(chunk[expected]).sum(), rel=5e-3)


def indices(data: NDArray[np.uint8], kept: int) -> list[int]:
    """Of the first chunk, from its bytes as docs/codecs.md has them."""
    bits = np.unpackbits(data[: (kept * 12 + 7) // 8], bitorder="little")
    return [int(bits[12 * i : 12 * i + 12] @ (1 << np.arange(12))) for i in range(kept)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), size=st.integers(1, 4096), k=st.integers(1, 4096),
    kind=st.sampled_from(["spread", "alike", "few values", "any bits"]),
)  # fmt: skip
def test_topk_chooses_the_lowest_index_among_equals(
    seed: int, size: int, k: int, kind: str
) -> None:
    random = np.random.default_rng(seed)
    bits = random.integers(0, 2**32, size, dtype=np.uint32)
    bits[(bits & 0x7F800000) == 0x7F800000] ^= np.uint32(0x40000000)
    values = {
        "spread": random.standard_t(4, size),
        "alike": 1 + random.random(size) / 1e4,  # one bucket of any histogram
        "few values": random.integers(-2, 3, size),
        "any bits": bits.view(np.float32),
    }[kind].astype(np.float32)
    kept = min(k, size)
    expected = np.sort(np.argsort(-np.abs(values), kind="stable")[:kept])
    assert indices(topk(values, k), kept) == expected.tolist()


def test_levels_of_many_huge_values_do_not_overflow() -> None:
    values = np.full(4096, 2.5e37, np.float32)
    assert np.allclose(dense(topk(values, 4096), 4096, 4096), values, rtol=0.01)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), size=st.integers(0, 9000), k=st.integers(1, 70),
    sparse=st.booleans(), exponent=st.integers(-30, 37),
)  # fmt: skip
def test_topk_of_what_was_decoded_changes_nothing(
    seed: int, size: int, k: int, sparse: bool, exponent: int
) -> None:
    random = np.random.default_rng(seed)
    values = (random.standard_t(4, size) * 10.0**exponent / 100).astype(np.float32)
    if sparse:
        values[random.random(size) < 0.99] = 0
    once = dense(topk(values, k), k, size)
    assert np.isfinite(once).all()
    assert (dense(topk(once, k), k, size) == once).all()


def test_topk_refuses_what_no_encoder_made() -> None:
    values = np.random.default_rng(2).standard_t(4, 5000).astype(np.float32)
    data = topk(values, 64)
    total = np.ones(5000, np.float32)
    assert not _core.topk_add(data[:-1], 64, 1.0, total)
    assert not _core.topk_add(data, 63, 1.0, total)
    for position, byte in ((0, 0xFF), (113, 0xFF), (113, 0x7F), (117, 0xFF)):
        broken = data.copy()
        broken[position] |= byte  # an index twice or out of order, a level NaN or negative
        assert (broken != data).any()
        assert not _core.topk_add(broken, 64, 1.0, total), position
    assert (total == 1).all()
    values[4999] = np.inf
    assert not _core.topk_encode(values, 64, data)
    with pytest.raises(ValueError, match="k is 1 to 4096"):
        _core.topk_bytes(4096, 0)


def test_topk_with_feedback_sends_everything_in_the_end() -> None:
    """The SparseLoCo recursion: e <- e + x, send the largest, e <- e - what was sent."""
    random = np.random.default_rng(3)
    meant = np.zeros(8192)
    sent = np.zeros(8192)
    residual = np.zeros(8192, np.float32)
    for _ in range(20):
        values = random.standard_t(4, 8192).astype(np.float32)
        residual += values
        meant += values
        data = topk(residual, 256)
        sent += dense(data, 256, 8192)
        assert _core.topk_add(data, 256, -1.0, residual)
    assert np.abs(sent + residual - meant).max() < 1e-4


# --- stochastic rounding


@pytest.mark.parametrize("codec", ["int8", "e2m1", "e3m0"])
def test_stochastic_rounding_keeps_the_mean(codec: str) -> None:
    values = np.random.default_rng(4).standard_t(4, 1024).astype(np.float32)
    data = np.empty(_core.codec_bytes(codec, 1024), np.uint8)
    again = np.empty_like(data)
    out = np.empty(1024, np.float32)
    assert _core.codec_encode(codec, values, data)
    assert _core.codec_decode(codec, data, out)
    nearest = np.sqrt(np.square(out - values).mean())
    total = np.zeros(1024)
    spread = np.zeros(1024)
    for stream in range(400):
        assert _core.codec_encode_stochastic(codec, values, 7, stream, data)
        assert _core.codec_decode(codec, data, out)
        total += out
        spread += np.square(out - values)
    error = np.sqrt(np.square(total / 400 - values).mean())
    chance = np.sqrt(spread.mean() / 400) / np.sqrt(400)
    assert error == pytest.approx(chance, rel=0.1)
    top = np.abs(values.reshape(-1, 32)).argmax(1) + 32 * np.arange(32)  # the largest of each block
    bias = np.abs(total / 400 - values)[top] / np.sqrt(np.maximum(spread[top] / 400, 1e-9) / 400)
    assert bias.max() < 5
    assert error < 0.1 * nearest
    assert _core.codec_encode_stochastic(codec, values, 7, 399, again)
    assert (again == data).all()
    assert _core.codec_encode_stochastic(codec, values, 8, 399, again)
    assert (again != data).any()


def test_stochastic_rounding_is_for_some_codecs() -> None:
    data = np.empty(_core.codec_bytes("int2", 64), np.uint8)
    with pytest.raises(ValueError, match="int2 has no stochastic rounding"):
        _core.codec_encode_stochastic("int2", np.zeros(64, np.float32), 1, 1, data)
