"""The commands of an operator: coordinator, status, leave, kick, token.

No torch and no hydra here: they start at once, also on a machine that trains nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from decotrain.parent import end_with_parent

EVENTS_SHOWN = 8


def coordinator(words: list[str]) -> int:
    """Serves until it is ended."""
    parser = argparse.ArgumentParser(prog="decotrain coordinator", description=coordinator.__doc__)
    parser.add_argument(
        "--listen",
        default="127.0.0.1:29400",
        metavar="HOST:PORT",
        help="port 0 takes any free one; the first line printed says which",
    )
    parser.add_argument("--run", default="default", help="name of the run")
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FOLDER",
        help="where the durable record lies; a restart goes on from it",
    )
    parser.add_argument("--min-peers", type=int, default=0, help="the first view waits for so many")
    _add_token(parser)
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="listen to other machines without a token: whoever reaches the port is in the run",
    )
    parser.add_argument("--with-parent", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(words)
    if asked.with_parent:
        end_with_parent()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)  # to stderr
    from decotrain.control.coordinator import Options
    from decotrain.control.server import serve
    from decotrain.control.token import find

    options = Options(run=asked.run, min_peers=asked.min_peers or None)
    return serve(
        asked.listen,
        options,
        asked.record,
        lambda line: print(line, flush=True),
        token=find(asked.token_file),
        insecure=asked.insecure,
    )


def _add_token(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        help="the run's token (decotrain token new); default: environment DECOTRAIN_TOKEN_FILE",
    )


def token(words: list[str]) -> int:
    """Makes the token of a run. Whoever holds it is in the run, nobody else is."""
    parser = argparse.ArgumentParser(prog="decotrain token", description=token.__doc__)
    parser.add_argument("action", choices=["new"], help="a new token")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="a new file that only you can read; without it the token is printed",
    )
    asked = parser.parse_args(words)
    from decotrain.control.token import Token, write

    made = Token.new()
    if asked.out is None:
        print(made.text)
        return 0
    write(made, asked.out)
    print(f"{asked.out}: keep it secret, and copy it to every machine of the run, with mode 600")
    return 0


def status(words: list[str]) -> int:
    """Who is in a run."""
    parser = argparse.ArgumentParser(prog="decotrain status", description=status.__doc__)
    parser.add_argument("address", metavar="HOST:PORT", help="of the coordinator")
    parser.add_argument("--run", default="", help="name of the run; whichever is there without it")
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    _add_token(parser)
    asked = parser.parse_args(words)
    from decotrain.control.client import status as ask
    from decotrain.control.token import find

    known = ask(asked.address, asked.run, token=find(asked.token_file))
    if asked.json:
        print(json.dumps(known, indent=1))
        return 0
    print(
        f"run {known['run']} at {asked.address}: view {known['term']}.{known['epoch']},"
        f" {known['phase']}, waiting for {known['waiting_for']} more"
    )
    for peer in known["peers"]:
        figures = " ".join(f"{key}={_short(value)}" for key, value in peer["figures"].items())
        slot = "-" if peer["slot"] is None else peer["slot"]
        print(f"  {slot:>2} {peer['name']:<20} {peer['role']:<10} {peer['state']:<6} {figures}")
    for event in known["events"][-EVENTS_SHOWN:]:
        print(f"  {event.get('kind', '')}: {event.get('text', '')}")
    return 0


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def leave(words: list[str]) -> int:
    """Asks a peer to leave in order: what it has contributed counts, and it may join again."""
    return _leave_out("leave", leave.__doc__, words)


def kick(words: list[str]) -> int:
    """Leaves a peer out, at once and for good."""
    return _leave_out("kick", kick.__doc__, words)


def _leave_out(command: str, description: str | None, words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"decotrain {command}", description=description)
    parser.add_argument("address", metavar="HOST:PORT", help="of the coordinator")
    parser.add_argument("peer", help="its name, how that begins, or its id (see status)")
    parser.add_argument("--run", default="default", help="name of the run")
    parser.add_argument("--reason", default="", help="told to the peer")
    _add_token(parser)
    asked = parser.parse_args(words)
    from decotrain.control import client
    from decotrain.control.token import find

    who = client.kick(
        asked.address,
        asked.run,
        asked.peer,
        leave=command == "leave",
        reason=asked.reason,
        token=find(asked.token_file),
    )
    print(f"{who} " + ("is asked to leave" if command == "leave" else "is left out"))
    return 0
