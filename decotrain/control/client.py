"""What operators and launchers ask a coordinator: status, kick, exited. One request, one answer."""

from __future__ import annotations

from typing import Any

import zmq

from decotrain.control import messages as m
from decotrain.control.transport import connect_dealer
from decotrain.errors import ConfigError, MessageError, RefusedError, UnreachableError


def _ask(address: str, message: Any, kind: type[Any], timeout_s: float) -> Any:
    context: zmq.Context[Any] = zmq.Context()
    try:
        socket = connect_dealer(context, address)
        try:
            socket.send(m.encode(message))
            if not socket.poll(int(timeout_s * 1000)):
                raise UnreachableError(
                    f"no coordinator answers at {address} within {timeout_s:g} s: check the"
                    " address, that it runs, and that the port is open"
                )
            answer = m.decode(socket.recv())
        finally:
            socket.close()
    finally:
        context.term()
    if isinstance(answer, m.Done) and kind is not m.Done:
        raise RefusedError(f"the coordinator at {address}: {answer.detail}")
    if not isinstance(answer, kind):
        raise MessageError(f"{address} answered with {type(answer).__name__}")
    return answer


def status(
    address: str, run: str = "", events_after: int = 0, timeout_s: float = 5.0
) -> dict[str, Any]:
    """Who is in, how fast, how stale. Empty run: whichever runs at the address."""
    answer: m.Status = _ask(address, m.AskStatus(run, events_after), m.Status, timeout_s)
    return answer.status


def kick(
    address: str,
    run: str,
    name: str,
    *,
    leave: bool = False,  # asks it to leave instead; it may come back
    reason: str = "",
    timeout_s: float = 5.0,
) -> str:
    """Leaves out the peer whose id (16 hex digits) or name's beginning is `name`; who it was."""
    peer = int(name, 16) if len(name) == 16 and all(c in "0123456789abcdef" for c in name) else 0
    message = m.Kick(run, peer, "" if peer else name, leave, reason)
    answer: m.Done = _ask(address, message, m.Done, timeout_s)
    if not answer.ok:
        raise ConfigError(f"cannot leave out {name!r}: {answer.detail}; see `decotrain status`")
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
) -> bool:
    """A launcher saw a process end. True when the coordinator knew the peer."""
    message = m.Exited(run, peer, host, launch, detail)
    answer: m.Done = _ask(address, message, m.Done, timeout_s)
    return answer.ok
