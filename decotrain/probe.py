"""Measures the way between two machines: round trip, clock, bytes a second, can it dial us back.

One machine answers (`decotrain doctor --answer PORT`, or a coordinator that is asked), the other
asks. Plain TCP: the answering side sends zeros, takes bytes and dials back who asks, for seconds.
With a key it does so only for who proves that it knows the key; everybody else gets a number.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from decotrain.errors import ConfigError, RefusedError, UnreachableError

LINE_BYTES = 128  # a request is one line
NUMBER_BYTES = 16  # random, so that no request is good twice
CONNECTIONS_MAX = 32
ANSWER_S = 20.0  # a connection at most
STRANGER_S = 5.0  # until there is a request
DIAL_S = 3.0
FIRST_S = 5.0  # for the first byte of a measurement
MEASURE_S_MAX = 5.0
BLOCK = bytes(1 << 18)


class Answerer:
    """Listens when constructed; every connection asks one thing. Empty host: all interfaces."""

    def __init__(self, host: str, port: int, key: bytes) -> None:
        self.key = key  # empty: for anybody
        both = not host and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
        try:
            self.socket = socket.create_server(
                (host, port), family=family, backlog=CONNECTIONS_MAX, dualstack_ipv6=both
            )
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise ConfigError(
                f"cannot listen on {host or '*'}:{port}: {why}; choose another port"
            ) from None
        self.port: int = self.socket.getsockname()[1]
        self.places = threading.BoundedSemaphore(CONNECTIONS_MAX)
        self.done = threading.Event()  # who has the key says so: it has measured
        self.lock = threading.Lock()
        self.open, self.used_s = 0, time.monotonic()  # connections, and when the last one ended
        self.thread = threading.Thread(target=self._serve, name="probe", daemon=True)
        self.thread.start()

    def quiet_s(self) -> float:
        """For how long nobody has been connected."""
        with self.lock:
            return 0.0 if self.open else time.monotonic() - self.used_s

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
        self._count(1)
        try:
            with connection:
                connection.settimeout(STRANGER_S)
                number = secrets.token_hex(NUMBER_BYTES)
                connection.sendall(f"{number}\n".encode())
                request, _, proof = _line(connection).rpartition(" ")
                if hmac.compare_digest(proof, _proof(self.key, number, request)):
                    connection.settimeout(ANSWER_S)
                    if request == "done":
                        self.done.set()
                    _answer(connection, source, request)
        except (OSError, ValueError, TypeError):
            pass  # whoever asked sees the connection end
        finally:
            self._count(-1)
            self.places.release()

    def _count(self, change: int) -> None:
        with self.lock:
            self.open, self.used_s = self.open + change, time.monotonic()


def _proof(key: bytes, number: str, request: str) -> str:
    text = f"{number} {request}".encode()
    return hashlib.blake2b(text, key=key, person=b"probe", digest_size=16).hexdigest()


def _answer(connection: socket.socket, source: str, request: str) -> None:
    word, _, number = request.partition(" ")
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
        part = connection.recv(1) if len(text) < LINE_BYTES else b""
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


@dataclass(frozen=True)
class Way:
    """To an Answerer elsewhere."""

    host: str
    port: int
    key: bytes

    def clock_offset_s(self) -> float:
        """Their clock less ours, good to half a round trip."""
        with self._ask("time") as connection:
            began_s = time.time()
            theirs = float(self._said(connection))
            return theirs - (began_s + time.time()) / 2

    def dials_back(self, own_port: int) -> bool:
        """Can they reach a port of ours?"""
        with self._ask(f"dial {own_port}") as connection:
            connection.settimeout(2 * DIAL_S)
            return self._said(connection) == "yes"

    def done(self) -> None:
        """They need not answer any longer. Who is from before this word waits for a minute."""
        self._ask("done").close()

    def rate_bps(self, streams: int, give: bool, seconds: float) -> float:
        """Bits a second over so many connections: from them (`give`) or to them."""
        open_: list[socket.socket] = []
        try:
            for _ in range(streams):
                open_.append(self._ask(f"give {seconds + 1}" if give else "take"))
            for connection in open_:
                connection.setblocking(False)
            return 8 * _pump(open_, give, seconds) / seconds
        except (BrokenPipeError, ConnectionResetError):
            raise self._refused() from None
        finally:
            for connection in open_:
                connection.close()

    def _ask(self, request: str) -> socket.socket:
        connection = _connect(self.host, self.port)
        try:
            number = _line(connection)
            connection.sendall(f"{request} {_proof(self.key, number, request)}\n".encode())
        except (OSError, ValueError):
            connection.close()
            raise self._refused() from None
        return connection

    def _said(self, connection: socket.socket) -> str:
        try:
            return _line(connection)
        except (OSError, ValueError):
            raise self._refused() from None

    def _refused(self) -> RefusedError:
        return RefusedError(
            f"{self.host}:{self.port} does not answer us: no `decotrain doctor --answer` runs"
            " there, or it was started with another token (--token-file on both)"
        )


def _pump(connections: Sequence[socket.socket], give: bool, seconds: float) -> int:
    """Bytes moved within the time. It counts from the first byte, which may be long in coming, and
    after a fifth of it for the windows to open."""
    scratch = bytearray(len(BLOCK))
    move: Callable[[socket.socket], int] = (
        (lambda one: one.recv_into(scratch)) if give else (lambda one: one.send(BLOCK))
    )
    moved, from_s = 0, math.inf
    end_s = time.monotonic() + FIRST_S
    with selectors.DefaultSelector() as selector:
        for connection in connections:
            selector.register(connection, selectors.EVENT_READ if give else selectors.EVENT_WRITE)
        while (now_s := time.monotonic()) < end_s and selector.get_map():
            for key, _ in selector.select(end_s - now_s):
                count = move(key.fileobj)  # type: ignore[arg-type]
                if not count:  # they have ended
                    selector.unregister(key.fileobj)
                elif math.isinf(from_s):
                    from_s = time.monotonic() + seconds / 5
                    end_s = from_s + seconds
                moved += count if now_s >= from_s else 0
    return moved


def _connect(host: str, port: int) -> socket.socket:
    try:
        return socket.create_connection((host, port), timeout=DIAL_S)
    except OSError as error:
        raise UnreachableError(
            f"{host}:{port} cannot be reached ({error.strerror or error}): check the address, that"
            " something listens there, and the firewall between"
        ) from None
