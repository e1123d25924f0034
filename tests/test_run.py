"""`decotrain run`: what torchrun documents of restarts, signals and exit codes holds for a peer."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from decotrain.control import client
from decotrain.control.coordinator import Options
from decotrain.control.server import ServerThread
from decotrain.control.token import Token, write
from decotrain.errors import ConfigError
from decotrain.launch.options import parse

WAIT_S = 90.0
WORDS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
TELL = f"""
import json, os, sys, time
told = {{key: os.environ[key] for key in {WORDS!r}}}
print("told", json.dumps([told, sys.argv[1:]]), flush=True)
"""
JOIN = """
import decotrain as dt
comm = dt.join(timeout_s=60)
comm.members
print("in", comm.peer, flush=True)
"""
ROUNDS = """
import numpy, sys
while True:  # a round for each line that it is given, and at the end of them all one after another
    comm.all_reduce(numpy.ones(4, numpy.float32)).wait()
    sys.stdin.readline()
"""


@pytest.fixture
def coordinator() -> Iterator[ServerThread]:
    server = ServerThread(Options(run="test", min_peers=1))
    yield server
    server.stop()


class Started:
    """A `decotrain run` in the background."""

    def __init__(self, folder: Path, code: str, *options: str, arguments: tuple[str, ...] = ()):
        (folder / "script.py").write_text(code)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "decotrain.cli", "run", *options, "script.py", *arguments],
            cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )  # fmt: skip

    def line(self, beginning: str) -> str:
        """The next line that begins so; what follows."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(beginning):
                return line.removeprefix(beginning).strip()
        raise AssertionError(self.process.communicate()[1])

    def end(self) -> tuple[int, str, str]:
        out, errors = self.process.communicate(timeout=WAIT_S)
        return self.process.returncode, out, errors

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()  # and it ends its own processes
            self.process.communicate(timeout=WAIT_S)


def until(what: Callable[[], bool]) -> None:
    """Waits for the outside world; the bound is only there to end a broken test."""
    end_s = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < end_s, "it never came true"
        time.sleep(0.05)


def peers(coordinator: ServerThread) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = client.status(coordinator.address, "test")["peers"]
    return rows


def events(coordinator: ServerThread) -> list[tuple[str, str]]:
    known = client.status(coordinator.address, "test")["events"]
    return [(event["kind"], event["text"]) for event in known]


def test_several_processes_are_one_group_with_prefixed_lines(run_dir: Path) -> None:
    options = ("--standalone", "--nproc-per-node=2", "--log-dir", "logs")
    with Started(run_dir, TELL, *options, arguments=("--lr", "1")) as started:
        code, out, errors = started.end()
    assert code == 0, errors
    lines = [line for line in out.splitlines() if " told " in line]
    assert sorted(line[:4] for line in lines) == ["[0] ", "[1] "]
    for line in lines:
        told, arguments = json.loads(line.partition(" told ")[2])
        assert told["RANK"] == told["LOCAL_RANK"] == line[1]
        assert told["WORLD_SIZE"] == told["LOCAL_WORLD_SIZE"] == "2"
        assert arguments == ["--lr", "1"]
    assert len(list((run_dir / "logs").rglob("stdout.log"))) == 2


def test_output_that_is_redirected_to_nowhere_in_particular_is_kept_and_named(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(run_dir))
    with Started(run_dir, TELL, "--standalone", "-r", "3") as started:
        code, out, errors = started.end()
    assert (code, out) == (0, "")
    said = next(line for line in errors.splitlines() if "output goes to" in line)
    folder = Path(said.partition("output goes to ")[2].partition(" ")[0])
    kept = [path.read_text() for path in folder.rglob("stdout.log")]
    assert len(kept) == 1
    assert kept[0].startswith("told ")


