"""Two peers of `decotrain train`, stopped and resumed, end with the bits of a run that never
stopped, whichever of them comes back first."""

from __future__ import annotations

import json
import threading
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from decotrain import checkpoint
from decotrain.communicator import Communicator
from decotrain.control.coordinator import Options
from decotrain.control.server import ServerThread
from decotrain.train import peer, worker
from decotrain.train.launcher import write_config
from decotrain.train.metrics import Journal
from decotrain.train.worker import slot_before
from tests.test_settings import composed

WAIT_S = 60.0
EVERY, ROUNDS = 4, 10
SAVED, STOP = 4, 6  # rounds
NAMES = ("peer-1", "peer-2")
PRESETS: dict[str, dict[str, Any]] = {
    "diloco": {"momentum": 0.9},
    "streaming": {"layers": 1, "overlap": 1},
    "ddp": {},
}


class Stopping(Journal):
    """Ends its peer as Ctrl-C does, in the middle of the run and on the same round at both."""

    def write(self, event: str, **values: Any) -> dict[str, Any]:
        if event == "round" and values["round"] == STOP:
            raise peer.Stopped
        return super().write(event, **values)


def config_of(place: Path, preset: str) -> dict[str, Any]:
    (place / "text").mkdir(exist_ok=True)
    words = b"the quick brown fox jumps over the lazy dog and runs away from it again. "
    for number in range(40):
        (place / "text" / f"{number}.txt").write_bytes(words[number % 30 :] * 10)
    config = composed()
    config |= {"peers": 2, "steps": ROUNDS * EVERY, "batch": 1, "threads": 1}
    config |= {"held_out_windows": 8, "data": {"path": str(place / "text")}}
    config["model"] |= {"layers": 2, "width": 16, "hidden": 24, "context": 16}
    config["outer"] = {"preset": preset, "sync_every": EVERY, **PRESETS[preset]}
    config["inner"]["warmup_steps"] = 5
    config["every"] = {"evaluation": 1000, "checkpoint": SAVED}
    return config


def run(
    folder: Path,
    config: dict[str, Any],
    names: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    journal: type[Journal] = Journal,
    resume: Path | None = None,
) -> None:
    """The peers join one after the other in the order of their names."""
    entered = {name: threading.Event() for name in names}
    joined = peer.joined

    @contextmanager
    def noted(asked: Namespace, *rest: Any) -> Iterator[Communicator]:
        with joined(asked, *rest) as comm:
            entered[asked.peer].set()
            yield comm

    def body(name: str) -> None:
        asked = Namespace(folder=folder, peer=name, join=server.address, alone=False, resume=resume)
        try:
            worker.body(asked, config, journal(folder / f"{name}.jsonl"))
        except peer.Stopped:
            assert journal is Stopping
        finally:
            entered[name].set()

    folder.mkdir(exist_ok=True)
    write_config(folder, config)
    server = ServerThread(Options(run=config["name"]))
    try:
        with monkeypatch.context() as patch, ThreadPoolExecutor(len(names)) as pool:
            patch.setattr(peer, "joined", noted)
            done = []
            for name in names:
                done.append(pool.submit(body, name))
                assert entered[name].wait(WAIT_S)
            for one in done:
                one.result(WAIT_S)
    finally:
        server.stop()


def ends(folder: Path) -> dict[str, tuple[str, int]]:
    """Peer -> digest at the end, and the slot it had."""
    found = {}
    for name in NAMES:
        saved = checkpoint.newest(folder / "checkpoints" / name)
        assert saved is not None
        assert saved.round_number == ROUNDS
        found[name] = saved.meta["digest"], saved.meta["slot"]
    return found


@pytest.mark.timeout(120)
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_peers_that_come_back_in_another_order_go_on_with_the_same_bits(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    config = config_of(run_dir, preset)
    whole, stopped = run_dir / "whole", run_dir / "stopped"
    run(whole, config, NAMES, monkeypatch)
    run(stopped, config, NAMES, monkeypatch, Stopping)
    saved = stopped / "checkpoints" / NAMES[0] / f"round-{SAVED:06d}"
    run(stopped, config, NAMES[::-1], monkeypatch, resume=saved)
    assert ends(stopped) == ends(whole)
    assert [slot for _, slot in ends(whole).values()] == [0, 1]


def test_a_peer_asks_for_the_slot_of_its_own_checkpoint_of_the_same_state(tmp_path: Path) -> None:
    def save(name: str, number: int, **meta: Any) -> Path:
        return checkpoint.write(tmp_path / name, number, {}, {}, meta)

    resume = save("peer-1", 3, digest="a", slot=0)
    own = tmp_path / "peer-2"
    assert slot_before(None, own) is None
    assert slot_before(resume, own) is None, "it has no checkpoint"
    save("peer-2", 2, digest="a", slot=5)
    assert slot_before(resume, own) is None, "its own is of another round"
    for digest, slot, asked in (
        ("a", 1, 1), ("b", 1, None), ("a", None, None), ("a", 64, None), ("a", True, None),
    ):  # fmt: skip
        save("peer-2", 3, digest=digest, slot=slot)
        assert slot_before(resume, own) == asked
    meta = own / resume.name / checkpoint.META
    facts = json.loads(meta.read_text())
    for damaged in ("{", json.dumps({**facts, "meta": []}), json.dumps({**facts, "format": 1})):
        meta.write_text(damaged)
        assert slot_before(resume, own) is None
