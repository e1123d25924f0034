"""What a person meets and what the screen then says: one line, the cause, the remedy, exit code 2.

Wrong token, wrong run, a name or an address that leads nowhere and wrong options of `decotrain run`
are in test_run.py and test_cli.py. Here: other versions and models, a kick, a coordinator that is
gone, and no space left.
"""

from __future__ import annotations

import errno
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from decotrain import checkpoint
from decotrain.communicator import join
from decotrain.control import client
from decotrain.control.coordinator import Options
from decotrain.control.server import ServerThread
from decotrain.control.token import Token, write
from decotrain.errors import ConfigError, FileError
from decotrain.spsa import Recipe, seedlog
from decotrain.spsa.record import Record
from decotrain.spsa.space import Layout
from decotrain.train.launcher import Launcher
from decotrain.train.metrics import Journal, RunLog, Tail
from decotrain.train.table import Board
from tests.test_run import WAIT_S, until

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
JOIN = """
import logging, sys
logging.basicConfig(format="%(message)s")
from decotrain.control import agent, messages
agent.ABSENT_S = 0.2
{before}
import decotrain as dt
comm = dt.join(sys.argv[1], {options})
print("in", len(comm.members), flush=True)
import numpy
for number in range(1, 100):
    comm.all_reduce(numpy.ones(4, numpy.float32)).wait()
    print("round", number, flush=True)
    sys.stdin.readline()
"""


@contextmanager
def script(folder: Path, address: str, options: str = "", before: str = "", launcher: bool = False,
           ) -> Iterator[subprocess.Popen[str]]:  # fmt: skip
    """A script that joins, and does a round for each line that it is given."""
    (folder / "script.py").write_text(JOIN.format(options=options, before=before))
    words = ["-m", "decotrain.cli", "run", "--join", address, "--name", "here"] if launcher else []
    made = subprocess.Popen(
        [sys.executable, *words, "script.py", address], cwd=folder, env=ENVIRONMENT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield made
    finally:
        if made.poll() is None:
            made.terminate()
        made.communicate(timeout=WAIT_S)


def command(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "decotrain.cli", *words], env={**ENVIRONMENT, **more},
        capture_output=True, text=True, check=False, timeout=WAIT_S,
    )  # fmt: skip


def line_of(stream: object, part: str) -> str:
    for line in stream:  # type: ignore[attr-defined]
        if part in line:
            return str(line)
    raise AssertionError(f"it ended without {part!r}")


