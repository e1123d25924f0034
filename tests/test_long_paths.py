"""Links over tens of milliseconds: their congestion control, and the ceiling they learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.wan.allreduce import Team
from bench.wan.lab import Lab
from bench.wan.profiles import Access, Profile
from decotrain.errors import ConfigError
from decotrain.joining import path_options

MBPS = 40
LONG = Profile("long", "30 ms, 40 Mbit/s", 30, Access(MBPS, MBPS, up_queue_ms=100))
SHORT = Profile("short", "1 ms, 40 Mbit/s", 1, Access(MBPS, MBPS, up_queue_ms=100))
AVAILABLE = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")


def links(profile: Profile, elements: int = 2 << 20, **options: Any) -> list[tuple[str, float]]:
    """Congestion control and ceiling (Mbit/s) of both ends after two rounds (of 1.7 s)."""
    with Lab(profile, sites=2) as lab:
        team = Team(lab, {"streams": 0, **options})
        for _ in range(2):
            said = team.run(variant="ours", elements=elements, calls=1)
        team.close()
    return [(link[3], 1e-6 * link[4]) for one in said for link in one["links"]]


@pytest.mark.net
def test_a_long_path_gets_bbr_where_the_kernel_has_it_and_a_ceiling_near_its_rate() -> None:
    wanted = "bbr" if "bbr" in AVAILABLE.read_text().split() else "cubic"
    for control, ceiling_mbps in links(LONG):
        assert control == wanted
        # What a busy machine makes of 40 Mbit/s of packets is less; it is never much more.
        assert wanted == "cubic" or 0.3 * MBPS < ceiling_mbps < 1.2 * MBPS


@pytest.mark.net
def test_small_rounds_are_left_to_the_system() -> None:
    """BBR would spread them over time, at the low rate that it has seen of them."""
    assert links(LONG, elements=16 << 10) == [("cubic", 0.0), ("cubic", 0.0)]


@pytest.mark.net
def test_both_can_be_turned_off() -> None:
    assert links(LONG, control="", pace=False) == [("cubic", 0.0), ("cubic", 0.0)]


@pytest.mark.net
def test_a_short_path_is_left_alone() -> None:
    assert links(SHORT) == [("cubic", 0.0), ("cubic", 0.0)]


def test_the_environment_names_the_congestion_control(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DECOTRAIN_CONGESTION", raising=False)
    assert path_options()["congestion"] == "bbr"
    monkeypatch.setenv("DECOTRAIN_CONGESTION", "system")
    assert path_options()["congestion"] == ""
    monkeypatch.setenv("DECOTRAIN_CONGESTION", "reno")
    assert path_options()["congestion"] == "reno"
    monkeypatch.setenv("DECOTRAIN_CONGESTION", "BBR; rm")
    with pytest.raises(ConfigError, match="system"):
        path_options()
