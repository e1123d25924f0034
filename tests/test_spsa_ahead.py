"""SPSA with several rounds in flight: what is handed out together is applied one by one.

Peers of the second test are threads with a communicator each, so that hundreds of steps with
newcomers, leaves and broken connections take seconds; tests/test_spsa_real.py has processes.
"""

from __future__ import annotations

import copy
import random
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from decotrain.communicator import join
from decotrain.control.coordinator import Options
from decotrain.control.server import ServerThread
from decotrain.errors import Error
from decotrain.spsa import SPSA, seedlog

WAIT_S = 100.0
RECIPE = {"lr": 1e-2, "samples": 2, "weight_decay": 0.01}


def make_model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 8))


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    tokens = torch.randint(0, 8, (2, 5), generator=torch.Generator().manual_seed(seed))
    scores = model(tokens[:, :-1]).flatten(0, 1)
    return nn.functional.cross_entropy(scores, tokens[:, 1:].flatten())


def replayed(path: Path) -> dict[int, str]:
    """Version -> digest of the parameters, by a log alone."""
    log = seedlog.read(path)
    spsa = SPSA(make_model(), recipe=log.header.recipe)
    assert spsa.digest() == log.header.base_digest
    held = {}
    for record in log:
        spsa.apply([spsa.recipe.update(record.step, record.entries)], record.step)
        held[record.step + 1] = spsa.digest()
    return held


def test_after_a_loss_in_flight_no_record_is_jumped_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is told "lost" applies what else it has in flight one by one, and before it waits for
    more: the others may need that state before they can contribute to what we wait for."""
    model, held, told = make_model(), {}, [-1]
    with join("local") as comm:
        spsa = SPSA(model, comm, log=tmp_path / "run.seedlog", staleness=3, **RECIPE)
        collect = comm.collect

        def watched(*args: Any, **options: Any) -> Any:
            work = collect(*args, **options)

            def wait() -> Any:
                assert spsa.version == told[-1] + 1, (
                    "it waits with a result that it has not applied"
                )
                result = work.wait(WAIT_S)
                if result.outcome == "stable":
                    told.append(result.seq)
                return result

            return SimpleNamespace(wait=wait)

        monkeypatch.setattr(comm, "collect", watched)
        behind = comm._shared.behind
        for step in range(24):
            lost = step % 8 == 4  # as when a view names a round stable whose result waits here
            monkeypatch.setattr(comm._shared, "behind", (lambda _: True) if lost else behind)
            spsa.step(lambda: loss_of(model, 1))
            held[spsa.version] = spsa.digest()
        spsa.finish()
        held[spsa.version] = spsa.digest()
    expected = replayed(tmp_path / "run.seedlog")
    assert max(held) >= 24 - 3
    assert max(expected) == max(held)
    held.pop(0)
    assert held.items() <= expected.items()


@dataclass
class Group:
    """Peers in threads, and what each held at every version."""

    address: str
    folder: Path
    staleness: int
    until: int
    held: dict[str, dict[int, str]] = field(default_factory=dict)
    threads: dict[str, threading.Thread] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    reached: threading.Condition = field(default_factory=threading.Condition)
    model: nn.Module = field(default_factory=make_model)

    def start(self, name: str, steps: int, leaves: bool) -> None:
        """Until the group's last version; or for some steps, then it leaves or is cut off."""
        self.held[name] = {}
        model = copy.deepcopy(self.model)
        thread = threading.Thread(target=self._peer, args=(name, model, steps, leaves), daemon=True)
        self.threads[name] = thread
        thread.start()

    def _peer(self, name: str, model: nn.Module, steps: int, leaves: bool) -> None:
        try:
            comm = join(self.address, name=name, run="test", listen="127.0.0.1", timeout_s=WAIT_S)
            log = self.folder / f"{name}.seedlog" if leaves else None
            spsa = SPSA(model, comm, log=log, staleness=self.staleness, **RECIPE)
            for _ in range(steps):
                if spsa.version >= self.until:
                    break
                spsa.step(lambda: loss_of(model, len(name)))
                with self.reached:
                    self.held[name][spsa.version] = spsa.digest()
                    self.reached.notify_all()
            if leaves:
                spsa.finish()
                comm.leave()
            else:
                comm.close()
        except Error as error:
            with self.reached:
                self.errors.append(f"{name}: {error!r}")
                self.reached.notify_all()

    def wait_for(self, version: int) -> None:
        def there() -> bool:
            return bool(self.errors) or max(self.held["p0"], default=0) >= version

        with self.reached:
            assert self.reached.wait_for(there, WAIT_S)
        assert not self.errors, self.errors


@pytest.mark.timeout(300)
@pytest.mark.parametrize("staleness", [0, 2, 7])
def test_newcomers_leaves_and_cut_peers_at_every_step(tmp_path: Path, staleness: int) -> None:
    run_through(tmp_path, staleness, versions=120, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("staleness", [0, 2, 7])
def test_a_thousand_steps_of_newcomers(tmp_path: Path, staleness: int) -> None:
    run_through(tmp_path, staleness, versions=1000, seed=2)


def run_through(folder: Path, staleness: int, versions: int, seed: int) -> None:
    dice = random.Random(seed)
    server = ServerThread(Options(run="test", min_peers=3))
    group = Group(server.address, folder, staleness, versions)
    try:
        for number in range(3):
            group.start(f"p{number}", 1 << 30, leaves=True)
        at = 5
        while at < versions - 40:
            group.wait_for(at)
            if sum(thread.is_alive() for thread in group.threads.values()) < 6:
                group.start(f"q{at}", dice.randrange(3, 40), leaves=dice.random() < 0.5)
            at += dice.randrange(4, 16)
        for name, thread in group.threads.items():
            thread.join(WAIT_S)
            assert not thread.is_alive(), f"{name} has not ended: {group.errors}"
    finally:
        server.stop()
    assert not group.errors, group.errors
    expected = {0: SPSA(make_model()).digest(), **replayed(folder / "p0.seedlog")}
    assert max(expected) >= versions
    assert len(group.held) > 6
    for name, held in group.held.items():
        assert held.items() <= expected.items(), f"{name} differs"
