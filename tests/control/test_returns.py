"""A peer that is left out comes back, but not for ever for the same reason."""

from __future__ import annotations

import pytest

from decotrain.control.misfits import REASON
from decotrain.control.returns import TIMES, WITHIN_S, Returns

BITS = "its bits diverged in round 0/7"


def test_bits_that_differ_again_and_again_are_no_accident() -> None:
    returns = Returns()
    assert [returns.vain(BITS, now) for now in range(TIMES - 1)] == [None] * (TIMES - 1)
    why = returns.vain("diverged in round 0/9, says b", WITHIN_S)
    assert why is not None
    assert f"diverged {TIMES} times in {WITHIN_S:.0f} s" in why
    assert "options" in why
    assert "0/9" in why


def test_nor_are_rounds_that_do_not_fit() -> None:
    returns = Returns()
    for now in range(TIMES - 1):
        assert returns.vain(f"{REASON} a (round 0/1: says b)", now) is None
        assert returns.vain(BITS, now) is None  # counted apart
    why = returns.vain(f"{REASON} a (round 0/9: says b)", TIMES)
    assert why is not None
    assert f"its rounds did not fit {TIMES} times" in why


@pytest.mark.parametrize(
    ("reason", "pause_s"), [("not heard for 3.0 s", 1.0), (BITS, WITHIN_S / (TIMES - 1) + 1)]
)
def test_other_reasons_and_rare_ones_do_not_keep_a_peer_out(reason: str, pause_s: float) -> None:
    returns = Returns()
    assert [returns.vain(reason, n * pause_s) for n in range(20)] == [None] * 20
