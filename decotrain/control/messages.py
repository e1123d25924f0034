"""Every message between peers, coordinator and operators: the specification and its checks.

A message is one msgpack map: `t` names its type, the other keys are the fields of its dataclass,
all of them, each checked. A field with a default came later: it may be lacking, and is sent only
when it says something, so that who is from before it understands and is understood. Anything else
is a MessageError: the receiver drops the message and goes on. Reports and installs are maps of
their own (maps.py). Nothing here knows sockets or what a message means; docs/protocol.md does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from numbers import Integral
from typing import Annotated, Any, get_type_hints

import msgpack

from decotrain.control import maps
from decotrain.control.fields import (
    blob,
    boolean,
    given,
    integer,
    mapping,
    number,
    optional,
    record,
    row,
    sequence,
    text,
    tree,
    u8,
    u32,
    u64,
    within,
)
from decotrain.errors import ConfigError, MessageError

PROTOCOL = 4
MESSAGE_BYTES_MAX = 16 << 20  # a report names every chunk of every open round
CONFIG_BYTES_MAX = 256 << 10
FIGURES_MAX = 40
PEERS_MAX = 64
ADDRESSES_MAX = 8
NOTE_MAX = 512
ASKED_TO_LEAVE = "asked to leave by an operator"

name = text(128, 1)
note = text(NOTE_MAX)
peer_id = integer(1, 2**64 - 1)
address = text(256, 1)
addresses = sequence(address, ADDRESSES_MAX)
freeze_id = row(u32, u64)
view_member = row(peer_id, u8, boolean)  # peer, slot, active
region = text(64)
launch = text(128)
run_or_any = text(128)  # empty: whatever runs there
peer_name = text(128)
min_peers = integer(0, PEERS_MAX)
figures = mapping(text(32, 1), lambda value: _figure(value), FIGURES_MAX)
contact = record(
    peer=peer_id,
    name=name,
    host=text(256),
    addresses=addresses,
    key=blob(0, 64),  # of TLS, between it and the receiver alone; empty: the run's
)


def _figure(value: Any) -> Any:
    return text(128)(value) if type(value) is str else number(-1e30, 1e30)(value)


def config(value: Any) -> Any:
    """What a run is configured with: plain data, bounded in depth, items and bytes."""
    value = tree(8, 4096)(value)
    size = len(msgpack.packb(value))
    if size > CONFIG_BYTES_MAX:
        raise MessageError(f"{size} bytes; at most {CONFIG_BYTES_MAX} are taken")
    return value


@dataclass(frozen=True)
class Hello:
    """Joins, or registers again with a coordinator that does not know us."""

    run: Annotated[str, name]
    protocol: Annotated[int, u32]
    peer: Annotated[int, peer_id]
    name: Annotated[str, name]
    host: Annotated[str, text(256)]
    launch: Annotated[str, launch]  # who started us, equal for the process that replaces us
    region: Annotated[str, region]  # for people
    version: Annotated[str, text(64)]  # of decotrain, for people; `protocol` is what has to fit
    addresses: Annotated[list[str], addresses]  # of its data plane
    key: Annotated[bytes, blob(0, 64)]  # its own; what the coordinator saw, whatever it says
    share: Annotated[float, number(0, 1e6)]
    config: Annotated[dict[str, Any] | None, optional(config)]
    min_peers: Annotated[int, min_peers]  # 0: no wish
    ready: Annotated[bool, boolean]  # has declared its state: may be in a view
    void: Annotated[bool, boolean]  # comes back: what it holds is neither new nor the run's
    term: Annotated[int, u32]  # highest seen
    view: Annotated[int, u64]  # installed; 0: none yet
    generation: Annotated[int, u32]
    members: Annotated[list[list[Any]], sequence(view_member, PEERS_MAX)]  # of that view
    slot: Annotated[int | None, optional(integer(0, maps.SLOTS - 1))] = None  # had before a resume


@dataclass(frozen=True)
class Foreign:
    """What can be read of the hello of another version; whoever said it has to be told. It is never
    sent, and no version may change these four fields or those of Refuse."""

    run: Annotated[str, name]
    protocol: Annotated[int, u32]
    peer: Annotated[int, peer_id]
    name: Annotated[str, name]


@dataclass(frozen=True)
class Heartbeat:
    """Absolute: what a lost heartbeat said, the next one says again."""

    run: Annotated[str, name]
    peer: Annotated[int, peer_id]
    term: Annotated[int, u32]
    view: Annotated[int, u64]
    ready: Annotated[bool, boolean]
    current: Annotated[bool, boolean]  # observing, holds the state, asks to be active
    down: Annotated[list[int], sequence(peer_id, PEERS_MAX)]  # links that are broken
    routes: Annotated[int, u64]  # number of the route table in use
    figures: Annotated[dict[str, Any], figures]
    share: Annotated[float, number(0, 1e6)]  # 0: owns nothing, as nobody can dial it
    uplink_bps: Annotated[float, number(0, 1e15)]  # 0: not measured
    # peer, out and in (bit/s), round trip (s), over a Unix socket, with shared memory, our own
    # ceiling (bit/s, 0: none), congestion control of what we send
    links: Annotated[
        list[list[Any]],
        sequence(
            row(peer_id, u64, u64, number(0, 1e6), boolean, boolean, number(0, 1e15), text(16)),
            PEERS_MAX,
        ),
    ]
    held_up: Annotated[list[list[Any]], sequence(row(peer_id, number(0, 1e12)), PEERS_MAX)]  # s


@dataclass(frozen=True)
class Report:
    run: Annotated[str, name]
    peer: Annotated[int, peer_id]
    freeze: Annotated[list[int], freeze_id]
    generation: Annotated[int, u32]
    report: Annotated[dict[str, Any], maps.check_report]


@dataclass(frozen=True)
class Ack:
    """The install is done, or refused (it does not answer our newest freeze)."""

    run: Annotated[str, name]
    peer: Annotated[int, peer_id]
    view: Annotated[int, u64]
    done: Annotated[bool, boolean]


@dataclass(frozen=True)
class Leave:
    run: Annotated[str, name]
    peer: Annotated[int, peer_id]


@dataclass(frozen=True)
class Suspect:
    """What our rounds say about others: repeated until a view changes."""

    run: Annotated[str, name]
    peer: Annotated[int, peer_id]
    view: Annotated[int, u64]
    kind: Annotated[str, text(32)]  # diverged, late_done, refused, spec_mismatch
    who: Annotated[int, u64]  # 0: see digests
    tag: Annotated[int, u32]
    seq: Annotated[int, u64]
    digests: Annotated[list[list[int]], sequence(row(u8, u64), PEERS_MAX)]  # slot, digest
    detail: Annotated[str, note]


@dataclass(frozen=True)
class Exited:
    """A launcher saw the process end."""

    run: Annotated[str, name]
    peer: Annotated[int, u64]  # 0: known by host and launch only
    host: Annotated[str, text(256)]
    launch: Annotated[str, launch]
    detail: Annotated[str, note]


@dataclass(frozen=True)
class Kick:
    """An operator leaves a peer out, or asks it to leave."""

    run: Annotated[str, run_or_any]
    peer: Annotated[int, u64]  # 0: by name
    name: Annotated[str, peer_name]  # or how it begins
    leave: Annotated[bool, boolean]
    detail: Annotated[str, note]


@dataclass(frozen=True)
class AskStatus:
    run: Annotated[str, run_or_any]
    events_after: Annotated[int, u64]


@dataclass(frozen=True)
class AskProbe:
    """Dial me back at this port (0: do not), and let me measure the way to you."""

    run: Annotated[str, run_or_any]
    port: Annotated[int, integer(0, 65535)]


@dataclass(frozen=True)
class Welcome:
    run: Annotated[str, name]
    term: Annotated[int, u32]
    peer: Annotated[int, peer_id]
    config: Annotated[dict[str, Any] | None, optional(config)]
    waiting_for: Annotated[int, u32]  # peers still missing before the first view


@dataclass(frozen=True)
class Refuse:
    run: Annotated[str, name]
    peer: Annotated[int, peer_id]
    reason: Annotated[str, text(2048, 1)]


@dataclass(frozen=True)
class AskHeartbeat:
    """Most others find their links to you closed: a heartbeat at once, or you are left out."""

    run: Annotated[str, name]
    term: Annotated[int, u32]
    peer: Annotated[int, peer_id]


@dataclass(frozen=True)
class AskHello:
    """The coordinator does not know who speaks: register."""

    run: Annotated[str, name]
    term: Annotated[int, u32]
    peer: Annotated[int, peer_id]


@dataclass(frozen=True)
class Freeze:
    run: Annotated[str, name]
    freeze: Annotated[list[int], freeze_id]


@dataclass(frozen=True)
class Install:
    run: Annotated[str, name]
    generation: Annotated[int, u32]
    install: Annotated[dict[str, Any], maps.check_install]
    contacts: Annotated[list[dict[str, Any]], sequence(contact, PEERS_MAX)]


@dataclass(frozen=True)
class Routes:
    """Absolute: to reach peer, send through via."""

    run: Annotated[str, name]
    term: Annotated[int, u32]
    number: Annotated[int, u64]
    routes: Annotated[list[list[int]], sequence(row(peer_id, peer_id), PEERS_MAX)]


@dataclass(frozen=True)
class Evicted:
    """Final for this peer id: who comes back does so as a newcomer, with a new id."""

    run: Annotated[str, name]
    peer: Annotated[int, peer_id]
    reason: Annotated[str, note]
    again: Annotated[bool, boolean]  # false: do not come back (left, kicked, does not fit)


@dataclass(frozen=True)
class Status:
    status: Annotated[dict[str, Any], tree(9, 1 << 17)]  # a configuration, one level deeper


@dataclass(frozen=True)
class Probe:
    """Answers AskProbe; decotrain/probe.py says what is spoken at the port."""

    port: Annotated[int, integer(1, 65535)]  # open for a minute
    key: Annotated[bytes, blob(32, 32)]
    dialled: Annotated[bool, boolean]
    place: Annotated[str, text(64)]  # where we see you


@dataclass(frozen=True)
class Done:
    """Answers an operator's request."""

    ok: Annotated[bool, boolean]
    detail: Annotated[str, note]


