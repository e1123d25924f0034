"""`decotrain status` is one screen, whatever the number of peers, and goes on without an answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from decotrain import operate
from decotrain.control import client
from decotrain.errors import UnreachableError
from decotrain.screen import LINKS_UP_TO, RECENT_S, SUMMARIES_MAX, RecentWaits, lines_of

FAR, NEAR_S, FAR_S = 5, 0.01, 0.25  # one peer of each run is far from the others


def link(peer: int, other: int) -> dict[str, Any]:
    rtt_s = FAR_S if FAR in (peer, other) else NEAR_S
    return {"peer": f"{other:016x}", "out_bps": 1e6, "in_bps": 2e6, "rtt_s": rtt_s, "unix": False,
            "shared": False, "pace_bps": 0.0, "congestion": "bbr"}  # fmt: skip


def known_of(count: int) -> dict[str, Any]:
    """A run as the coordinator tells of it: everybody has a link to everybody."""
    peers = [
        {"peer": f"{one:016x}", "name": f"peer{one}", "host": "h", "region": "", "version": "1",
         "slot": one, "role": "active", "state": "here", "share": 1.0, "silent_s": 0.2,
         "heard": True, "installed": True, "links_down": [], "uplink_bps": 2e7, "dialled": True,
         "links": [link(one, other) for other in range(count) if other != one],
         "held_up_s": 0.0, "waited_s": [], "figures": {}}
        for one in range(count)
    ]  # fmt: skip
    return {"run": "r", "generation": 0, "term": 1, "epoch": 1, "phase": "steady", "silent_s": 0.2,
            "waiting_for": 0, "peers": peers, "events": []}  # fmt: skip


def test_a_few_peers_show_every_link() -> None:
    lines = lines_of(known_of(LINKS_UP_TO), "h:1")
    assert sum(" -> " in line for line in lines) == LINKS_UP_TO * (LINKS_UP_TO - 1)


@pytest.mark.parametrize(("count", "most"), [(8, 20), (16, 40), (64, 90)])
def test_many_peers_are_a_line_each_and_those_with_the_worst_links_one_more(
    count: int, most: int
) -> None:
    known = known_of(count)
    known["peers"][count - 1]["links_down"] = [f"{one:016x}" for one in range(4)]
    lines = lines_of(known, "h:1")
    assert len(lines) < most
    of = {line.split()[0]: line for line in lines if " links, out " in line}
    assert len(of) == min(count, SUMMARIES_MAX)
    assert f"peer0 {count - 1:>2} links" in of["peer0"]
    assert f"out {count - 1:>4} Mb/s, in" in of["peer0"]
    assert f"worst -> peer{FAR} 250.0 ms bbr" in of["peer0"]
    assert of[f"peer{count - 1}"].endswith("broken -- peer0, peer1, peer2 and 1 more")
    assert "--links shows every link" in lines[-1]
    every = lines_of(known, "h:1", every_link=True)
    assert sum(" -> " in line for line in every) == count * (count - 1)


def waited(known: dict[str, Any], seconds: float) -> dict[str, Any]:
    known["peers"][0]["waited_s"] = [[known["peers"][1]["peer"], seconds]]
    return known


def test_waits_are_those_of_the_last_minute_where_we_have_looked_before() -> None:
    known, recent = known_of(2), RecentWaits()
    text = "\n".join(lines_of(waited(known, 900.0), "h:1"))
    assert "since the start: the others waited 900.0 s for peer1 alone" in text
    first = recent.add(waited(known, 900.0), 10.0)
    assert (list(first.seconds.values()), first.since) == ([900.0], "since the start")
    later = recent.add(waited(known, 907.0), 30.0)
    assert (list(later.seconds.values()), later.since) == ([7.0], "in the last 20 s")
    assert "in the last 20 s: the others waited 7.0 s for peer1 alone" in "\n".join(
        lines_of(known, "h:1", waits=later)
    )
    recent.add(waited(known, 907.0), 10.0 + RECENT_S)
    last = recent.add(waited(known, 908.0), 30.0 + RECENT_S)
    assert (list(last.seconds.values()), last.since) == ([1.0], "in the last 60 s")
    again = recent.add(waited(known, 2.0), 31.0 + RECENT_S)  # the peer was started again
    assert list(again.seconds.values()) == [2.0]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Any]], None]:
    """Lets the coordinator answer with these, and an operator press Ctrl-C after the last."""

    def tell(answers: list[Any]) -> None:
        left = iter(answers)

        def status(*_: Any, **__: Any) -> Any:
            answer = next(left, KeyboardInterrupt())
            if isinstance(answer, BaseException):
                raise answer
            return answer

        monkeypatch.setattr(client, "status", status)
        monkeypatch.setattr(operate, "WATCH_S", 0.0)

    return tell


AWAY = UnreachableError("no coordinator answers")


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["screen", "json"])
def test_who_watches_goes_on_watching_while_the_coordinator_is_away(
    told: Callable[[list[Any]], None], form: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    told([known_of(2), AWAY, AWAY, known_of(3)])
    with pytest.raises(KeyboardInterrupt):
        operate.status(["h:1", "--watch", *form])
    out, err = capsys.readouterr()
    if form:
        assert len(out.splitlines()) == 2  # what programs read stays JSON
        assert len(re.findall(r"^no answer for \d+ s$", err, re.MULTILINE)) == 2
        return
    screens = out.split(operate.CLEAR)[1:]
    late = [re.match(r"no answer for \d+ s; ", one) is not None for one in screens]
    assert late == [False, True, True, False]
    assert "2 of 2 peers active" in screens[2]
    assert "3 of 3 peers active" in screens[3]


def test_who_watches_an_address_where_nobody_is_hears_that(
    told: Callable[[list[Any]], None],
) -> None:
    told([AWAY])
    with pytest.raises(UnreachableError):
        operate.status(["h:1", "--watch"])
