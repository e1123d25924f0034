"""The run's token: its text, its file, and the keys that follow from it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decotrain.control import token as tk
from decotrain.errors import ConfigError


def test_a_token_survives_being_written_and_read(tmp_path: Path) -> None:
    made = tk.Token.new()
    umask = os.umask(0)
    try:
        tk.write(made, tmp_path / "run.token")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "run.token").stat().st_mode) == 0o600
    assert tk.read(tmp_path / "run.token") == made
    assert made.text not in repr(made)
    assert repr(made.secret) not in repr(made)


def test_a_token_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "run.token"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="not overwritten"):
        tk.write(tk.Token.new(), path)
    assert path.read_text() == "precious"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610])
def test_a_file_that_others_can_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "run.token"
    tk.write(tk.Token.new(), path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"chmod 600 {path}"):
        tk.read(path)


def test_a_file_without_a_token_is_refused_and_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "run.token"
    tk.write(tk.Token.new(), path)
    text = path.read_text().strip()
    swapped = "a" if text[20] != "a" else "b"
    for wrong in ("", "hunter2", text[:-1], text + "aa", text[:20] + swapped + text[21:], "\xff"):
        path.write_bytes(wrong.encode("latin-1"))
        with pytest.raises(ConfigError, match="holds no token") as raised:
            tk.read(path)
        assert text[8:16] not in str(raised.value)
        assert "hunter2" not in str(raised.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the token file"):
        tk.read(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="cannot read the token file"):
        tk.read(tmp_path)


def test_the_environment_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tk.find() is None
    made = tk.Token.new()
    tk.write(made, tmp_path / "run.token")
    monkeypatch.setenv(tk.VARIABLE, str(tmp_path / "run.token"))
    assert tk.find() == made


def test_keys_differ_by_label_run_and_token() -> None:
    a, b = tk.Token(bytes(32)), tk.Token(bytes(31) + b"\1")
    keys = [
        key
        for token in (a, b)
        for key in (
            token.data_key("one"), token.data_key("two"), *token.server_keys, *token.client_keys,
            token.record_mark(), token.fingerprint("one"), token.fingerprint("two"), token.secret,
        )
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert a.data_key("one") == tk.Token(bytes(32)).data_key("one")


@given(st.text(max_size=80), st.text("abcdefghijklmnopqrstuvwxyz234567", min_size=54, max_size=58))
def test_any_other_text_is_a_value_error(text: str, body: str) -> None:
    for wrong in (text, tk.PREFIX + body):
        with pytest.raises(ValueError, match=r".+"):
            tk.parse(wrong)
