"""Bytes from the network become messages or a MessageError, and nothing else."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest

from decotrain.control import messages as m
from decotrain.errors import ConfigError, MessageError
from tests.control.fakes import empty_report

HELLO = {
    "t": "hello", "run": "r", "protocol": m.PROTOCOL, "peer": 5, "name": "n", "host": "h",
    "launch": "", "region": "", "version": "1",
    "addresses": ["tcp://1.2.3.4:5"], "key": b"", "share": 1.0, "config": {"a": [1, {"b": 2.5}]},
    "min_peers": 0, "ready": True, "void": False, "term": 0, "view": 0, "generation": 0,
    "members": [[7, 0, True]],
}  # fmt: skip
ROUND = {
    "tag": 0, "seq": 1, "spec": b"s", "begun": True, "skipped": 0, "owner": b"\0\xff",
    "received": bytes(16), "born": bytes(16), "digest": bytes(16), "contributors": bytes(16),
}  # fmt: skip


def changed(path: list[Any], value: Any) -> bytes:
    content = msgpack.unpackb(msgpack.packb(HELLO))
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return bytes(msgpack.packb(content))


def report_with(**change: Any) -> bytes:
    report = {**empty_report(1), "rounds": [{**ROUND, **change}]}
    head = {"t": "report", "run": "r", "peer": 1, "freeze": [1, 1], "generation": 0}
    return bytes(msgpack.packb({**head, "report": report}))


def test_a_message_survives_the_wire() -> None:
    message = m.decode(msgpack.packb(HELLO))
    assert isinstance(message, m.Hello)
    assert m.decode(m.encode(message)) == message
    assert m.decode(report_with()).report["rounds"][0]["owner"] == b"\0\xff"


def test_a_configuration_as_deep_as_is_taken_is_shown_by_status() -> None:
    deep: Any = 1
    for _ in range(8):
        deep = {"a": deep}
    assert m.config(deep) == deep
    m.encode(m.Status({"config": deep}))
    with pytest.raises(MessageError, match="too deep"):
        m.config({"a": deep})


def test_a_hello_of_another_version_says_who_and_which() -> None:
    theirs = {"t": "hello", "run": "r", "protocol": 77, "peer": 5, "name": "n", "news": [1, 2]}
    assert m.decode(msgpack.packb(theirs)) == m.Foreign("r", 77, 5, "n")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not msgpack"),
        (b"\xc1", "not msgpack"),
        (b"\x93\x01\x02\x03", "not a map"),
        (msgpack.packb({"t": "nonsense"}), "unknown message type"),
        (msgpack.packb({"t": ["hello"]}), "unknown message type"),
        (msgpack.packb({**HELLO, "extra": 1}), "missing or unknown keys: extra"),
        (msgpack.packb({k: v for k, v in HELLO.items() if k != "peer"}), "peer"),
        (changed(["peer"], 0), "peer: expected an integer"),
        (changed(["peer"], True), "peer: expected an integer"),
        (changed(["protocol"], -1), "protocol"),
        (changed(["share"], float("nan")), "share"),
        (changed(["name"], "x" * 1000), "name"),
        (changed(["name"], "a\nb"), "control characters"),
        (changed(["addresses"], ["x"] * 99), "addresses"),
        (changed(["config"], {"a": b"bytes"}), "config"),
        (changed(["config"], [[[[[[[[[[1]]]]]]]]]]), "too large or too deep"),
        (changed(["members", 0], [7, 0]), "members"),
        (report_with(received=bytes(8)), "received has a wrong length"),
        (report_with(owner=b"\0\x40"), "slot that does not exist"),
        (report_with(seq=-1), "seq"),
        (report_with(tag=5000), "tag"),
    ],
)
def test_what_is_no_message_is_refused_with_a_reason(data: bytes, says: str) -> None:
    with pytest.raises(MessageError, match=says):
        m.decode(data)


def test_nothing_but_a_message_error_comes_out() -> None:
    """Every cut and many flips of real messages."""
    draw = random.Random(1)
    for good in (bytes(msgpack.packb(HELLO)), report_with()):
        for cut in range(len(good)):
            with pytest.raises(MessageError):
                m.decode(good[:cut])
        for _ in range(2000):
            bad = bytearray(good)
            for _ in range(draw.randint(1, 4)):
                bad[draw.randrange(len(bad))] = draw.randrange(256)
            try:
                message = m.decode(bytes(bad))
                if not isinstance(message, m.Foreign):
                    m.encode(message)
            except MessageError:
                continue


LONG, DEEP = "x" * 513, {"a": [[[[[[[[[1]]]]]]]]]}
WELCOME = m.Welcome("r", 1, 1, None, 0)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (m.Kick("r", 0, "n" * 129, False, ""), r"kick: name: .* 0\.\.128 characters"),
        (m.Kick("r", 0, "n", False, LONG), r"kick: detail: .* 0\.\.512 characters"),
        (m.Kick("r", 0, "n", False, "a\nb"), "kick: detail: .*control characters"),
        (m.AskStatus("r" * 129, 0), r"ask_status: run: .* 0\.\.128 characters"),
        (m.Leave("", 1), r"leave: run: .* 1\.\.128 characters"),
        (
            replace(WELCOME, config=DEEP),
            "config: too large or too deep: .* 4096 items and 8 levels",
        ),
        (replace(WELCOME, config={"a": [0] * 5000}), "config: too large or too deep"),
        (replace(WELCOME, config={"a": "x" * m.CONFIG_BYTES_MAX}), "bytes; at most 262144"),
        (replace(WELCOME, config={"a": float("inf")}), "config: not plain data: inf"),
        (replace(WELCOME, config={"a": {5: 1}}), "config: a key that is no text: 5"),
        (replace(WELCOME, config={"a": object()}), "welcome: not plain data"),
    ],
)
def test_what_the_receiver_would_drop_is_not_sent(message: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        m.encode(message)


def test_figures_are_made_to_fit_a_heartbeat() -> None:
    """One that does not would cost the whole heartbeat, and with it the peer its place."""
    given = {
        "loss": np.float64(2.5), "rate": np.float32(0.5), "step": np.int64(7), "on": True,
        "odd": float("nan"), "huge": 1e31, "thing": object(), "": 1, "tab": "a\tb" * 99, 5: "five",
    }  # fmt: skip
    fits = m.fitting(given)
    assert fits == {"loss": 2.5, "rate": 0.5, "step": 7, "on": 1, "tab": ("ab" * 99)[:128],
                    "5": "five"}  # fmt: skip
    beat = m.Heartbeat("r", 1, 0, 0, True, False, [], 0, fits, 1.0, 0.0, [], [])
    assert m.decode(m.encode(beat)) == beat
    assert len(m.fitting({f"figure {n}": n for n in range(99)})) == 32


def test_too_many_bytes_are_not_even_read() -> None:
    with pytest.raises(MessageError, match="at most"):
        m.decode(bytes(m.MESSAGE_BYTES_MAX + 1))
