"""The commands of an operator: coordinator, status, leave, kick, token.

No torch and no hydra here: they start at once, also on a machine that trains nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from decotrain.errors import ConfigError, UnreachableError
from decotrain.parent import end_with_parent
from decotrain.screen import RecentWaits, lines_of

WATCH_S = 1.0
CLEAR = "\x1b[H\x1b[2J"


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
    parser.add_argument("--metrics", metavar="HOST:PORT", help="a page for Prometheus, plain HTTP")
    parser.add_argument("--with-parent", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(words)
    from decotrain.control import messages as m
    from decotrain.control.fields import given

    given("--run", m.name, asked.run)
    given("--min-peers", m.min_peers, asked.min_peers)
    if asked.with_parent:
        end_with_parent()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)  # to stderr
    from decotrain.control.coordinator import Options
    from decotrain.control.peer_list import PeerList
    from decotrain.control.server import serve
    from decotrain.control.token import find, place, whole

    options = Options(run=asked.run, min_peers=asked.min_peers or None)
    own = whole(find(asked.token_file), asked.token_file)
    listed = PeerList(str(place(asked.token_file))) if own else None
    if listed and listed.names and asked.record is None:
        logging.warning("without --record, keys that a kick takes away are back after a restart")
    return serve(
        asked.listen,
        options,
        asked.record,
        lambda line: print(line, flush=True),
        token=own,
        insecure=asked.insecure,
        metrics=asked.metrics,
        peer_list=listed,
    )


def _add_token(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        help="the run's token (decotrain token new); default: environment DECOTRAIN_TOKEN_FILE",
    )


def token(words: list[str]) -> int:
    """Makes the token of a run, or a key of one peer. Who holds none of them is not in the run."""
    parser = argparse.ArgumentParser(prog="decotrain token", description=token.__doc__)
    parser.add_argument("action", choices=["new"], help="a new token")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="a new file that only you can read; without it the token is printed",
    )
    parser.add_argument(
        "--peer",
        metavar="NAME",
        help="a key for this peer alone, which `decotrain kick` takes away; its public part goes to"
        " the list beside the token file (FILE.peers) on the coordinator's machine",
    )
    _add_token(parser)
    asked = parser.parse_args(words)
    if asked.peer is not None:
        return _new_peer_key(asked)
    from decotrain.control.token import Token, write

    made = Token.new()
    if asked.out is None:
        print(made.text)
        return 0
    write(made, asked.out)
    print(f"{asked.out}: keep it secret, and copy it to every machine of the run, with mode 600")
    return 0


def _new_peer_key(asked: argparse.Namespace) -> int:
    from decotrain.control.peer_list import PeerList
    from decotrain.control.token import find, place, whole, write

    run = whole(find(asked.token_file), asked.token_file)
    if run is None or asked.out is None:
        raise ConfigError(
            "a peer's key is made from the token of its run, into a file: decotrain token new"
            " --peer NAME --token-file run.token --out NAME.token"
        )
    listed, key = PeerList(str(place(asked.token_file))), run.peer_key()
    listed.check(asked.peer)
    write(key, asked.out)
    listed.add(asked.peer, key)
    print(
        f"{asked.out}: the key of {asked.peer}, and of nobody else; copy it to that machine, with"
        f" mode 600. {listed.path} lists it: the coordinator reads that beside its token"
    )
    return 0


def status(words: list[str]) -> int:
    """Who is in a run, how fast, how stale, and who slows whom."""
    parser = argparse.ArgumentParser(prog="decotrain status", description=status.__doc__)
    parser.add_argument("address", metavar="HOST:PORT", help="of the coordinator")
    parser.add_argument("--run", default="", help="name of the run; whichever is there without it")
    _add_token(parser)
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    parser.add_argument(
        "--links", action="store_true", help="a line for every link, also with many peers"
    )
    parser.add_argument("--watch", action="store_true", help="again every second, until Ctrl-C")
    asked = parser.parse_args(words)
    from decotrain.control import client
    from decotrain.control import messages as m
    from decotrain.control.fields import given
    from decotrain.control.token import find

    given("--run", m.run_or_any, asked.run)
    token = find(asked.token_file)
    known = client.status(asked.address, asked.run, token=token)
    if asked.watch:
        _watch(asked, known, lambda: client.status(asked.address, asked.run, token=token))
    elif asked.json:
        print(json.dumps(known, indent=1))
    else:
        print("\n".join(lines_of(known, asked.address, asked.links)))
    return 0


def _watch(
    asked: argparse.Namespace, known: dict[str, Any], ask: Callable[[], dict[str, Any]]
) -> None:
    """Also while the coordinator is away: it comes back, and the run goes on without it."""
    recent = RecentWaits()
    while True:
        heard_s = time.monotonic()
        lines = lines_of(known, asked.address, asked.links, recent.add(known, heard_s))
        print(json.dumps(known) if asked.json else CLEAR + "\n".join(lines), flush=True)
        answered = False
        while not answered:
            time.sleep(WATCH_S)
            try:
                known, answered = ask(), True
            except UnreachableError:
                late = f"no answer for {time.monotonic() - heard_s:.0f} s"
                if asked.json:
                    print(late, file=sys.stderr, flush=True)
                else:
                    print("\n".join([f"{CLEAR}{late}; what it said last:", *lines]), flush=True)


def leave(words: list[str]) -> int:
    """Asks a peer to leave in order: what it has contributed counts, and it may join again."""
    return _leave_out("leave", leave.__doc__, words)


def kick(words: list[str]) -> int:
    """Leaves a peer out, at once and for good."""
    return _leave_out("kick", kick.__doc__, words)


def _leave_out(command: str, description: str | None, words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"decotrain {command}", description=description)
    parser.add_argument("address", metavar="HOST:PORT", help="of the coordinator")
    parser.add_argument("peer", help="its name or id, or how that begins (see status)")
    parser.add_argument("--run", default="", help="name of the run; default: the one there")
    parser.add_argument("--reason", default="", help="told to the peer")
    _add_token(parser)
    asked = parser.parse_args(words)
    from decotrain.control import client
    from decotrain.control import messages as m
    from decotrain.control.fields import given
    from decotrain.control.token import find

    given("--run", m.run_or_any, asked.run)
    given("PEER", m.peer_name, asked.peer)
    given("--reason", m.note, asked.reason)
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
