"""Strangers at the coordinator's port: none of their messages is delivered, and others go on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from decotrain.control import client, transport
from decotrain.control.coordinator import Options
from decotrain.control.messages import MESSAGE_BYTES_MAX
from decotrain.control.server import ServerThread
from decotrain.control.token import Token, write
from decotrain.errors import RefusedError
from tests.attacks.tools import (
    WAIT_S,
    answer_to,
    descriptors,
    dial,
    place_of,
    recorder,
    resident_bytes,
    until_closed,
)
from tests.control.test_shells import agent, until

TOKEN = Token(bytes(range(32)))
MARK = "KNOWN PLAINTEXT"  # the name of a run: in every message
GREETING_BYTES = 64


@pytest.fixture
def coordinator() -> Iterator[ServerThread]:
    server = ServerThread(Options(run=MARK, min_peers=1), token=TOKEN)
    yield server
    server.stop()


@dataclass
class Process:
    address: str
    id: int


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    """A coordinator whose descriptors and memory are its own."""
    write(TOKEN, tmp_path / "run.token")
    words = ["coordinator", "--listen", "127.0.0.1:0", "--token-file", str(tmp_path / "run.token")]
    made = subprocess.Popen(
        [sys.executable, "-m", "decotrain.cli", *words], stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert made.stdout is not None
    address = made.stdout.readline().rpartition(" ")[2].strip()
    yield Process(address, made.pid)
    made.terminate()
    made.wait(WAIT_S)
    made.stdout.close()


@contextmanager
def dealer(address: str, token: Token | None = None) -> Iterator[zmq.Socket[Any]]:
    context: zmq.Context[Any] = zmq.Context()
    socket = transport.connect_dealer(context, address, token=token)
    yield socket
    socket.close()
    context.term()


def talk(address: str, token: Token | None) -> tuple[bytes, list[bytes], list[bytes]]:
    """What goes over the wire when a client asks for the status: all of it, and by direction."""
    with recorder(place_of(address)) as tap:
        assert client.status(f"127.0.0.1:{tap.address[1]}", token=token)["run"] == MARK
        sent, answered = [bytes(s) for s in tap.sent], [bytes(s) for s in tap.answered]
        return tap.everything(), sent, answered


def test_a_recorder_finds_nothing_it_knows(coordinator: ServerThread) -> None:
    wire, _, _ = talk(coordinator.address, TOKEN)
    assert MARK.encode() not in wire
    assert b"epoch" not in wire
    plain = ServerThread(Options(run=MARK))
    try:
        wire, _, _ = talk(plain.address, None)
    finally:
        plain.stop()
    assert MARK.encode() in wire
    assert b"epoch" in wire


WORDS = {
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "zeros": bytes(1000),
    "noise": bytes(range(256)) * 20,
    "greeting and noise": transport.GREETING + b"CURVE" + bytes(range(256)) * 4,
    "greeting without a key": transport.GREETING + b"NULL" + bytes(48) + b"\x04\x19\x05READY",
    "huge command": transport.GREETING + b"CURVE" + bytes(47) + b"\x06" + b"\xff" * 8 + bytes(99),
}


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS.keys())
def test_a_stranger_learns_the_greeting_and_no_more(
    coordinator: ServerThread, words: bytes
) -> None:
    assert len(answer_to(coordinator.address, words)) <= GREETING_BYTES
    assert client.status(coordinator.address, token=TOKEN)["peers"] == []
    assert coordinator.server.refused == 0  # none of it came as a message


def test_a_conversation_played_again_changes_nothing(coordinator: ServerThread) -> None:
    _, sent, answered = talk(coordinator.address, TOKEN)
    longest = max(sent, key=len)
    again = answer_to(coordinator.address, longest)
    assert len(again) < len(max(answered, key=len))  # no READY, no status
    assert MARK.encode() not in again
    assert coordinator.server.refused == 0


def mirror(one: socket.socket) -> bytes:
    """Says what it hears, until the other side has had enough; what that was."""
    heard = b""
    with suppress(OSError):
        while data := one.recv(1 << 16):
            heard += data
            one.sendall(data)
    return heard


def test_what_comes_back_to_its_sender_leads_nowhere(coordinator: ServerThread) -> None:
    """A client that dials a mirror, and a coordinator that hears its own words."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        dealer(f"127.0.0.1:{server.getsockname()[1]}", TOKEN) as victim,
    ):
        victim.send(b"secret")
        taken, _ = server.accept()
        taken.settimeout(5.0)
        with taken:
            assert b"secret" not in mirror(taken)
    with dial(coordinator.address) as one:
        one.sendall(transport.GREETING)
        mirror(one)
    assert client.status(coordinator.address, token=TOKEN)["peers"] == []


