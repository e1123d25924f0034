"""`decotrain train join=ADDRESS`: an address says what is trained, and the bits are the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from decotrain.control import client
from decotrain.control.coordinator import Options
from decotrain.control.server import ServerThread
from decotrain.control.token import Token, write
from decotrain.control.transport import INSECURE, check_trust
from decotrain.errors import ConfigError
from decotrain.train.asked import overruled, shared_by, trust
from decotrain.train.settings import SHARED
from tests.local_runs import running

pytestmark = pytest.mark.timeout(300)  # many processes that import torch

WHAT = ["model=tiny", "model.width=16", "model.hidden=24", "model.context=16", "model.layers=2",
        "batch=1", "steps=20", "outer.sync_every=5", "codec=int8"]  # fmt: skip
HERE = ["data.path=text.txt", "held_out_windows=8", "final_windows=16",
        "sample_bytes=20"]  # fmt: skip


def test_who_joins_by_address_trains_what_the_others_do(run_dir: Path) -> None:
    (run_dir / "text.txt").write_bytes(b"some words, and some more of them; " * 4000)
    server = ServerThread(Options(run="ours", min_peers=2))
    try:
        with running(run_dir, "train", *HERE, f"join={server.address}") as make:
            first = make("folder=first", *WHAT)
            first.until(lambda: client.status(server.address)["config"], "what is trained")
            second = make("folder=second")  # an address, and nothing of the model
            first.end()
            said = second.end()
    finally:
        server.stop()
    kept = [next((run_dir / name).glob("*/config.json")) for name in ("first", "second")]
    configs = [json.loads(path.read_text()) for path in kept]
    assert configs[1]["model"]["width"] == 16
    assert configs[1]["codec"] == configs[0]["codec"]
    assert configs[1]["name"] == "ours"
    assert [config["peers"] for config in configs] == [1, 1]  # a machine is one peer, if none says
    assert "holds here" not in said
    ends = [
        [json.loads(line) for line in path.with_name("peer-1.jsonl").read_text().splitlines()][-1]
        for path in kept
    ]
    assert ends[0]["digest"] == ends[1]["digest"]


def test_the_token_is_a_key_too(run_dir: Path) -> None:
    """For asking what is trained, and for the process that joins."""
    (run_dir / "text.txt").write_bytes(b"some words, and some more of them; " * 4000)
    token = Token.new()
    write(token, run_dir / "run.token")
    server = ServerThread(Options(run="ours", min_peers=1), token=token)
    try:
        with running(run_dir, "train", *HERE, *WHAT, "steps=5", f"join={server.address}") as make:
            make("folder=first", "token_file=run.token").end()
        told = client.status(server.address, token=token)["config"]
    finally:
        server.stop()
    assert told["steps"] == 5


def test_a_network_that_is_trusted_is_a_key_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INSECURE, "0")
    with pytest.raises(ConfigError, match="insecure=True"):
        check_trust("192.0.2.1:1", None, False)
    trust({"insecure": True})
    check_trust("192.0.2.1:1", None, False)


def test_who_asks_for_something_else_is_told_what_holds() -> None:
    asked = {
        "name": "2026",
        "model": {"width": 64, "layers": 2},
        "outer": {"sync_every": 7},
        "codec": {"contributions": "f32"},
        "inner": {},
        "steps": 900,
        "batch": 8,
        "seed": 1,
    }
    run = {
        "name": "ours",
        "model": {"width": 16, "layers": 2},
        "outer": {"sync_every": 5},
        "codec": {"contributions": "int8"},
        "inner": {},
        "steps": 20,
        "batch": 1,
        "seed": 1,
    }
    named = ["model=small", "outer.sync_every=7", "seed=1", "steps=20", "join=x"]
    assert overruled(named, asked | {"steps": 20}, run, SHARED) == [
        "model.width=16 holds here, as the run has it, and not 64",
        "outer.sync_every=5 holds here, as the run has it, and not 7",
    ]
    assert overruled(["name=mine"], asked | {"name": "mine"}, {"name": "ours"}, SHARED) == [
        "name=ours holds here, as the run has it, and not mine"
    ]
    assert overruled([], asked, run, SHARED) == []


def test_a_run_of_something_else_is_named(run_dir: Path) -> None:
    server = ServerThread(Options(run="other", config={"model": {"width": 1}}))
    try:
        with pytest.raises(ConfigError, match=r"not one of `decotrain train`.*no outer, codec"):
            shared_by(server.address, SHARED, "train")
    finally:
        server.stop()
