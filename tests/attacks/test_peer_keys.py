"""Peers with keys of their own: one that is kicked stays out with all it ever knew, others go on.

The handshake between pairs is tried at the core (csrc/tests/test_tls.cpp); here it is what the
coordinator lets in, hands out and believes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from decotrain import operate
from decotrain.communicator import Communicator, join
from decotrain.control import client, transport
from decotrain.control import messages as m
from decotrain.control.coordinator import Options
from decotrain.control.effects import identity
from decotrain.control.peer_list import PeerList
from decotrain.control.server import ServerThread
from decotrain.control.token import PeerKey, Secret, Token, read, write
from decotrain.errors import ConfigError, RefusedError
from decotrain.joining import ask
from tests.control.test_shells import agent, until
from tests.test_communicator import together

RUN = "default"


@pytest.fixture
def token(tmp_path: Path) -> Token:
    write(made := Token.new(), tmp_path / "run.token")
    return made


@pytest.fixture
def start(tmp_path: Path, token: Token) -> Iterator[Any]:
    """Starts the coordinator, as often as it is called; the one before it ends."""
    running: list[ServerThread] = []

    def begin(min_peers: int = 1) -> ServerThread:
        address = running[-1].address if running else "127.0.0.1:0"
        if running:
            running[-1].stop()
        running.append(
            ServerThread(
                Options(min_peers=min_peers), address, tmp_path / "record", token,
                PeerList(tmp_path / "run.token"),
            )
        )  # fmt: skip
        return running[-1]

    yield begin
    if running:
        running[-1].stop()


def key_for(name: str, folder: Path) -> PeerKey:
    """As an operator makes it."""
    words = ["new", "--peer", name, "--token-file", str(folder / "run.token"),
             "--out", str(folder / f"{name}.token")]  # fmt: skip
    assert operate.token(words) == 0
    made = read(folder / f"{name}.token")
    assert isinstance(made, PeerKey)
    return made


@contextmanager
def peers(address: str, **secrets: Secret) -> Iterator[dict[str, Any]]:
    """Peers by name, in a view; an agent that ended by itself is stopped all the same."""
    made = {}
    try:
        for name, secret in secrets.items():
            made[name] = agent(address, name, secret)
            until(lambda: all(len(one.shared.members) == len(made) for one in made.values()))
        yield made
    finally:
        for one in made.values():
            one.stop()


def test_a_peers_key_survives_its_file_and_says_nothing_of_the_token(
    token: Token, tmp_path: Path
) -> None:
    key = key_for("alice", tmp_path)
    assert key.server_public == token.server_public
    assert key.fingerprint(RUN) == token.fingerprint(RUN)
    assert key.data_key(RUN) == b""
    assert (tmp_path / "alice.token").stat().st_mode & 0o777 == 0o600
    listed = (tmp_path / "run.token.peers").read_text()
    assert listed.startswith("alice ")
    for secret in (token.secret, token.data_key(RUN), token.derive("data tls pair", RUN)):
        assert secret not in (key.secret, key.server, key.mark)
        assert secret.hex() not in listed
    assert key.secret.hex() not in listed
    with pytest.raises(ConfigError, match="alice has a key already"):
        key_for("alice", tmp_path)
    with pytest.raises(ConfigError, match="key of one peer"):
        operate.coordinator(["--token-file", str(tmp_path / "alice.token")])
    with pytest.raises(ConfigError, match="key of one peer"):
        join("local", token_file=str(tmp_path / "alice.token"))


def test_pairs_share_keys_that_nobody_else_is_told(
    token: Token, start: Any, tmp_path: Path
) -> None:
    alice, bob = key_for("alice", tmp_path), key_for("bob", tmp_path)
    with peers(start().address, whole=token, alice=alice, bob=bob) as here:
        until(lambda: all(len(one.node.keys) == 3 for one in here.values()))
        ids = {name: one.shared.peer for name, one in here.items()}
        keys = {name: one.node.keys for name, one in here.items()}
        for one in ids:
            for other in ids:
                if one != other:
                    assert keys[one][ids[other]] == keys[other][ids[one]]
        told = [
            keys[a][ids[b]] for a, b in (("whole", "alice"), ("whole", "bob"), ("alice", "bob"))
        ]
        assert len({*told, token.data_key(RUN)}) == 4
        assert {len(key) for key in told} == {32}


def test_rounds_of_peers_with_own_keys_travel_through_tls(
    token: Token, start: Any, tmp_path: Path
) -> None:
    key_for("alice", tmp_path)
    key_for("bob", tmp_path)
    address = start(min_peers=3).address

    def peer(name: str) -> tuple[float, bool]:
        file = str(tmp_path / f"{name}.token")
        asked = ask(address, name, None, file, None, 3, "127.0.0.1")
        asked = replace(asked, listen=["tcp://127.0.0.1:0"])  # no Unix socket
        with Communicator(asked, asked.tls()) as comm:
            result = comm.all_reduce(np.ones(1000, np.float32), op="sum").wait()
            secured = all(link["tls"] for link in comm._agent.shared.node.links() if link["up"])
            comm.all_reduce(np.ones(1, np.float32)).wait()  # nobody has gone before
            return float(result.tensor[0]), secured

    done = together(*(lambda name=name: peer(name) for name in ("alice", "bob", "run")))
    assert done == [(3.0, True)] * 3


def test_a_kicked_peers_key_opens_nothing_any_more(
    token: Token, start: Any, tmp_path: Path
) -> None:
    bob = key_for("bob", tmp_path)
    server = start()
    with peers(server.address, a=token, b=bob) as here:
        status = client.status(server.address, token=bob)
        assert {row["name"] for row in status["peers"]} == {"a", "b"}
        assert client.kick(server.address, RUN, "b", token=token).endswith(") with its key")
        until(lambda: here["b"].shared.over is not None)
        until(lambda: len(here["a"].shared.members) == 1)
        for server in (server, start()):  # noqa: B020 - and after a restart
            with pytest.raises(RefusedError, match="taken away"):
                client.status(server.address, timeout_s=30.0, token=bob)
            again = agent(server.address, "new name", bob)
            until(lambda again=again: again.shared.over is not None)
            assert again.shared.over_kind == "refused"
            assert "taken away" in str(again.shared.over)
            again.stop()
        until(lambda: here["a"].handshakes.accepted)
        assert client.status(server.address, token=token)["peers"][0]["name"] == "a"


def test_a_line_that_is_deleted_is_a_key_less(token: Token, start: Any, tmp_path: Path) -> None:
    alice, bob = key_for("alice", tmp_path), key_for("bob", tmp_path)
    server = start()
    client.status(server.address, token=alice)
    path = tmp_path / "run.token.peers"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("alice ")))
    client.status(server.address, token=bob)
    with pytest.raises(RefusedError, match="does not accept this peer's key"):
        client.status(server.address, timeout_s=30.0, token=alice)
    path.write_text("nonsense")  # and nobody is thrown out by a slip of the operator's
    client.status(server.address, token=bob)


def test_a_peers_key_decides_nothing_about_others(token: Token, start: Any, tmp_path: Path) -> None:
    bob = key_for("bob", tmp_path)
    server = start()
    with peers(server.address, a=token, b=bob) as here:
        with pytest.raises(ConfigError, match="takes the run's token"):
            client.kick(server.address, RUN, "a", token=bob)
        assert not client.exited(server.address, RUN, peer=here["a"].shared.peer, token=bob)
        assert len(here["a"].shared.members) == 2
        assert client.exited(server.address, RUN, peer=here["b"].shared.peer, token=bob)
        until(lambda: len(here["a"].shared.members) == 1)


@pytest.mark.parametrize("shows", ["bob", "token"])
@pytest.mark.parametrize("tail", [b"", bytes(transport.TAIL_BYTES)], ids=["none", "another"])
def test_nobody_speaks_in_the_name_of_another_peer(
    token: Token, start: Any, tmp_path: Path, tail: bytes, shows: str
) -> None:
    """With a key of its own, or with the same token as the other."""
    bob = key_for("bob", tmp_path)
    server = start()
    with peers(server.address, a=token, b=bob) as here:
        victim = here["a"].shared.peer
        view = here["a"].shared.view
        context: zmq.Context[Any] = zmq.Context()
        secret = bob if shows == "bob" else token
        route = identity(victim) + tail
        thief = transport.connect_dealer(context, server.address, route, secret)
        refused = server.server.refused
        thief.send(m.encode(m.Leave(RUN, victim)))
        thief.send(m.encode(m.AskStatus(RUN, 0)))
        until(lambda: server.server.refused >= refused + 2)
        assert not thief.poll(50)  # not even an answer
        thief.close()
        context.term()
        assert here["a"].shared.over is None
        assert here["a"].shared.view == view
        assert len(here["b"].shared.members) == 2


def test_a_list_that_others_can_write_to_is_refused(token: Token, tmp_path: Path) -> None:
    key_for("alice", tmp_path)
    path = tmp_path / "run.token.peers"
    path.chmod(0o620)
    with pytest.raises(ConfigError, match=r"chmod 600 .*run\.token\.peers"):
        PeerList(tmp_path / "run.token")
    path.chmod(0o600)
    path.write_bytes(b"alice 12\n")
    with pytest.raises(ConfigError, match="line 1 is no NAME and KEY"):
        PeerList(tmp_path / "run.token")
