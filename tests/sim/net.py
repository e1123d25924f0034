"""The network of the simulator: control messages that get lost, doubled, late and out of order,
and data links that keep frames in order on a stream until they break.

It delivers bytes and knows neither protocol.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.sim.peer import SimPeer
    from tests.sim.world import World

REPLAYS_KEPT = 40
FRAMES_KEPT = 30
RESULT = 4  # type of a frame that brings a chunk's value


class Control:
    """Messages between peers and the coordinator."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.cut: set[int] = set()  # peers that the coordinator cannot hear, nor they it
        self.past: deque[tuple[Callable[[bytes], None], bytes]] = deque(maxlen=REPLAYS_KEPT)

    def send(self, peer: int, deliver: Callable[[bytes], None], data: bytes) -> None:
        world, draw = self.world, self.world.draw
        if peer in self.cut:
            return
        if world.faulty and draw.random() < world.options.control_loss:
            return
        copies = 1
        if world.faulty and draw.random() < world.options.control_double:
            copies = 2
        for _ in range(copies):
            delay_s = world.options.latency_s * (0.5 + draw.random())
            if world.faulty and draw.random() < world.options.control_late:
                delay_s += draw.random() * 3.0
            world.after(delay_s, lambda: self._arrive(peer, deliver, data))
        if world.options.control_replay:
            self.past.append((deliver, data))

    def _arrive(self, peer: int, deliver: Callable[[bytes], None], data: bytes) -> None:
        if peer not in self.cut:
            deliver(data)

    def replay(self) -> None:
        """Something that was said long ago arrives once more."""
        if self.past:
            deliver, data = self.past[self.world.draw.randrange(len(self.past))]
            deliver(data)


@dataclass
class Stream:
    """One direction of one TCP connection: in order, and stopped while its reader waits."""

    arrive_s: float = 0.0  # of the newest frame
    flying: int = 0
    inbox: deque[bytes] = field(default_factory=deque)
    waiting: bool = False  # the reader wants an INSTALL first
    halfway: Any = None  # a header is in, its payload is not


