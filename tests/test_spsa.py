"""SPSA: the estimate, what peers hold, and that a model comes out as it went in.

Peers are threads over tests/fake_collect.py; processes over the real communicator are in
tests/test_spsa_peers.py.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from decotrain.errors import ConfigError
from decotrain.spsa import SPSA, Recipe, code, kernels, seedlog
from decotrain.spsa.recipe import cosine
from decotrain.spsa.record import entries_of, payload
from decotrain.spsa.space import Space
from tests.fake_collect import CollectComm, CollectRun


class Net(nn.Module):
    """Tied weights, attention that uses its child's weight, recurrent weights in a flat list."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.2, batch_first=True)
        self.recurrent = nn.LSTM(16, 16, batch_first=True)
        self.normed = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.recurrent(self.block(self.embedding(tokens)))[0]
        x = self.normed(x.transpose(1, 2)).transpose(1, 2)
        out: torch.Tensor = functional.linear(x, self.head.weight)  # past the head's forward
        return out


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def loss_of(model: nn.Module, seed: int = 1) -> Callable[[], torch.Tensor]:
    tokens = torch.randint(0, 20, (4, 9), generator=torch.Generator().manual_seed(seed))
    return lambda: functional.cross_entropy(
        model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
    )


class Quadratic(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.scale = torch.rand(size, generator=generator) + 0.5
        self.theta = nn.Parameter(torch.randn(size, generator=generator))

    def forward(self) -> torch.Tensor:
        return 0.5 * (self.scale.double() * self.theta.double() ** 2).sum()


# --- the estimate


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_the_estimate_is_unbiased_and_its_variance_is_known(noise: str, samples: int) -> None:
    """Mean of g z against the gradient within 3 sigma; E|g z|^2 = (d + n - 1) / n |grad|^2."""
    size, draws = 48, 4000 // samples
    model = Quadratic(size)
    spsa = SPSA(model, noise=noise, epsilon=1e-2, samples=samples)
    gradient = (model.scale * model.theta).detach().double()
    entry = spsa.space.layout.entries[0]
    total, square, norms = torch.zeros(size).double(), torch.zeros(size).double(), 0.0
    z = torch.empty(size)
    for step in range(draws):
        _, scalars = spsa.measure(step, model)
        estimate = torch.zeros(size).double()
        for sample, scalar in enumerate(scalars):
            words = code.stream(step, 0, sample)
            kernels.perturb(spsa.recipe, words, 1.0, entry, torch.zeros(size), z)
            estimate += scalar * z.double() / samples
        total += estimate
        square += estimate**2
        norms += float((estimate**2).sum())
    mean = total / draws
    sigma = ((square / draws - mean**2) / draws).sqrt()
    beyond = ((mean - gradient).abs() > 3 * sigma).sum()
    assert beyond <= 2  # of 48; 0.13 are expected
    ratio = norms / draws / float((gradient**2).sum())
    one = size if noise == "rademacher" else size + 1
    expected = (one + samples - 1) / samples
    assert ratio == pytest.approx(expected, rel=0.1)


def test_one_byte_is_as_good_as_float32() -> None:
    losses = {}
    for kind in ("byte", "float"):
        model = Quadratic(64)
        spsa = SPSA(model, lr=4e-3, samples=4, epsilon=1e-3)
        for step in range(400):
            _, scalars = spsa.measure(step, model)
            codes = code.encode(scalars)
            update = spsa.recipe.update(step, {0: codes})
            if kind == "float":
                assert len(update.terms) == len(scalars)
                terms = [
                    type(term)(term.c2, term.c3, value)
                    for term, value in zip(update.terms, scalars, strict=True)
                ]
                update = type(update)(tuple(terms), update.rate, update.decay, update.counted)
            spsa.apply([update], step)
        losses[kind] = float(model().detach())
    start = float(Quadratic(64)().detach())
    assert losses["float"] < 0.5 * start
    assert losses["byte"] == pytest.approx(losses["float"], rel=0.1)


def test_a_perturbed_evaluation_is_that_of_a_perturbed_copy() -> None:
    """Through attention, recurrence, tied and borrowed weights: exactly the same loss."""
    model = net()
    recipe = Recipe(samples=2, epsilon=1e-2)
    spsa = SPSA(model, recipe=recipe)
    _, scalars = spsa.measure(5, loss_of(model))
    twin = net().eval()
    space = Space(twin)
    clean = [master.clone() for master in space.masters]
    for sample, scalar in enumerate(scalars):
        losses = []
        for sign in (1.0, -1.0):
            words = code.stream(5, 0, sample)
            for entry, master, source in zip(
                space.layout.entries, space.masters, clean, strict=True
            ):
                kernels.perturb(recipe, words, sign * recipe.epsilon, entry, source, master)
            with torch.no_grad():
                losses.append(float(loss_of(twin)()))
        assert scalar == (losses[0] - losses[1]) / (2 * recipe.epsilon)


def test_measuring_leaves_no_trace() -> None:
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    identities = [id(parameter) for parameter in model.parameters()]
    for eval_mode in (True, False):
        spsa = SPSA(model, samples=2, eval_mode=eval_mode)
        spsa.measure(0, loss_of(model))
        after = model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert [id(parameter) for parameter in model.parameters()] == identities
        assert all(module.training for module in model.modules())
        assert not any(module._forward_hooks for module in model.modules())


def test_an_error_in_the_loss_puts_the_parameters_back() -> None:
    model = net()
    spsa = SPSA(model)
    spsa.measure(0, loss_of(model))
    identities = [id(parameter) for parameter in model.parameters()]
    broken = torch.full((1, 4), 99)  # no such token
    with pytest.raises(IndexError):
        spsa.measure(0, lambda: model(broken).sum())
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert math.isfinite(spsa.measure(0, loss_of(model))[0])


def test_a_use_outside_every_module_is_refused() -> None:
    model = nn.Linear(3, 3)
    spsa = SPSA(model)
    with pytest.raises(ConfigError, match="weight"):
        spsa.step(lambda: (model.weight**2).sum())


def test_a_module_that_returns_its_weight_gets_a_copy() -> None:
    class Bank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Parameter(torch.ones(4, 4))

        def forward(self) -> torch.Tensor:
            return self.rows[:2]

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Bank(), Bank()

        def forward(self) -> torch.Tensor:
            first = self.a()
            second = self.b()
            return (first * 3 - second).sum()

    model = Two()
    spsa = SPSA(model, epsilon=0.5)
    spsa.perturbed.probe(model)
    with spsa.perturbed.at(code.stream(0, 0, 0), 0.5):
        loss = float(model())
    values = []
    for entry in spsa.space.layout.entries:
        out = torch.empty(16)
        kernels.perturb(spsa.recipe, code.stream(0, 0, 0), 0.5, entry, torch.ones(16), out)
        values.append(out.view(4, 4)[:2])
    assert loss == float((values[0] * 3 - values[1]).sum())


def test_the_scratch_is_no_larger_than_the_largest_module() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(10)], nn.Linear(64, 256))
    spsa = SPSA(model)
    x = torch.ones(2, 64)
    spsa.step(lambda: model(x).sum())
    (buffer,) = spsa.perturbed.scratch.buffers.values()
    assert buffer.numel() <= 1.05 * (64 * 256 + 256)