def test_a_failed_script_is_started_again_as_a_new_incarnation(
    run_dir: Path, coordinator: ServerThread
) -> None:
    code = TELL + JOIN + "sys.exit(7 if told['TORCHELASTIC_RESTART_COUNT'] == '0' else 0)"
    options = ("--join", coordinator.address, "--run", "test", "--max-restarts", "1")
    with Started(run_dir, code, *options) as started:
        ids = [started.line("in "), started.line("in ")]
        code, _, errors = started.end()
    assert code == 0
    assert "exit code 7" in errors
    assert "started again" in errors
    assert ids[0] != ids[1]
    joined = [text for kind, text in events(coordinator) if kind == "joined"]
    assert len(joined) == 2
    until(lambda: not peers(coordinator))


def test_a_killed_peer_is_left_out_at_once_and_given_up_after_its_restarts(run_dir: Path) -> None:
    token = Token.new()
    write(token, run_dir / "token")
    coordinator = ServerThread(Options(run="test", min_peers=1), token=token)
    code = "import os\n" + JOIN + "print('pid', os.getpid(), flush=True)\n" + ROUNDS
    options = ["--join", coordinator.address, "--run", "test", "--max-restarts", "0"]
    try:
        with Started(run_dir, code, *options, "--token-file", "token") as started:
            os.kill(int(started.line("pid ")), signal.SIGKILL)
            ended, _, errors = started.end()
        seen = client.status(coordinator.address, "test", token=token)["events"]
    finally:
        coordinator.stop()
    assert ended == 1  # as torchrun
    assert errors.splitlines()[-1] == "decotrain: process 0 ended: killed by SIGKILL"
    assert any("SIGKILL" in e["text"] for e in seen if e["kind"] == "suspected")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_forwarded_and_the_peer_leaves_in_order(
    run_dir: Path, coordinator: ServerThread, number: signal.Signals
) -> None:
    options = ("--join", coordinator.address, "--run", "test")
    with Started(run_dir, JOIN + ROUNDS, *options) as started:
        started.line("in ")
        until(lambda: [row["role"] for row in peers(coordinator)] == ["active"])
        started.process.send_signal(number)
        code, _, errors = started.end()
    assert code == 128 + number
    assert "stopping; its processes have 30 s to leave" in errors
    kinds = [kind for kind, _ in events(coordinator)]
    assert "left" in kinds
    assert "suspected" not in kinds


def test_a_killed_launcher_leaves_no_peer_behind(run_dir: Path, coordinator: ServerThread) -> None:
    options = ("--join", coordinator.address, "--run", "test")
    with Started(run_dir, JOIN + ROUNDS, *options) as started:
        started.line("in ")
        until(lambda: [row["role"] for row in peers(coordinator)] == ["active"])
        started.process.kill()
        until(lambda: not peers(coordinator))
        _, _, errors = started.end()  # its script held the pipes
    assert "terminate called" not in errors
    assert "Traceback" not in errors
    assert "left" in [kind for kind, _ in events(coordinator)]


TWICE = """
import os, signal
from decotrain.farewell import end_well
def leave(bound_s):
    os.kill(os.getpid(), signal.SIGTERM)
    print("left")
end_well(leave)
os.kill(os.getpid(), signal.SIGTERM)
signal.pause()
"""


def test_a_second_signal_does_not_break_into_leaving(run_dir: Path) -> None:
    """Each thread of a launcher that is killed sends one."""
    done = subprocess.run(
        [sys.executable, "-c", TWICE], capture_output=True, text=True, check=False, timeout=WAIT_S,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent),
             "DECOTRAIN_FAREWELL": str(run_dir / "farewell")},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGTERM, "left\n", "")


