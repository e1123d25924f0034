"""The control plane with a token: who gets in, and what everybody else is told."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from decotrain.control import client, transport
from decotrain.control import messages as m
from decotrain.control.coordinator import Options
from decotrain.control.server import Server, ServerThread
from decotrain.control.token import VARIABLE, Token, write
from decotrain.errors import ConfigError, RefusedError
from decotrain.joining import ask
from tests.control.test_shells import agent, until

OURS = Token(bytes(range(32)))
OTHER = Token(bytes(32))


@pytest.fixture
def coordinator() -> Iterator[ServerThread]:
    server = ServerThread(Options(min_peers=2), token=OURS)
    yield server
    server.stop()


@pytest.fixture
def plain() -> Iterator[ServerThread]:
    server = ServerThread(Options(min_peers=2))
    yield server
    server.stop()


def test_peers_with_the_token_meet(coordinator: ServerThread) -> None:
    a = agent(coordinator.address, "a", OURS)
    b = agent(coordinator.address, "b", OURS)
    try:
        until(lambda: len(a.shared.members) == 2 == len(b.shared.members))
        names = {peer["name"] for peer in client.status(coordinator.address, token=OURS)["peers"]}
        assert names == {"a", "b"}
    finally:
        a.stop()
        b.stop()


def refusal(address: str, token: Token | None) -> str:
    """What an operator and a peer are told: the same."""
    with pytest.raises(RefusedError) as raised:
        client.status(address, timeout_s=30.0, token=token)
    peer = agent(address, "x", token)
    try:
        until(lambda: peer.shared.over is not None)
        assert peer.shared.over_kind == "refused"
        assert peer.shared.over == str(raised.value)
        assert not peer.shared.welcome
    finally:
        peer.stop()
    return str(raised.value)


def test_another_token_says_so_at_once(coordinator: ServerThread) -> None:
    text = refusal(coordinator.address, OTHER)
    assert "does not accept our token" in text
    assert "copy the token file" in text


def test_no_token_says_so_at_once(coordinator: ServerThread) -> None:
    text = refusal(coordinator.address, None)
    assert "wants the run's token" in text
    assert "--token-file" in text


def test_a_token_where_none_is_wanted_says_so_at_once(plain: ServerThread) -> None:
    assert "runs without a token" in refusal(plain.address, OURS)


def test_a_handshake_that_fails_before_there_is_a_word_is_no_hang(
    plain: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine under load: libzmq has given up when the request is handed to it."""

    class Late(transport.Handshakes):
        def __init__(self, *asked: Any) -> None:
            super().__init__(*asked)
            until(lambda: not self.socket.poll(0, zmq.POLLOUT))

    monkeypatch.setattr(client, "Handshakes", Late)
    assert "runs without a token" in refusal(plain.address, OURS)


@pytest.mark.parametrize("token", [None, OURS])
def test_another_service_says_so_at_once(token: Token | None) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        with pytest.raises(RefusedError, match="is no coordinator"):
            client.status(f"127.0.0.1:{server.server_port}", timeout_s=30.0, token=token)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_another_run_is_told_both_names(coordinator: ServerThread) -> None:
    peer = agent(coordinator.address, "x", OURS, run="mine")
    try:
        until(lambda: peer.shared.over is not None)
        assert "this is run 'default', not 'mine'" in str(peer.shared.over)
    finally:
        peer.stop()


@contextmanager
def raw(address: str, public: bytes, secret: bytes, server: bytes) -> Iterator[zmq.Socket[Any]]:
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    for option, value in (
        (zmq.LINGER, 0), (zmq.CURVE_PUBLICKEY, public), (zmq.CURVE_SECRETKEY, secret),
        (zmq.CURVE_SERVERKEY, server),
    ):  # fmt: skip
        socket.setsockopt(option, value)
    socket.connect(address)
    yield socket
    socket.close()
    context.term()


def test_the_servers_key_alone_lets_nobody_in(coordinator: ServerThread) -> None:
    """Without an allow-list libzmq takes any client that knows it."""
    public, secret = zmq.curve_keypair()
    with raw(coordinator.address, public, secret, OURS.server_keys[0]) as socket:
        socket.send(m.encode(m.AskStatus("", 0)))
        gate = coordinator.server.gate
        assert gate is not None
        until(lambda: gate.refused > 0)
        assert not socket.poll(50)
    with raw(coordinator.address, *OURS.client_keys, OURS.server_keys[0]) as socket:
        socket.send(m.encode(m.AskStatus("", 0)))
        assert socket.poll(30_000)  # the same, with the key that is let in


def test_a_coordinator_that_comes_back_with_the_token_goes_on(tmp_path: Path) -> None:
    server = ServerThread(Options(min_peers=1), folder=tmp_path, token=OURS)
    peer = agent(server.address, "a", OURS)
    try:
        until(lambda: len(peer.shared.members) == 1)
        view = peer.shared.view
        server.stop()
        with pytest.raises(ConfigError, match="another token"):
            Server(server.address, Options(min_peers=1), tmp_path, token=OTHER)
        other = ServerThread(Options(min_peers=1), server.address, token=OTHER)
        until(lambda: peer.handshakes.failures > 3)  # nobody else's coordinator ends us
        other.stop()
        server = ServerThread(Options(min_peers=1), server.address, tmp_path, OURS)
        until(lambda: peer.shared.view > view)
        assert peer.shared.over is None
    finally:
        peer.stop()
        server.stop()


# --- without a token


@pytest.mark.parametrize("place", ["0.0.0.0:0", "[::]:0", "192.0.2.7:29400", "tcp://192.0.2.7"])
def test_other_machines_are_not_let_in_without_a_token(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(transport.INSECURE, raising=False)
    with pytest.raises(ConfigError, match="--insecure"):
        transport.check_trust(place, None, False)
    transport.check_trust(place, None, True)
    transport.check_trust(place, OURS, False)
    monkeypatch.setenv(transport.INSECURE, "1")
    transport.check_trust(place, None, False)


@pytest.mark.parametrize("place", ["127.0.0.1:1", "localhost:1", "[::1]:1", "tcp://127.0.0.9"])
def test_this_machine_needs_no_token(place: str) -> None:
    transport.check_trust(place, None, False)


def test_a_coordinator_and_a_peer_check_where_they_listen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(transport.INSECURE, raising=False)
    with pytest.raises(ConfigError, match="open to other machines"):
        Server("0.0.0.0:0", Options(), None)
    rest: tuple[Any, ...] = (None, None, None, None, None)
    with pytest.raises(ConfigError, match="open to other machines"):
        ask("192.0.2.7:1", *rest, "127.0.0.1")
    with pytest.raises(ConfigError, match="open to other machines"):
        ask("127.0.0.1:1", *rest, "0.0.0.0")
    write(OURS, tmp_path / "run.token")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "run.token"))
    asked = ask("192.0.2.7:1", *rest, "127.0.0.1")
    assert asked.token == OURS
    assert asked.fingerprint == OURS.fingerprint("default")
