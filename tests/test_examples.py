"""The examples, with real processes: short, right, and still scripts without decotrain."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from decotrain.control.coordinator import Options
from decotrain.control.server import ServerThread
from tests.tree import ROOT, of, read

pytestmark = pytest.mark.timeout(240)  # several processes that import torch

MARK = "  # decotrain"
LINES_MAX = 5
WAIT_S = 150.0
EXAMPLES = of(".py", under="examples")
NAMES = [path.stem for path in EXAMPLES]


def without_decotrain(path: Path) -> str:
    """The script as it was before."""
    return "".join(x for x in read(path).splitlines(True) if not x.rstrip("\n").endswith(MARK))


@pytest.mark.parametrize("path", EXAMPLES, ids=NAMES)
def test_decotrain_adds_few_lines(path: Path) -> None:
    """What it adds is marked, and nothing else knows of it."""
    marked = [line for line in read(path).splitlines() if line.endswith(MARK)]
    assert 1 <= len(marked) <= LINES_MAX, marked
    code = re.sub(r'""".*?"""', "", without_decotrain(path), count=1, flags=re.S)
    assert not re.search(r"\b(dt|comm|outer|decotrain)\b", code)


def test_all_kinds_are_there() -> None:
    assert set(NAMES) == {"plain", "ddp", "fsdp2", "transformers_model"}


@pytest.fixture
def coordinator() -> Iterator[ServerThread]:
    """Waits for two peers before the first view."""
    server = ServerThread(Options(run="test", min_peers=2))
    yield server
    server.stop()


Run = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(run_dir: Path) -> Iterator[Run]:
    """Starts `decotrain run`, and leaves none behind."""
    started: list[subprocess.Popen[str]] = []

    def begin(*words: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, "-m", "decotrain.cli", "run", *words],
            cwd=run_dir, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=60)


def loss_of(process: subprocess.Popen[str]) -> float:
    """The script's last word, when all of it went well."""
    text, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, text
    found = re.search(r"loss (\d+\.\d+)", text)
    assert found, text
    return float(found[1])


def peers(start: Run, server: ServerThread, script: str, processes: tuple[int, int]) -> list[float]:
    """Two peers of one run, of so many processes each; their last losses."""
    running = [
        start("--join", server.address, "--run", "test", "--max-restarts", "0", "--nproc",
              str(count), str(ROOT / "examples" / script), f"model-{number}")
        for number, count in enumerate(processes)
    ]  # fmt: skip
    return [loss_of(process) for process in running]


def assert_equal_models(folder: Path, inside: str = "") -> None:
    one, two = (load_file(folder / f"model-{number}" / inside) for number in range(2))
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)


@pytest.mark.parametrize(
    ("script", "processes"),
    [("plain.py", (1, 1)), ("ddp.py", (2, 1)), ("fsdp2.py", (2, 1))],
    ids=["plain", "ddp", "fsdp2"],
)
def test_two_peers_hold_the_same_model(
    run_dir: Path, start: Run, coordinator: ServerThread, script: str, processes: tuple[int, int]
) -> None:
    """Peers of different numbers of processes, on different samples, end with the same bits."""
    losses = peers(start, coordinator, script, processes)
    assert max(losses) < 0.3, "sin(x) has a mean square of 0.5: nothing was learned"
    assert_equal_models(run_dir)


def test_a_transformers_model(run_dir: Path, start: Run, coordinator: ServerThread) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (an extra of tests)")
    losses = peers(start, coordinator, "transformers_model.py", (1, 1))
    assert max(losses) < 5.6, "worse than knowing nothing: ln(256) is 5.55"
    assert_equal_models(run_dir, "model.safetensors")


@pytest.mark.parametrize("script", ["plain.py", "ddp.py"])
def test_without_the_marked_lines_it_trains_alone(run_dir: Path, script: str) -> None:
    (run_dir / "alone.py").write_text(without_decotrain(ROOT / "examples" / script))
    words = [sys.executable, "alone.py", "model"]
    if script != "plain.py":
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:]]
    done = subprocess.run(
        words, cwd=run_dir, capture_output=True, text=True, check=False, timeout=WAIT_S,
        env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "loss" in done.stdout
    assert (run_dir / "model").is_file()
