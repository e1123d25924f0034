"""Status for people and for Prometheus, and the page that serves it."""

from __future__ import annotations

import socket
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from decotrain.control import metrics_page
from decotrain.control.metrics_page import MetricsPage
from decotrain.control.status import prometheus
from decotrain.errors import ConfigError
from decotrain.screen import lines_of

PEER: dict[str, Any] = {
    "peer": "00000000000000aa", "name": 'a "b"', "host": "h", "addresses": [], "slot": 0,
    "region": "oslo", "version": "0.9", "waited_s": [["00000000000000bb", 3.5]],
    "role": "active", "state": "here", "share": 1.5, "silent_s": 0.25, "heard": True,
    "installed": True, "links_down": ["00000000000000bb"], "uplink_bps": 2e7,
    "dialled": False, "held_up_s": 12.0,
    "links": [
        {"peer": "00000000000000bb", "out_bps": 8, "in_bps": 9, "rtt_s": 0.02, "unix": False,
         "shared": False, "pace_bps": 3e7, "congestion": "bbr"},
        {"peer": "00000000000000cc", "out_bps": 8, "in_bps": 9, "rtt_s": 1e-4, "unix": True,
         "shared": True, "pace_bps": 0.0, "congestion": ""},
    ],
    "figures": {"last_round": "0/7", "loss": 2.5},
}  # fmt: skip
KNOWN: dict[str, Any] = {
    "run": "r", "config": None, "generation": 0, "term": 5, "epoch": 2, "phase": "steady",
    "waiting_for": 0, "silent_s": 0.25, "routes": [],
    "events": [{"n": 1, "at_s": 0, "kind": "view", "text": "x"}],
    "peers": [PEER, PEER | {"peer": "00000000000000bb", "name": "b", "role": "observing",
                            "silent_s": None, "state": "away", "heard": False, "held_up_s": 0.0,
                            "waited_s": [["00000000000000aa", 12.0]], "version": "1.0",
                            "figures": {"last_round": "0/4"}}],
}  # fmt: skip


def test_a_screen_says_who_slows_whom() -> None:
    text = "\n".join(lines_of(KNOWN, "h:1"))
    parts = ["run r at h:1", "view 5.2", "1 of 2 peers active", "0/7", "loss=2.5", "20 Mb/s"]
    parts += ["20.0 ms", "broken", "dials out only", 'waited 12.0 s for a "b" alone', "away"]
    parts += ["20.0 ms bbr, at most 30 Mb/s", "same machine, shared memory"]
    parts += ["oslo", "decotrain 0.9, 1.0", 'a "b" waited 3.5 s for b', "00000000 h"]
    assert [part for part in parts if part not in text] == []
    assert [line.split()[7:9] for line in text.splitlines() if " 0/4 " in line] == [["0/4", "3"]]


def test_prometheus_text() -> None:
    text = prometheus(KNOWN)
    assert 'decotrain_peers{run="r",role="active"} 1' in text
    assert 'decotrain_peer_share{run="r",peer="00000000000000aa",name="a \\"b\\""} 1.5' in text
    assert 'figure="loss"} 2.5' in text
    assert 'to="00000000000000cc"} 1' in text[text.index("decotrain_link_shared{") :]
    assert 'to="00000000000000bb"} 3e+07' in text
    assert 'to="00000000000000bb",over="tcp",congestion="bbr"} 1' in text
    assert "last_round" not in text
    assert text.count("decotrain_peer_silent_s{") == 1  # who is away has none
    for line in text.splitlines():
        assert line.startswith("#") or float(line.rpartition(" ")[2]) is not None


def test_the_page() -> None:
    page = MetricsPage("127.0.0.1:0")
    try:
        page.text = "decotrain_x 1\n"
        with urllib.request.urlopen(f"http://{page.address}/metrics", timeout=30) as answer:
            assert answer.read() == b"decotrain_x 1\n"
        with pytest.raises(urllib.error.HTTPError) as missing:
            urllib.request.urlopen(f"http://{page.address}/etc", timeout=30)
        assert missing.value.code == 404
        missing.value.close()
        with pytest.raises(ConfigError, match="choose another address"):
            MetricsPage(page.address)
    finally:
        page.close()


def test_the_page_at_an_address_of_the_new_kind() -> None:
    page = MetricsPage("[::1]:0")
    try:
        assert page.address.startswith("[::1]:")
        page.text = "decotrain_x 1\n"
        with urllib.request.urlopen(f"http://{page.address}/metrics", timeout=30) as answer:
            assert answer.read() == b"decotrain_x 1\n"
    finally:
        page.close()


def test_who_asks_slowly_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than there are places, none of which comes to the end of its time."""
    monkeypatch.setattr(metrics_page, "REQUEST_S", 600.0)
    page = MetricsPage("127.0.0.1:0")
    host, _, port = page.address.partition(":")
    try:
        with ExitStack() as stack:
            slow = [
                stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
                for _ in range(metrics_page.REQUESTS_MAX + 1)
            ]
            for one in slow:
                one.sendall(b"G")
            with urllib.request.urlopen(f"http://{page.address}/metrics", timeout=30) as answer:
                assert answer.status == 200
            with suppress(ConnectionResetError):  # the oldest is cut for those who come later
                assert slow[0].recv(1) == b""
    finally:
        page.close()


def test_a_request_has_an_end_however_it_is_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes well within the limit of one read."""
    monkeypatch.setattr(metrics_page, "REQUEST_S", 0.4)
    page = MetricsPage("127.0.0.1:0")
    host, _, port = page.address.partition(":")
    began_s = time.monotonic()
    try:
        with socket.create_connection((host, int(port)), timeout=0.05) as slow:
            ended = False
            while not ended:
                assert time.monotonic() - began_s < 30, "a byte now and then goes on for ever"
                try:
                    slow.sendall(b"G")
                    ended = slow.recv(1) == b""
                except TimeoutError:  # nothing yet: the next byte
                    continue
                except OSError:
                    ended = True
    finally:
        page.close()
