"""Addresses and ZeroMQ sockets of the control plane: names in, safe sockets out.

It knows no message. With a token every socket is CURVE: the coordinator's key and the one key it
lets in follow from the token, so neither side talks to anybody who does not hold it. What a
handshake that fails says about the other side is told here too.
"""

from __future__ import annotations

import ipaddress
import os
import socket as sockets
import struct
from collections.abc import Callable
from typing import Any

import zmq
from zmq.utils import z85

from decotrain.control.fields import brief
from decotrain.control.messages import MESSAGE_BYTES_MAX
from decotrain.control.token import VARIABLE, PeerKey, Secret, Token
from decotrain.errors import ConfigError, UnreachableError

DEFAULT_PORT = 29400
INSECURE = "DECOTRAIN_INSECURE"
DOMAIN = b"decotrain"  # without one libzmq asks no ZAP handler
ZAP = "inproc://zeromq.zap.01"
FAILURES_MAX = 3  # handshakes in a row, before it is no accident
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01"  # ZMTP 3.1, as far as the other side waits for it
GREETING_BYTES = 64
PROBE_S = 2.0
LAST_LOOK_S = 0.5  # at an address whose coordinator did not answer in time
ZMQ_MIN = (4, 3, 5)  # older ones have known holes before authentication
TAIL_BYTES = 16  # of a peer's routing id: random, known to it and the coordinator


def split_address(address: str) -> tuple[str, int]:
    """'HOST', 'HOST:PORT', '[IPV6]:PORT', each with or without tcp:// -> (host, port)."""
    text = address.strip()
    if text.startswith("tcp://"):
        text = text[len("tcp://") :]
    host, port = text, str(DEFAULT_PORT)
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        if rest:
            port = rest[1:] if rest.startswith(":") else "?"
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    if not host or any(letter.isspace() or letter in "/@" for letter in host):
        raise ConfigError(f"{address!r} is no address; write HOST:PORT, for example 10.0.0.7:29400")
    try:
        host.encode("idna")
    except UnicodeError:
        raise ConfigError(
            f"{brief(address)} is no address: a part of the name between two dots is empty or too"
            " long"
        ) from None
    if not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{address!r} has no valid port; write HOST:PORT with PORT in 0..65535")
    return host, int(port)


def with_port(address: str) -> str:
    """The address as it is dialled, for messages: who left the port out sees which one it is."""
    host, port = split_address(address)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_name(address: str) -> None:
    """ZeroMQ tries for ever to resolve a name that is not there; a person wants to be told."""
    host, port = split_address(address)
    try:
        sockets.getaddrinfo(host, port, type=sockets.SOCK_STREAM)
    except OSError as error:
        raise UnreachableError(  # as while a machine starts: it may come
            f"the name {host} does not resolve ({error.strerror or error}): check its spelling and"
            " this machine's network, or give the number of the address"
        ) from None


def no_answer(address: str, seconds: float) -> UnreachableError:
    """No coordinator has answered in that time. A connection tells who is at fault."""
    try:
        sockets.create_connection(split_address(address), timeout=LAST_LOOK_S).close()
    except ConnectionRefusedError:
        why = "nothing listens on that port (connection refused): check the address, and that it"
        why += " runs"
    except OSError as error:
        why = f"no connection ({error.strerror or error}): check the address, that the machine is"
        why += " up, and that the port is open"
    else:
        why = "a connection is made, and no coordinator speaks: check host and port, and that it is"
        why += " not stopped"
    return UnreachableError(
        f"no coordinator answers at {with_port(address)} within {seconds:g} s: {why}"
    )


