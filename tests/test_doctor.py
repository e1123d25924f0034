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
from decotrain.control import probing
from decotrain.control.coordinator import Options
from decotrain.control.server import ServerThread
from decotrain.errors import ConfigError, RefusedError, UnreachableError

HERE = "127.0.0.1"
KEY = bytes(range(32))


@pytest.fixture
def answerer() -> Iterator[probe.Answerer]:
    made = probe.Answerer(HERE, 0, KEY)
    yield made
    made.close()


@pytest.fixture
def way(answerer: probe.Answerer) -> probe.Way:
    return probe.Way(HERE, answerer.port, KEY)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MEASURE_S", 0.05)


def test_the_way_to_a_machine_that_answers(way: probe.Way) -> None:
    assert 0 < probe.round_trip_s(HERE, way.port) < 30
    assert abs(way.clock_offset_s()) < 30
    for give in (False, True):
        for streams in (1, 4):
            assert way.rate_bps(streams, give, 0.1) > 1e6


def test_dialled_back_or_not(way: probe.Way) -> None:
    other = probe.Answerer("", 0, b"")  # on all interfaces, of both kinds
    try:
        assert way.dials_back(other.port)
    finally:
        other.close()
    assert not way.dials_back(other.port)


@pytest.mark.parametrize(
    "request_",
    [b"nonsense\n", b"time\n", b"take 00\n", b"time " + b"0" * 32 + b"\n", b"x" * 200, b"",
     b"time \xff\n"],
)  # fmt: skip
def test_a_stranger_gets_a_number_and_stops_nobody(way: probe.Way, request_: bytes) -> None:
    stranger = socket.create_connection((HERE, way.port), timeout=30)
    with stranger, suppress(OSError):  # it may have closed with our words unread
        assert len(stranger.recv(33, socket.MSG_WAITALL)) == 33
        stranger.sendall(request_)
        stranger.shutdown(socket.SHUT_WR)
        assert stranger.recv(100) == b""
    assert abs(way.clock_offset_s()) < 30


@pytest.mark.parametrize("key", [b"", bytes(32)], ids=["none", "another"])
def test_who_has_not_the_token_measures_nothing(answerer: probe.Answerer, key: bytes) -> None:
    way = probe.Way(HERE, answerer.port, key)
    with pytest.raises(RefusedError, match="another token"):
        way.clock_offset_s()
    with pytest.raises(RefusedError, match="another token"):
        way.dials_back(answerer.port)
    with suppress(RefusedError):
        assert way.rate_bps(1, True, 0.1) == 0


def test_nobody_answers_all_the_world_by_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DECOTRAIN_INSECURE", raising=False)
    with pytest.raises(ConfigError, match="--insecure"):
        doctor.main(["--answer", "0"])


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
        assert "yes (it sees us at 127.0.0.1)" in said
        assert "ok bandwidth from it: Mbit/s by number of streams: 1: " in said
        assert "16: " in said.splitlines()[-2]
        peer: dict[str, Any] = {"name": "a", "dialled": True, "heard": True}
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


def test_one_doctor_after_the_other_and_one_beside_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who is done says so; of who is at work the other learns, and goes on with the rest."""
    monkeypatch.setattr(probing, "QUIET_S", 600.0)
    monkeypatch.setattr(doctor, "STREAMS", (1,))
    server = ServerThread(Options(run="home"))
    place = server.server.probing.place
    other = probe.Answerer(HERE, 0, b"")
    try:
        for _ in range(2):
            doctor.main([server.address])
            assert "bandwidth from it: Mbit/s" in capsys.readouterr().out
            assert place.acquire(timeout=30), (
                "the coordinator is still busy with a doctor that ended"
            )
            place.release()
        with place:  # as when another one is at work
            assert doctor.main([server.address, "--to", f"{HERE}:{other.port}"]) == 1
        said = capsys.readouterr().out
        assert "!! dialled back, bandwidth: not known: " in said
        assert "another doctor is at work" in said
        assert "ok bandwidth from it: Mbit/s" in said  # of --to
    finally:
        other.close()
        server.stop()


def test_a_doctor_that_is_not_heard_of_holds_its_place_for_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probing, "QUIET_S", 0.2)
    made = probing.Probing(HERE)
    made.ask(b"a", HERE, 0)
    assert made.place.acquire(timeout=30)


def test_low_limits_have_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (256, 1024))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(doctor, "_kernel", lambda name: "4096 1 2" if "mem" in name else "cubic")
    found = {one.what: one for one in doctor.limits()}
    assert found["descriptors"].remedy.startswith("ulimit -n 1024")
    assert "--shm-size" in found["room in /dev/shm"].remedy
    assert found["tcp_rmem"].remedy == "sysctl -w net.ipv4.tcp_rmem='4096 1 4194304'"


@pytest.mark.parametrize(
    ("control", "allowed", "idle", "remedies"),
    [
        ("cubic", "reno cubic bbr", "1", []),
        ("bbr", "reno", "1", []),
        ("cubic", "reno cubic", "1",
         ["tcp_allowed_congestion_control='reno cubic bbr'", "tcp_slow_start_after_idle=0"]),
        ("cubic", "reno cubic", "0", ["modprobe tcp_bbr"]),
        ("", "", "", []),
    ],
)  # fmt: skip
def test_what_slows_long_paths_has_a_remedy(
    monkeypatch: pytest.MonkeyPatch, control: str, allowed: str, idle: str, remedies: list[str]
) -> None:
    knobs = {"tcp_congestion_control": control, "tcp_allowed_congestion_control": allowed,
             "tcp_slow_start_after_idle": idle}  # fmt: skip
    monkeypatch.setattr(doctor, "_kernel", knobs.__getitem__)
    found = [one.remedy for one in doctor.long_paths() if one.remedy]
    assert len(found) == len(remedies)
    assert all(part in remedy for part, remedy in zip(remedies, found, strict=True))
