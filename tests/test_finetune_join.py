"""`decotrain finetune join=ADDRESS`: an address and a token, a kill, and the same bits."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from decotrain import checkpoint
from decotrain.control import client
from decotrain.control.coordinator import Options
from decotrain.control.server import ServerThread
from decotrain.control.token import Token, write
from decotrain.model import ModelConfig, Transformer
from decotrain.spsa import seedlog
from decotrain.spsa.replay import replay
from tests.local_runs import WAIT_S, journal, running

pytestmark = pytest.mark.timeout(300)  # many processes that import torch

SHAPES = {"layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "hidden": 24, "context": 16}
HERE = ["base=runs/first", "data.path=text.txt", "batch=2", "held_out_windows=16",
        "every.evaluation=10"]  # fmt: skip
WHAT = ["steps=1000000", "seed=9", "spsa.lr=0.002", "spsa.staleness=2", "spsa.samples=2"]


def test_who_joins_by_address_tunes_what_the_others_do(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second launcher knows an address and a token; one of the first's peers is killed."""
    (run_dir / "text.txt").write_bytes(b"some words, and some more of them; " * 4000)
    torch.manual_seed(3)
    model = Transformer(ModelConfig(**SHAPES)).state_dict()
    checkpoint.write(
        run_dir / "runs" / "first" / "checkpoints" / "peer-1", 7, model, {},
        {"config": {"model": SHAPES}},
    )  # fmt: skip
    token = Token.new()
    write(token, run_dir / "run.token")
    monkeypatch.setenv("DECOTRAIN_TOKEN_FILE", str(run_dir / "run.token"))
    server = ServerThread(Options(run="ours", min_peers=3), token=token)
    try:
        with running(run_dir, "finetune", *HERE, f"join={server.address}") as make:
            first = make("folder=first", "peers=2", *WHAT)
            known = client.status
            first.until(lambda: known(server.address, token=token)["config"], "what is tuned")
            second = make("folder=second", "peers=1")
            here = first.until(lambda: folder_of(run_dir / "first"), "its folder")
            there = second.until(lambda: folder_of(run_dir / "second"), "its folder")
            first.until(lambda: len(digests(here, "peer-2")) >= 3, "thirty steps")
            os.kill(journal(here, "peer-2", "start")[0]["pid"], signal.SIGKILL)
            back = first.until(lambda: journal(here, "peer-2", "start")[1:], "peer-2 again")[0]
            for run, folder, peer in ((first, here, "peer-2"), (second, there, "peer-1")):
                run.until(
                    lambda folder=folder, peer=peer: (
                        len([s for s in digests(folder, peer) if s > back["step"]]) >= 4
                    ),
                    f"forty steps more of {peer}",
                )
            for run in (first, second):
                run.process.send_signal(signal.SIGINT)
                assert run.process.wait(WAIT_S) == 130, run.text
    finally:
        server.stop()
    held = [digests(here, "peer-1"), digests(here, "peer-2"), digests(there, "peer-1")]
    for one in held[1:]:
        both = set(held[0]) & set(one)
        assert len(both) > 3
        assert all(held[0][step] == one[step] for step in both)
    config = json.loads((there / "config.json").read_text())
    assert config["spsa"]["staleness"] == 2
    assert config["seed"] == 9
    # Base and log of the second launcher give what the first one's peers held.
    log = there / "peer-1.seedlog"
    step = max(step for step in held[0] if step <= seedlog.read(log).next_step)
    assert replay(there / "base.safetensors", log, run_dir / "out", step) == held[0][step]


def folder_of(place: Path) -> Path | None:
    return next((path.parent for path in place.glob("*/config.json")), None)


def digests(folder: Path, peer: str) -> dict[int, str]:
    """SHA-256 of the parameters, by step."""
    return {event["step"]: event["digest"] for event in journal(folder, peer, "round")}
