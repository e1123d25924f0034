"""The command line: help at once, and for bad input one line, exit code 2, no traceback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from decotrain.control.coordinator import Options
from decotrain.control.server import ServerThread


def run(arguments: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "decotrain.cli", *arguments],
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parent.parent),
            "DECOTRAIN_CACHE": str(cwd / "cache"),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def assert_refused(done: subprocess.CompletedProcess[str], *parts: str, code: int = 2) -> None:
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("decotrain: ")
    for part in parts:
        assert part in lines[0]


@pytest.fixture
def text(run_dir: Path) -> str:
    (run_dir / "text.txt").write_bytes(b"some words, and some more of them\n" * 40_000)
    return "data.path=text.txt"


@pytest.mark.parametrize("arguments", [["--help"], [], ["train", "--help"], ["--version"]])
def test_help(run_dir: Path, arguments: list[str]) -> None:
    done = run(arguments, run_dir)
    assert done.returncode == 0
    assert "decotrain" in done.stdout
    assert not done.stderr


def test_help_of_train_shows_every_key(run_dir: Path) -> None:
    out = run(["train", "--help"], run_dir).stdout
    for key in ("peers:", "steps:", "baseline:", "resume:", "data.path=", "-m "):
        assert key in out


@pytest.mark.parametrize("multirun", [[], ["-m"]])
@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("peerz=3", ["unknown key peerz (did you mean peers?)", "--help"]),
        ("outer.peerz=3", ["unknown key outer.peerz", "+outer.own.peerz="]),
        ("outer=mine:f", ["a function of your own is outer.preset=mine:f"]),
        ("outer=nothing", ["outer/nothing", "diloco"]),
        ("peers=0", ["peers=0", "between 1 and 64"]),
        ("peers=[", ["'['"]),
        ("peers", ["'peers' is no KEY=VALUE", "--help"]),
        ("inner.betas=[0.9,1.5]", ["inner.betas=[0.9, 1.5]", "from 0 to below 1"]),
        ("data.path=/no/such/place", ["/no/such/place", "no file there"]),
        ("folder=/dev/null/runs", ["/dev/null/runs", "another folder"]),
    ],
)
def test_bad_input_of_train(
    run_dir: Path, override: str, parts: list[str], multirun: list[str]
) -> None:
    done = run(["train", *multirun, override], run_dir)
    assert_refused(done, *parts)


def test_the_configuration_of_a_sweep(run_dir: Path) -> None:
    assert_refused(run(["train", "-m", "--cfg", "job"], run_dir), "without -m")


def test_an_empty_file(run_dir: Path) -> None:
    (run_dir / "empty.txt").touch()
    assert_refused(run(["train", "data.path=empty.txt"], run_dir), "empty.txt", "is empty")
    assert not list((run_dir / "runs").iterdir()), "a run that never was left something behind"


def test_torch_is_missing(run_dir: Path, text: str) -> None:
    hide = run_dir / "hide"
    (hide / "torch").mkdir(parents=True)
    (hide / "torch" / "__init__.py").write_text("raise ModuleNotFoundError('No module torch')")
    root = str(Path(__file__).parent.parent)
    done = run(["train", text], run_dir, PYTHONPATH=f"{hide}:{root}")
    assert_refused(done, "torch is not installed", "pip install torch")


def test_a_port_in_use(run_dir: Path, text: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run(["train", text, f"listen=127.0.0.1:{port}"], run_dir)
        assert_refused(done, str(port), "in use")
        done = run(["coordinator", "--listen", f"127.0.0.1:{port}"], run_dir)
        assert_refused(done, str(port), "in use")


@pytest.mark.parametrize("host", ["10.0.0..7", "x" * 70])
def test_an_address_that_no_resolver_takes(run_dir: Path, host: str) -> None:
    for command in (["status"], ["coordinator", "--listen"]):
        assert_refused(run([*command, f"{host}:29400"], run_dir), "empty or too long")


def test_unknown_words(run_dir: Path) -> None:
    assert_refused(run(["tarin"], run_dir), "unknown command 'tarin'", "train")
    assert_refused(run(["train", "--fast"], run_dir), "unknown option --fast")
    assert_refused(run(["train", "--cfg"], run_dir), "--cfg needs a value")


def test_a_sweep_may_have_its_flag_anywhere(run_dir: Path) -> None:
    done = run(["train", "outer.lr=0.4,0.7", "-m", "peers=0"], run_dir)
    assert_refused(done, "peers=0")


def test_status_of_nobody(run_dir: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    parts = ("no coordinator answers", "connection refused")
    assert_refused(run(["status", f"127.0.0.1:{port}"], run_dir), *parts, code=3)
    assert_refused(run(["train", f"join=127.0.0.1:{port}"], run_dir), *parts, code=3)


@pytest.mark.parametrize("words", [["status", "--watch", "--json"], ["token", "new"]])
def test_who_reads_no_further_is_no_traceback(run_dir: Path, words: list[str]) -> None:
    server = ServerThread(Options())
    address = [server.address] if "status" in words else []
    try:
        made = subprocess.Popen(
            [sys.executable, "-m", "decotrain.cli", *words, *address],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert made.stdout is not None
        made.stdout.close()  # as `head` does when it has its lines
        assert made.stderr is not None
        with made.stderr:
            errors = made.stderr.read()
        assert made.wait(timeout=100) == 128 + signal.SIGPIPE
    finally:
        server.stop()
    assert errors == ""


def test_a_new_token_goes_into_a_file_of_its_own(run_dir: Path) -> None:
    done = run(["token", "new", "--out", "run.token"], run_dir)
    assert done.returncode == 0, done.stderr
    text = (run_dir / "run.token").read_text().strip()
    assert text.startswith("dtk1-")
    assert text not in done.stdout + done.stderr
    assert (run_dir / "run.token").stat().st_mode & 0o777 == 0o600
    assert_refused(run(["token", "new", "--out", "run.token"], run_dir), "not overwritten")
    printed = run(["token", "new"], run_dir).stdout.strip()
    assert printed.startswith("dtk1-")
    assert printed != text


@pytest.mark.parametrize("command", [["coordinator"], ["status", "127.0.0.1:1"]])
def test_a_wrong_token_file_is_one_line(run_dir: Path, command: list[str]) -> None:
    (run_dir / "open.token").write_text("dtk1-")
    (run_dir / "open.token").chmod(0o644)
    assert_refused(run([*command, "--token-file", "open.token"], run_dir), "chmod 600")
    (run_dir / "open.token").chmod(0o600)
    assert_refused(run([*command, "--token-file", "open.token"], run_dir), "holds no token")
    assert_refused(run([*command, "--token-file", "none"], run_dir), "token file none: No such")


def test_an_open_coordinator_has_to_be_asked_for(run_dir: Path) -> None:
    done = run(["coordinator", "--listen", "0.0.0.0:0"], run_dir, DECOTRAIN_INSECURE="")
    assert_refused(done, "decotrain token new", "--insecure")
