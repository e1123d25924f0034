"""Is there any use in coming back once more? A peer whose bits or rounds differ again and again has
other options or other code than the others: each return costs them two views, and it would never
end.
"""

from __future__ import annotations

from collections import deque

from decotrain.control import misfits

REASONS = {  # what is in every reason that says so
    "diverged in round": "its bits diverged",
    misfits.REASON: "its rounds did not fit",
}
TIMES = 3
WITHIN_S = 300.0


class Returns:
    def __init__(self) -> None:
        self._left_out_s = {why: deque[float](maxlen=TIMES) for why in REASONS}

    def vain(self, reason: str, now: float) -> str | None:
        """After each time that this peer was left out: why it stays out, if it does."""
        why = next((one for one in REASONS if one in reason), None)
        if why is None:
            return None
        times_s = self._left_out_s[why]
        times_s.append(now)
        took_s = now - times_s[0]
        if len(times_s) < TIMES or took_s > WITHIN_S:
            return None
        return (
            f"{REASONS[why]} {TIMES} times in {took_s:.0f} s: its options (learning rate,"
            " sync_every, ...), code or data type may differ from the others', or its memory is"
            f" at fault; last: {reason}"
        )
