"""P5 where it is hard: two newcomers at once; one stands still in the middle of its fetch, a peer
that serves it is killed, and it goes on; the other dies in the middle of its own, and is replaced.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from bench.fleet import Fleet, nothing
from tests import joining_peer as jp

ELEMENTS = 1 << 24  # 64 MiB
LIMIT_S = 60.0


def wait_until_stopped(process: Any) -> None:
    stat = Path(f"/proc/{process.pid}/stat")
    until_s = time.monotonic() + LIMIT_S
    while stat.read_text().rsplit(")", 1)[1].split()[0] != "T":
        assert time.monotonic() < until_s, "it never had a part of the state"
        time.sleep(0.001)


@pytest.mark.timeout(240)
def test_a_server_dies_in_a_download_and_a_newcomer_in_its_own() -> None:
    with Fleet(3) as fleet:
        elders = fleet.start(3)
        fleet.all(jp.hold, ELEMENTS)
        for elder in elders:
            elder.ask(jp.rounds)
        first, second = fleet.start(2)
        first.ask(jp.come, ELEMENTS, int(signal.SIGSTOP))
        second.ask(jp.come, ELEMENTS, int(signal.SIGKILL))
        second.process.join(LIMIT_S)
        assert second.process.exitcode == -signal.SIGKILL
        wait_until_stopped(first.process)
        elders[1].signal(signal.SIGKILL)
        elders[1].process.join(LIMIT_S)
        first.signal(signal.SIGCONT)
        (third,) = fleet.start()
        third.ask(jp.come, ELEMENTS, 0)
        for newcomer in (first, third):
            newcomer.ask(nothing)
        said, *others = [one.answer() for one in (first, third, elders[0], elders[2])]
    assert len({one["crc"] for one in (said, *others)}) == 1
    assert 0 < said["parts"][0] < 4 * ELEMENTS, "it had all or nothing when it was stopped"
    assert max(others[1]["counts"]) == 4  # the elders that live and both of them