def test_the_first_evaluation_needs_no_more_than_the_others() -> None:
    """The scratch has its size before the first forward, not after it."""
    held = []

    class Layer(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            held.append(len(spsa.perturbed.scratch.spill))
            return super().forward(x)

    model = nn.Sequential(*[Layer(8, 8) for _ in range(6)])
    spsa = SPSA(model)
    x = torch.ones(2, 8)
    spsa.step(lambda: model(x).sum())
    assert held
    assert set(held) == {0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_parameters_have_float32_masters(dtype: torch.dtype) -> None:
    model = nn.Linear(8, 8).to(dtype)
    x = torch.ones(2, 8, dtype=dtype)
    spsa = SPSA(model, lr=1e-5, epsilon=1e-2)
    first = spsa.space.masters[0].clone()
    for _ in range(3):
        spsa.step(lambda: model(x).float().square().sum())
    assert not torch.equal(first, spsa.space.masters[0])
    assert torch.equal(model.weight.detach().view(-1), spsa.space.masters[0].to(dtype))


def test_autocast_sees_perturbed_weights() -> None:
    model = nn.Linear(16, 16)
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x).float().square().sum()

    _, scalars = SPSA(model, epsilon=0.1, samples=3).measure(0, loss)
    assert all(scalars)


@pytest.mark.parametrize(
    ("select", "names"),
    [
        ("norms_and_biases", {"0.bias", "1.weight", "1.bias", "2.bias"}),
        (r"^2\.", {"2.weight", "2.bias"}),
        (lambda name, parameter: parameter.dim() == 2, {"0.weight", "2.weight"}),
    ],
)
def test_a_subset_of_parameters(select: object, names: set[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    before = {name: value.clone() for name, value in model.named_parameters()}
    spsa = SPSA(model, select=select, lr=1e-2)  # type: ignore[arg-type]
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    target = torch.arange(4.0)
    for _ in range(5):
        spsa.step(lambda: (model(x) - target).square().sum())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == names


# --- the shared arithmetic


def test_schedules_and_normalisations() -> None:
    assert all(abs(cosine(x / 97) - math.cos(math.pi * x / 97)) < 1e-14 for x in range(98))
    linear = Recipe(lr=1.0, schedule="linear", total_steps=10, final_fraction=0.1)
    assert [linear.lr_at(step) for step in (0, 5, 10, 99)] == [1.0, 0.55, 0.1, 0.1]
    warm = Recipe(lr=1.0, schedule="cosine", total_steps=10, warmup_steps=3)
    assert [warm.lr_at(step) for step in (0, 1, 3, 10)] == [0.25, 0.5, 1.0, 0.0]
    entries = {0: code.encode([2.0, -2.0]), 1: bytes([code.SKIP, code.ZERO])}
    assert Recipe(lr=3.0).update(0, entries).rate == 1.0
    assert Recipe(lr=3.0).update(0, entries).counted == 3
    assert len(Recipe(lr=3.0).update(0, entries).terms) == 2
    std = math.sqrt(8 / 3)
    rate = Recipe(lr=3.0, normalise="std").update(0, entries).rate
    assert rate == pytest.approx(1 / std, rel=1e-6)
    assert Recipe().update(0, {}).rate == 0.0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"samples": 0}, "samples"),
        ({"samples": 256}, "samples"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"lr": float("nan")}, "finite"),
        ({"noise": "cauchy"}, "noise"),
        ({"schedule": "linear"}, "total_steps"),
        ({"pool": 100}, "power of two"),
        ({"pool": 64, "weight_decay": 0.1}, "pool"),
        ({"staleness": 1000}, "staleness"),
    ],
)
def test_bad_recipes_are_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Recipe(**options)  # type: ignore[arg-type]


