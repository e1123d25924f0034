"""An operator's commands are small: they load nothing that they do not need, so they start at once.

What is counted are imports and not seconds, which docs/log.md has.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from decotrain.control.coordinator import Options
from decotrain.control.server import ServerThread

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "numpy", "hydra", "omegaconf", "rich", "safetensors", "tensorboard", "psutil"}
MODULES_MAX = 320  # 110 to 230, most of them Python's own (pyzmq brings asyncio)
CODE = """
import json, sys
from decotrain import cli
from decotrain.control import server
server.Server.run = lambda self: self.socket.close()
code = cli.main(sys.argv[1:])
print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)
"""


@pytest.fixture
def address() -> Iterator[str]:
    server = ServerThread(Options(run="test"))
    yield server.address
    server.stop()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["token", "new"], 0),
        (["status", "ADDRESS"], 0),
        (["status", "ADDRESS", "--json"], 0),
        (["leave", "ADDRESS", "nobody", "--run", "test"], 2),
        (["kick", "ADDRESS", "nobody", "--run", "test"], 2),
        (["coordinator", "--listen", "127.0.0.1:0"], 0),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_a_small_command_loads(address: str, words: list[str], code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, *(word.replace("ADDRESS", address) for word in words)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        timeout=100,
    )  # fmt: skip
    ended, modules = json.loads(done.stderr.splitlines()[-1])
    assert ended == code, done.stderr
    assert HEAVY.isdisjoint(modules)
    assert not any(name.startswith("decotrain._core") for name in modules)
    assert len(modules) < MODULES_MAX
