"""What a process needs to know to join a run: from arguments, the environment, and this machine.

It opens no connection and sends nothing; a run of one gets its coordinator here.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from decotrain.control import member as mb
from decotrain.control.agent import new_peer_id
from decotrain.control.coordinator import Options
from decotrain.control.server import ServerThread
from decotrain.control.transport import split_address
from decotrain.errors import ConfigError


@dataclass(frozen=True)
class Asked:
    """Which run, as whom, and where this peer can be reached."""

    address: str  # of the coordinator
    who: mb.Identity
    fingerprint: int  # what peers of one run have in common
    listen: list[str]  # of the data plane
    server: ServerThread | None  # our own coordinator, in a run of one


def ask(
    address: str | None,
    name: str | None,
    run: str | None,
    token_file: str | None,
    config: Mapping[str, Any] | None,
    min_peers: int | None,
    listen: str | Sequence[str] | None,
) -> Asked:
    """Arguments first, then the environment that `decotrain run` sets, then this machine."""
    address = address or os.environ.get("DECOTRAIN_JOIN")
    if not address:
        raise ConfigError(
            "no coordinator to join: give an address (HOST:PORT), start this script with"
            " `decotrain run --join HOST:PORT`, or join 'local' for a run of one"
        )
    run = run or os.environ.get("DECOTRAIN_RUN") or "default"
    host = "127.0.0.1" if address == "local" else own_host(address)
    places = listen_addresses(listen, host)
    number = fingerprint(run, token_file or os.environ.get("DECOTRAIN_TOKEN_FILE"))
    who = mb.Identity(
        run=run,
        peer=new_peer_id(),
        name=name or os.environ.get("DECOTRAIN_NAME") or f"{socket.gethostname()}:{os.getpid()}",
        host=socket.gethostname(),
        launch=os.environ.get("DECOTRAIN_LAUNCH", ""),
        config=dict(config) if config is not None else None,
        min_peers=min_peers or 0,
    )
    server = None
    if address == "local":
        server = ServerThread(Options(run=run, min_peers=1))
        address = server.address
    return Asked(address, who, number, places, server)


def fingerprint(run: str, token_file: str | None) -> int:
    """What peers of one run have in common: its name and token."""
    token = b""
    if token_file:
        try:
            with open(token_file, "rb") as file:
                token = file.read(4096).strip()
        except OSError as error:
            raise ConfigError(
                f"cannot read the token file {token_file}: {error.strerror}"
            ) from None
    digest = hashlib.blake2b(run.encode() + b"\0" + token, digest_size=8).digest()
    return int.from_bytes(digest, "big")


def own_host(address: str) -> str:
    """The address of this machine on its way to the coordinator. Sends nothing."""
    host, port = split_address(address)
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"


def listen_addresses(listen: str | Sequence[str] | None, host: str) -> list[str]:
    """What the node listens on: TCP where others can reach us, and a Unix socket for neighbours."""
    if listen is None:
        listen = os.environ.get("DECOTRAIN_LISTEN") or host
    wanted = [listen] if isinstance(listen, str) else list(listen)
    places = []
    for text in wanted:
        if text.startswith("unix://"):
            places.append(text)
            continue
        bare = text.removeprefix("tcp://")
        if bare.count(":") != 1 and not bare.startswith("["):
            bare = f"[{bare}]:0" if ":" in bare else f"{bare}:0"
        place, port = split_address(bare)
        try:
            numeric = socket.getaddrinfo(place, port, type=socket.SOCK_STREAM)[0][4][0]
        except OSError as error:
            raise ConfigError(f"cannot listen on {text}: {error}") from None
        places.append(
            f"tcp://[{numeric}]:{port}" if ":" in str(numeric) else f"tcp://{numeric}:{port}"
        )
    return places
