"""The coordinator process: a socket, a clock and a disk around the pure Coordinator.

Effects are carried out in order, a record with fsync before the message after it. Decides nothing.
Where peers have keys of their own it says whose message is whose, and hands out the keys of pairs.
"""

from __future__ import annotations

import logging
import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import zmq

from decotrain.control import messages
from decotrain.control.coordinator import Coordinator, Options
from decotrain.control.effects import Log, Persist, Received, Send, Stop, Tick, identity
from decotrain.control.fields import given
from decotrain.control.metrics_page import MetricsPage
from decotrain.control.peer_list import PeerList
from decotrain.control.probing import Probing
from decotrain.control.record import Record, RecordFile
from decotrain.control.status import prometheus, status
from decotrain.control.token import Token
from decotrain.control.transport import TAIL_BYTES, Gate, bind_router, check_trust, split_address
from decotrain.errors import ConfigError, FileError, MessageError

TICK_S = 0.05
DUE_TICK_S = 0.005  # at most so often, while a change of view is due
PERSIST_RETRY_S = 1.0
PERSIST_SAY = 30  # tries, between two lines about them
PAGE_S = 1.0  # between two states of the metrics page
PEER_ROUTE_BYTES = len(identity(0)) + TAIL_BYTES
ROUTES_MAX = 4096

logger = logging.getLogger("decotrain.coordinator")


class Server:
    """Bound when constructed; `run()` serves until `stop()` (any thread) or a higher term."""

    def __init__(
        self,
        listen: str,
        options: Options,
        folder: str | Path | None,  # of the record; None: memory only
        on_log: Callable[[Log], None] | None = None,
        *,
        token: Token | None = None,
        insecure: bool = False,  # without a token, for other machines too
        page: MetricsPage | None = None,
        peer_list: PeerList | None = None,  # peers with keys of their own
    ) -> None:
        check_trust(listen, token, insecure)
        given("run", messages.name, options.run)
        given("min_peers", messages.min_peers, options.min_peers or 0)
        if options.config is not None:
            options = replace(options, config=messages.plain(options.config))
        if token is not None:
            options = replace(options, token=token.record_mark())
        self.file = RecordFile(folder) if folder is not None else None
        record = self.file.load() if self.file is not None else None
        _check_record(record, options)
        if self.file is not None:  # a full disk is found now, when nobody waits for us yet
            fresh = Record(run=options.run, config=options.config, token=options.token)
            self.file.save(record or fresh)
        self.context: zmq.Context[Any] = zmq.Context()
        self.gate: Gate | None = None
        try:
            if token is not None:
                self.gate = Gate(self.context, token, self._knows)
            self.socket, self.address = bind_router(self.context, listen, token)
        except ConfigError:
            if self.gate is not None:
                self.gate.close()
            self.context.term()
            raise
        options = replace(options, first_term=int(time.time()))
        self.coordinator = Coordinator(options, record)
        self.token, self.peer_list = token, peer_list
        self.routes: OrderedDict[bytes, bytes] = OrderedDict()
        self.probing = Probing(split_address(self.address)[0])
        self.on_log = on_log
        self.page, self.page_s = page, 0.0
        self.stopping = threading.Event()
        self.stopped: str | None = None  # why it ended by itself
        self.refused = 0  # messages that were none

    def run(self) -> None:
        try:
            self._carry(self.coordinator.step(Tick(), time.monotonic()))
            poller = zmq.Poller()
            for socket in (self.socket, self.gate.socket if self.gate else None):
                if socket is not None:
                    poller.register(socket, zmq.POLLIN)
            tick_s = time.monotonic()
            while not self.stopping.is_set() and self.stopped is None:
                pause_s = max(0.0, self._next_tick(tick_s) - time.monotonic())
                ready = dict(poller.poll(int(pause_s * 1000) + 1))
                if self.gate is not None and self.gate.socket in ready:
                    self.gate.answer()
                if self.socket in ready:
                    self._receive()
                while self.probing.answers:
                    to, answer = self.probing.answers.popleft()
                    self._send(to, answer)
                if time.monotonic() >= self._next_tick(tick_s):
                    tick_s = time.monotonic()
                    self._carry(self.coordinator.step(Tick(), tick_s))
                if self.page is not None and tick_s >= self.page_s:
                    self.page_s = tick_s + PAGE_S
                    self.page.text = prometheus(status(self.coordinator, tick_s))
        finally:
            self.probing.close()
            self.socket.close()
            if self.gate is not None:
                self.gate.close()
            self.context.term()

    def _next_tick(self, last_s: float) -> float:
        """Survivors wait for a change that is due: it does not wait for the usual tick."""
        due_s = self.coordinator.next_s()
        if due_s is None:
            return last_s + TICK_S
        return min(last_s + TICK_S, max(due_s, last_s + DUE_TICK_S))

    def stop(self) -> None:
        self.stopping.set()

    def _receive(self) -> None:
        for _ in range(256):  # then a tick gets its turn
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                if len(parts) != 2:
                    raise MessageError(f"a message of {len(parts)} parts")
                message = messages.decode(parts[1].bytes)
                key = _user_of(parts[1])
                source = self._source(parts[0].bytes, key)
            except MessageError as error:
                self.refused += 1
                logger.debug("dropped a message: %s", error)
                continue
            event = Received(source, message, key)
            if self._probes(event, parts[1]):
                continue
            self._carry(self.coordinator.step(event, time.monotonic()))

    def _probes(self, event: Received, frame: zmq.Frame) -> bool:
        """Is it a doctor of this run? The coordinator itself has no business with it."""
        asked, record = event.message, self.coordinator.record
        if not isinstance(asked, messages.AskProbe) or asked.run not in ("", record.run):
            return False
        if event.key not in record.barred:
            self.probing.ask(event.source, str(frame.get("Peer-Address")), asked.port)
        return True

    def _knows(self, key: bytes) -> bool:
        """May who shows this key of its own talk to us?"""
        if self.peer_list is None or key in self.coordinator.record.barred:
            return False
        return self.peer_list.name_of(key) is not None

    def _source(self, route: bytes, key: bytes) -> bytes:
        """Who speaks. A peer's route has a tail that nobody else knows: with another tail somebody
        speaks in its name, and would be given what is meant for it."""
        if not route.startswith(b"p"):
            return route
        if len(route) != PEER_ROUTE_BYTES:
            raise MessageError("the name of a peer without its tail")
        who = route[:-TAIL_BYTES]
        peer = int.from_bytes(who[1:], "big")
        owner = self.coordinator.key_of(peer)
        if owner is not None and owner != key:
            raise MessageError("the name of a peer that has another key")
        if self.coordinator.gone.get(peer) is not None:
            self.routes[who] = route  # nothing more is meant for it than that it is gone
        if self.routes.setdefault(who, route) != route:
            raise MessageError("the name of a peer that is here already")
        self.routes.move_to_end(who)
        while len(self.routes) > ROUTES_MAX:
            self.routes.popitem(last=False)
        return who

    def _carry(self, effects: list[Any]) -> None:
        for effect in effects:
            if isinstance(effect, Persist):
                self._persist(effect.record)
            elif isinstance(effect, Send):
                if isinstance(effect.message, messages.Status):  # for who compares clocks
                    effect.message.status["wall_s"] = time.time()
                self._send(effect.to, self._keyed(effect.to, effect.message))
            elif isinstance(effect, Log):
                logger.info("%s: %s", effect.kind, effect.text)
                if self.on_log is not None:
                    self.on_log(effect)
            elif isinstance(effect, Stop):
                logger.error("stops: %s", effect.reason)
                self.stopped = effect.reason
            if self.stopping.is_set():
                return

    def _persist(self, record: Record) -> None:
        """Nothing that depends on a record leaves before it is durable, so a full disk waits."""
        tries = 0
        while self.file is not None:
            try:
                self.file.save(record)
                return
            except FileError as error:
                if tries % PERSIST_SAY == 0:
                    text = "%s. The run goes on without changes of membership until it can be done"
                    logger.error(text, error)
                tries += 1
                if self.stopping.wait(PERSIST_RETRY_S):
                    return

    def _keyed(self, to: bytes, message: Any) -> Any:
        """An install with the keys that its receiver shares with each other peer."""
        install = isinstance(message, messages.Install)
        if not install or self.token is None or self.peer_list is None or not self.peer_list.names:
            return message
        run, peer = self.coordinator.record.run, int.from_bytes(to[1:], "big")
        contacts = [
            {**one, "key": self.token.pair_key(run, peer, one["peer"])} for one in message.contacts
        ]
        return replace(message, contacts=contacts)

    def _send(self, to: bytes, message: Any) -> None:
        try:
            data = messages.encode(message)
        except ConfigError as error:  # a mistake of ours: one message less, and the run goes on
            logger.error("a message was not sent: %s", error)
            return
        try:
            self.socket.send_multipart([self.routes.get(to, to), data], zmq.NOBLOCK)
        except zmq.ZMQError as error:  # its queue is full, or it is gone: everything is repeated
            logger.debug("a message was not sent: %s", error)


