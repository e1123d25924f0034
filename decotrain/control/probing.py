"""What a coordinator does for `decotrain doctor`: dials back who asks, lets the way be measured.

Each request runs on a thread of its own and leaves its answer in a queue, so the coordinator waits
for nothing. At most one at a time; what was opened for it closes when the doctor says that it is
done or is not heard of for some seconds, and after a minute anyhow. It decides nothing and holds no
state of the run.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque

from decotrain.control import messages as m
from decotrain.errors import ConfigError
from decotrain.probe import Answerer, can_dial

OPEN_S = 60.0
QUIET_S = 6.0  # without a connection: a doctor to whom the port is closed tries for half as long
LOOK_S = 0.1
KEY_BYTES = 32


class Probing:
    def __init__(self, host: str) -> None:
        self.host = host  # that the coordinator listens on
        self.answers: deque[tuple[bytes, m.Probe | m.Done]] = deque()
        self.place = threading.BoundedSemaphore(1)
        self.over = threading.Event()

    def ask(self, source: bytes, place: str, port: int) -> None:
        """`place`: where the request came from, as the coordinator's socket sees it."""
        if not self.place.acquire(blocking=False):
            busy = m.Done(False, "another doctor is at work there")
            self.answers.append((source, busy))
            return
        thread = threading.Thread(target=self._one, args=(source, place, port), daemon=True)
        thread.start()

    def close(self) -> None:
        self.over.set()

    def _one(self, source: bytes, place: str, port: int) -> None:
        try:
            dialled = bool(port) and can_dial(place, port)
            key = secrets.token_bytes(KEY_BYTES)
            try:
                answerer = Answerer(self.host, 0, key)
            except ConfigError as error:
                self.answers.append((source, m.Done(False, str(error)[:512])))
                return
            self.answers.append((source, m.Probe(answerer.port, key, dialled, place[:64])))
            end_s = time.monotonic() + OPEN_S
            while not self.over.is_set() and not answerer.done.wait(LOOK_S):
                if answerer.quiet_s() > QUIET_S or time.monotonic() > end_s:
                    break
            answerer.close()
        finally:
            self.place.release()