KINDS: dict[str, type[Any]] = {
    "hello": Hello,
    "heartbeat": Heartbeat,
    "report": Report,
    "ack": Ack,
    "leave": Leave,
    "suspect": Suspect,
    "exited": Exited,
    "kick": Kick,
    "ask_status": AskStatus,
    "ask_probe": AskProbe,
    "probe": Probe,
    "welcome": Welcome,
    "refuse": Refuse,
    "ask_hello": AskHello,
    "ask_heartbeat": AskHeartbeat,
    "freeze": Freeze,
    "install": Install,
    "routes": Routes,
    "evicted": Evicted,
    "status": Status,
    "done": Done,
}
_NAMES = {kind: word for word, kind in KINDS.items()}
_CHECKS = {
    word: record(
        **{
            key: hint.__metadata__[0]
            for key, hint in get_type_hints(kind, include_extras=True).items()
        }
    )
    for word, kind in KINDS.items()
}

_DEFAULTS = {
    word: {entry.name: entry.default for entry in fields(kind) if entry.default is not MISSING}
    for word, kind in KINDS.items()
}

Message = Any  # one of KINDS


_FOREIGN = record(run=name, protocol=u32, peer=peer_id, name=name)


def encode(message: Message) -> bytes:
    """The bytes of a message. Our own pass the same checks as everybody's: ConfigError names what
    the receiver would drop without a word. Not so reports and installs, which no person writes: to
    look through their columns twice would make each change of view longer."""
    word = _NAMES[type(message)]
    content = {
        entry.name: value
        for entry in fields(message)
        if (value := getattr(message, entry.name)) != entry.default
    }
    try:
        data: bytes = msgpack.packb({"t": word, **content}, use_bin_type=True)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{word}: not plain data: {error}") from None
    if len(data) > MESSAGE_BYTES_MAX:
        raise ConfigError(f"{word}: {len(data)} bytes; at most {MESSAGE_BYTES_MAX} are taken")
    if not isinstance(message, Report | Install):
        _same_checks(word, data)
    return data


