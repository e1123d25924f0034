"""P11: whatever happens to the disk or the process during a write, the last good one is loadable.

Death (with the loss of what was not flushed) and ENOSPC at each system call in turn of every writer
of durable files, in real processes under tests/disk_faults.cpp; a file system that is full.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.disk_faults import SCENARIOS

ROOT = Path(__file__).resolve().parent.parent
COMPILER = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x00020000, 16384, 1 << 18

FULL = """
import sys
from pathlib import Path
from decotrain.errors import FileError
from tests import disk_faults as df
folder = Path(sys.argv[1])
df.VALUES = 200_000  # two files of 0.8 MB: two checkpoints fit into 4 MiB, not three
df.checkpoints(folder)
df.append(folder, 6)
(folder / "filler").write_bytes(bytes(600_000))
for change in (df.CHECKPOINT.change, lambda place: df.append(place, 200_000)):
    try:
        change(folder)
        print("no error")
    except FileError as error:
        print(error)
print(df.newest_is(folder, {2: 2}) or df.log_has(folder, 6, 200_000) or "good")
(folder / "filler").unlink()
df.append(folder, df.seedlog.read(folder / "run.seedlog").next_step + 10)
print(df.newest_is(folder, {2: 2}) or "good")
"""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    if COMPILER is None:
        pytest.skip("needs a C++ compiler for the faults")
    if not sys.platform.startswith("linux"):
        pytest.skip("LD_PRELOAD and these system calls are Linux's")
    made = tmp_path_factory.mktemp("faults") / "disk_faults.so"
    source = ROOT / "tests" / "disk_faults.cpp"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-o", str(made)]
    subprocess.run([COMPILER, *flags, str(source), "-ldl"], check=True)
    return str(made)


def test_a_fault_at_each_system_call(library: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.disk_faults", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "LD_PRELOAD": library},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("WRONG")] == []
    calls = {tuple(words[:2]): int(words[2]) for words in map(str.split, lines)}
    assert len(calls) == 2 * len(SCENARIOS)
    assert min(calls.values()) >= 8  # each was a fault


def test_a_full_file_system(tmp_path: Path) -> None:
    def enter() -> None:  # a mount that ends with the process
        libc = ctypes.CDLL(None)
        here = str(tmp_path).encode()
        if (
            libc.unshare(CLONE_NEWNS) != 0
            or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) != 0
            or libc.mount(b"tmpfs", here, b"tmpfs", 0, b"size=4m") != 0
        ):
            os._exit(77)

    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], preexec_fn=enter,
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    if done.returncode == 77:
        pytest.skip("needs the right to mount a small tmpfs")
    assert done.returncode == 0, done.stderr
    checkpoint, log, good, again = done.stdout.splitlines()
    assert "round-000003 cannot be written: No space left on device" in checkpoint
    assert "run.seedlog: No space left on device" in log
    assert good == again == "good"