@pytest.mark.parametrize(("command", "code"), [("kick", 2), ("leave", 0)])
def test_who_is_left_out_is_not_started_again(
    run_dir: Path, coordinator: ServerThread, command: str, code: int
) -> None:
    options = ("--join", coordinator.address, "--run", "test", "--name", "here")
    with Started(run_dir, JOIN + ROUNDS, *options) as started:
        started.line("in ")
        until(lambda: [row["role"] for row in peers(coordinator)] == ["active"])
        done = subprocess.run(
            [sys.executable, "-m", "decotrain.cli", command, coordinator.address, "here"],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
            capture_output=True, text=True, check=False, timeout=WAIT_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("here ")
        ended, _, errors = started.end()
    assert ended == code
    assert len(errors.splitlines()) == 1, errors
    assert "by an operator" in errors


def test_only_process_0_joins(run_dir: Path) -> None:
    with Started(run_dir, JOIN, "--standalone", "--nproc-per-node=2") as started:
        code, _, errors = started.end()
    assert code == 2
    assert errors.splitlines()[-1].startswith("decotrain: process 1 of this peer cannot join")


def test_options() -> None:
    options = parse(["--standalone", "--nproc_per_node", "4", "-m", "package.train", "--join", "x"])
    assert options.join is None
    assert (options.processes, options.tee) == (4, "3")
    assert (options.module, options.entrypoint) == (True, "package.train")
    assert options.arguments == ("--join", "x")
    assert parse(["--join", "h:1", "--no-python", sys.executable, "-V"]).arguments == ("-V",)


@pytest.mark.parametrize("wrong", ["run", "address", "name"])
def test_no_way_to_the_run_is_one_line(
    run_dir: Path, coordinator: ServerThread, wrong: str
) -> None:
    """What may be well later has an exit code of its own, for services that start us again."""
    address, run, part, expected = {
        "run": (coordinator.address, "other", "this is run 'test', not 'other'", 2),
        "address": ("127.0.0.1:1", "test", "no coordinator answers at 127.0.0.1:1", 3),
        "name": ("no-such-host.invalid:29400", "test", "the name no-such-host.invalid does not", 3),
    }[wrong]
    with Started(run_dir, TELL, "--join", address, "--run", run) as started:
        code, out, errors = started.end()
    assert (code, out) == (expected, "")
    assert len(errors.splitlines()) == 1, errors
    assert errors.startswith("decotrain: ")
    assert part in errors


@pytest.mark.parametrize("wrong", ["port", "address"])
def test_an_address_that_cannot_be_had_is_one_line_and_no_restart(
    run_dir: Path, coordinator: ServerThread, wrong: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen, part = {
            "port": (f"127.0.0.1:{taken.getsockname()[1]}", "another process has the port: stop"),
            "address": ("192.0.2.1", "this machine does not have the address"),
        }[wrong]
        options = ("--join", coordinator.address, "--run", "test", "--listen", listen)
        with Started(run_dir, JOIN, *options, "--insecure") as started:
            code, out, errors = started.end()
    assert (code, out) == (2, "")
    assert len(errors.splitlines()) == 1, errors
    assert errors.startswith(f"decotrain: cannot listen on tcp://{listen}")
    assert part in errors


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["script.py"], "--standalone"),
        (["--standalone", "--join", "h:1", __file__], "leave one out"),
        (["--standalone", "missing.py"], "no script missing.py"),
        (["--standalone", "--no-python", "no-such-program"], "no program"),
        (["--standalone", "-m", "--no-python", "x"], "-m names"),
        (["--standalone", "--nproc", "0", __file__], "1..1024"),
        (["--standalone", "--nproc", "two", __file__], "gpu, cpu or auto"),
        (["--standalone", "--max-restarts", "-1", __file__], "0 or more"),
        (["--standalone", "--monitor-interval", "0", __file__], "0.001..3600"),
        (["--standalone", "--dial-only", "--listen", "1.2.3.4", __file__], "--dial-only"),
        (["--standalone", "--local-ranks-filter", "a", __file__], "numbers"),
    ],
)
def test_wrong_options_name_the_remedy(
    words: list[str], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DECOTRAIN_JOIN", raising=False)
    with pytest.raises(ConfigError, match=part):
        parse(words)
