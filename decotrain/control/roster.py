"""Whom the coordinator knows: peers that talk to it, and those that are gone for good.

Also the two decisions that are functions of what peers say: does a configuration fit, and through
whom a broken link is relayed. It decides no view.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from decotrain.control import messages as m
from decotrain.control.measures import Measures

GONE_MAX = 4096
SETTLE_FIRST_S = 0.01
ID_LETTERS_MIN = 6  # that name a peer for an operator


@dataclass
class Peer:
    """A process that said hello and is not gone."""

    hello: m.Hello
    heard_s: float
    joined_s: float
    view: int = 0  # installed, as its last message said
    current: bool = False
    void: bool = False  # until it has fetched the run's state
    slow: bool = False  # was made observing for it, and has not been active since
    promote_after_s: float = 0.0
    failed: int = 0  # attempts to make it active since it last was
    down: tuple[int, ...] = ()
    asked_s: float | None = None  # for a heartbeat, because others find its links closed
    answer_s: float = 0.0  # it took to install the last view: a bound on its round trip
    routes: int = 0
    figures: dict[str, Any] = field(default_factory=dict)
    measures: Measures = field(default_factory=Measures)

    @property
    def name(self) -> str:
        return f"{self.hello.name} ({self.hello.peer:016x})"

    def tried(self, active: bool, again_s: float) -> None:
        """A new view was made: did what it asked for come true?"""
        if active:
            self.failed, self.slow = 0, False
        elif self.current:
            self.failed += 1
            self.promote_after_s = again_s
        self.current = False


def settle_s(peers: Iterable[Peer]) -> float:
    """How long what the active peers have settled may need to reach these observers. The
    coordinator knows no latency between peers: it doubles its patience after each failure.
    """
    return max((SETTLE_FIRST_S * 2.0 ** min(peer.failed, 16) for peer in peers), default=0.0)


class Gone:
    """Peer ids that never come back: an id is used once (V11). Bounded.

    And launches whose peer was kicked: what is started in its place stays out too.
    """

    def __init__(self) -> None:
        self._reasons: OrderedDict[int, tuple[str, bool]] = OrderedDict()
        self._kicked: OrderedDict[tuple[str, str], str] = OrderedDict()

    def add(self, peer: int, reason: str, again: bool) -> None:
        self._reasons[peer] = (reason, again)
        while len(self._reasons) > GONE_MAX:
            self._reasons.popitem(last=False)

    def get(self, peer: int) -> tuple[str, bool] | None:
        return self._reasons.get(peer)

    def bar(self, origin: tuple[str, str], reason: str) -> None:
        """origin: host and launch. Without a launch nobody can be told from a newcomer."""
        if origin[1]:
            self._kicked[origin] = reason[: m.NOTE_MAX]
        while len(self._kicked) > GONE_MAX:
            self._kicked.popitem(last=False)

    def of(self, hello: m.Hello) -> tuple[str, bool] | None:
        reason = self._kicked.get((hello.host, hello.launch))
        return self.get(hello.peer) or (None if reason is None else (reason, False))


def config_misfit(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """Which keys differ, with both values; None when the configurations are equal."""
    run, peer = _flat(ours), _flat(theirs)
    odd = [key for key in sorted(run.keys() | peer.keys()) if run.get(key) != peer.get(key)]
    if not odd:
        return None
    shown = [
        f"{_plain(key)}: the run has {_short(run.get(key))}, this peer {_short(peer.get(key))}"
        for key in odd[:4]
    ]
    more = f" and {len(odd) - 4} more" if len(odd) > 4 else ""
    return "; ".join(shown) + more


def _plain(key: str) -> str:
    return key if key.isprintable() else repr(key)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _short(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:80]


def shunned(down: Mapping[int, Iterable[int]]) -> set[int]:
    """Peers whose links are closed, say more than half of the others in the map."""
    said: dict[int, int] = {}
    for peer, others in down.items():
        for other in set(others) - {peer}:
            said[other] = said.get(other, 0) + 1
    return {peer for peer in down if 2 * said.get(peer, 0) > len(down) - 1}


Edge = tuple[int, int]  # peers, lower id first


def broken_edges(down: Mapping[int, Iterable[int]]) -> set[Edge]:
    """Links that one of their ends calls broken, both ends being in the map."""
    return {
        (min(peer, other), max(peer, other))
        for peer, others in down.items()
        for other in others
        if other in down and other != peer
    }


def relays(edges: set[Edge], peers: Iterable[int]) -> tuple[dict[int, dict[int, int]], list[Edge]]:
    """Routes {peer: {other: via}} around broken links, and links nobody can relay.

    The relay with the least load whose own links to both ends work; ties by id, so that the same
    facts give the same routes.
    """
    everybody = sorted(peers)
    load = dict.fromkeys(everybody, 0)
    routes: dict[int, dict[int, int]] = {}
    stuck: list[Edge] = []
    for edge in sorted(edges):
        a, b = edge
        able = [
            via
            for via in everybody
            if via not in edge
            and (min(a, via), max(a, via)) not in edges
            and (min(b, via), max(b, via)) not in edges
        ]
        if not able:
            stuck.append(edge)
            continue
        via = min(able, key=lambda one: (load[one], one))
        load[via] += 1
        routes.setdefault(a, {})[b] = via
        routes.setdefault(b, {})[a] = via
    return routes, stuck


def meant(peer: int, word: str, names: Mapping[int, str]) -> list[int]:
    """Whom an operator means by an id, or by a word that a name or an id begins with. A whole name
    is no doubt about a longer one: gpu1 is not gpu10. Who is away has its id behind its name."""
    if peer:
        return [peer] if peer in names else []
    if not word:
        return []
    exact = [key for key, name in names.items() if f"{name} (".startswith(f"{word} (")]
    return exact or [
        key
        for key, name in names.items()
        if name.startswith(word) or (len(word) >= ID_LETTERS_MIN and f"{key:016x}".startswith(word))
    ]
