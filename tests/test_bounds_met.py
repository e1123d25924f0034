"""What a person gives that no message can carry: one line at once, which names it and its bound.

It was dropped where it came to, and then it looked as if no coordinator answered.
"""

from __future__ import annotations

from typing import Any

import pytest

from decotrain import cli
from decotrain.communicator import join
from decotrain.control.coordinator import Options
from decotrain.control.server import ServerThread
from decotrain.errors import ConfigError
from tests.control.test_shells import agent, until

NOWHERE = "127.0.0.1:1"
LONG = "x" * 300


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "--standalone", "--name", LONG, "no.py"], "--name: expected text of 1..128"),
        (["run", "--standalone", "--name", "a\tb", "no.py"], "--name: a text contains control"),
        (["run", "--standalone", "--run", LONG, "no.py"], "--run: expected text of 1..128"),
        (["run", "--standalone", "--run", "", "no.py"], "--run: expected text of 1..128"),
        (["run", "--join", NOWHERE, "--region", LONG, "no.py"], "--region: expected text of 0..64"),
        (["kick", NOWHERE, LONG], "PEER: expected text of 0..128"),
        (["kick", NOWHERE, "a", "--reason", "x" * 513], "--reason: expected text of 0..512"),
        (["leave", NOWHERE, "a", "--reason", "a\nb"], "--reason: a text contains control"),
        (["kick", NOWHERE, "a", "--run", LONG], "--run: expected text of 0..128"),
        (["status", NOWHERE, "--run", LONG], "--run: expected text of 0..128"),
        (["coordinator", "--listen", NOWHERE, "--run", LONG], "--run: expected text of 1..128"),
        (["coordinator", "--listen", NOWHERE, "--run", ""], "--run: expected text of 1..128"),
        (["coordinator", "--listen", NOWHERE, "--min-peers", "1000"], "--min-peers: expected an"),
        (["coordinator", "--listen", NOWHERE, "--min-peers=-3"], "integer in 0..64, got -3"),
    ],
)
def test_a_command_says_which_option_is_out_of_bounds(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    out, errors = capsys.readouterr()
    assert out == ""
    assert len(errors.splitlines()) == 1
    assert said in errors


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"name": LONG}, "name: expected text of 1..128"),
        ({"name": "a\tb"}, "name: a text contains control"),
        ({"run": LONG}, "run: expected text of 1..128"),
        ({"min_peers": 1000}, "min_peers: expected an integer in 0..64"),
        ({"min_peers": -3}, "min_peers: expected an integer in 0..64"),
        ({"advertise": LONG}, r"^'x{1,60}.* is no address: a part of the name .* is .* too long"),
        ({"advertise": "x." * 200}, "advertise: expected text of 1..256"),
        ({"config": {"a": [[[[[[[[[1]]]]]]]]]}}, "config: too large or too deep"),
        ({"config": {"a": list(range(5000))}}, "4096 items"),
        ({"config": {"a": "x" * 300_000}}, "config: 30000. bytes; at most 262144"),
        ({"config": {"a": float("inf")}}, "config: not plain data: inf"),
        ({"config": {1: "a"}}, "config: a key that is no text: 1"),
        ({"config": {"a": object()}}, "config: not plain data"),
    ],
)
def test_joining_says_which_argument_is_out_of_bounds(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        join("local", **wrong)


def test_a_region_from_the_environment_is_looked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECOTRAIN_REGION", LONG)
    with pytest.raises(ConfigError, match=r"DECOTRAIN_REGION: expected text of 0\.\.64"):
        join("local")


def test_a_configuration_that_others_read_alike_is_taken() -> None:
    with join("local", config={"betas": (0.9, 0.95), "name": "tiny"}) as comm:
        assert comm.config == {"betas": [0.9, 0.95], "name": "tiny"}


@pytest.mark.parametrize(
    "wrong", [{"run": LONG}, {"run": ""}, {"min_peers": 1000}, {"config": {"a": {5: 1}}}], ids=str
)
def test_a_coordinator_that_nobody_can_join_does_not_start(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ServerThread(Options(**wrong))


def test_a_hello_that_nobody_takes_ends_the_peer_at_once() -> None:
    server = ServerThread(Options(min_peers=1))
    peer = agent(server.address, "a", host=LONG)
    try:
        until(lambda: peer.shared.over is not None)
        assert "hello: host: expected text of 0..256 characters" in str(peer.shared.over)
        assert not peer.shared.welcome
    finally:
        peer.stop()
        server.stop()
