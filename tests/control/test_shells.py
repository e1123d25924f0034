"""The coordinator and the peer's control thread over real sockets, with a node without rounds."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

from decotrain.control import client
from decotrain.control import member as mb
from decotrain.control.agent import Agent, new_peer_id
from decotrain.control.coordinator import Options
from decotrain.control.server import Server, ServerThread
from decotrain.control.token import Secret
from decotrain.control.transport import with_port
from decotrain.errors import ConfigError, UnreachableError
from tests.control.fakes import empty_report

WAIT_S = 30.0


class FakeNode:
    def __init__(self, peer: int) -> None:
        self.peer = peer
        self.addresses = ["tcp://127.0.0.1:1"]
        self.event_fd, self._write = os.pipe()
        self.view = 0
        self.peers: list[Any] = []
        self.keys: dict[int, bytes] = {}

    def freeze(self, term: int, number: int) -> dict[str, Any]:
        return empty_report(self.view)

    def install(self, install: dict[str, Any]) -> bool:
        self.view = install["view"]["id"]
        return True

    def declare(self, covered: list[tuple[int, int]]) -> None:
        pass

    def set_peers(self, peers: list[Any], keys: dict[int, bytes]) -> None:
        self.peers, self.keys = peers, keys

    def set_route(self, peer: int, via: int) -> None:
        pass

    def links(self) -> list[dict[str, Any]]:
        return []

    def measures(self) -> dict[str, Any]:
        return {"uplink_bps": 0.0, "held_up_s": {}, "sent_bytes": 0, "received_bytes": 0}

    def events(self) -> list[dict[str, Any]]:
        return []

    def close(self) -> None:
        os.close(self.event_fd)
        os.close(self._write)


def agent(address: str, name: str, token: Secret | None = None, **identity: Any) -> Agent:
    who = mb.Identity(**{"run": "default", "peer": new_peer_id(), "name": name, **identity})
    made = Agent(address, who, FakeNode, list, token=token)
    made.post(mb.Ready())
    return made


def until(what: Callable[[], bool]) -> None:
    """Waits for the outside world; the bound is only there to end a broken test."""
    end_s = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < end_s, "it never came true"
        threading.Event().wait(0.01)


@pytest.fixture
def coordinator() -> Iterator[ServerThread]:
    server = ServerThread(Options(min_peers=2))
    yield server
    server.stop()


def test_peers_meet_and_one_is_left_out_when_its_launcher_says_so(
    coordinator: ServerThread,
) -> None:
    a = agent(coordinator.address, "a")
    b = agent(coordinator.address, "b", host="h", launch="worker 1")
    try:
        until(lambda: len(a.shared.members) == 2 == len(b.shared.members))
        assert sorted(row[1] for row in a.shared.members) == [0, 1]
        assert {entry[0] for entry in a.node.peers} == {a.shared.peer, b.shared.peer}
        peers = client.status(coordinator.address)["peers"]
        assert {peer["name"] for peer in peers} == {"a", "b"}
        b.stop()
        assert client.exited(coordinator.address, "default", host="h", launch="worker 1")
        until(lambda: len(a.shared.members) == 1)
    finally:
        a.stop()


def test_an_evicted_peer_comes_back_with_a_new_id(coordinator: ServerThread) -> None:
    a, b = agent(coordinator.address, "a"), agent(coordinator.address, "b")
    try:
        until(lambda: len(a.shared.members) == 2 == len(b.shared.members))
        before = b.shared.peer
        client.exited(coordinator.address, "default", peer=before)  # a mistake: it lives
        until(lambda: b.shared.peer != before and len(a.shared.members) == 2)
        assert b.shared.peer in {row[0] for row in a.shared.members}
    finally:
        a.stop()
        b.stop()


def test_a_kicked_peer_stays_out(coordinator: ServerThread) -> None:
    a, b = agent(coordinator.address, "a"), agent(coordinator.address, "b")
    try:
        until(lambda: len(a.shared.members) == 2 == len(b.shared.members))
        client.kick(coordinator.address, "default", "b", reason="out with you")
        until(lambda: b.shared.over is not None and len(a.shared.members) == 1)
        assert b.shared.over == "kicked out by an operator (out with you)"
        with pytest.raises(ConfigError, match="nobody of that name or id"):
            client.kick(coordinator.address, "default", "nobody")
    finally:
        a.stop()
        b.stop()


def test_a_coordinator_comes_back_at_its_address_with_its_record(tmp_path: Any) -> None:
    server = ServerThread(Options(min_peers=2, recover_s=2.0), folder=tmp_path)
    a, b = agent(server.address, "a"), agent(server.address, "b")
    try:
        until(lambda: len(a.shared.members) == 2 == len(b.shared.members))
        view = a.shared.view
        server.stop()
        server = ServerThread(
            Options(min_peers=2, recover_s=2.0),
            listen=server.address,
            folder=tmp_path,
        )
        until(lambda: a.shared.view > view and b.shared.view == a.shared.view)
        assert a.shared.view >> 32 == (view >> 32) + 1
        assert len(a.shared.members) == 2
    finally:
        a.stop()
        b.stop()
        server.stop()


def test_garbage_ends_nothing(coordinator: ServerThread) -> None:
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(coordinator.address)
    for garbage in (b"", b"\xff" * 100, b"\x81\xa1t\xa5hello", bytes(range(256))):
        socket.send(garbage)
        socket.send_multipart([garbage, garbage])
    until(lambda: coordinator.server.refused >= 8)
    assert client.status(coordinator.address)["phase"] == "waiting"
    socket.close()
    context.term()


def test_a_port_in_use_is_a_clear_error(coordinator: ServerThread) -> None:
    with pytest.raises(ConfigError, match="is in use"):
        Server(coordinator.address, Options(), None)


@pytest.mark.parametrize("address", ["", "a b:1", "host:port", "host:99999", "tcp://x/y"])
def test_a_wrong_address_is_a_clear_error(address: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        Server(address, Options(), None)


def test_nobody_there_is_a_clear_error(coordinator: ServerThread) -> None:
    address = coordinator.address
    coordinator.stop()
    with pytest.raises(UnreachableError, match="no coordinator answers"):
        client.status(address, timeout_s=0.2)


@pytest.mark.parametrize(
    ("address", "dialled"),
    [("home", "home:29400"), ("tcp://[::1]:5", "[::1]:5"), ("::1", "[::1]:29400")],
)
def test_messages_name_the_port_that_was_left_out(address: str, dialled: str) -> None:
    assert with_port(address) == dialled


def test_the_control_plane_starts_without_torch_or_numpy() -> None:
    code = (
        "import sys; import decotrain.control.server, decotrain.control.client;"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
