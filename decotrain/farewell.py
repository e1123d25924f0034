"""How a script that `decotrain run` started ends: it leaves the run, and says why it cannot go on.

On SIGTERM, Ctrl-C, the end of the script or of the launcher the peer leaves cleanly, so that nobody
waits for it.
An error that starting again would not mend (kicked, refused, wrong options) goes to the launcher,
which prints it and stops. Scripts started otherwise, or that handle SIGTERM, are left alone.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from decotrain.errors import ConfigError, Error, LeftError, RefusedError
from decotrain.parent import end_with_parent

FILE = "DECOTRAIN_FAREWELL"  # environment: where the last words go
FINAL = (ConfigError, LeftError, RefusedError)
LEAVE_S = 5.0


def end_well(leave: Callable[[float], None]) -> None:
    """From now on the end of this process is a clean leave."""
    if FILE not in os.environ:
        return
    end_with_parent()  # a launcher that was killed would leave a peer behind
    atexit.register(leave, LEAVE_S)
    say_last_words()
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _exit)


def say_last_words() -> None:
    """An uncaught error of ours that is final is one line for the launcher, and no traceback."""
    if FILE not in os.environ or getattr(sys.excepthook, "__module__", "") == __name__:
        return
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not isinstance(error, FINAL):
            before(kind, error, trace)
            return
        with suppress(OSError):
            Path(os.environ[FILE]).write_text(f"{kind.__name__}\n{error}", encoding="utf-8")

    sys.excepthook = hook


def last_words(path: Path) -> Error | None:
    """What a process of the peer ended with, if it was final."""
    try:
        name, _, text = path.read_text(encoding="utf-8").partition("\n")
    except OSError:
        return None
    kinds = {kind.__name__: kind for kind in FINAL}
    return kinds[name](text) if name in kinds else None


def _exit(number: int, _: object) -> None:
    # Once: threads of a launcher that is killed end one by one, and each tells its children. A
    # second exception would come in the middle of leaving.
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)
