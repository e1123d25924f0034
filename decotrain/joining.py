"""What a process needs to know to join a run: from arguments, the environment, and this machine.

It opens no connection and sends nothing; a run of one gets its coordinator here, and who asked to
join waits here for the coordinator's welcome.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import ipaddress
import math
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from decotrain.control import member as mb
from decotrain.control import messages as m
from decotrain.control.agent import new_peer_id
from decotrain.control.coordinator import Options
from decotrain.control.fields import given
from decotrain.control.maps import SLOTS
from decotrain.control.server import ServerThread
from decotrain.control.token import Secret, find, whole
from decotrain.control.transport import check_name, check_trust, no_answer, split_address
from decotrain.errors import ConfigError
from decotrain.farewell import FILE

if TYPE_CHECKING:
    from decotrain.communicator import Communicator

UNIX = "unix://"  # any free name
WAIT_SLICE_S = 0.2  # so that an interrupt is seen
SIOCGIFADDR = 0x8915  # linux/sockios.h


@dataclass(frozen=True)
class Asked:
    """Which run, as whom, and where this peer can be reached."""

    address: str  # of the coordinator
    who: mb.Identity
    token: Secret | None  # None: whoever reaches us may talk
    fingerprint: int  # what peers of one run have in common
    listen: list[str]  # of the data plane
    advertise: list[str]  # what others are told instead of the TCP addresses we listen on
    server: ServerThread | None  # our own coordinator, in a run of one

    def tls(self) -> dict[str, Any]:
        """What the node needs for TLS: none without a token."""
        if self.token is None:
            return {}
        return {"tls_key": self.token.data_key(self.who.run), "pair_keys": True}


def patience(grace_s: float, quorum: float, late_s: float | None) -> dict[str, float]:
    """Options of the core about peers that are late."""
    if not (math.isfinite(grace_s) and grace_s >= 0.0):
        raise ConfigError(f"grace_s={grace_s}: give seconds, or 0 to wait for every contribution")
    if not 0.0 < quorum <= 1.0:
        raise ConfigError(f"quorum={quorum}: give a fraction of the weight, above 0 and at most 1")
    if quorum == 1.0 and grace_s > 0.0:
        raise ConfigError(
            f"grace_s={grace_s} with quorum=1.0 waives nobody: give a lower quorum, such as 0.5"
        )
    if late_s is None:
        late_s = max(2.0, 4 * grace_s) if grace_s > 0 else 0.0
    if not (math.isfinite(late_s) and late_s >= 0.0):
        raise ConfigError(f"late_s={late_s}: give seconds, or 0 to leave late peers active")
    return {"grace_s": grace_s, "quorum": quorum, "done_bound_s": late_s}


def ask(
    address: str | None,
    name: str | None,
    run: str | None,
    token_file: str | None,
    config: Mapping[str, Any] | None,
    min_peers: int | None,
    listen: str | Sequence[str] | None,
    advertise: str | Sequence[str] | None = None,
    insecure: bool = False,
    slot: int | None = None,
) -> Asked:
    """Arguments first, then the environment that `decotrain run` sets, then this machine."""
    if slot is not None and not 0 <= slot < SLOTS:
        raise ConfigError(f"slot={slot}: a run has the slots 0 to {SLOTS - 1}")
    if FILE in os.environ and os.environ.get("RANK", "0") != "0":
        raise ConfigError(
            f"process {os.environ['RANK']} of this peer cannot join: a peer of several processes is"
            " one peer, and process 0 joins for it; send its results to the others with"
            " torch.distributed"
        )
    address = address or os.environ.get("DECOTRAIN_JOIN")
    if not address:
        raise ConfigError(
            "no coordinator to join: give an address (HOST:PORT), start this script with"
            " `decotrain run --join HOST:PORT`, or join 'local' for a run of one"
        )
    run = run or os.environ.get("DECOTRAIN_RUN") or "default"
    if address != "local":
        check_name(address)
    host = "127.0.0.1" if address == "local" else own_host(address)
    if listen is None:
        listen = [] if os.environ.get("DECOTRAIN_DIAL_ONLY") else os.environ.get("DECOTRAIN_LISTEN")
    places = listen_addresses(host if listen is None else listen)
    told = advertised(advertise or os.environ.get("DECOTRAIN_ADVERTISE") or "")
    token = find(token_file)
    for place in ([] if address == "local" else [address]) + places:
        if not place.startswith("unix://"):
            check_trust(place, token, insecure)
    who = mb.Identity(
        run=run,
        peer=new_peer_id(),
        name=name or os.environ.get("DECOTRAIN_NAME") or f"{socket.gethostname()}:{os.getpid()}",
        host=socket.gethostname(),
        launch=os.environ.get("DECOTRAIN_LAUNCH", ""),
        region=os.environ.get("DECOTRAIN_REGION", ""),
        config=m.plain(config) if config is not None else None,
        min_peers=min_peers or 0,
        share=float(places != [UNIX]),  # who cannot be dialled owns nothing
        slot=slot,
    )
    _check(who, told)
    server = None
    if address == "local":
        server = ServerThread(Options(run=run, min_peers=1), token=whole(token, token_file))
        address = server.address
    return Asked(address, who, token, fingerprint(run, token), places, told, server)


def _check(who: mb.Identity, told: Sequence[str]) -> None:
    """What a person chose, as the coordinator will: it drops a hello that is none, and then it
    would look as if nobody answered."""
    given("run", m.name, who.run)
    given("name", m.name, who.name)
    given("DECOTRAIN_REGION", m.region, who.region)
    given("DECOTRAIN_LAUNCH", m.launch, who.launch)
    given("min_peers", m.min_peers, who.min_peers)
    for place in told:
        given("advertise", m.address, place)


def path_options() -> dict[str, Any]:
    """How a node sends, over long paths and within a host, from the environment (docs/links.md)."""
    name = os.environ.get("DECOTRAIN_CONGESTION", "bbr")
    if not re.fullmatch("[a-z0-9_]{1,15}", name):
        raise ConfigError(
            f"DECOTRAIN_CONGESTION={name!r}: give the name of a congestion control, or `system` to"
            " leave what the kernel has chosen"
        )
    shared = os.environ.get("DECOTRAIN_SHARED_MEMORY") != "0"
    return {"congestion": "" if name == "system" else name, "shared_memory": shared}


def fingerprint(run: str, token: Secret | None) -> int:
    """What peers of one run have in common: its name and token."""
    if token is not None:
        return token.fingerprint(run)
    return int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "big")


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


def listen_addresses(listen: str | Sequence[str]) -> list[str]:
    """What the node listens on: TCP where others can reach us, and a Unix socket for neighbours."""
    wanted = _split(listen)
    places = [text for text in wanted if text.startswith("unix://")]
    for text in wanted:
        if text in places:
            continue
        place, port = _host_port(text, 0)
        try:
            found = socket.getaddrinfo(place, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {text}: {error.strerror or error}; name an address of this"
                " machine (`ip address` lists them)"
            ) from None
        for numeric in sorted({str(entry[4][0]) for entry in found}, key=lambda n: ":" in n)[:1]:
            places.append(_tcp(numeric, port))
    return places if any(text.startswith("unix://") for text in places) else [*places, UNIX]


def advertised(text: str | Sequence[str]) -> list[str]:
    """Addresses for others, as given: names are resolved by those who dial. Port 0: our own."""
    places = []
    for one in _split(text):
        host, port = _host_port(one, 0)
        places.append(_tcp(host, port))
    return places


@contextmanager
def bind_errors() -> Iterator[None]:
    """A node that cannot have its address says what to do. Its other errors are not for people."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not text.startswith("cannot listen on "):
            raise
        remedy = "give another address (--listen HOST for any free port)"
        if text.endswith(os.strerror(errno.EADDRINUSE)):
            remedy = "another process has the port: stop it, or --listen HOST for any free one"
        elif text.endswith(os.strerror(errno.EADDRNOTAVAIL)):
            remedy = (
                "this machine does not have the address (`ip address` lists those it has): listen"
                " on one of them, and --advertise what a router forwards"
            )
        raise ConfigError(f"{text}; {remedy}") from None


