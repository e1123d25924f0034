"""What a peer listens on and what others are told of it."""

from __future__ import annotations

import pytest

from decotrain import joining
from decotrain.control import messages as m
from decotrain.errors import ConfigError


@pytest.mark.parametrize("advertise", [[], [f"tcp://host{n}:29500" for n in range(9)]])
def test_neighbours_are_told_of_the_unix_socket_however_many_addresses_there_are(
    monkeypatch: pytest.MonkeyPatch, advertise: list[str]
) -> None:
    many = [f"10.0.0.{number}" for number in range(9)]
    monkeypatch.setattr(joining, "interface_addresses", lambda six: many)
    told = joining.told_addresses(["tcp://0.0.0.0:29500", "unix://@here"], advertise)
    assert len(told) > m.ADDRESSES_MAX
    assert "unix://@here" in told[: m.ADDRESSES_MAX]


@pytest.mark.parametrize(
    ("why", "remedy"),
    [
        ("Address already in use", "another process has the port: stop it"),
        ("Cannot assign requested address", "does not have the address"),
        ("Permission denied", "give another address"),
    ],
)
def test_an_address_that_cannot_be_had_has_a_remedy(why: str, remedy: str) -> None:
    said = f"tcp://10.0.0.4:1: {why}; .*{remedy}"
    with pytest.raises(ConfigError, match=said), joining.bind_errors():
        raise RuntimeError(f"cannot listen on tcp://10.0.0.4:1: {why}")


def test_other_errors_of_a_node_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="epoll"), joining.bind_errors():
        raise RuntimeError("cannot start the mesh: epoll")
