"""GPU codecs against the CPU's, bit for bit. Needs a CUDA device and cupy; else skipped, saying so.

The same kernels, run on the CPU thread by thread, are tested in test_codecs.py everywhere.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from decotrain import _core, cuda
from decotrain.device import encoded_bytes
from tests.test_codecs import CODECS, KINDS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing())),
]


def nasty(elements: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    bits = random.integers(0, 2**32, elements, dtype=np.uint32)
    kinds = [kind for name, kind in KINDS.items() if name != "poisoned"]
    for kind, stretch in zip(kinds, np.array_split(bits, len(kinds)), strict=True):
        kind(stretch, random)
    return bits.view(np.float32)


def on_cpu(codec: str, values: np.ndarray, chunk: int) -> np.ndarray:
    parts = []
    for begin in range(0, values.size, chunk):
        part = values[begin : begin + chunk]
        parts.append(np.empty(_core.codec_bytes(codec, part.size), np.uint8))
        assert _core.codec_encode(codec, part, parts[-1])
    return np.concatenate(parts)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("elements", "chunk"), [(1, 4096), (5000, 4096), (300_001, 65_536)])
def test_bits_of_the_cpu(codec: str, elements: int, chunk: int) -> None:
    values = nasty(elements, elements)
    encoded, flag = cuda.encode(codec, torch.from_numpy(values).cuda(), chunk)
    assert not int(flag)
    expected = on_cpu(codec, values, chunk)
    assert (encoded.cpu().numpy() == expected).all()
    out = torch.empty(elements, device="cuda")
    assert not int(cuda.decode(codec, encoded, chunk, out))
    begin = 0
    for first in range(0, elements, chunk):
        count = min(chunk, elements - first)
        size = _core.codec_bytes(codec, count)
        decoded = np.empty(count, np.float32)
        assert _core.codec_decode(codec, expected[begin : begin + size], decoded)
        assert out[first : first + count].cpu().numpy().tobytes() == decoded.tobytes()
        begin += size


@pytest.mark.parametrize("codec", CODECS)
def test_poison_is_flagged(codec: str) -> None:
    values = torch.ones(5000, device="cuda")
    values[4321] = float("nan")
    _, flag = cuda.encode(codec, values, 4096)
    assert int(flag)


def test_streams_of_torch_and_steps_to_the_host() -> None:
    values = torch.from_numpy(nasty(1 << 20, 3)).cuda()
    host = cuda.host_bytes(encoded_bytes("int8", 1 << 20, 1 << 18))
    ends = [*range(1 << 18, host.numel(), 1 << 18), host.numel()]
    wanted = on_cpu("int8", (values * 0.5).cpu().numpy(), 1 << 18)
    with torch.cuda.stream(torch.cuda.Stream()):
        doubled = values * 0.5  # on this stream: the kernel must wait for it
        data, flag = cuda.encode("int8", doubled, 1 << 18)
        for end, _ in zip(ends, cuda.to_host(data, host, ends), strict=True):
            assert (host.numpy()[:end] == wanted[:end]).all()
        out = torch.empty_like(values)
        assert not int(cuda.decode("int8", cuda.from_host(host, out), 1 << 18, out))
    assert not int(flag)
