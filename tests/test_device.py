"""Rounds on tensors of a GPU: the bits of the CPU's path, chunks on the wire while others cross.

By default the device is a stand-in on the CPU, with the CUDA kernels' own code run thread by thread
and copies that a test can hold up. With `-m gpu`, a real one: needs a CUDA device and cupy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from decotrain import _core, cuda, device
from decotrain import tensors as tn
from decotrain.communicator import Communicator, join
from decotrain.control.coordinator import Options
from decotrain.control.server import ServerThread
from decotrain.errors import AbandonedError, NotFiniteError
from tests.test_codecs import CODECS
from tests.test_communicator import WAIT_S, together

NO_GPU = cuda.missing()
PAIRS = [*CODECS, "e2m1+int8", "bf16+f32"]


class StandIn:
    """A device whose memory is the host's. Its "GPU tensors" are those of this thread's peer."""

    def __init__(self) -> None:
        self.out_bytes = self.in_bytes = 0
        self.before_step: Callable[[int], None] = lambda _: None  # of copies to the host

    def encode(self, codec: str, values: Tensor, chunk_elements: int) -> tuple[Tensor, Tensor]:
        size = device.encoded_bytes(codec, values.numel(), chunk_elements)
        out, at, good = torch.empty(size, dtype=torch.uint8), 0, True
        for part in values.split(chunk_elements):
            data = out[at : at + _core.codec_bytes(codec, part.numel())]
            good &= _core.codec_encode(codec, part.numpy(), data.numpy(), as_cuda=True)
            at += data.numel()
        return out, torch.tensor(int(not good))

    def decode(self, codec: str, data: Tensor, chunk_elements: int, out: Tensor) -> Tensor:
        at, good = 0, True
        for part in out.split(chunk_elements):
            size = _core.codec_bytes(codec, part.numel())
            encoded = data[at : at + size].numpy()
            good &= _core.codec_decode(codec, encoded, part.numpy(), as_cuda=True)
            at += size
        return torch.tensor(int(not good))

    def host_bytes(self, size: int) -> Tensor:
        return torch.full(
            (size,), 0xA5, dtype=torch.uint8
        )  # what has not crossed is no contribution

    def to_host(self, data: Tensor, host: Tensor, ends: Sequence[int]) -> Iterator[None]:
        for step, (begin, end) in enumerate(pairwise([0, *ends])):
            self.before_step(step)
            host[begin:end] = data[begin:end]
            self.out_bytes += end - begin
            yield

    def from_host(self, host: Tensor, like: Tensor) -> Tensor:
        self.in_bytes += host.numel()
        return host.clone()


class Bench:
    """Where a test's tensors lie: `place` moves them there."""

    def __init__(self, real: bool) -> None:
        self.real, self.stand_in = real, StandIn()
        self.here: set[int] = set()  # threads whose tensors are on the device

    def place(self, tensor: Tensor) -> Tensor:
        return tensor.cuda() if self.real else tensor

    def device_of(self, tensors: Sequence[Any]) -> Any:
        return self.stand_in if threading.get_ident() in self.here else None