def _same_checks(word: str, data: bytes) -> None:
    """On what the receiver will see: subclasses of numbers, say, have become plain by then."""
    content = msgpack.unpackb(data, raw=False, strict_map_key=False)
    del content["t"]
    given(word, _CHECKS[word], _DEFAULTS[word] | content)


def plain(value: Mapping[str, Any], shown: str = "config") -> dict[str, Any]:
    """A configuration as others will read it; ConfigError says why they would not."""
    try:
        data = msgpack.packb(dict(value), use_bin_type=True)
        read = msgpack.unpackb(data, raw=False, strict_map_key=False)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{shown}: not plain data: {error}") from None
    checked: dict[str, Any] = given(shown, config, read)
    return checked


def _line(value: str) -> str:
    return "".join(letter for letter in value if letter.isprintable())


def fitting(told: Mapping[Any, Any]) -> dict[str, float | int | str]:
    """The figures that a heartbeat can carry, as it carries them: one that it cannot would cost
    all of it, and so the peer its place in the run."""
    fits: dict[str, float | int | str] = {}
    for key, value in list(told.items())[: FIGURES_MAX - 8]:
        try:
            if isinstance(value, str):
                kept: float | int | str = _line(value)[:128]
            else:
                kept = int(value) if isinstance(value, Integral) else float(value)
            fits |= figures({_line(str(key))[:32]: kept})
        except (MessageError, TypeError, ValueError, OverflowError):
            continue
    return fits


def decode(data: bytes) -> Message:
    """The message in the bytes; MessageError when there is none."""
    if len(data) > MESSAGE_BYTES_MAX:
        raise MessageError(f"a message of {len(data)} bytes; at most {MESSAGE_BYTES_MAX} are taken")
    try:
        content = msgpack.unpackb(data, raw=False, strict_map_key=True)
    except Exception as error:  # msgpack documents no common base for what it raises
        raise MessageError(f"not msgpack: {type(error).__name__}") from None
    if type(content) is not dict:
        raise MessageError("not a map")
    word = content.pop("t", None)
    if type(word) is not str or word not in KINDS:
        raise MessageError(f"unknown message type {str(word)[:32]!r}")
    if word == "hello" and content.get("protocol") != PROTOCOL:
        known = {key: content.get(key) for key in ("run", "protocol", "peer", "name")}
        return Foreign(**within("hello", _FOREIGN, known))
    return KINDS[word](**within(word, _CHECKS[word], _DEFAULTS[word] | content))
