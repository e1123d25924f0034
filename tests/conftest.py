"""What every test gets: one thread of arithmetic, seeded generators, an empty folder of its own.

Nothing here depends on the order of tests or on how many run at once.
"""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from pathlib import Path

# Before anything imports torch or numpy, and inherited by every peer process a test starts: several
# processes with a pool of threads each would fight over two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest

ROOT = Path(__file__).parent.parent

# Another build of the core, for example one with a sanitizer (scripts/check.sh attacks).
if core := os.environ.get("DECOTRAIN_TEST_CORE"):
    spec = importlib.util.spec_from_file_location("decotrain._core", core)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["decotrain._core"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["decotrain._core"])

# Deadlines measure the machine, not the code. Under CI hypothesis' own profile applies (no random
# choice between runs); elsewhere each run tries new examples.
if "CI" not in os.environ:
    hypothesis.settings.register_profile("house", deadline=None, print_blob=True)
    hypothesis.settings.load_profile("house")


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random numbers for a test, whatever ran before it in this process."""
    random.seed(0)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(0)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, and the working directory: what a run writes lands nowhere else."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