class Links:
    """Data links between peers."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.cut: set[tuple[int, int]] = set()
        self.broken_until_s: dict[tuple[int, int], float] = {}
        self.number: dict[tuple[int, int], int] = {}  # of the connection
        self.streams: dict[tuple[int, int, int, int], Stream] = {}  # from, to, via, stream
        self.past: deque[tuple[int, int, bytes]] = deque(maxlen=FRAMES_KEPT)  # from, to, frame

    def usable(self, one: int, other: int) -> bool:
        edge = (min(one, other), max(one, other))
        if edge in self.cut or self.broken_until_s.get(edge, 0.0) > self.world.now:
            return False
        peers = self.world.peers
        a, b = peers.get(one), peers.get(other)
        return bool(a and b and a.alive and b.alive and a.knows(other) and b.knows(one))

    def path(self, one: int, other: int, via: int) -> tuple[int, ...] | None:
        """The connections a frame travels on now; None: it waits."""
        if self.usable(one, other):
            return (self._number(one, other),)
        if via and self.usable(one, via) and self.usable(via, other):
            if self.world.peers[via].stopped:
                return None
            return (self._number(one, via), self._number(via, other))
        return None

    def _number(self, one: int, other: int) -> int:
        return self.number.get((min(one, other), max(one, other)), 0)

    def pump(self, peer: SimPeer) -> None:
        """Moves frames from the peer's engine onto its links while there is room."""
        if not peer.alive or peer.stopped:
            return
        engine, me = peer.engine, peer.id
        for other in peer.others:
            if not engine.has_frames(other):
                continue
            via = peer.routes.get(other, 0)
            path = self.path(me, other, via)
            if path is None:
                continue
            through = via if len(path) == 2 else 0
            for number in range(self.world.options.streams):
                key = (me, other, through, number)
                stream = self.streams.get(key)
                if stream is None:
                    stream = self.streams[key] = Stream()
                while stream.flying < self.world.options.window:
                    frame = engine.next_frame(other)
                    if frame is None:
                        break
                    self._fly(key, stream, path, frame)

    def _fly(
        self, key: tuple[int, int, int, int], stream: Stream, path: tuple[int, ...], frame: bytes
    ) -> None:
        world = self.world
        delay_s = world.options.latency_s * (0.5 + world.draw.random()) * len(path)
        source, to = world.peers[key[0]], world.peers.get(key[1])
        delay_s *= max(source.slow, source.slow_up, to.slow if to is not None else 1.0)
        stream.arrive_s = max(stream.arrive_s + 1e-6, world.now + delay_s)
        stream.flying += 1

        def arrive() -> None:
            stream.flying -= 1
            if self.streams.get(key) is not stream:
                return  # the connection broke: lost
            stream.inbox.append(frame)
            self.read(key, stream)

        world.at(stream.arrive_s, arrive)

    def read(self, key: tuple[int, int, int, int], stream: Stream) -> None:
        """Gives what has arrived to the reader, until it wants to wait."""
        source, to, _, _ = key
        peer = self.world.peers.get(to)
        while stream.inbox and peer is not None and peer.alive and not peer.stopped:
            if stream.waiting or stream.halfway is not None:
                return
            if not peer.knows(source):
                stream.inbox.clear()
                return
            frame = stream.inbox[0]
            receiving = peer.engine.on_header(source, frame, self.world.now)
            accept = receiving.accept
            if accept == "later":
                stream.waiting = True
                return
            stream.inbox.popleft()
            self.past.append((source, to, frame))
            if accept == "refuse":
                self.world.refused(peer, source, receiving.reason)
                self.break_link(source, to, 0.1)
                return
            if accept == "drop":
                peer.touched()
                continue
            world = self.world
            if world.draw.random() < world.options.split:
                stream.halfway = receiving
                world.after(
                    world.options.latency_s * world.draw.random(),
                    lambda frame=frame, receiving=receiving: self._payload(
                        key, stream, receiving, frame
                    ),
                )
                return
            self._take(peer, source, receiving, frame)
        sender = self.world.peers.get(source)
        if sender is not None:
            self.pump(sender)

    def _payload(
        self, key: tuple[int, int, int, int], stream: Stream, receiving: Any, frame: bytes
    ) -> None:
        peer = self.world.peers.get(key[1])
        if self.streams.get(key) is not stream or peer is None or not peer.alive:
            return
        if peer.stopped:
            peer.later.append(lambda: self._payload(key, stream, receiving, frame))
            return
        stream.halfway = None
        self._take(peer, key[0], receiving, frame)
        self.read(key, stream)

    def _take(self, peer: SimPeer, source: int, receiving: Any, frame: bytes) -> None:
        peer.engine.on_payload(source, receiving, frame[64:], self.world.now)
        view = int.from_bytes(frame[8:16], "little")
        if frame[4] == RESULT and not peer.engine.frozen and view == peer.member.view:
            peer.arrived.append(
                {
                    "view": view,
                    "tag": int.from_bytes(frame[16:20], "little"),
                    "chunk": int.from_bytes(frame[20:24], "little"),
                    "seq": int.from_bytes(frame[24:32], "little"),
                    "digest": frame[40:56].hex(),
                }
            )
        peer.touched()

    def again(self, peer: SimPeer) -> None:
        """Frames of the view before arrive once more: none may have an effect (R4)."""
        for source, to, frame in list(self.past):
            view = int.from_bytes(frame[8:16], "little")
            if to != peer.id or view >= peer.member.view or not peer.knows(source):
                continue
            if self.world.draw.random() < 0.5:
                receiving = peer.engine.on_header(source, frame, self.world.now)
                if receiving.accept == "take":
                    peer.engine.on_payload(source, receiving, frame[64:], self.world.now)
                    text = f"takes a frame of {view >> 32}.{view & 0xFFFFFFFF}"
                    self.world.check(ev="stale", peer=peer.id, text=text)

    def resume(self, peer: SimPeer) -> None:
        """After an INSTALL or a SIGCONT: paused streams are read again."""
        for key, stream in list(self.streams.items()):
            if key[1] == peer.id and self.streams.get(key) is stream:
                stream.waiting = False
                self.read(key, stream)

    def break_link(self, one: int, other: int, pause_s: float) -> None:
        """What was on the way is lost; after the pause both sides say what they have."""
        edge = (min(one, other), max(one, other))
        self.number[edge] = self.number.get(edge, 0) + 1
        for key in list(self.streams):
            hops = {(key[0], key[1])} if not key[2] else {(key[0], key[2]), (key[2], key[1])}
            if edge in hops or (edge[1], edge[0]) in hops:
                del self.streams[key]
        until_s = self.world.now + pause_s
        self.broken_until_s[edge] = max(self.broken_until_s.get(edge, 0.0), until_s)
        self.world.after(pause_s, lambda: self.healed(one, other))

    def healed(self, one: int, other: int) -> None:
        """A path is there again: both ends exchange HAVE."""
        for me, there in ((one, other), (other, one)):
            peer = self.world.peers.get(me)
            if peer is None or not peer.alive:
                continue
            if self.path(me, there, peer.routes.get(there, 0)) is None:
                continue
            peer.reset(there)

    def forget(self, peer: int) -> None:
        for key in list(self.streams):
            if peer in key[:3]:
                del self.streams[key]