def _user_of(frame: zmq.Frame) -> bytes:
    """The user id that our gate gave to the connection."""
    try:
        return str(frame.get("User-Id")).encode()
    except zmq.ZMQError:  # no token: nobody was asked
        return b""


def _check_record(record: Record | None, options: Options) -> None:
    if record is None:
        return
    if record.run != options.run:
        raise ConfigError(
            f"the record is of run {record.run!r}, not {options.run!r}:"
            " name that run, or give this one a folder of its own"
        )
    if record.token != options.token:
        raise ConfigError(
            f"the record of run {record.run!r} was made with another token: use that token,"
            " or give this run a folder of its own"
        )


class ServerThread:
    """A coordinator inside this process: for a run of one, launchers and tests."""

    def __init__(
        self,
        options: Options,
        listen: str = "127.0.0.1:0",
        folder: Any = None,
        token: Token | None = None,
        peer_list: PeerList | None = None,
    ) -> None:
        self.server = Server(listen, options, folder, token=token, peer_list=peer_list)
        self.address = self.server.address
        self.thread = threading.Thread(target=self.server.run, name="coordinator", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.server.stop()
        self.thread.join()


def serve(
    listen: str,
    options: Options,
    folder: str | Path | None,
    announce: Callable[[str], None] = print,
    *,
    token: Token | None = None,
    insecure: bool = False,
    metrics: str | None = None,  # address of the page for Prometheus
    peer_list: PeerList | None = None,
) -> int:
    """Runs a coordinator in the foreground; the exit status."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:  # a stranger's connection costs a descriptor for 5 s: there should be plenty
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    page = MetricsPage(metrics) if metrics else None
    server = Server(
        listen, options, folder, token=token, insecure=insecure, page=page, peer_list=peer_list
    )
    announce(f"coordinator of run {options.run!r} listens on {server.address}")
    if page is not None:
        announce(f"metrics at http://{page.address}/metrics")
    try:
        server.run()
    except KeyboardInterrupt:
        return 0
    finally:
        if page is not None:
            page.close()
    return 1 if server.stopped is not None else 0
