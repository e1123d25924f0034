"""`decotrain train` with real processes: a peer killed and back, Ctrl-C, resume, summary, sweep."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from decotrain import checkpoint
from decotrain.control import client
from decotrain.train import compare
from tests.local_runs import WAIT_S, Running, journal, processes_of, running

pytestmark = pytest.mark.timeout(300)  # many processes that import torch

TINY = [
    "data.path=text", "model=tiny", "model.width=16", "model.hidden=24", "model.context=16",
    "model.layers=2", "batch=1", "outer.sync_every=5", "inner.warmup_steps=5",
    "every.evaluation=5", "every.checkpoint=4", "held_out_windows=8", "final_windows=16",
    "sample_bytes=20",
]  # fmt: skip


@pytest.fixture
def place(run_dir: Path) -> Path:
    """A folder with some text to train on."""
    words = b"the quick brown fox jumps over the lazy dog and runs away from it again. "
    (run_dir / "text").mkdir()
    for number in range(60):
        (run_dir / "text" / f"{number}.txt").write_bytes(words[number % 30 :] * 20)
    return run_dir


@pytest.fixture
def start(place: Path) -> Iterator[Callable[..., Running]]:
    """Starts runs, and leaves none behind."""
    with running(place, "train", *TINY) as make:
        yield make


def digests(folder: Path, peer: str) -> dict[int, str]:
    """SHA-256 of the outer state after each round, by version."""
    return {event["round"]: event["digest"] for event in journal(folder, peer, "round")}


def check_samples(folder: Path, peers: list[str]) -> None:
    """No sample was counted twice, and none that nobody holds was left out, but for those of one
    round: the killed peer may have contributed to it and not have lived to say so."""
    saved = max(folder.glob("checkpoints/peer-*/round-*"), key=lambda p: int(p.name[-6:]))
    number = int(saved.name[-6:])
    lines = [e for peer in peers for e in journal(folder, peer, "round") if e["round"] <= number]
    counted = [n for e in lines for first, end in e["samples"] for n in range(first, end)]
    assert len(counted) == len(set(counted)), "a sample was counted twice"
    allotted = checkpoint.read(saved).state["shared.0.allotted"].tolist()
    held, following, portion = set(allotted[:128]), allotted[-2], 5
    known = {n // portion for n in counted} | held
    assert len(set(range(following)) - known) <= 1, "samples were left out"


def test_a_killed_peer_comes_back_and_everybody_holds_the_same(
    place: Path, start: Callable[..., Running]
) -> None:
    """kill -9, rejoin with state from a survivor, Ctrl-C, resume, the end."""
    folder = place / "runs" / "first"
    run = start("name=first", "peers=3", "steps=1000000")
    run.until(lambda: len(digests(folder, "peer-2")) >= 3, "third round of peer-2")
    victim = journal(folder, "peer-2", "start")[0]
    os.kill(victim["pid"], signal.SIGKILL)

    back = run.until(lambda: journal(folder, "peer-2", "start")[1:], "peer-2 again")[0]
    assert back["id"] != victim["id"], "a restarted process is a new peer"
    assert back["step"] >= 15, "it began at the beginning instead of fetching state"
    run.until(
        lambda: [e for e in journal(folder, "peer-2", "round") if e["round"] > back["round"] + 3
                 and e["counted"]],
        "round with the new peer-2",
    )  # fmt: skip
    assert "peer-2 lost (killed by SIGKILL), 2 remain" in run.text
    assert "peer-2 is back at step" in run.text
    run.until(lambda: list(folder.glob("checkpoints/peer-1/round-*")), "checkpoint")

    one, two, three = (digests(folder, f"peer-{number}") for number in (1, 2, 3))
    both = sorted(set(one) & set(three))
    assert len(both) > 5
    assert [one[number] for number in both] == [three[number] for number in both]
    shared = sorted(set(one) & set(two))
    assert shared[-1] > back["round"]
    assert [one[number] for number in shared] == [two[number] for number in shared]

    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(WAIT_S) == 130
    check_samples(folder, ["peer-1", "peer-2", "peer-3"])
    command = re.search(r"to go on: \S*decotrain train (.*)", run.text)
    assert command, run.text
    assert "name=first resume=auto" in command[1]
    assert not processes_of(folder), "a process was left behind"

    saved = max(int(p.name[-6:]) for p in folder.glob("checkpoints/peer-*/round-*"))
    steps = (saved + 6) * 5
    text = start("name=first", "resume=auto", "peers=3", f"steps={steps}").end()
    assert f"resuming from round {saved}" in text
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["rounds"] == saved + 6
    assert len(summary["digests"]) == 3
    assert len(set(summary["digests"].values())) == 1
    assert not processes_of(folder)


def test_who_is_kicked_or_asked_to_leave_is_not_started_again(
    place: Path, start: Callable[..., Running]
) -> None:
    folder = place / "runs" / "first"
    run = start("name=first", "peers=2", "steps=1000000")
    run.until(lambda: len(digests(folder, "peer-2")) >= 2, "second round of peer-2")
    found = re.search(r"coordinator at (\S+)", run.text)
    assert found

    def operate(*words: str) -> None:
        command = [sys.executable, "-m", "decotrain.cli", words[0], found[1], *words[1:]]
        root = str(Path(__file__).parent.parent)
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": root}, check=False)
        assert done.returncode == 0, words

    operate("kick", "peer-1", "--reason", "too slow")
    run.until(lambda: "kicked out by an operator (too slow)), 1 remain" in run.text, "the kick")
    operate("leave", "peer-2")
    assert run.process.wait(WAIT_S) == 0, run.text
    assert "peer-2 has left, as it was asked to" in run.text
    assert "no peer is left; to go on: " in run.text
    assert "is started again" not in run.text
    assert not processes_of(folder)


def test_rounds_go_on_while_the_coordinator_is_gone(
    place: Path, start: Callable[..., Running]
) -> None:
    folder = place / "runs" / "first"
    run = start("name=first", "peers=2", "steps=1000000")
    run.until(lambda: len(digests(folder, "peer-1")) >= 3, "third round")
    address = re.search(r"coordinator at (\S+)", run.text)
    assert address, run.text
    known = client.status(address[1])
    assert sorted(peer["name"] for peer in known["peers"]) == ["peer-1", "peer-2"]
    assert {peer["role"] for peer in known["peers"]} == {"active"}
    (victim,) = [pid for pid, line in processes_of(folder).items() if " coordinator " in line]
    before = max(digests(folder, "peer-1"))
    os.kill(victim, signal.SIGKILL)
    run.until(lambda: "coordinator lost (killed by SIGKILL)" in run.text, "notice of the loss")
    run.until(lambda: max(digests(folder, "peer-1")) > before + 10, "more rounds")
    assert len(journal(folder, "peer-1", "start")) == 1, "a peer was lost with the coordinator"
    one, two = (digests(folder, f"peer-{number}") for number in (1, 2))
    both = set(one) & set(two)
    assert len(both) > 10
    assert all(one[number] == two[number] for number in both)
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(WAIT_S) == 130
    assert not processes_of(folder)


def test_a_whole_run_with_its_baseline(place: Path, start: Callable[..., Running]) -> None:
    folder = place / "runs" / "whole"
    text = start("name=whole", "peers=2", "steps=100", "baseline=true").end()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["rounds"] == 20
    assert len(set(summary["digests"].values())) == 1
    assert 0 < summary["held_out_nats"] < 6
    assert 0 < summary["alone_nats"] < 6
    assert summary["sent_bytes"] > 0
    assert "one peer alone" in text
    assert "sample" in text
    assert "\x1b" not in text
    losses = journal(folder, "peer-1", "evaluation") + journal(folder, "peer-2", "evaluation")
    assert [event["round"] for event in sorted(losses, key=lambda e: e["round"])] == [5, 10, 15, 20]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert {"start", "round", "evaluation", "progress", "end", "summary"} <= {
        event["event"] for event in events
    }
    assert list(folder.glob("tensorboard/peer-1/events.*"))


def test_a_sweep_is_one_run_for_each_value(place: Path, start: Callable[..., Running]) -> None:
    start("-m", "name=sweep", "peers=2", "steps=20", "outer=streaming,ddp", "codec=e2m1+int8").end()
    found = {
        json.loads((folder / "config.json").read_text())["outer"]["preset"]: folder
        for folder in (place / "runs" / "sweep").iterdir()
        if folder.is_dir()
    }
    assert set(found) == {"streaming", "ddp"}
    assert all((folder / "summary.json").is_file() for folder in found.values())
    runs = {run.label: run for run in compare.read_all([place / "runs" / "sweep"])}
    assert set(runs) == {"streaming", "ddp"}
    for run in runs.values():
        assert run.last.step == 20
        assert 0 < run.last.sent_bytes <= run.sent_bytes
        assert 0 < run.last.seconds <= run.seconds


@pytest.mark.parametrize(
    ("meta", "why"), [({}, "shape (7,)"), ({"portion": 7}, "train on 7 samples between rounds")]
)
def test_peers_that_cannot_start_say_why(
    place: Path, start: Callable[..., Running], meta: dict[str, int], why: str
) -> None:
    """What only a peer can notice reaches the user as one line too."""
    checkpoint.write(
        place / "runs" / "first" / "checkpoints" / "peer-1",
        3,
        {"w": torch.zeros(1)},
        {"shared.0.theta": torch.zeros(7)},
        {"outer": {"versions": [4], "step": 20}, "digest": "", **meta},
    )
    run = start("name=first", "peers=1", "steps=80", "resume=auto")
    assert run.process.wait(WAIT_S) == 2
    assert why in run.text
    assert "resume with the options the run was started with" in run.text
    assert "Traceback" not in run.text
