"""`decotrain finetune` with real processes: a kill, Ctrl-C, resume, replay, labels, bad input."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from decotrain import checkpoint, cli
from decotrain.model import ModelConfig, Transformer
from decotrain.spsa import seedlog
from tests.local_runs import WAIT_S, Running, journal, processes_of, running

pytestmark = pytest.mark.timeout(300)  # many processes that import torch

SHAPES = {"layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "hidden": 24, "context": 16}
SMALL = ["data.path=text.txt", "batch=2", "held_out_windows=16", "every.evaluation=10"]
RIGHT = {"good": b"a fine day and a good meal", "bad": b"rain on the road, cold soup, no"}


@pytest.fixture
def place(run_dir: Path) -> Path:
    """A folder with a text, labelled texts, and a checkpoint as `decotrain train` leaves it."""
    dice = random.Random(1)
    words = [b"tide", b"moon", b"harbour", b"and", b"the", b"of", b"gulls", b"slow"]
    text = b" ".join(dice.choice(words) for _ in range(20_000))
    (run_dir / "text.txt").write_bytes(text)
    with (run_dir / "labelled.tsv").open("wb") as out:
        for number in range(400):
            label = dice.choice(sorted(RIGHT))
            out.write(b"%d %s\t%s\n" % (number, RIGHT[label], label.encode()))
    torch.manual_seed(3)
    model = Transformer(ModelConfig(**SHAPES)).state_dict()
    checkpoint.write(
        run_dir / "runs" / "first" / "checkpoints" / "peer-1", 7, model, {},
        {"config": {"model": SHAPES}},
    )  # fmt: skip
    return run_dir


@pytest.fixture
def start(place: Path) -> Iterator[Callable[..., Running]]:
    """Starts fine-tunes, and leaves none behind."""
    with running(place, "finetune", "base=runs/first", *SMALL) as make:
        yield make


def digests(folder: Path, peer: str) -> dict[int, str]:
    """SHA-256 of the parameters, by step."""
    return {event["step"]: event["digest"] for event in journal(folder, peer, "round")}


def test_a_killed_peer_ctrl_c_and_the_same_parameters_from_the_log(
    place: Path, start: Callable[..., Running]
) -> None:
    """kill -9, catching up, Ctrl-C, resume from base and log, the end, a replay by hand."""
    folder = place / "tuned" / "poems"
    run = start("name=poems", "peers=3", "steps=1000000")
    run.until(lambda: len(digests(folder, "peer-2")) >= 3, "thirty steps of peer-2")
    victim = journal(folder, "peer-2", "start")[0]
    os.kill(victim["pid"], signal.SIGKILL)
    back = run.until(lambda: journal(folder, "peer-2", "start")[1:], "peer-2 again")[0]
    run.until(
        lambda: len([s for s in digests(folder, "peer-2") if s > back["step"]]) >= 4,
        "forty steps of the new peer-2",
    )
    assert "peer-2 lost (killed by SIGKILL), 2 remain" in run.text
    held = [digests(folder, f"peer-{number}") for number in (1, 2, 3)]
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(WAIT_S) == 130, run.text
    command = re.search(r"to go on: \S*decotrain (.*)", run.text)
    assert command, run.text
    assert command[1].startswith("finetune name=poems resume=auto base=runs/first")
    assert not processes_of(folder), "a process was left behind"
    for one in held:
        both = set(held[0]) & set(one)
        assert len(both) > 3
        assert all(held[0][step] == one[step] for step in both)

    saved = max(seedlog.read(path).next_step for path in folder.glob("peer-?.seedlog"))
    steps = saved + 25
    text = start("name=poems", "resume=auto", "peers=3", f"steps={steps}").end()
    assert f"resuming from step {saved}" in text
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == steps
    assert set(summary["digests"].values()) == {summary["replayed"]}
    assert len(summary["digests"]) == 3
    assert 0 < summary["bytes_per_step"] < 2000
    assert "bytes for each peer and step" in text
    out = place / "again.safetensors"
    words = ["replay", str(folder / "base.safetensors"), summary["log"], "-o", str(out)]
    assert cli.main(words) == 0
    again, tuned = load_file(out), load_file(folder / "tuned.safetensors")
    assert set(again) == set(tuned)
    assert all(torch.equal(again[name], tuned[name]) for name in tuned)
    assert list(folder.glob("tensorboard/peer-1/events.*"))


def test_labels_are_learned(place: Path, start: Callable[..., Running]) -> None:
    """A head that knows nothing becomes one that tells two kinds of sentence apart."""
    run = start(
        "name=labels", "task=classify", "data.path=labelled.tsv", "peers=2", "steps=100",
        "batch=16", "spsa.lr=0.1", "spsa.select=head",
    )  # fmt: skip
    run.end()
    summary = json.loads((place / "tuned" / "labels" / "summary.json").read_text())
    assert summary["base"]["held_out"] == pytest.approx(0.6931, abs=1e-3)  # ln 2: a head of zeros
    assert summary["tuned"]["accuracy"] > 0.9
    assert summary["reference"] == "prior"
    assert "accuracy" in run.text


def test_a_file_of_tensors_and_a_function(place: Path, start: Callable[..., Running]) -> None:
    (place / "mine.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Embedding(256, 8), nn.Linear(8, 256))\n"
    )
    model = nn.Sequential(nn.Embedding(256, 8), nn.Linear(8, 256))
    save_file(model.state_dict(), place / "mine.safetensors")
    run = start(
        "base=mine.safetensors", "factory=mine:make", "context=12", "name=mine", "peers=1",
        "steps=12", "spsa.pool=16", "spsa.rebase_every=5",
    )  # fmt: skip
    run.end()
    assert json.loads((place / "tuned" / "mine" / "summary.json").read_text())["steps"] == 12


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["base=null"], "base is missing"),
        (["base=nowhere"], "base=nowhere: nothing there"),
        (["base=text.txt"], "say what model they belong to with factory"),
        (["base=text.txt", "factory=mine"], "write module:function"),
        (["base=text.txt", "factory=no_such:make"], "cannot be had"),
        (["context=17"], "the base takes at most 16"),
        (["task=classify"], "text.txt line 1 is no sample"),
        (["task=guess"], "task=guess: one of text, classify"),
        (["spsa.noise=cauchy"], "noise is one of"),
        (["spsa.select=nothing"], "chooses no parameter"),
        (["spsa.samples=0"], "samples is 1 to 255"),
        (["data.path=missing.txt"], "no file there"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(
    place: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("decotrain.peer")
    assert cli.main(["finetune", "base=runs/first", *SMALL, *words]) == 2
    assert not logger.disabled, "hydra has switched off the loggers there were"
    assert logging.getLogger().level == logging.WARNING
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not list((place / "tuned").glob("*")) if (place / "tuned").exists() else True
