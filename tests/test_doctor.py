"""`decotrain doctor`: what it measures is there, and what is wrong gets a remedy."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from decotrain import doctor, probe
from decotrain.control.coordinator import Options
from decotrain.control.server import ServerThread
from decotrain.errors import UnreachableError

HERE = "127.0.0.1"


@pytest.fixture
def answerer() -> Iterator[probe.Answerer]:
    made = probe.Answerer(HERE, 0)
    yield made
    made.close()


def test_the_way_to_a_machine_that_answers(answerer: probe.Answerer) -> None:
    assert 0 < probe.round_trip_s(HERE, answerer.port) < 30
    assert abs(probe.clock_offset_s(HERE, answerer.port)) < 30
    for give in (False, True):
        for streams in (1, 4):
            assert probe.rate_bps(HERE, answerer.port, streams, give, 0.1) > 1e6


def test_dialled_back_or_not(answerer: probe.Answerer) -> None:
    other = probe.Answerer(HERE, 0)
    try:
        assert probe.dials_back(HERE, answerer.port, other.port)
    finally:
        other.close()
    assert not probe.dials_back(HERE, answerer.port, other.port)


@pytest.mark.parametrize("request_", [b"nonsense\n", b"dial x\n", b"x" * 200, b"", b"give -1\n"])
def test_a_stranger_gets_nothing_and_stops_nobody(
    answerer: probe.Answerer, request_: bytes
) -> None:
    stranger = socket.create_connection((HERE, answerer.port), timeout=30)
    with stranger, suppress(OSError):  # it may have closed with our words unread
        stranger.sendall(request_)
        stranger.shutdown(socket.SHUT_WR)
        assert stranger.recv(100) == b""
    assert abs(probe.clock_offset_s(HERE, answerer.port)) < 30


def test_nobody_answers() -> None:
    with socket.socket() as free:
        free.bind((HERE, 0))
        port = free.getsockname()[1]
    with pytest.raises(UnreachableError, match="firewall"):
        probe.round_trip_s(HERE, port)


def test_findings_about_a_coordinator_and_its_peers(
    answerer: probe.Answerer, capsys: pytest.CaptureFixture[str]
) -> None:
    server = ServerThread(Options(run="home"))
    try:
        assert doctor.main([server.address]) in (0, 1)
        said = capsys.readouterr().out
        assert "run 'home', round trip" in said
        assert "ok clock" in said
        peer: dict[str, Any] = {"name": "a", "dialled": True}
        open_, shut = f"tcp://{HERE}:{answerer.port}", f"tcp://{HERE}:1"
        known = {"run": "home", "wall_s": time.time() + 60, "peers": [
            peer | {"addresses": [shut, open_]}, peer | {"addresses": [shut]},
            peer | {"addresses": ["unix://x/y"]},
        ]}  # fmt: skip
        found = list(doctor.coordinator(server.address, known, time.time()))
    finally:
        server.stop()
    assert [bool(one.remedy) for one in found] == [False, True, False, True, False]
    assert "timedatectl" in found[1].remedy
    assert "--dial-only" in found[3].remedy


def test_low_limits_have_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (256, 1024))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(doctor, "_kernel", lambda name: "4096 1 2" if "mem" in name else "cubic")
    found = {one.what: one for one in doctor.limits()}
    assert found["descriptors"].remedy.startswith("ulimit -n 1024")
    assert "--shm-size" in found["room in /dev/shm"].remedy
    assert found["tcp_rmem"].remedy == "sysctl -w net.ipv4.tcp_rmem='4096 1 4194304'"
    assert not found["congestion control"].remedy
