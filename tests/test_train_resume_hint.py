"""What a stopped run says to type: the program where this shell finds it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from decotrain.train.launcher import _program


@pytest.fixture
def called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """decotrain in an environment that is not active."""
    program = tmp_path / ".venv" / "bin" / "decotrain"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(program), "train"])
    monkeypatch.setenv("PATH", "/nowhere")
    return program


def test_as_it_was_called_where_no_path_leads_to_it(
    called: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _program() == ".venv/bin/decotrain"
    monkeypatch.chdir("/")
    assert (Path("/") / _program()).resolve() == called.resolve()
    monkeypatch.chdir(called.parent / "..")
    assert Path(_program()).resolve() == called.resolve()


def test_by_its_name_otherwise(called: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(called.parent))
    assert _program() == "decotrain"
    monkeypatch.setattr(sys, "argv", ["/somewhere/decotrain/cli.py"])
    assert _program() == "decotrain"
