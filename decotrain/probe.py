"""Measures the way between two machines: round trip, clock, bytes a second, can it dial us back.

One machine answers (`decotrain doctor --answer PORT`), the other asks. Plain TCP, no secrets: the
answering side sends zeros, takes bytes and dials back who asks, for seconds, while it runs.
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence

from decotrain.errors import ConfigError, UnreachableError

WORD_BYTES = 64  # a request is one line
CONNECTIONS_MAX = 32
ANSWER_S = 20.0  # a connection at most
DIAL_S = 3.0
MEASURE_S_MAX = 5.0
BLOCK = bytes(1 << 18)


class Answerer:
    """Listens when constructed; every connection asks one thing."""

    def __init__(self, host: str, port: int) -> None:
        try:
            self.socket = socket.create_server((host, port), backlog=CONNECTIONS_MAX)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another port"
            ) from None
        self.port: int = self.socket.getsockname()[1]
        self.places = threading.BoundedSemaphore(CONNECTIONS_MAX)
        self.thread = threading.Thread(target=self._serve, name="probe", daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, source = self.socket.accept()
            except OSError:  # closed
                return
            if not self.places.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._one, args=(connection, source[0]), daemon=True).start()

    def _one(self, connection: socket.socket, source: str) -> None:
        try:
            with connection:
                connection.settimeout(ANSWER_S)
                _answer(connection, source)
        except (OSError, ValueError):
            pass  # whoever asked sees the connection end
        finally:
            self.places.release()


def _answer(connection: socket.socket, source: str) -> None:
    word, _, number = _line(connection).partition(" ")
    if word == "time":
        connection.sendall(f"{time.time():.6f}\n".encode())
    elif word == "dial":
        connection.sendall(b"yes\n" if can_dial(source, int(number)) else b"no\n")
    elif word == "give":
        end_s = time.monotonic() + min(float(number), MEASURE_S_MAX)
        while time.monotonic() < end_s:
            connection.sendall(BLOCK)
    elif word == "take":
        while connection.recv(len(BLOCK)):
            pass


def _line(connection: socket.socket) -> str:
    text = b""
    while not text.endswith(b"\n"):
        # One byte at a time: what follows the line belongs to whoever reads on.
        part = connection.recv(1) if len(text) < WORD_BYTES else b""
        if not part:
            raise ValueError("no request")
        text += part
    return text.decode("ascii").strip()


def can_dial(host: str, port: int) -> bool:
    """Does anybody listen there, as seen from here?"""
    try:
        socket.create_connection((host, port), timeout=DIAL_S).close()
    except (OSError, OverflowError):
        return False
    return True


def round_trip_s(host: str, port: int, times: int = 5) -> float:
    """The least of some connects: a TCP handshake is one round trip."""
    best_s = float("inf")
    for _ in range(times):
        began_s = time.perf_counter()
        _connect(host, port).close()
        best_s = min(best_s, time.perf_counter() - began_s)
    return best_s


def clock_offset_s(host: str, port: int) -> float:
    """Their clock less ours, good to half a round trip."""
    with _connect(host, port) as connection:
        began_s = time.time()
        connection.sendall(b"time\n")
        theirs = float(_line(connection))
        return theirs - (began_s + time.time()) / 2


def dials_back(host: str, port: int, own_port: int) -> bool:
    """Can they reach a port of ours?"""
    with _connect(host, port) as connection:
        connection.settimeout(2 * DIAL_S)
        connection.sendall(f"dial {own_port}\n".encode())
        return _line(connection) == "yes"


def rate_bps(host: str, port: int, streams: int, give: bool, seconds: float) -> float:
    """Bits a second over so many connections: from them (`give`) or to them."""
    open_ = [_connect(host, port) for _ in range(streams)]
    try:
        for connection in open_:
            connection.sendall(f"give {seconds + 1}\n".encode() if give else b"take\n")
            connection.setblocking(False)
        return 8 * _pump(open_, give, seconds) / seconds
    finally:
        for connection in open_:
            connection.close()


def _pump(connections: Sequence[socket.socket], give: bool, seconds: float) -> int:
    """Bytes moved within the time, after a fifth of it for the windows to open."""
    scratch = bytearray(len(BLOCK))
    move: Callable[[socket.socket], int] = (
        (lambda one: one.recv_into(scratch)) if give else (lambda one: one.send(BLOCK))
    )
    moved = 0
    with selectors.DefaultSelector() as selector:
        for connection in connections:
            selector.register(connection, selectors.EVENT_READ if give else selectors.EVENT_WRITE)
        start_s = time.monotonic() + seconds / 5
        while (now_s := time.monotonic()) < start_s + seconds:
            for key, _ in selector.select(start_s + seconds - now_s):
                count = move(key.fileobj)  # type: ignore[arg-type]
                moved += count if now_s >= start_s else 0
    return moved


def _connect(host: str, port: int) -> socket.socket:
    try:
        return socket.create_connection((host, port), timeout=DIAL_S)
    except OSError as error:
        raise UnreachableError(
            f"{host}:{port} cannot be reached ({error.strerror or error}): check the address, that"
            " something listens there, and the firewall between"
        ) from None
