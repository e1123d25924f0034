"""Is there any use in coming back once more? A peer whose bits differ again and again has other
options or other code than the others: each return costs them two views, and it would never end.
"""

from __future__ import annotations

from collections import deque

DIVERGED = "diverged in round"  # in every reason that says so
TIMES = 3
WITHIN_S = 300.0


class Returns:
    def __init__(self) -> None:
        self._diverged_s: deque[float] = deque(maxlen=TIMES)

    def vain(self, reason: str, now: float) -> str | None:
        """After each time that this peer was left out: why it stays out, if it does."""
        if DIVERGED not in reason:
            return None
        self._diverged_s.append(now)
        took_s = now - self._diverged_s[0]
        if len(self._diverged_s) < TIMES or took_s > WITHIN_S:
            return None
        return (
            f"its bits diverged {TIMES} times in {took_s:.0f} s: its options (learning rate,"
            " sync_every, ...), code or data type may differ from the others', or its memory is"
            f" at fault; last: {reason}"
        )
