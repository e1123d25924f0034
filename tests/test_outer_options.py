"""Options of outer optimizers: one check for Python and for the command line."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from decotrain import outer_options
from decotrain.errors import ConfigError
from decotrain.outer import PRESETS, Staggered, make
from decotrain.outer.presets import options_of
from decotrain.train.settings import OuterSettings, parse
from decotrain.train.worker import make_model
from tests.fake_comm import FakeRun
from tests.local_runs import running
from tests.outer_runs import make_model as small_model
from tests.test_settings import composed

WRONG = [
    ("delayed_nesterov", "delay", 0, "it lies between 1 and 64"),
    ("diloco", "sync_every", 0, "it lies between 1 and 1000000000"),
    ("diloco", "sync_every", "30", "must be a whole number"),
    ("diloco", "sync_every", 2.5, "must be a whole number"),
    ("diloco", "sync_every", None, "must be"),
    ("diloco", "sync_every", True, "must be a whole number"),
    ("diloco", "momentum", 1.5, "it lies between 0 and 0.9999"),
    ("diloco", "momentum", "much", "must be a number"),
    ("diloco", "lr", -1, "it lies between 0 and 100"),
    ("diloco", "lr", float("nan"), "it lies between 0 and 100"),
    ("streaming", "alpha", 7, "it lies between 0 and 1"),
    ("streaming", "layers", 0, "it lies between 1 and 1000000"),
    ("streaming", "overlap", -1, "it lies between 0 and 1000000000"),
    ("co2", "clip", -1, "it lies between 0 and 1e+09"),
    ("co2", "penalty", "no", "must be true or false"),
    ("sparseloco", "keep", 4097, "it lies between 1 and 4096"),
    ("sparseloco", "decay", 1.01, "it lies between 0 and 1"),
    ("muloco", "decay", -0.1, "it lies between 0 and 1"),
    ("muloco", "error_feedback", 1, "must be true or false"),
    ("ddp", "bucket_elements", 0, "it lies between 1 and 268435456"),
]


def made(name: str, **options: Any) -> Any:
    model = small_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    return make(name, model, inner, FakeRun(1).comm(1), **options)


@pytest.mark.parametrize(("name", "option", "value", "bounds"), WRONG)
def test_python_and_command_line_refuse_the_same(
    name: str, option: str, value: Any, bounds: str
) -> None:
    """Option, value and what is allowed, in one line."""
    with pytest.raises(ConfigError, match=re.escape(f"{option}={value!r}")) as python:
        made(name, **{option: value})
    assert bounds in str(python.value)
    if option not in outer_options.LIMITS or value is None:
        return  # the command line has codec.error_feedback; null is the preset's own value
    config = composed()
    config["outer"] = {"preset": name, "sync_every": 30, option: value}
    with pytest.raises(ConfigError, match=re.escape(f"outer.{option}={value!r}")) as line:
        parse(config)
    if not isinstance(value, str):
        assert bounds in str(line.value)


def test_what_is_allowed_is_made() -> None:
    assert made("diloco", sync_every=np.int64(3), momentum=np.float32(0.5), lr=None)
    assert made("co2", clip=1, penalty=False)
    assert made("streaming", sync_every=30, overlap=0, alpha=0)


def test_every_option_of_a_preset_has_bounds() -> None:
    """Numbers and switches; names are checked by what they name."""
    names = {"codec", "residual", "pattern"}
    options = {option for name in PRESETS for option in options_of(name)}
    assert options - names == {*outer_options.LIMITS, *outer_options.SWITCHES}
    assert tuple(PRESETS) == outer_options.PRESETS
    fields = {field.name for field in dataclasses.fields(OuterSettings)}
    assert fields - {"preset", "pattern", "penalty", "own"} == set(outer_options.LIMITS)
    for name in PRESETS:
        defaults = {key: p.default for key, p in options_of(name).items()}
        assert inspect.Parameter.empty not in defaults.values()
        outer_options.check(defaults)


@pytest.mark.parametrize(("layers", "each"), [(1, 1), (1, 3), (4, 3), (6, 2), (7, 2), (6, 7)])
@pytest.mark.parametrize("pattern", ["strided", "sequential"])
def test_fragments_are_counted_without_a_model(layers: int, each: int, pattern: str) -> None:
    config = composed()
    config["model"]["layers"] = layers
    names = [name for name, _ in make_model(parse(config)).named_parameters()]
    parts = Staggered(1000, each, pattern, 0).fragments(names)
    assert len(parts) == outer_options.fragments_of(layers, each)


@pytest.mark.parametrize(
    ("outer", "fits"),
    [
        ({"overlap": 5, "sync_every": 5}, False),
        ({"overlap": 4, "layers": 1, "sync_every": 30}, True),  # 7 fragments
        ({"overlap": 4, "layers": 1, "sync_every": 25}, False),
        ({"overlap": 5, "layers": 1, "sync_every": 30}, False),
        ({"overlap": 5, "layers": 2, "sync_every": 30}, True),
        ({"sync_every": 3}, False),  # layers 3, overlap 1: 3 fragments
        ({"overlap": 0, "layers": 1, "sync_every": 3}, True),
    ],
)
def test_an_overlap_that_does_not_fit_is_an_error_of_the_configuration(
    outer: dict[str, int], fits: bool
) -> None:
    config = composed()
    config["outer"] = {"preset": "streaming", **outer}
    config["steps"] = 30 * 25
    if fits:
        parse(config)
        return
    with pytest.raises(ConfigError, match=r"overlap=\d is too long: with \d fragments every \d+"):
        parse(config)


def test_no_process_is_started_for_it(run_dir: Path) -> None:
    (run_dir / "text.txt").write_bytes(b"some words, and some more of them; " * 4000)
    with running(run_dir, "train", "data.path=text.txt", "name=x", "outer=streaming") as start:
        run = start("outer.overlap=5", "outer.sync_every=5")
        assert run.process.wait(60) == 2
    assert run.text.startswith("decotrain: overlap=5 is too long")
    assert len(run.text.splitlines()) == 1
    assert not (run_dir / "runs").exists() or not list((run_dir / "runs").iterdir())
