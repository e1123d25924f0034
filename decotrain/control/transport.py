"""Addresses and ZeroMQ sockets of the control plane: names in, safe sockets out.

It knows no message. Every limit that keeps a stranger cheap is set here, in one place.
"""

from __future__ import annotations

import socket as sockets
from typing import Any

import zmq

from decotrain.control.messages import MESSAGE_BYTES_MAX
from decotrain.errors import ConfigError

DEFAULT_PORT = 29400


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
    if not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{address!r} has no valid port; write HOST:PORT with PORT in 0..65535")
    return host, int(port)


def endpoint(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _guard(socket: zmq.Socket[Any]) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX + 4096)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 5000)
    socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 10000)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 20)
    socket.setsockopt(zmq.SNDHWM, 1000)
    socket.setsockopt(zmq.RCVHWM, 1000)


def bind_router(context: zmq.Context[Any], address: str) -> tuple[zmq.Socket[Any], str]:
    """A listening socket, and the address it got (port 0 takes a free one)."""
    host, port = split_address(address)
    socket = context.socket(zmq.ROUTER)
    try:
        _guard(socket)
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
        raise ConfigError(f"cannot listen on {address}: {error}") from None
    return socket, socket.getsockopt_string(zmq.LAST_ENDPOINT)


def connect_dealer(
    context: zmq.Context[Any], address: str, identity: bytes | None = None
) -> zmq.Socket[Any]:
    """Connects, and reconnects for ever with growing pauses. Sends nothing while it cannot."""
    host, port = split_address(address)
    socket: zmq.Socket[Any] = context.socket(zmq.DEALER)
    _guard(socket)
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
