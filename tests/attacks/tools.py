"""What an attacker has: a recorder between two ends, sockets, and time.

Sockets block with a bound, so that a test that waits for an end sees it as soon as it comes.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

WAIT_S = 30.0


class Recorder:
    """A proxy in front of an address that keeps every byte, by direction and connection."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = self.listener.getsockname()
        self.sent: list[bytearray] = []  # by those who dial
        self.answered: list[bytearray] = []
        self.open: list[socket.socket] = []
        self.threads = [threading.Thread(target=self._accept, daemon=True)]
        self.threads[0].start()

    def everything(self) -> bytes:
        return b"".join(bytes(part) for part in self.sent + self.answered)

    def close(self) -> None:
        for one in (self.listener, *self.open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self.threads:
            thread.join(WAIT_S)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
                far = socket.create_connection(self.target)
            except OSError:
                return
            self.open += [near, far]
            self.sent.append(bytearray())
            self.answered.append(bytearray())
            for one, other, kept in (
                (near, far, self.sent[-1]),
                (far, near, self.answered[-1]),
            ):
                thread = threading.Thread(target=_copy, args=(one, other, kept), daemon=True)
                self.threads.append(thread)
                thread.start()


def _copy(one: socket.socket, other: socket.socket, kept: bytearray) -> None:
    with suppress(OSError):
        while data := one.recv(1 << 16):
            kept += data
            other.sendall(data)
    with suppress(OSError):
        other.shutdown(socket.SHUT_RDWR)


@contextmanager
def recorder(target: tuple[str, int]) -> Iterator[Recorder]:
    made = Recorder(target)
    try:
        yield made
    finally:
        made.close()


def place_of(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return host, int(port)


def dial(address: str) -> socket.socket:
    made = socket.create_connection(place_of(address), WAIT_S)
    made.settimeout(WAIT_S)
    return made


def answer_to(address: str, data: bytes) -> bytes:
    """All that comes back until the other side closes."""
    with dial(address) as one, suppress(ConnectionError):
        one.sendall(data)
        return until_closed(one)
    return b""


def until_closed(one: socket.socket) -> bytes:
    got = b""
    with suppress(ConnectionError):
        while data := one.recv(1 << 16):
            got += data
    return got


def descriptors(process: int | str = "self") -> int:
    return len(os.listdir(f"/proc/{process}/fd"))


def resident_bytes(process: int | str = "self") -> int:
    with open(f"/proc/{process}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