def endpoint(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def check_trust(address: str, token: Secret | None, insecure: bool) -> None:
    """Without a token only this machine may talk, unless somebody says that the network is safe."""
    if token is not None or insecure or os.environ.get(INSECURE) == "1":
        return
    host, port = split_address(address)
    try:
        found = sockets.getaddrinfo(host, port, type=sockets.SOCK_STREAM)
    except OSError:
        return  # whoever uses the address says so
    if all(ipaddress.ip_address(str(entry[4][0])).is_loopback for entry in found):
        return
    raise ConfigError(
        f"{address} is open to other machines, and without a token whoever reaches it is in the"
        " run: `decotrain token new --out run.token`, and give every machine that file"
        f" (--token-file, token_file= or {VARIABLE}); or, on a network where you trust everybody,"
        f" say so (--insecure, insecure=True or {INSECURE}=1)"
    )


class Gate:
    """The ZAP handler: the key of the run's token in, and the keys of peers that `knows` says yes
    to; everybody else out. Polled by whoever owns the context. A peer's own key is the user id of
    all its messages, and that of the token is none.
    """

    def __init__(
        self, context: zmq.Context[Any], token: Token, knows: Callable[[bytes], bool]
    ) -> None:
        self.socket: zmq.Socket[Any] = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(ZAP)
        self.key = z85.decode(token.client_keys[0])
        self.knows = knows
        self.refused = 0

    def answer(self) -> None:
        """All requests that wait."""
        while True:
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            sender, empty, version, request, domain, _, _, mechanism, *keys = parts
            user = b"" if keys == [self.key] else b"".join(keys).hex().encode()
            known = domain == DOMAIN and mechanism == b"CURVE" and (not user or self.knows(user))
            self.refused += not known
            status = [b"200", b"OK", user] if known else [b"400", b"unknown key", b""]
            self.socket.send_multipart([sender, empty, version, request, *status, b""])

    def close(self) -> None:
        self.socket.close()


class Handshakes:
    """What became of a connecting socket's handshakes, and what that says about the other side."""

    EVENTS = (
        zmq.EVENT_HANDSHAKE_SUCCEEDED
        | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        | zmq.EVENT_DISCONNECTED
    )

    def __init__(self, socket: zmq.Socket[Any], address: str, token: Secret | None) -> None:
        self.socket, self.address, self.secured = socket, address, token is not None
        self.single = isinstance(token, PeerKey)
        self.monitor: zmq.Socket[Any] = socket.get_monitor_socket(self.EVENTS)
        self.failures = 0
        self.accepted = False  # once: then it is ours, whatever happens later
        self.connected = False
        self.stuck = False  # libzmq dials no more after what it calls a breach of the protocol
        self.wrong: str | None = None  # why nobody there talks to us

    def look(self) -> str | None:
        """Why there is no use in going on, None while there is hope. To be called again and again:
        libzmq waits for whoever does not read its events."""
        while True:
            try:
                # pyzmq's own function for this imports asyncio: a third of a small command's start
                kind, _ = struct.unpack("=hi", self.monitor.recv_multipart(zmq.NOBLOCK)[0])
            except zmq.Again:
                return self.wrong
            if kind in (zmq.EVENT_HANDSHAKE_SUCCEEDED, zmq.EVENT_DISCONNECTED):
                self.connected = kind == zmq.EVENT_HANDSHAKE_SUCCEEDED
                self.accepted = self.accepted or self.connected
                continue
            self.failures += 1
            self.stuck = kind == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            denied = kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH  # a word, no accident
            if (self.stuck or denied or self.failures == FAILURES_MAX) and not self.accepted:
                self.wrong = self._why()

    def _why(self) -> str | None:
        """Which side hangs up first is a matter of luck, so its greeting is asked for."""
        place = self.address.removeprefix("tcp://")
        mechanism = _greeting_of(self.address)
        if mechanism is None:
            self.failures = 0  # it has just gone: nothing is known
            return None
        if mechanism == b"CURVE" and self.single:
            return (
                f"the coordinator at {place} does not accept this peer's key: it was taken away"
                " (`decotrain kick`) or is of another run; ask its operator for a new one"
            )
        if mechanism == b"CURVE" and self.secured:
            return (
                f"the coordinator at {place} does not accept our token: it was started with another"
                " one; copy the token file from its machine"
            )
        if mechanism == b"CURVE":
            return (
                f"the coordinator at {place} wants the run's token: copy the token file from its"
                f" machine and name it (--token-file, token_file= or {VARIABLE})"
            )
        if mechanism == b"NULL" and self.secured:
            return (
                f"the coordinator at {place} runs without a token, and we have one: start it with"
                " --token-file, or do without the token here"
            )
        return f"what answers at {place} is no coordinator: check host and port"

    def close(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close()


def _greeting_of(address: str) -> bytes | None:
    """The mechanism of the ZMTP greeting at the address, empty for no ZMTP; None: nobody there."""
    greeting = b""
    try:
        with sockets.create_connection(split_address(address), PROBE_S) as probe:
            probe.settimeout(PROBE_S)
            probe.sendall(GREETING)
            while len(greeting) < GREETING_BYTES:
                part = probe.recv(GREETING_BYTES - len(greeting))
                if not part:
                    break
                greeting += part
    except TimeoutError:
        return b""
    except OSError:
        return None if not greeting else b""
    return greeting[12:32].rstrip(b"\0") if greeting[:1] == b"\xff" else b""


def libzmq() -> tuple[str, str]:
    """Its version, and what to do about it; empty: it will do."""
    old = zmq.zmq_version_info() < ZMQ_MIN
    wheel = "`pip install --force-reinstall --only-binary :all: pyzmq` brings a newer one"
    return zmq.zmq_version(), wheel if old else ""


def _guard(socket: zmq.Socket[Any]) -> None:
    found, remedy = libzmq()
    if remedy:
        raise ConfigError(f"libzmq {found} is too old: {remedy}")
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX + 4096)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 5000)
    socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 10000)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 20)
    socket.setsockopt(zmq.SNDHWM, 1000)
    socket.setsockopt(zmq.RCVHWM, 1000)