def told_addresses(bound: Sequence[str], advertise: Sequence[str]) -> list[str]:
    """What others are told of the addresses we got: every interface when bound to all of them.

    Unix sockets first: only so many are told, and neighbours share memory over these alone.
    """
    sockets = [text for text in bound if text.startswith("unix://")]
    reached = [split_address(text) for text in bound if text not in sockets]
    if advertise:
        own = reached[0][1] if reached else 0
        given = [split_address(text) for text in advertise]
        return [*sockets, *[_tcp(host, port or own) for host, port in given if port or own]]
    told: list[str] = []
    for host, port in reached:
        everywhere = host in ("0.0.0.0", "::")  # noqa: S104 - compared, not bound
        places = interface_addresses(":" in host) if everywhere else [host]
        told += [_tcp(place, port) for place in places]
    return [*sockets, *dict.fromkeys(told)]


def interface_addresses(six: bool) -> list[str]:
    """Of this machine's interfaces, what others may be able to use (Linux)."""
    found = []
    if six:
        with suppress(OSError), open("/proc/net/if_inet6", encoding="ascii") as file:
            rows = [line.split() for line in file]
            found = [str(ipaddress.IPv6Address(int(row[0], 16))) for row in rows]
    else:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                request = name.encode()[:15].ljust(40, b"\0")
                with suppress(OSError):  # an interface without an address
                    answer = fcntl.ioctl(probe, SIOCGIFADDR, request)
                    found.append(socket.inet_ntoa(answer[20:24]))
    useful = [
        place for place in found if not place.startswith(("127.", "fe80:")) and place != "::1"
    ]
    return list(dict.fromkeys(useful)) or ["::1" if six else "127.0.0.1"]


def _split(text: str | Sequence[str]) -> list[str]:
    parts = text.split(",") if isinstance(text, str) else text
    return [part.strip() for part in parts if part.strip()]


def _host_port(text: str, port: int) -> tuple[str, int]:
    """'HOST', 'HOST:PORT', '[V6]:PORT', 'V6'; without a port it is the one given."""
    bare = text.removeprefix("tcp://")
    if bare.count(":") != 1 and not bare.startswith("["):
        bare = f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"
    elif bare.endswith("]"):
        bare = f"{bare}:{port}"
    return split_address(bare)


def _tcp(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def wait_for_welcome(comm: Communicator, address: str, timeout_s: float | None) -> None:
    deadline_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
    shared = comm._agent.shared
    with shared.changed:
        while not shared.welcome:
            comm._check_over()
            if time.monotonic() >= deadline_s:
                raise no_answer(address, timeout_s or 0.0)
            shared.changed.wait(WAIT_SLICE_S)
