"""Shared state between peers: served from where it lies, fetched in chunks from several at once.

Each chunk has a digest and the version and view it belongs to; what does not fit is thrown away
and asked for elsewhere. When the state moves on faster than it can be fetched, the server is asked
to keep one copy. It decides neither when to fetch nor whether what came may be used
(decotrain/versions.py and the communicator do).
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgpack

from decotrain._core import digest
from decotrain.control.fields import boolean, integer, record, row, sequence, text, u32, u64
from decotrain.errors import MessageError, StateError

CHUNK_BYTES = 4 << 20
HEADER_BYTES_MAX = 256 << 10
CONNECTIONS_MAX = 32
IDLE_S = 20.0
PATIENCE_S = 5.0  # for one answer
PINNED_S = 30.0  # a copy nobody asks for is dropped
SERVERS_MAX = 4
TENSORS_MAX = 4096

_LENGTH = struct.Struct("<I")
_request = record(
    run=u64, peer=u64, tag=u32, what=text(16, 1), tensor=u32, offset=u64, pinned=boolean
)
_answer = record(
    error=text(256),
    version=integer(-1, 2**62),
    view=u64,
    bytes=integer(0, CHUNK_BYTES),
    digest=u64,
    tensors=sequence(row(text(256), text(64), u64), TENSORS_MAX),
)


@dataclass
class Fragment:
    """The registered tensors of one tag. The lock guards bytes and version against each other."""

    names: list[str]
    kinds: list[str]  # dtype and shape, must be equal everywhere
    buffers: list[memoryview]
    version: int
    void: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def describe(self) -> list[list[Any]]:
        return [
            [name, kind, buffer.nbytes]
            for name, kind, buffer in zip(self.names, self.kinds, self.buffers, strict=True)
        ]


@dataclass
class _Pin:
    version: int
    view: int
    copies: list[bytes]
    asked_s: float


class StateServer:
    """Serves fragments to peers that ask. Costs the trainer one short lock for each chunk."""

    def __init__(self, host: str, fingerprint: int, fragments: Mapping[int, Fragment]) -> None:
        self.fingerprint = fingerprint
        self.fragments = fragments
        self.peer = 0  # who we are, and in which view: the control thread keeps them true
        self.view = 0
        self.sent_bytes = 0
        self.pins: dict[int, _Pin] = {}
        self.pin_lock = threading.Lock()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.listener = socket.create_server((host, 0), family=family, backlog=64)
        port = self.listener.getsockname()[1]
        self.address = f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
        self.room = threading.BoundedSemaphore(CONNECTIONS_MAX)
        self.thread = threading.Thread(target=self._accept, name="decotrain-state", daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return  # closed
            if not self.room.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                connection.settimeout(IDLE_S)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while True:
                    asked = _read_map(connection, _request)
                    if asked["run"] != self.fingerprint:
                        return  # a stranger hears nothing
                    header, data = self._answer(asked)
                    _send(connection, header, data)
                    self.sent_bytes += len(data)
        except (OSError, MessageError):
            return  # it hung up, was too slow, or sent no request of ours
        finally:
            self.room.release()

    def _answer(self, asked: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        fragment = self.fragments.get(asked["tag"])
        answer: dict[str, Any] = {
            "error": "", "version": -1, "view": self.view, "bytes": 0, "digest": 0, "tensors": [],
        }  # fmt: skip
        if asked["peer"] != self.peer:
            return {**answer, "error": "another incarnation"}, b""
        if fragment is None or fragment.void:
            return {**answer, "error": "no such state here"}, b""
        pin = self._pin(asked["tag"], fragment) if asked["pinned"] else None
        if asked["what"] == "describe":
            answer["tensors"] = fragment.describe()
            answer["version"] = pin.version if pin else fragment.version
            answer["view"] = pin.view if pin else self.view
            return answer, b""
        tensor, offset = asked["tensor"], asked["offset"]
        if tensor >= len(fragment.buffers) or offset > fragment.buffers[tensor].nbytes:
            return {**answer, "error": "no such chunk"}, b""
        if pin is not None:
            data = pin.copies[tensor][offset : offset + CHUNK_BYTES]
            answer["version"], answer["view"] = pin.version, pin.view
        else:
            with fragment.lock:
                answer["view"] = self.view
                data = bytes(fragment.buffers[tensor][offset : offset + CHUNK_BYTES])
                answer["version"] = fragment.version
        return {**answer, "bytes": len(data), "digest": digest(data)}, data

    def _pin(self, tag: int, fragment: Fragment) -> _Pin:
        with self.pin_lock:
            now = time.monotonic()
            for old in [old for old, pin in self.pins.items() if now - pin.asked_s > PINNED_S]:
                del self.pins[old]
            pin = self.pins.get(tag)
            if pin is None:
                with fragment.lock:
                    view = self.view
                    copies = [bytes(buffer) for buffer in fragment.buffers]
                    pin = _Pin(fragment.version, view, copies, now)
                self.pins.clear()  # at most one copy is kept
                self.pins[tag] = pin
            pin.asked_s = now
            return pin


@dataclass(frozen=True)
class Source:
    """A peer that may serve state."""

    peer: int
    addresses: tuple[str, ...]


@dataclass(frozen=True)
class Fetched:
    version: int
    served: tuple[tuple[int, int], ...]  # peer and the view it served in
    bytes: int


class _Link:
    """One connection to one server."""

    def __init__(self, source: Source, fingerprint: int) -> None:
        self.source = source
        self.fingerprint = fingerprint
        self.socket = self._connect()

    def _connect(self) -> socket.socket:
        problem: Exception = StateError("it has no address for state")
        for address in self.source.addresses:
            host, _, port = address.removeprefix("tcp://").rpartition(":")
            try:
                made = socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE_S)
            except (OSError, ValueError) as error:
                problem = error
                continue
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return made
        raise StateError(f"peer {self.source.peer:016x} serves no state: {problem}")

    def ask(
        self, tag: int, what: str, tensor: int, offset: int, pinned: bool, into: memoryview
    ) -> dict[str, Any]:
        asked = {
            "run": self.fingerprint, "peer": self.source.peer, "tag": tag, "what": what,
            "tensor": tensor, "offset": offset, "pinned": pinned,
        }  # fmt: skip
        who = f"peer {self.source.peer:016x}"
        try:
            _send(self.socket, asked, b"")
            answer = _read_map(self.socket, _answer)
            if answer["error"]:
                raise StateError(f"{who}: {answer['error']}")
            if answer["bytes"] != into.nbytes:
                raise StateError(f"{who} sent {answer['bytes']} bytes, expected {into.nbytes}")
            _read_into(self.socket, into)
        except (OSError, MessageError) as error:
            raise StateError(f"{who} does not serve its state: {error}") from None
        if what == "chunk" and digest(bytes(into)) != answer["digest"]:
            raise StateError(f"{who} sent a chunk that does not match its digest")
        return answer

    def close(self) -> None:
        self.socket.close()


def fetch(
    tag: int,
    fragment: Fragment,
    sources: list[Source],
    fingerprint: int,
    pinned: bool = False,
    warn: Callable[[str], None] = lambda text: None,
) -> Fetched:
    """Writes one consistent version into the fragment's buffers, from several servers at once.

    Raises StateError when nobody can give a whole version: the buffers are then a mixture, and the
    caller keeps the fragment void. A server that fails is named and left alone.
    """
    links, described = _describe(tag, fragment, sources, fingerprint, pinned, warn)
    version = max(one["version"] for one in described.values())
    useful = [link for link in links if described[link.source.peer]["version"] == version]
    if pinned:
        useful = useful[:1]
    chunks = [
        (index, offset)
        for index, buffer in enumerate(fragment.buffers)
        for offset in range(0, buffer.nbytes, CHUNK_BYTES)
    ]
    work = _Work(tag, fragment, version, pinned, chunks, warn)
    threads = [threading.Thread(target=work.run, args=(link,)) for link in useful]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for link in links:
        link.close()
    if work.left:
        raise StateError(work.problem or "no server was left")
    served = {link.source.peer: described[link.source.peer]["view"] for link in useful}
    served.update(work.views)
    total = sum(buffer.nbytes for buffer in fragment.buffers)
    return Fetched(version, tuple(sorted(served.items())), total)


def _describe(
    tag: int,
    fragment: Fragment,
    sources: list[Source],
    fingerprint: int,
    pinned: bool,
    warn: Callable[[str], None],
) -> tuple[list[_Link], dict[int, dict[str, Any]]]:
    links: list[_Link] = []
    described: dict[int, dict[str, Any]] = {}
    problem = "no peer of the view serves state"
    for source in sources:
        if len(links) == (1 if pinned else SERVERS_MAX):
            break
        try:
            link = _Link(source, fingerprint)
            answer = link.ask(tag, "describe", 0, 0, pinned, memoryview(b""))
        except StateError as error:
            problem = str(error)
            warn(problem)
            continue
        if answer["tensors"] != fragment.describe():
            raise StateError(
                f"the state of tag {tag} differs from what is registered here: peer "
                f"{source.peer:016x} has {_brief(answer['tensors'])}, this peer "
                f"{_brief(fragment.describe())}; run the same model and options everywhere"
            )
        links.append(link)
        described[source.peer] = answer
    if not links:
        raise StateError(problem)
    return links, described


def _brief(tensors: list[list[Any]]) -> str:
    shown = ", ".join(f"{name} {kind}" for name, kind, _ in tensors[:4])
    return f"{len(tensors)} tensors ({shown}{', ...' if len(tensors) > 4 else ''})"


class _Work:
    """Chunks still to fetch, shared by the threads of one fetch."""

    def __init__(
        self,
        tag: int,
        fragment: Fragment,
        version: int,
        pinned: bool,
        chunks: list[tuple[int, int]],
        warn: Callable[[str], None],
    ) -> None:
        self.tag, self.fragment, self.version, self.pinned = tag, fragment, version, pinned
        self.todo = list(reversed(chunks))
        self.left = len(chunks)
        self.problem = ""
        self.moved = False
        self.views: dict[int, int] = {}
        self.lock = threading.Lock()
        self.warn = warn

    def run(self, link: _Link) -> None:
        while True:
            with self.lock:
                if not self.todo or self.moved:
                    return
                index, offset = self.todo.pop()
            buffer = self.fragment.buffers[index]
            into = buffer[offset : min(offset + CHUNK_BYTES, buffer.nbytes)]
            try:
                answer = link.ask(self.tag, "chunk", index, offset, self.pinned, into)
                if answer["version"] != self.version:
                    self.moved = True
                    raise StateError("the state moved on while it was fetched")
            except StateError as error:
                with self.lock:
                    self.todo.append((index, offset))
                    self.problem = str(error)
                if not self.moved:
                    self.warn(str(error))
                return
            with self.lock:
                self.left -= 1
                peer = link.source.peer
                self.views[peer] = max(self.views.get(peer, 0), answer["view"])


def _send(connection: socket.socket, header: dict[str, Any], data: bytes) -> None:
    packed: bytes = msgpack.packb(header)
    connection.sendall(_LENGTH.pack(len(packed)) + packed)
    if data:
        connection.sendall(data)


def _read_map(connection: socket.socket, check: Callable[[Any], Any]) -> dict[str, Any]:
    head = bytearray(_LENGTH.size)
    _read_into(connection, memoryview(head))
    (length,) = _LENGTH.unpack(head)
    if not 0 < length <= HEADER_BYTES_MAX:
        raise MessageError(f"a header of {length} bytes")
    packed = bytearray(length)
    _read_into(connection, memoryview(packed))
    try:
        content = msgpack.unpackb(bytes(packed), raw=False, strict_map_key=True)
    except Exception:  # msgpack documents no common base for what it raises
        raise MessageError("not msgpack") from None
    checked: dict[str, Any] = check(content)
    return checked


def _read_into(connection: socket.socket, into: memoryview) -> None:
    while into:
        count = connection.recv_into(into)
        if count == 0:
            raise MessageError("the connection ended")
        into = into[count:]
