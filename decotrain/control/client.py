"""What operators and launchers ask a coordinator: status, kick, exited. One request, one answer.

Each takes the run's token; without one it is that of the environment (DECOTRAIN_TOKEN_FILE).
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import zmq

from decotrain.control import messages as m
from decotrain.control.token import Secret, find
from decotrain.control.transport import Handshakes, check_name, connect_dealer, no_answer
from decotrain.errors import ConfigError, MessageError, RefusedError

LOOK_S = 0.05


def _ask(
    address: str, message: Any, kind: type[Any], timeout_s: float, token: Secret | None
) -> Any:
    token = token or find()
    check_name(address)
    context: zmq.Context[Any] = zmq.Context()
    try:
        socket = connect_dealer(context, address, token=token)
        handshakes = Handshakes(socket, address, token)
        try:
            # A failed handshake may have come first: there is nobody to send to then, ever.
            with suppress(zmq.Again):
                socket.send(m.encode(message), zmq.NOBLOCK)
            _await(socket, handshakes, timeout_s)
            answer = m.decode(socket.recv())
        finally:
            handshakes.close()
            socket.close()
    finally:
        context.term()
    if isinstance(answer, m.Done) and kind is not m.Done:
        raise RefusedError(f"the coordinator at {address}: {answer.detail}")
    if not isinstance(answer, kind):
        raise MessageError(f"{address} answered with {type(answer).__name__}")
    return answer


def _await(socket: zmq.Socket[Any], handshakes: Handshakes, timeout_s: float) -> None:
    """Until there is an answer, or a reason why there will be none."""
    end_s = time.monotonic() + timeout_s
    while not socket.poll(int(min(timeout_s, LOOK_S) * 1000)):
        wrong = handshakes.look()
        if wrong is not None:
            raise RefusedError(wrong)
        if time.monotonic() >= end_s:
            raise no_answer(handshakes.address, timeout_s)


def status(
    address: str,
    run: str = "",
    events_after: int = 0,
    timeout_s: float = 5.0,
    token: Secret | None = None,
) -> dict[str, Any]:
    """Who is in, how fast, how stale. Empty run: whichever runs at the address."""
    message = m.AskStatus(run, events_after)
    answer: m.Status = _ask(address, message, m.Status, timeout_s, token)
    return answer.status


def probe(
    address: str, run: str, port: int, *, timeout_s: float = 15.0, token: Secret | None = None
) -> m.Probe:
    """Has the coordinator dial us back at a port, and open one where the way can be measured."""
    answer: m.Probe = _ask(address, m.AskProbe(run, port), m.Probe, timeout_s, token)
    return answer


def kick(
    address: str,
    run: str,
    name: str,
    *,
    leave: bool = False,  # asks it to leave instead; it may come back
    reason: str = "",
    timeout_s: float = 5.0,
    token: Secret | None = None,
) -> str:
    """Leaves out the peer whose id (16 hex digits) or name's beginning is `name`; who it was."""
    peer = int(name, 16) if len(name) == 16 and all(c in "0123456789abcdef" for c in name) else 0
    message = m.Kick(run, peer, "" if peer else name, leave, reason)
    answer: m.Done = _ask(address, message, m.Done, timeout_s, token)
    if not answer.ok:
        what = "ask {!r} to leave" if leave else "leave out {!r}"
        raise ConfigError(f"cannot {what.format(name)}: {answer.detail}; see `decotrain status`")
    return answer.detail


def exited(
    address: str,
    run: str,
    *,
    peer: int = 0,
    host: str = "",
    launch: str = "",
    detail: str = "",
    timeout_s: float = 2.0,
    token: Secret | None = None,
) -> bool:
    """A launcher saw a process end. True when the coordinator knew the peer."""
    message = m.Exited(run, peer, host, launch, detail)
    answer: m.Done = _ask(address, message, m.Done, timeout_s, token)
    return answer.ok