@pytest.fixture
def coordinator() -> Iterator[ServerThread]:
    server = ServerThread(Options(min_peers=1, config={"model": {"width": 64}}))
    yield server
    server.stop()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"grace_s": -1.0}, "grace_s=-1.0"),
        ({"grace_s": math.nan}, "grace_s=nan"),
        ({"grace_s": 1.0, "quorum": 0.0}, "above 0"),
        ({"grace_s": 1.0, "quorum": 1.0}, "waives nobody"),
        ({"late_s": math.inf}, "late_s=inf"),
    ],
)
def test_patience_that_makes_no_sense(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        join("local", **wrong)


@pytest.mark.parametrize(
    ("options", "before", "parts"),
    [
        ("config={'model': {'width': 32}}", "", ["model.width: the run has 64, this peer 32"]),
        ("", "messages.PROTOCOL = 77", ["protocol", "this peer 77", "install the same version"]),
    ],
    ids=["model", "version"],
)
def test_who_does_not_fit_is_told_both_values_and_not_started_again(
    run_dir: Path, coordinator: ServerThread, options: str, before: str, parts: list[str]
) -> None:
    with script(run_dir, coordinator.address, options, before, launcher=True) as run:
        out, errors = run.communicate(timeout=WAIT_S)
    assert (run.returncode, out) == (2, "")
    assert len(errors.splitlines()) == 1, errors
    assert [part for part in parts if part not in errors] == []


def test_a_kicked_script_says_by_whom(run_dir: Path, coordinator: ServerThread) -> None:
    with script(run_dir, coordinator.address, "name='here'") as peer:
        line_of(peer.stdout, "round 1")
        done = command("kick", coordinator.address, "here", "--reason", "wrong data")
        assert done.returncode == 0, done.stderr
        _, errors = peer.communicate("\n", timeout=WAIT_S)
    assert peer.returncode == 1  # an exception like any other: no launcher
    assert "kicked out by an operator (wrong data)" in errors.splitlines()[-1]


def test_rounds_go_on_without_a_coordinator_and_people_are_told(run_dir: Path) -> None:
    server = ServerThread(Options(min_peers=1), folder=run_dir / "record")
    with script(run_dir, server.address) as peer:
        assert peer.stdin is not None
        line_of(peer.stdout, "round 1")
        server.stop()
        gone = line_of(peer.stderr, "has gone")
        assert "started again with its record" in gone
        peer.stdin.write("\n")
        peer.stdin.flush()
        line_of(peer.stdout, "round 2")
        again = ServerThread(Options(min_peers=1), server.address, run_dir / "record")
        line_of(peer.stderr, "is there")
        again.stop()


def test_a_script_that_finds_no_coordinator_says_so_and_waits(run_dir: Path) -> None:
    address = "127.0.0.1:1"
    with script(run_dir, address) as peer:
        assert f"no coordinator answers at {address} yet: check" in line_of(peer.stderr, "no coord")
        assert peer.poll() is None


# --- no space left


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
from decotrain import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def limited(bytes_max: int, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command whose files cannot grow beyond a bound, as on a full disk."""
    return subprocess.run(
        [sys.executable, "-c", FULL, str(bytes_max), *words], cwd=cwd,
        env={**ENVIRONMENT, "DECOTRAIN_CACHE": str(cwd / "cache")}, capture_output=True, text=True,
        check=False, timeout=WAIT_S,
    )  # fmt: skip


def test_a_coordinator_whose_record_has_no_room_says_so_and_does_not_start(run_dir: Path) -> None:
    done = limited(10, "coordinator", "--listen", "127.0.0.1:0", "--record", "rec", cwd=run_dir)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "cannot write the record rec/coordinator.record: File too large" in done.stderr
    assert "free some space" in done.stderr


def test_a_record_that_finds_no_room_later_waits_for_it(run_dir: Path) -> None:
    """A run that holds views goes on without changes of membership, and makes them up."""
    record = run_dir / "record"
    code = (
        "import resource, signal, sys\n"
        "from decotrain import cli\n"
        "def full(number, _):\n"
        "    size = 10 if number == signal.SIGUSR1 else resource.RLIM_INFINITY\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))\n"
        "    print('room' if size > 10 else 'full', flush=True)\n"
        "signal.signal(signal.SIGUSR1, full)\n"
        "signal.signal(signal.SIGUSR2, full)\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    words = ["coordinator", "--listen", "127.0.0.1:0", "--record", str(record), "--min-peers", "1"]
    made = subprocess.Popen(
        [sys.executable, "-c", code, *words], env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        address = line_of(made.stdout, "listens on").rpartition(" ")[2].strip()
        until(lambda: client.status(address)["term"] > 0)
        made.send_signal(signal.SIGUSR1)
        line_of(made.stdout, "full")
        with script(run_dir, address) as peer:
            said = line_of(made.stderr, "cannot write the record")
            assert "goes on without changes of membership" in said
            made.send_signal(signal.SIGUSR2)
            line_of(peer.stdout, "round 1")
    finally:
        made.terminate()
        made.communicate(timeout=WAIT_S)


@contextmanager
def no_room(bytes_max: int) -> Iterator[None]:
    """Files of this process cannot grow beyond a bound."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_max, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_finds_no_room_leaves_the_one_before(run_dir: Path) -> None:
    model = {"w": torch.zeros(1000)}
    checkpoint.write(run_dir, 1, model, {}, {})
    with no_room(1000), pytest.raises(FileError, match=r"File too large; make room there"):
        checkpoint.write(run_dir, 2, model, {}, {})
    saved = checkpoint.newest(run_dir)
    assert saved is not None
    assert saved.round_number == 1
    assert [path.name for path in run_dir.iterdir()] == [saved.path.name]


def test_a_seed_log_that_finds_no_room_goes_on_where_it_is_whole(run_dir: Path) -> None:
    layout = Layout.of([("w", (), (3, 5), "F32", True)])
    header = seedlog.Header(Recipe(), layout, "ab" * 32)
    writer = seedlog.Writer("a.seedlog", header)
    size = Path("a.seedlog").stat().st_size
    many = [Record(step, {0: b"1234"}) for step in range(100)]
    with no_room(size + 100), pytest.raises(FileError, match="make room there and resume"):
        deque(map(writer.append, many))
    reached = writer.next_step
    writer.close()
    assert 0 < reached < 100
    writer = seedlog.Writer("a.seedlog", header)
    assert writer.next_step == reached
    writer.append(Record(reached, {0: b"1234"}))
    writer.close()
    assert seedlog.read("a.seedlog").next_step == reached + 1


def test_a_journal_that_finds_no_room_loses_lines_and_stops_nobody(run_dir: Path) -> None:
    journal = Journal(run_dir / "journal")
    journal.write("one")
    with no_room((run_dir / "journal").stat().st_size + 10):
        journal.write("lost")
        journal.write("lost too")
    journal.write("two")
    journal.close()
    told = [event["event"] for event in Tail(run_dir / "journal", whole=True).read()]
    assert told == ["one", "two"]


def test_a_run_whose_checkpoints_find_no_room_trains_to_its_end_and_says_so(run_dir: Path) -> None:
    (run_dir / "text.txt").write_bytes(b"some words, and some more of them; " * 4000)
    words = ["train", "peers=1", "model=tiny", "steps=20", "outer.sync_every=5", "batch=1",
             "every.checkpoint=2", "data.path=text.txt", "held_out_windows=4"]  # fmt: skip
    done = limited(200_000, *words, cwd=run_dir)
    assert done.returncode == 1, done.stderr
    notes = [line for line in done.stdout.splitlines() if "cannot be written" in line]
    assert len(notes) == 2, done.stdout
    assert all("make room there; what was saved before stands" in line for line in notes)
    assert "step 20/20" in done.stdout
    assert "no checkpoint can be read" in done.stderr.splitlines()[-1]


class DeadWriter:
    """TensorBoard's, whose thread has found no room: it says so with every call."""

    def add_scalar(self, *_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_tensorboard_without_room_stops_nobody(run_dir: Path) -> None:
    before = threading.excepthook
    log = RunLog(run_dir)
    try:
        log._writers["peer-1"] = DeadWriter()
        log.take("peer-1", {"event": "progress", "step": 1, "loss": 2.0})
        assert not log._writers
        thread = threading.Thread(target=DeadWriter().add_scalar)
        thread.start()
        thread.join()  # its traceback would be on the screen: pytest would say so
        log.full = True
        log.take("peer-1", {"event": "progress", "step": 2, "loss": 2.0})
        assert not log._writers, "a thread that would die"
    finally:
        log.close()
    assert threading.excepthook is before


def test_a_full_disk_is_told_once_and_its_end_too(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = SimpleNamespace(name="r", peers=1, restarts=0)
    launcher = Launcher(cast(Any, job), run_dir, [])
    launcher.board, launcher.log = Board("r", 1, 1, 1.0, {}), RunLog(run_dir)
    free = iter([1 << 30, 0, 0, 1 << 30, 1 << 30])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=next(free)))
    for _ in range(5):
        launcher._look_for_room()
    launcher.log.close()
    told = [line.partition(" ")[2] for line in launcher.board.events]
    assert [line.partition(" in ")[0] for line in told] == ["no room", "there is room again"]


def test_a_token_for_which_there_is_no_room_leaves_nothing_behind(run_dir: Path) -> None:
    done = limited(10, "token", "new", "--out", "run.token", cwd=run_dir)
    assert done.returncode == 2, done.stderr
    assert "cannot write the token file run.token: File too large" in done.stderr
    assert not (run_dir / "run.token").exists()
    write(Token.new(), run_dir / "run.token")
    words = ["token", "new", "--peer", "a", "--token-file", "run.token", "--out", "a.token"]
    done = limited(10, *words, cwd=run_dir)
    assert done.returncode == 2, done.stderr
    assert not (run_dir / "a.token").exists()