def _secure(socket: zmq.Socket[Any], own: tuple[bytes, bytes], server: bytes | None) -> None:
    """CURVE, as the server without a server's key, as its client with one."""
    if not zmq.has("curve"):
        raise ConfigError(
            "this pyzmq was built without libsodium, which a token needs: install its wheel with"
            " `pip install --force-reinstall --only-binary :all: pyzmq`"
        )
    socket.setsockopt(zmq.CURVE_PUBLICKEY, own[0])
    socket.setsockopt(zmq.CURVE_SECRETKEY, own[1])
    if server is not None:
        socket.setsockopt(zmq.CURVE_SERVERKEY, server)
    else:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)


def bind_router(
    context: zmq.Context[Any], address: str, token: Token | None = None
) -> tuple[zmq.Socket[Any], str]:
    """A listening socket, and the address it got (port 0 takes a free one)."""
    host, port = split_address(address)
    socket = context.socket(zmq.ROUTER)
    try:
        _guard(socket)
        if token is not None:
            _secure(socket, token.server_keys, None)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a peer that redials keeps its identity
        socket.setsockopt(zmq.BACKLOG, 1024)
        family, *_, place = sockets.getaddrinfo(
            host, port, type=sockets.SOCK_STREAM, flags=sockets.AI_PASSIVE
        )[0]
        socket.setsockopt(zmq.IPV6, int(family == sockets.AF_INET6))
        socket.bind(endpoint(str(place[0]), port))
    except (zmq.ZMQError, sockets.gaierror) as error:
        socket.close()
        if isinstance(error, zmq.ZMQError) and error.errno == zmq.EADDRINUSE:
            raise ConfigError(
                f"port {port} of {host} is in use: another coordinator may run there;"
                " stop it or listen on another port"
            ) from None
        why = error.strerror or str(error)
        raise ConfigError(
            f"cannot listen on {address}: {why.partition(' (addr=')[0]}; name an address of this"
            " machine (`ip address` lists them), or 0.0.0.0 for all of them"
        ) from None
    return socket, socket.getsockopt_string(zmq.LAST_ENDPOINT)


def connect_dealer(
    context: zmq.Context[Any],
    address: str,
    identity: bytes | None = None,
    token: Secret | None = None,
) -> zmq.Socket[Any]:
    """Connects, and reconnects for ever with growing pauses. Sends nothing while it cannot."""
    host, port = split_address(address)
    socket: zmq.Socket[Any] = context.socket(zmq.DEALER)
    _guard(socket)
    if token is not None:
        _secure(socket, token.client_keys, token.server_public)
    if identity is not None:
        socket.setsockopt(zmq.IDENTITY, identity)
        socket.setsockopt(zmq.IMMEDIATE, 1)  # messages for a dead connection are not kept
    socket.setsockopt(zmq.RECONNECT_IVL, 100)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
    socket.setsockopt(zmq.CONNECT_TIMEOUT, 5000)
    socket.setsockopt(zmq.IPV6, 1)
    try:
        socket.connect(endpoint(host, port))
    except zmq.ZMQError as error:
        socket.close()
        raise ConfigError(f"cannot use the address {address}: {error}") from None
    return socket