def test_payloads_of_another_step_and_garbage_count_as_missing() -> None:
    good = payload(65536 + 7, 9, b"\x40\x41")
    other = payload(8, 9, b"\x40")
    parts = {3: good, 1: b"", 2: b"\x07\x00\x09\x00", 4: other}
    assert entries_of(7, parts) == ({3: b"\x40\x41"}, 9)
    assert entries_of(7, {0: payload(7, 9, b"\x40" * 255) + b"\x40", 64: good}) == ({}, None)


def test_of_peers_told_different_things_the_most_count() -> None:
    one, two = payload(7, 1, b"a"), payload(7, 2, b"b")
    assert entries_of(7, {0: one, 1: two, 2: two}) == ({1: b"b", 2: b"b"}, 2)
    assert entries_of(7, {0: one, 1: two}) == ({0: b"a"}, 1)


@pytest.mark.parametrize("odd", ["recipe", "base"])
def test_a_peer_with_another_recipe_or_base_is_told(odd: str) -> None:
    run = CollectRun()
    models = [net(), net(), net(seed=1 if odd == "base" else 0)]
    comms = [run.join(slot) for slot in range(3)]
    lrs = [1e-3, 1e-3, 1e-3 if odd == "base" else 2e-3]
    peers = [SPSA(model, comm, lr=lr) for model, comm, lr in zip(models, comms, lrs, strict=True)]
    told: list[int] = []

    def step(number: int) -> None:
        try:
            peers[number].step(loss_of(models[number]))
        except ConfigError:
            told.append(number)

    threads = [threading.Thread(target=step, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert told == [2]
    assert peers[0].version == 1


# --- peers


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("pool", [0, 16])
def test_peers_hold_the_same_bits_and_so_does_a_replay(
    staleness: int, pool: int, tmp_path: Path
) -> None:
    """A13 with peers that join and leave: live, replayed and newcomer agree at every step."""
    run = CollectRun()
    options = {"lr": 1e-2, "samples": 2, "staleness": staleness, "pool": pool, "rebase_every": 7}
    if not pool:
        options |= {"weight_decay": 0.01, "schedule": "cosine", "total_steps": 20}
    digests: dict[int, set[str]] = {}
    comms = [run.join(slot) for slot in range(3)]
    errors: list[BaseException] = []
    ready = threading.Barrier(3)
    late = net()  # threads share one source of random numbers: models are made here

    def peer(comm: CollectComm, steps: int, model: Net) -> None:
        try:
            log = tmp_path / "run.seedlog" if comm.slot == 0 else None
            spsa = SPSA(model, comm, log=log, **options)  # type: ignore[arg-type]
            loss = loss_of(model, seed=comm.slot)
            if comm.slot < 3:
                ready.wait(30)
            for _ in range(steps):
                spsa.step(loss)
                digests.setdefault(spsa.version, set()).add(spsa.digest())
            if comm.slot == 0:
                spsa.finish()
                digests.setdefault(spsa.version, set()).add(spsa.digest())
            run.remove(comm.slot)
        except BaseException as error:
            errors.append(error)
            run.remove(comm.slot)

    threads = [
        threading.Thread(target=peer, args=(comm, steps, net()))
        for comm, steps in zip(comms, (24, 9, 14), strict=True)
    ]
    for thread in threads:
        thread.start()
    with run.changed:
        assert run.changed.wait_for(lambda: len(run.rounds) > 6, 20)
    threads.append(threading.Thread(target=peer, args=(run.join(5), 8, late)))
    threads[-1].start()
    for thread in threads:
        thread.join(60)
    assert not errors, errors
    assert max(digests) == 24
    assert all(len(held) == 1 for held in digests.values())
    assert len(run.rounds[2].parts) == 3

    log = seedlog.read(tmp_path / "run.seedlog")
    assert log.next_step == 24
    fresh = SPSA(net(), recipe=log.header.recipe)
    assert fresh.digest() == log.header.base_digest
    for record in log:
        fresh.apply([fresh.recipe.update(record.step, record.entries)], record.step)
        assert fresh.digest() in digests.get(record.step + 1, {fresh.digest()})
    once = SPSA(net(), recipe=log.header.recipe)
    once.apply([once.recipe.update(r.step, r.entries) for r in log], 0)
    assert {once.digest()} == {fresh.digest()} == digests[24]


def test_a_failed_sample_is_sent_as_skip_and_moves_nothing() -> None:
    model = net()
    spsa = SPSA(model, samples=2, lr=1e-2)
    before = spsa.digest()
    done = spsa.step(lambda: loss_of(model)() * float("nan"))
    assert done.samples == 0
    assert spsa.version == 1
    assert spsa.digest() == before


def test_training_lowers_the_loss() -> None:
    for options in ({}, {"one_sided": True, "normalise": "std"}):
        model = net()
        scale = 1e-2 if not options else 3e-2
        spsa = SPSA(model, lr=scale, samples=8, epsilon=1e-3, **options)  # type: ignore[arg-type]
        loss = loss_of(model)
        losses = [spsa.step(loss).loss for _ in range(40)]
        assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