@pytest.fixture(
    params=[
        "stand-in",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU)),
            ],
        ),
    ]
)
def bench(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench(request.param == "cuda")
    if not made.real:
        monkeypatch.setattr(tn, "device_of", made.device_of)
    return made


@pytest.fixture
def coordinator() -> Iterator[ServerThread]:
    server = ServerThread(Options(min_peers=2))
    yield server
    server.stop()


def pair(
    bench: Bench,
    coordinator: ServerThread,
    on_device: Callable[[Communicator], Any],
    on_cpu: Callable[[Communicator], Any],
) -> tuple[Any, Any]:
    """One peer whose tensors are on the device, and one on the CPU."""

    def one(action: Callable[[Communicator], Any], here: bool) -> Any:
        if here:
            bench.here.add(threading.get_ident())
        with join(coordinator.address) as comm:
            return action(comm)

    first, second = together(lambda: one(on_device, True), lambda: one(on_cpu, False))
    return first, second


def values(elements: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_t(4, elements).astype(np.float32))


def bits(tensors: Sequence[Tensor]) -> list[bytes]:
    return [one.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for one in tensors]


SHAPES = [
    ("one", lambda x: [x]),
    ("halves", lambda x: [x.bfloat16()]),
    ("a list", lambda x: [x[:100].view(10, 10), x[100:3000].half(), x[3000:].bfloat16()]),
    ("not contiguous", lambda x: [x[:4096].view(64, 64).t(), x[4096:]]),
    ("double", lambda x: [x.double()]),
]


@pytest.mark.parametrize(("what", "cut"), SHAPES, ids=[name for name, _ in SHAPES])
@pytest.mark.parametrize("codec", PAIRS)
def test_the_bits_of_the_cpu(
    bench: Bench, coordinator: ServerThread, codec: str, what: str, cut: Any
) -> None:
    def action(seed: int, place: Callable[[Tensor], Tensor]) -> Any:
        def run(comm: Communicator) -> Any:
            given = [place(one) for one in cut(values(10_001, seed))]
            before = bits(given)
            out = [torch.empty_like(one) for one in given]
            work = comm.all_reduce(
                given, codec=codec, out=out, weight=1.0 + seed, chunk_elements=2048
            )
            result = work.wait(WAIT_S)
            assert bits(given) == before
            assert len(result.contributors) == 2
            return bits(out), result.digest

        return run

    first, second = pair(bench, coordinator, action(0, bench.place), action(1, lambda x: x))
    assert first == second
    if not bench.real:  # what crossed is the encoded bytes, and nothing else
        contribution, _, result = codec.partition("+")
        for crossed, name in (
            (bench.stand_in.out_bytes, contribution),
            (bench.stand_in.in_bytes, result or contribution),
        ):
            assert crossed == device.encoded_bytes(name, 10_001, 2048)


def on_the_wire(comm: Communicator, wanted_bytes: float) -> None:
    """Waits until so much has gone out. Of each chunk one payload does: our contribution, or the
    result when it is ours."""
    patience = threading.Event()
    for _ in range(int(WAIT_S / 0.005)):
        if comm.figures()["bytes_out"] >= wanted_bytes:
            return
        patience.wait(0.005)
    raise AssertionError("what has crossed is not on the wire")


def test_chunks_are_on_the_wire_while_others_still_cross(
    bench: Bench, coordinator: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step crosses before the one before it has been sent, as far as it has to be."""
    if bench.real:
        pytest.skip("nothing can be held up on a real device")
    elements, chunk, step_chunks = 1 << 18, 4096, 4
    step_bytes = step_chunks * 4 * chunk  # of f32
    monkeypatch.setattr(device, "STEP_BYTES", step_bytes)
    monkeypatch.setenv("DECOTRAIN_SHARED_MEMORY", "0")  # what is lent is counted later
    steps: list[int] = []

    def on_device(comm: Communicator) -> Any:
        comm.collect(b"", tag=1).wait(WAIT_S)  # the link is up
        start = comm.figures()["bytes_out"]

        def hold(step: int) -> None:
            on_the_wire(comm, start + step * step_bytes)
            steps.append(step)

        bench.stand_in.before_step = hold
        return comm.all_reduce(values(elements, 1), chunk_elements=chunk).wait(WAIT_S).digest

    def on_cpu(comm: Communicator) -> Any:
        comm.collect(b"", tag=1).wait(WAIT_S)
        return comm.all_reduce(values(elements, 2), chunk_elements=chunk).wait(WAIT_S).digest

    first, second = pair(bench, coordinator, on_device, on_cpu)
    assert first == second
    assert steps == list(range(elements // chunk // step_chunks))


@pytest.mark.parametrize("residual_type", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("codec", ["int8", "e2m1+int8", "int2"])
def test_the_residual_of_the_cpu(
    bench: Bench, coordinator: ServerThread, codec: str, residual_type: torch.dtype
) -> None:
    """Three rounds with error feedback, on the device and on the CPU, of the same values."""

    def action(place: Callable[[Tensor], Tensor]) -> Any:
        def run(comm: Communicator) -> Any:
            kept = place(torch.zeros(5000, dtype=residual_type))
            for number in range(3):
                given = place(values(5000, number))
                comm.all_reduce(given, codec=codec, residual=kept).wait(WAIT_S)
            assert kept.any()
            return bits([kept, given])

        return run

    first, second = pair(bench, coordinator, action(bench.place), action(lambda x: x))
    assert first == second


@pytest.mark.parametrize("on_device", [True, False], ids=["device", "cpu"])
def test_what_is_refused_changes_nothing_and_holds_nobody_up(
    bench: Bench, coordinator: ServerThread, on_device: bool
) -> None:
    """A NaN in the last of many chunks."""

    def poisoned(comm: Communicator) -> Any:
        place = bench.place if on_device else lambda x: x
        given = [place(values(100_000, 1)), place(values(5000, 2))]
        given[1][-1] = float("nan")
        kept = [place(values(100_000, 3).bfloat16()), place(values(5000, 4))]
        before = bits([*given, *kept])
        with pytest.raises(NotFiniteError, match="tensor 1 contains NaN"):
            comm.all_reduce(given, codec="e2m1", residual=kept, chunk_elements=4096)
        assert bits([*given, *kept]) == before
        assert not on_device or bench.stand_in.out_bytes == 0
        comm.collect(None, tag=1).wait(WAIT_S)

    def healthy(comm: Communicator) -> Any:
        given = values(105_000, 5)
        result = comm.all_reduce(given, codec="e2m1", chunk_elements=4096).wait(WAIT_S)
        comm.collect(None, tag=1).wait(WAIT_S)
        return result.contributors == (comm.peer,)

    if on_device:
        assert pair(bench, coordinator, poisoned, healthy)[1]
    else:
        assert pair(bench, coordinator, healthy, poisoned)[0]


def test_a_device_that_fails_half_way_holds_nobody_up(
    bench: Bench, coordinator: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bench.real:
        pytest.skip("a real device cannot be made to fail")
    monkeypatch.setattr(device, "STEP_BYTES", 4 * 4096)
    monkeypatch.setenv("DECOTRAIN_SHARED_MEMORY", "0")

    def failing(comm: Communicator) -> Any:
        comm.collect(None, tag=1).wait(WAIT_S)  # the link is up
        start = comm.figures()["bytes_out"]

        def fail(step: int) -> None:
            if step == 7:
                on_the_wire(comm, start + 7 * 4 * 4096)
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

        bench.stand_in.before_step = fail
        kept = values(16 * 4096, 3)
        before = bits([kept])
        with pytest.raises(AbandonedError, match="illegal memory access"):
            comm.all_reduce(values(16 * 4096, 1), residual=kept, chunk_elements=4096)
        assert bits([kept]) == before
        comm.collect(None, tag=1).wait(WAIT_S)

    def healthy(comm: Communicator) -> Any:
        comm.collect(None, tag=1).wait(WAIT_S)
        work = comm.all_reduce(values(16 * 4096, 2), chunk_elements=4096)
        result = work.wait(WAIT_S)
        comm.collect(None, tag=1).wait(WAIT_S)
        own = values(16 * 4096, 2).split(4096)
        given = values(16 * 4096, 1) + values(16 * 4096, 3)  # with the residual
        mean = [(a + b) / 2 for a, b in zip(given.split(4096), own, strict=True)]
        parts = result.tensor.split(4096)
        # SKIP may overtake contributions on other streams: then they do not count.
        crossed = zip(parts[:7], mean[:7], own[:7], strict=True)
        good = [torch.equal(part, both) or torch.equal(part, one) for part, both, one in crossed]
        rest = zip(parts[7:], own[7:], strict=True)
        return good + [torch.equal(part, one) for part, one in rest]

    assert all(pair(bench, coordinator, failing, healthy)[1])


def test_skipped_and_broadcast_and_missed(bench: Bench, coordinator: ServerThread) -> None:
    def action(place: Callable[[Tensor], Tensor], seed: int) -> Any:
        def run(comm: Communicator) -> Any:
            one, two = place(values(70_000, seed)), place(values(70_000, seed + 5))
            nobody = comm.all_reduce(two, weight=0.0, tag=1).wait(WAIT_S)
            assert not nobody.contributors
            assert not nobody.tensor.any()
            root = next(member.peer for member in comm.members)
            given = comm.broadcast(one, root=root, tag=2).wait(WAIT_S)
            return bits([given.tensor]), comm.slot

        return run

    first, second = pair(bench, coordinator, action(bench.place, 1), action(lambda x: x, 2))
    assert first[0] == second[0] == bits([values(70_000, 1 if first[1] == 0 else 2)])


@pytest.mark.skipif(NO_GPU is None, reason="needs a machine without a GPU")
def test_without_a_device_the_core_does_it() -> None:
    assert tn.device_of([torch.zeros(1)]) is None
    assert tn.device_of([np.zeros(1)]) is None
