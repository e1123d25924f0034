"""Strangers at a peer's data port: none gets in, none learns a byte, a round goes on.

A handshake with any bit turned, stopped at every byte, played again or reflected is tried at the
core itself (csrc/tests/test_tls.cpp); here it is whole peers and what a wire shows.
"""

from __future__ import annotations

import os
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from decotrain import _core
from tests.attacks.tools import (
    answer_to,
    descriptors,
    dial,
    place_of,
    recorder,
    resident_bytes,
    until_closed,
)
from tests.test_node import VIEW, plan, results

KEY = bytes(range(32))
RUN = 5
PLAIN = b"KNOWN PLAINTEXT!"  # four float32 that are finite
LISTEN = "tcp://127.0.0.1:0"


@contextmanager
def team(key: bytes, seen: dict[int, str] | None = None) -> Iterator[list[Any]]:
    """Two peers; `seen`: addresses that the other is told instead."""
    nodes = [_core.Node(10 + i, [LISTEN], run_fingerprint=RUN, tls_key=key) for i in range(2)]
    try:
        told = [(n.peer, i, [(seen or {}).get(i) or n.addresses[0]]) for i, n in enumerate(nodes)]
        for node in nodes:
            node.set_peers(told)
            node.freeze(1, 1)
            assert node.install(plan(nodes))
        yield nodes
    finally:
        for node in nodes:
            node.close()


def a_round(nodes: list[Any], repeats: int = 4096) -> None:
    known = np.frombuffer(PLAIN * repeats, np.float32)
    arrays = [known.copy() for _ in nodes]
    works = [node.begin([array]) for node, array in zip(nodes, arrays, strict=True)]
    for result, array in zip(results(works), arrays, strict=True):
        result.decode_into([array])
        assert (array == known).all()


def tapped(key: bytes) -> bytes:
    """Everything that two peers say to each other in a round."""
    bait = _core.Node(11, [LISTEN], run_fingerprint=RUN, tls_key=key)
    nodes = [_core.Node(10, [], run_fingerprint=RUN, tls_key=key), bait]
    try:
        with recorder(place_of(bait.addresses[0])) as tap:
            told = [(10, 0, []), (11, 1, [f"tcp://127.0.0.1:{tap.address[1]}"])]
            for node in nodes:
                node.set_peers(told)
                node.freeze(1, 1)
                assert node.install(plan(nodes))
            a_round(nodes)
            return tap.everything()
    finally:
        for node in nodes:
            node.close()


def test_a_recorder_between_two_peers_finds_nothing_it_knows() -> None:
    plain = tapped(b"")
    assert plain.count(PLAIN) > 4096  # it does without a key, so it looks in the right place
    wire = tapped(KEY)
    assert len(wire) > 2 * 4096 * len(PLAIN)
    for size in (8, 16):
        assert PLAIN[:size] not in wire
    assert b"DTF1" not in wire  # what every frame begins with


def hello(run: int = RUN, sender: int = 11, to: int = 10) -> bytes:
    """A valid hello of the plain protocol, taken from a peer that dials us."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        node = _core.Node(sender, [], run_fingerprint=run)
        try:
            address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
            node.set_peers([(sender, 1, []), (to, 0, [address])])
            taken, _ = server.accept()
            with taken:
                data = b""
                while len(data) < 64:
                    data += taken.recv(64 - len(data))
                return data
        finally:
            node.close()


def client_hello() -> bytes:
    """What Python's own TLS client says first."""
    context = ssl.create_default_context()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname="peer")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


WORDS = {
    "nothing": lambda: b"",
    "http": lambda: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "hello without tls": hello,
    "tls without the key": client_hello,
    "zeros": lambda: bytes(5000),
    "noise": lambda: os.urandom(5000),
    "huge record": lambda: b"\x16\x03\x01\xff\xff" + os.urandom(5000),
    "huge message": lambda: b"\x16\x03\x01\x40\x00\x01\xff\xff\xff" + bytes(0x4000 - 4),
    "half a record": lambda: client_hello()[:50],
}


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS.keys())
def test_a_stranger_gets_no_byte_and_is_sent_away(words: Any) -> None:
    with team(KEY) as nodes:
        assert answer_to(nodes[0].addresses[0], words()) == b""
        a_round(nodes)


@pytest.mark.parametrize("key", [b"", bytes(32)], ids=["none", "another"])
def test_a_peer_without_the_key_gets_nothing(key: bytes) -> None:
    with team(KEY) as nodes:
        stranger = _core.Node(11, [LISTEN], run_fingerprint=RUN, tls_key=key)
        try:
            with recorder(place_of(nodes[0].addresses[0])) as tap:
                stranger.set_peers([(11, 1, []), (10, 0, [f"tcp://127.0.0.1:{tap.address[1]}"])])
                dialled = threading.Event()
                while sum(len(part) > 0 for part in tap.sent) < 3:
                    dialled.wait(0.01)
                assert not any(link["up"] for link in stranger.links())
            assert not any(tap.answered)
        finally:
            stranger.close()
        a_round(nodes)


def test_a_crowd_takes_little_and_leaves_nothing_behind() -> None:
    """Silent ones, noisy ones, and some that stop within a handshake at each of its bytes."""
    first = client_hello()
    with team(KEY) as nodes:
        a_round(nodes)
        before, memory = descriptors(), resident_bytes()
        for _ in range(3):
            crowd = [dial(nodes[0].addresses[0]) for _ in range(200)]
            for number, one in enumerate(crowd):
                one.sendall((b"", b"x", os.urandom(100), first[: number % len(first)])[number % 4])
            a_round(nodes)
            theirs = descriptors() - before - len(crowd)
            assert theirs <= 64
            for one in crowd:
                one.close()
        for one in [dial(nodes[0].addresses[0]) for _ in range(40)]:  # the oldest are sent away
            one.close()
        a_round(nodes)
        assert descriptors() - before <= 64
        assert resident_bytes() - memory < 32 << 20


@contextmanager
def insider(node: Any) -> Iterator[socket.socket]:
    """A connection that has shown a valid hello, in a run without a token."""
    with dial(node.addresses[0]) as one:
        one.sendall(hello(sender=11, to=10))
        assert len(one.recv(64, socket.MSG_WAITALL)) == 64
        yield one


def frame(kind: int, payload_bytes: int) -> bytes:
    """A frame from slot 1 to slot 0 in the view that is installed, see docs/wire.md."""
    return struct.pack("<4sBBBBQIIQIIQQQ", b"DTF1", kind, 0, 1, 0, VIEW, 0, 0, 1, payload_bytes,
                       0, 0, 0, 0)  # fmt: skip


@pytest.mark.parametrize("size", [0, 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_frames_of_a_wrong_size_end_the_connection_and_take_no_memory(size: int) -> None:
    with team(b"") as nodes:
        a_round(nodes)
        memory = resident_bytes()
        for kind in range(1, 16):
            with insider(nodes[0]) as one:
                one.sendall(frame(kind, size) + os.urandom(200))
                one.shutdown(socket.SHUT_WR)
                until_closed(one)
        assert resident_bytes() - memory < 32 << 20
        a_round(nodes)


def test_a_frame_may_end_at_every_byte() -> None:
    whole = hello(sender=11, to=10)
    with team(b"") as nodes:
        for size in range(len(whole)):
            with dial(nodes[0].addresses[0]) as one:
                one.sendall(whole[:size])
                one.shutdown(socket.SHUT_WR)
                assert until_closed(one) == b""
        a_round(nodes)
