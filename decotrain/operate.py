"""The commands of an operator: coordinator, status, leave, kick, token.

No torch and no hydra here: they start at once, also on a machine that trains nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from decotrain.errors import ConfigError
from decotrain.parent import end_with_parent

EVENTS_SHOWN = 8
WATCH_S = 1.0
SLOW_S = 1.0  # waited for one peer alone, before it is worth a line


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
    parser.add_argument("--watch", action="store_true", help="again every second, until Ctrl-C")
    asked = parser.parse_args(words)
    from decotrain.control import client
    from decotrain.control import messages as m
    from decotrain.control.fields import given
    from decotrain.control.token import find

    given("--run", m.run_or_any, asked.run)
    token = find(asked.token_file)
    while True:
        known = client.status(asked.address, asked.run, token=token)
        if asked.json:
            text = json.dumps(known, indent=None if asked.watch else 1)
        else:
            text = ("\x1b[H\x1b[2J" if asked.watch else "") + "\n".join(
                lines_of(known, asked.address)
            )
        print(text, flush=True)
        if not asked.watch:
            return 0
        time.sleep(WATCH_S)


def lines_of(known: Mapping[str, Any], address: str) -> list[str]:
    """One screen of status."""
    peers = known["peers"]
    active = sum(peer["role"] == "active" for peer in peers)
    head = f"run {known['run']} at {address}: view {known['term']}.{known['epoch']}"
    head += f" of generation {known['generation']}, {known['phase']}"
    head += f" for {known['silent_s']:.0f} s" if known["phase"] == "hears nobody" else ""
    head += f", {active} of {len(peers)} peers active"
    heard = sum(peer["heard"] for peer in peers)
    head += f", {heard} heard" if heard < len(peers) else ""
    if known["waiting_for"]:
        head += f", waiting for {known['waiting_for']} more"
    versions = sorted({peer["version"] for peer in peers if peer["version"]})
    if versions:
        head += f"; decotrain {', '.join(versions)}"
    regions = any(peer["region"] for peer in peers)
    lines = [head]
    if peers:
        lines.append(
            f"{'':>3} {'peer':<18} {'id':<8} {'host':<14} " + f"{'region':<10} " * regions
            + f"{'role':<9} {'last round':>10} {'behind':>6} {'heard':>7}"
            f" {'share':>5} {'can send':>9} {'held up':>8}  figures"
        )  # fmt: skip
    newest = _newest_rounds(peers)
    for peer in peers:
        lines.append(_peer_line(peer, newest, regions))
        if peer["state"] not in ("here", "silent", "away"):  # the line itself says those
            lines.append(f"      {peer['state']}")
        if len(versions) > 1:
            lines.append(f"      decotrain {peer['version']}")
    return [
        *lines,
        *_link_lines(peers),
        *(f"  {event.get('kind', '')}: {event.get('text', '')}" for event in
          known["events"][-EVENTS_SHOWN:]),
    ]  # fmt: skip


def _link_lines(peers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every link with what goes over it, and who waits for whom."""
    names = {peer["peer"]: peer["name"] for peer in peers}
    lines = []
    for peer in peers:
        for link in peer["links"]:
            lines.append(
                f"  {peer['name']:>18} -> {names.get(link['peer'], link['peer']):<18}"
                f" {_rate(link['out_bps']):>9}" + _way(link)
            )
        for other in peer["links_down"]:
            lines.append(f"  {peer['name']:>18} -- {names.get(other, other):<18} broken")
    slow = max(peers, key=lambda peer: peer["held_up_s"], default=None)
    if slow is not None and slow["held_up_s"] >= SLOW_S:
        lines.append(f"the others waited {slow['held_up_s']:.1f} s for {slow['name']} alone so far")
    waits = [
        (seconds, peer["name"], names.get(other, other))
        for peer in peers
        for other, seconds in peer["waited_s"]
        if seconds >= SLOW_S
    ]
    lines += [f"  {who} waited {s:.1f} s for {other}" for s, who, other in sorted(waits)[:-5:-1]]
    return lines


def _way(link: Mapping[str, Any]) -> str:
    """How the bytes of a link travel."""
    if link["unix"]:
        return " same machine, shared memory" if link["shared"] else " same machine"
    control = f" {link['congestion']}" if link["congestion"] else ""
    if link["pace_bps"]:
        control += f", at most {_rate(link['pace_bps'])}"
    return f" {1e3 * link['rtt_s']:.1f} ms{control}"


def _newest_rounds(peers: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The newest round of each tag that any peer has taken."""
    newest: dict[str, int] = {}
    for peer in peers:
        tag, number = _last_round(peer)
        newest[tag] = max(newest.get(tag, 0), number)
    return newest


def _last_round(peer: Mapping[str, Any]) -> tuple[str, int]:
    tag, _, number = str(peer["figures"].get("last_round", "")).partition("/")
    return tag, int(number) if number.isdecimal() else 0


def _peer_line(peer: Mapping[str, Any], newest: Mapping[str, int], regions: bool) -> str:
    figures = dict(peer["figures"])
    last = str(figures.pop("last_round", ""))
    tag, number = _last_round(peer)
    behind = str(newest[tag] - number) if last else ""
    shown = " ".join(f"{key}={_short(value)}" for key, value in figures.items())
    slot = "-" if peer["slot"] is None else peer["slot"]
    heard = "away" if peer["silent_s"] is None else f"{peer['silent_s']:.1f} s"
    mark, note = " ", "" if peer["dialled"] else " (dials out only)"
    if not peer["heard"]:
        mark, note = "!", f" ({peer['state']})" * (peer["state"] in ("silent", "away"))
    return (
        f"{mark}{slot:>2} {peer['name'][:18]:<18} {peer['peer'][:8]} {peer['host'][:14]:<14} "
        + f"{peer['region'][:10]:<10} " * regions
        + f"{peer['role']:<9} {last:>10} {behind:>6} {heard:>7} {peer['share']:>5.2f}"
        f" {_rate(peer['uplink_bps']):>9} {peer['held_up_s']:>6.1f} s  {shown}" + note
    )


def _rate(bps: float) -> str:
    if not bps:
        return "-"
    return f"{bps / 1e6:.3g} Mb/s" if bps < 1e9 else f"{bps / 1e9:.3g} Gb/s"


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
    parser.add_argument("peer", help="its name or id, or how that begins (see status)")
    parser.add_argument("--run", default="default", help="name of the run")
    parser.add_argument("--reason", default="", help="told to the peer")
    _add_token(parser)
    asked = parser.parse_args(words)
    from decotrain.control import client
    from decotrain.control import messages as m
    from decotrain.control.fields import given
    from decotrain.control.token import find

    given("--run", m.name, asked.run)
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
