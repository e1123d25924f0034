"""`decotrain compare`: what it reads from the folders of runs, and what it makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from decotrain import cli
from decotrain.errors import ConfigError, FileError
from decotrain.train import compare

CONFIG: dict[str, Any] = {
    "name": "a", "folder": "runs", "peers": 2, "batch": 4, "seed": 1,
    "model": {"context": 100}, "outer": {"preset": "diloco", "lr": 0.7}, "codec": {"name": "f32"},
}  # fmt: skip


class Written:
    """A run's folder as the launcher would leave it. Times are the peers' own."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        config = {**CONFIG, "name": folder.name, **changes}
        (folder / "config.json").write_text(json.dumps(config))
        self.now_s = 1000.0

    def add(self, event: str, after_s: float = 0.0, **values: Any) -> None:
        self.now_s += after_s
        # the launcher reads it later, and peer by peer: the file is not in order
        line = {"time_s": self.now_s + 0.2, "event": event, "said_s": self.now_s, **values}
        with (self.folder / "events.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def start(self, step: int = 0) -> None:
        for peer in ("p1", "p2"):
            self.add("start", 1.0, peer=peer, step=step)

    def round(self, step: int, sent_bytes: float, held_out: float) -> None:
        """Ten seconds on, both peers have sent so much, and the first evaluates."""
        self.now_s += 10.0
        self.add("evaluation", 0.0, peer="p1", step=step, held_out=held_out)
        self.now_s -= 0.5
        for peer in ("p1", "p2"):
            self.add("round", 0.0, peer=peer, step=step, sent_bytes=sent_bytes)
        self.now_s += 0.5

    def end(self, loss: float) -> None:
        for peer, part in (("p1", 0.1), ("p2", 0.3)):
            self.add("end", 0.0, peer=peer, step=20, utilisation=part)
        self.add("summary", 60.0, held_out_nats=loss)


@pytest.fixture
def run(run_dir: Path) -> Written:
    run = Written(run_dir / "runs" / "a")
    run.add("note", text="coordinator at somewhere")
    run.now_s += 30  # processes start
    run.start()
    run.round(10, 1000, 3.0)
    run.round(20, 2000, 2.5)
    return run


def test_points_of_a_run(run: Written) -> None:
    run.end(2.4)
    found = compare.read(run.folder)
    # tokens: steps x 2 peers x batch 4 x context 100; bytes of both peers; seconds from the start
    assert [(p.step, p.loss, p.tokens, p.sent_bytes) for p in found.points] == [
        (10, 3.0, 8000.0, 2000.0),
        (20, 2.5, 16000.0, 4000.0),
    ]
    assert [p.seconds for p in found.points] == pytest.approx([11.0, 21.0])
    assert found.final_loss == 2.4
    assert found.seconds == pytest.approx(21.0), "the summary's own time is no training"
    assert found.utilisation == pytest.approx(0.2)


def test_tokens_are_those_that_counted(run: Written) -> None:
    """A peer was away for the first half."""
    run.add("mean", 1.0, round=1, step=10, loss=3.0, tokens=4000, peers=1)
    run.add("mean", 0.0, round=2, step=20, loss=2.5, tokens=8000, peers=2)
    run.add("mean", 0.0, step="much", tokens=None)
    assert [p.tokens for p in compare.read(run.folder).points] == [4000.0, 12000.0]


def test_bytes_of_a_peer_that_came_back_add_up(run: Written) -> None:
    run.add("start", 1.0, peer="p2", step=20)
    run.add("round", 5.0, peer="p2", step=30, sent_bytes=700)
    assert compare.read(run.folder).sent_bytes == 2000 + 2000 + 700


def test_a_resumed_run_goes_on_where_it_was(run: Written) -> None:
    """Without the pause; steps that are done again replace what they gave the first time."""
    run.add("interrupted")
    run.now_s += 86400
    run.start(step=10)
    run.round(20, 900, 2.2)
    found = compare.read(run.folder)
    assert [(p.step, p.loss, p.sent_bytes) for p in found.points] == [
        (10, 3.0, 2000.0),
        (20, 2.2, 4000.0 + 1800.0),
    ]
    assert found.last.seconds == pytest.approx(21 + 11)


def test_a_run_begun_anew_counts_from_there(run: Written) -> None:
    run.end(2.4)
    run.start()
    run.round(10, 50, 2.9)
    found = compare.read(run.folder)
    assert [(p.step, p.loss, p.sent_bytes) for p in found.points] == [(10, 2.9, 100.0)]
    assert found.last.seconds == pytest.approx(11.0)
    assert found.final_loss is None


def test_labels_are_short_and_tell_apart() -> None:
    def config(preset: str, codec: str, **more: Any) -> dict[str, Any]:
        return {"name": "x", "outer.preset": preset, "codec.name": codec, "seed": 1, **more}

    both = [config("diloco", "f32"), config("co2", "int8", seed=2)]
    assert compare.labels(both) == ["diloco", "co2"], "one key is enough"
    grid = [config(p, c) for p in ("diloco", "co2") for c in ("f32", "int8")]
    assert compare.labels(grid) == ["diloco f32", "diloco int8", "co2 f32", "co2 int8"]
    seeds = [config("diloco", "f32", seed=n) for n in (1, 2)]
    assert compare.labels(seeds) == ["seed=1", "seed=2"]
    assert compare.labels(seeds[:1] * 2) == ["", ""]


def test_a_codec_that_was_not_used_tells_no_runs_apart(run_dir: Path) -> None:
    for number, (preset, codec) in enumerate(
        (p, c) for p in ("diloco", "sparseloco") for c in ("f32", "int8")
    ):
        one = Written(run_dir / str(number), outer={"preset": preset}, codec={"name": codec})
        one.start()
        one.round(10, 1000, 3.0)
    found = [run.label for run in compare.read_all([run_dir])]
    assert found == ["diloco f32", "diloco int8", "2 sparseloco", "3 sparseloco"]


def sweep(folder: Path) -> None:
    for number, (preset, loss) in enumerate((("diloco", 2.6), ("streaming", 2.5))):
        one = Written(folder / str(number), outer={"preset": preset, "lr": 0.7})
        one.start()
        one.round(10, 1000 / (number + 1), loss + 0.4)
        one.round(20, 2000 / (number + 1), loss + 0.1)
        one.end(loss)
    (folder / "multirun.yaml").write_text("")


def test_a_sweep_becomes_a_table_a_picture_and_hyperparameters(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(run_dir / "runs" / "sweep")
    assert cli.main(["compare", "runs/sweep", "-o", "out"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("|")[2].strip() == "held-out loss"
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["streaming", "diloco"]
    assert lines[2].split("|")[2].strip() == "2.5000"
    assert lines[2].split("|")[5].strip() == "2.0 kB"
    assert (run_dir / "out/compare.md").read_text().splitlines()[2] == lines[0]
    assert (run_dir / "out/compare.png").read_bytes()[:4] == b"\x89PNG"

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(run_dir / "out/tensorboard/streaming"))
    events.Reload()
    curve = events.Scalars("held_out/by_ktokens")
    assert [(e.step, round(e.value, 4)) for e in curve] == [(8, 2.9), (16, 2.6)]
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = HParamsPluginData.FromString(content).session_start_info.hparams
    assert values["outer.preset"].string_value == "streaming"
    assert values["outer.lr"].number_value == 0.7


def test_while_one_goes_on_losses_are_those_of_the_last_evaluation(
    run: Written, run_dir: Path
) -> None:
    sweep(run_dir / "runs" / "sweep")
    text = compare.table(compare.read_all([run.folder, run_dir / "runs" / "sweep"]))
    assert "last loss" in text
    assert " 2.6000 " in text


def test_what_is_no_run_is_one_line(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = Written(run_dir / "runs" / "empty")
    for place, part in (
        ("missing", "no such folder"),
        (".", "no config.json"),
        (str(empty.folder), "no evaluation yet"),
    ):
        assert cli.main(["compare", place]) in (1, 2)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("decotrain: ")
        assert part in lines[0]
    assert not (run_dir / "comparison").exists()


def test_a_foreign_configuration_is_named(run: Written) -> None:
    (run.folder / "config.json").write_text('{"peers": 2}')
    with pytest.raises(FileError, match=r"config\.json cannot be read"):
        compare.read(run.folder)
    with pytest.raises(ConfigError, match="no such folder"):
        compare.find([run.folder / "x"])


def test_torn_and_strange_lines_are_left_out(run: Written) -> None:
    with (run.folder / "events.jsonl").open("a") as file:
        file.write('[1]\n{"event": "evaluation", "step": "x", "held_out": 1}\n{"event": "eval')
    assert len(compare.read(run.folder).points) == 2