def test_a_crowd_takes_little_and_leaves_nothing_behind(process: Process) -> None:
    """Silent ones, noisy ones, and some that stop within the handshake at each of its bytes."""
    status = client.status(process.address, token=TOKEN)
    with recorder(place_of(process.address)) as tap:
        client.status(f"127.0.0.1:{tap.address[1]}", token=TOKEN)
        handshake = bytes(tap.sent[0])
    before, memory = descriptors(process.id), resident_bytes(process.id)
    crowd = [dial(process.address) for _ in range(600)]
    for number, one in enumerate(crowd):
        one.sendall((b"", b"x", os.urandom(100), handshake[: number % len(handshake)])[number % 4])
    assert client.status(process.address, token=TOKEN)["term"] == status["term"]
    assert resident_bytes(process.id) - memory < 16 << 20
    for one in crowd:
        until_closed(one)  # all of them are sent away
        one.close()
    until(lambda: descriptors(process.id) <= before + 2)
    assert resident_bytes(process.id) - memory < 16 << 20


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


BOMBS = {
    "deep": nested(500_000),
    "wide": b"\xdd\xff\xff\xff\xff" + b"\xc0" * 1000,
    "wide map": b"\xdf\xff\xff\xff\xff" + b"\xa1t\xc0" * 1000,
    "long text": b"\xdb\xff\xff\xff\xff" + b"x" * 1000,
    "extension": b"\xc9\xff\xff\xff\xff\x01" + b"x" * 1000,
    "many small": b"\xdc\xff\xff" + b"\x90" * 65535,
    "every byte": msgpack.packb({"t": "hello", "run": "x" * 100_000}),
    "as long as allowed": b"\xc6" + (MESSAGE_BYTES_MAX - 5).to_bytes(4, "big")
    + bytes(MESSAGE_BYTES_MAX - 5),
}  # fmt: skip


def test_bombs_of_a_member_are_dropped(process: Process) -> None:
    client.status(process.address, token=TOKEN)
    with dealer(process.address, TOKEN) as socket:
        for bomb in BOMBS.values():
            socket.send(bomb)
        socket.send(BOMBS["as long as allowed"] + bytes(1 << 20))  # ends the connection
        client.status(process.address, timeout_s=WAIT_S, token=TOKEN)
        memory = resident_bytes(process.id)
        for _ in range(3):
            for bomb in BOMBS.values():
                socket.send(bomb)
        client.status(process.address, timeout_s=WAIT_S, token=TOKEN)
        # A busy machine has some of them waiting at once; none of them stays.
        until(lambda: resident_bytes(process.id) - memory < MESSAGE_BYTES_MAX)


def test_a_kicked_peer_does_not_come_back(coordinator: ServerThread) -> None:
    a = agent(coordinator.address, "a", TOKEN, run=MARK)
    until(lambda: len(a.shared.members) == 1)  # so that it is not b whom nobody can do without
    b = agent(coordinator.address, "b", TOKEN, run=MARK, host="h", launch="one")
    try:
        until(lambda: len(a.shared.members) == 2 == len(b.shared.members))
        gone = b.shared.peer
        client.kick(coordinator.address, MARK, "b", token=TOKEN)
        until(lambda: b.shared.over is not None and len(a.shared.members) == 1)
        for again in (
            {"peer": gone, "name": "b"},  # the same incarnation
            {"name": "new name", "host": "h", "launch": "one"},  # what its launcher starts
        ):
            peer = agent(coordinator.address, again.pop("name"), TOKEN, run=MARK, **again)
            until(lambda peer=peer: peer.shared.over is not None)
            peer.stop()
        assert len(a.shared.members) == 1
    finally:
        a.stop()
        b.stop()


def test_without_the_token_nobody_can_ask_or_kick(coordinator: ServerThread) -> None:
    a = agent(coordinator.address, "a", TOKEN, run=MARK)
    try:
        until(lambda: len(a.shared.members) == 1)
        for token in (None, Token(bytes(32))):
            with pytest.raises(RefusedError):
                client.kick(coordinator.address, MARK, "a", timeout_s=30.0, token=token)
            with pytest.raises(RefusedError):
                client.exited(
                    coordinator.address, MARK, peer=a.shared.peer, timeout_s=30.0, token=token
                )
        assert a.shared.over is None
        assert len(a.shared.members) == 1
    finally:
        a.stop()
