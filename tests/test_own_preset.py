"""`outer.preset=module:function`: an outer optimizer of the user's own in a run, and what is wrong
with one in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from decotrain.control.coordinator import Options
from decotrain.control.server import ServerThread
from decotrain.errors import ConfigError
from decotrain.outer import EveryH, make
from decotrain.train import preset
from decotrain.train.job import TrainJob
from decotrain.train.settings import SHARED, parse
from tests.fake_comm import FakeRun
from tests.local_runs import journal, running
from tests.outer_runs import make_model
from tests.test_settings import composed
from tests.tree import ROOT

# Each test has modules of its own names: a process imports a name once.
OTHERS = """
from decotrain.outer import OuterOptimizer, EveryH, Nesterov

def strict(model, optimizer, comm, sync_every, *, clip=3.0, error_feedback=None):
    made = OuterOptimizer(model, optimizer, comm, schedule=EveryH(sync_every), update=Nesterov())
    made.told = (sync_every, clip, error_feedback)
    return made

def raises(model, optimizer, comm, sync_every=1):
    return 1 / 0

def other(model, optimizer, comm, sync_every=1):
    return "outer"

def no_period(model, optimizer, comm, **more):
    pass

number = 3
"""


def module(place: Path, name: str, text: str = OTHERS) -> None:
    (place / f"{name}.py").write_text(text)


@pytest.fixture(autouse=True)
def _own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is put in front of it while looking for modules is taken away again."""
    import sys

    monkeypatch.setattr(sys, "path", [*sys.path])


def config_of(name: str, **outer: Any) -> dict[str, Any]:
    config = composed()
    config["outer"] |= {"preset": name, **outer}
    return config


def made(name: str, **options: Any) -> Any:
    model = make_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    return make(name, model, inner, FakeRun(1).comm(1), **options)


def test_it_gets_the_options_that_it_names(run_dir: Path) -> None:
    module(run_dir, "mine_options")
    name = "mine_options:strict"
    config = config_of(name, sync_every=9, momentum=0.5, clip=2)
    config["codec"]["error_feedback"] = True
    options = preset.options(parse(config))
    assert options == {"sync_every": 9, "clip": 2.0, "error_feedback": True}
    outer = made(name, epoch_portions=7, **options)
    assert outer.told == (9, 2.0, True)
    assert outer.schedule == EveryH(9)


def test_options_with_names_of_its_own(run_dir: Path) -> None:
    text = "def f(model, optimizer, comm, sync_every, gain=1.0, word='a'): pass\n"
    module(run_dir, "mine_named", text)
    config = config_of("mine_named:f", own={"gain": 2.5, "word": "b"}, momentum=0.1)
    assert preset.options(parse(config)) == {"sync_every": 30, "gain": 2.5, "word": "b"}
    with pytest.raises(ConfigError, match=r"outer\.own\.gian=1: .* has no option gian; .*gain"):
        preset.options(parse(config_of("mine_named:f", own={"gian": 1})))
    with pytest.raises(ConfigError, match="for a function of your own, and diloco is none"):
        preset.options(parse(config_of("diloco", own={"gain": 1})))
    with pytest.raises(ConfigError, match=r"outer\.own=3 must be"):
        parse(config_of("mine_named:f", own=3))


def test_rounds_further_apart_than_samples_are_handed_out_are_refused() -> None:
    preset.check_distance(EveryH(4), 4)
    preset.check_distance(EveryH(3), 4)
    with pytest.raises(ConfigError, match=r"0 and 5 are further apart than outer\.sync_every=4"):
        preset.check_distance(EveryH(5), 4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mine_wrong:raises", {}, r"mine_wrong:raises raised ZeroDivisionError: division by zero"
         r" \(mine_wrong\.py:\d+\)"),
        ("mine_wrong:other", {}, "returned str, and no OuterOptimizer"),
        ("mine_wrong:no_period", {}, "is no outer optimizer: it is called with"),
        ("os:system", {}, "is no outer optimizer"),
        ("time:time", {}, "is no outer optimizer"),
        ("mine_wrong:number", {}, "it is no function"),
        ("mine_wrong:lacking", {}, "cannot be had: .*has no attribute 'lacking'"),
        ("no_such_module:f", {}, "cannot be had: No module named 'no_such_module'"),
        ("mine_broken:f", {}, r"cannot be had: ValueError: not today \(mine_broken\.py:1\)"),
        ("mine_wrong:strict", {"state": {}}, "takes no state"),
        ("mine_wrong:strict", {"device": "cpu"}, "takes no device"),
        ("mine_wrong:strict", {"momentum": 0.5}, "has no option momentum"),
        ("mine_wrong:strict", {"sync_every": 0}, "sync_every=0 is out of range"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(
    name: str, options: dict[str, Any], message: str, run_dir: Path
) -> None:
    module(run_dir, "mine_wrong")
    module(run_dir, "mine_broken", "raise ValueError('not\\n today')\n")
    with pytest.raises(ConfigError, match=message) as caught:
        made(name, **{"sync_every": 3, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mine", "mine:", ":f"])
def test_what_is_no_name_is_told_what_there_is(name: str) -> None:
    with pytest.raises(ConfigError, match=r"one of local_sgd, .*, or module:function"):
        parse(config_of(name))


def test_options_that_it_does_not_take_are_named(run_dir: Path) -> None:
    module(run_dir, "mine_unused")
    (run_dir / "text.txt").write_bytes(b"some words, and some more of them; " * 4000)
    config = config_of("mine_unused:strict", alpha=0.5, own={"clip": 2.0})
    config["data"]["path"] = str(run_dir / "text.txt")
    config["codec"]["error_feedback"] = True
    words = ["outer.preset=mine_unused:strict", "+outer.alpha=0.5", "outer.sync_every=30",
             "keep=2", "outer=diloco", "+outer.own.clip=2"]  # fmt: skip

    def told(name: str) -> list[str]:
        outer = {**config["outer"], "preset": name}
        if name != "mine_unused:strict":
            del outer["own"]
        job = TrainJob.of(config | {"outer": outer}, words)
        job.prepare()
        return [line.partition(" ")[2] for line in job.board({}).events][1:]

    assert told("mine_unused:strict") == [
        "+outer.alpha=0.5 is not used: mine_unused:strict takes no alpha"
    ]
    module(run_dir, "mine_plain", "def f(model, optimizer, comm, sync_every, codec): pass\n")
    assert "codec.error_feedback=True is not used: mine_plain:f takes no error_feedback" in told(
        "mine_plain:f"
    )


def test_a_machine_without_the_module_is_told_so(run_dir: Path) -> None:
    """Who joins by address gets the name from the run; nothing is started."""
    shared = {key: config_of("only_elsewhere:f")[key] for key in SHARED}
    server = ServerThread(Options(run="ours", config=shared))
    try:
        job = TrainJob.of(composed() | {"join": server.address, "peers": 1}, [])
        with pytest.raises(
            ConfigError, match=r"only_elsewhere:f.*No module named 'only_elsewhere'"
        ):
            job.prepare()
    finally:
        server.stop()


def example(place: Path, name: str) -> None:
    """The outer optimizer of the documentation, as a module."""
    (text,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/outer.md").read_text(), re.S)
    module(place, name, text)


def test_the_example_of_the_documentation_can_be_resumed(run_dir: Path) -> None:
    example(run_dir, "mine_resumed")
    outer = made("mine_resumed:heavy_ball", sync_every=2, epoch_portions=9)
    for _ in range(4):
        outer.step()
    outer.finish()
    again = made("mine_resumed:heavy_ball", sync_every=2, state=outer.state_dict())
    assert again.global_step == 4
    assert again.digest() == outer.digest()
    assert int(outer.allotment.tensor[-1]) == 9, "the epoch's portions"


@pytest.mark.timeout(300)  # processes that import torch
def test_the_example_of_the_documentation_in_a_sweep(run_dir: Path) -> None:
    example(run_dir, "mine")
    (run_dir / "text.txt").write_bytes(b"some words, and some more of them; " * 4000)
    words = ["data.path=text.txt", "model=tiny", "model.width=16", "model.hidden=24", "batch=1",
             "model.context=16", "model.layers=2", "peers=2", "outer.sync_every=2", "codec=int8",
             "held_out_windows=8", "final_windows=16", "sample_bytes=20", "steps=8"]  # fmt: skip
    with running(run_dir, "train", "-m", "name=sweep", *words) as start:
        run = start("outer.preset=mine:heavy_ball")
        run.end()
    folder = run_dir / "runs" / "sweep" / "0"
    ends = [journal(folder, f"peer-{number}", "end")[-1] for number in (1, 2)]
    assert [end["step"] for end in ends] == [8, 8]
    assert ends[0]["digest"] == ends[1]["digest"]
    config = json.loads((folder / "config.json").read_text())
    assert config["outer"]["preset"] == "mine:heavy_ball"
