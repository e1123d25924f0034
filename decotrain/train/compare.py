"""Runs side by side: one table, one picture, and TensorBoard's hyper-parameters.

    decotrain compare runs/sweep runs/other -o comparison

Reads what runs left behind (config.json, events.jsonl), also of runs that still go on; starts and
changes nothing there. A folder of a sweep stands for all its runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from decotrain.errors import ConfigError, FileError
from decotrain.train.metrics import Event, Tail
from decotrain.train.settings import OWN_CODEC
from decotrain.units import size

ENDS = ("summary", "interrupted")  # what a launcher notes last
HEAD = ("run", "held-out loss", "steps", "tokens", "sent", "time", "computing")
LAST = "last loss"  # its name while a run goes on: measured on fewer windows than the final one
# What differs between any two runs, and says nothing about them.
NAMES = ("name", "folder", "resume", "listen", "token_file", "insecure")
SPEAKING = ("outer.preset", "codec.name")  # first in a label, and known by their values
SCALES = (("tokens", 1e6), ("sent_bytes", 1e6), ("seconds", 1.0))
COLOURS, LINES = 10, ("-", "--", ":", "-.")  # of matplotlib; the next line when colours are used up
TITLES = ("tokens (million)", "bytes sent by all peers (MB)", "wall-clock time (s)")


@dataclass(frozen=True)
class Point:
    """One evaluation on held-out text, and what had been spent by then, by all peers together."""

    step: int
    loss: float  # nats for each byte
    tokens: float  # that counted, by all peers (in older logs: of that many steps of every peer)
    sent_bytes: float
    seconds: float  # of wall-clock time, without pauses before a resume


@dataclass
class Run:
    """What a run's folder says."""

    folder: Path
    config: Mapping[str, Any]
    points: list[Point] = field(default_factory=list)
    utilisations: dict[str, float] = field(default_factory=dict)  # by peer
    sent_bytes: float = 0.0  # by all peers, up to their last words
    seconds: float = 0.0
    final_loss: float | None = None  # of the summary, when the run has ended
    label: str = ""

    @property
    def last(self) -> Point:
        return self.points[-1]

    @property
    def utilisation(self) -> float:
        values = self.utilisations.values()
        return sum(values) / max(len(values), 1)


def find(places: Sequence[Path]) -> list[Path]:
    """Folders of runs: those given, and those of the sweeps given."""
    found: list[Path] = []
    for place in places:
        if not place.is_dir():
            raise ConfigError(f"{place}: there is no such folder; give the folder of a run")
        inside = sorted(path.parent for path in place.glob("*/config.json"))
        inside = [path for path in inside if path.name != "baseline"]
        if (place / "config.json").is_file():
            inside = [place]
        if not inside:
            raise ConfigError(f"{place} is no run and no sweep: it holds no config.json")
        found += [path for path in inside if path not in found]
    return found


class _Reader:
    """From the events of a run, in order, to its points."""

    def __init__(self, run: Run, tokens_of_step: float) -> None:
        self.run, self.tokens_of_step = run, tokens_of_step
        self.sent: dict[str, float] = {}  # by peer, of its present incarnation
        self.sent_before = 0.0
        self.seconds = 0.0
        self.counted: list[tuple[int, float]] = []  # (step, tokens) of rounds
        self.told_s: float | None = None  # None: the time until the next event is a pause
        self.ended = True  # between two launches

    def take(self, event: Event) -> None:
        kind, peer = event["event"], str(event.get("peer", ""))
        if kind == "start" and isinstance(event.get("step"), int):
            self._start(peer, event["step"])
        self._pass_time(event)
        if isinstance(event.get("sent_bytes"), int | float) and peer:
            self.sent[peer] = event["sent_bytes"]
        if isinstance(event.get("utilisation"), int | float):
            self.run.utilisations[peer] = event["utilisation"]
        if peer:
            self.run.sent_bytes = self.sent_before + sum(self.sent.values())
            self.run.seconds = self.seconds
        step, tokens = event.get("step"), event.get("tokens")
        if kind == "mean" and isinstance(step, int) and isinstance(tokens, int | float):
            self.counted.append((step, tokens))
        if kind == "evaluation":
            self._point(event.get("step"), event.get("held_out"))
        if kind in ENDS:
            self.ended, self.told_s = True, None
            self.run.final_loss = event.get("held_out_nats")

    def _start(self, peer: str, step: int) -> None:
        """A peer (re)starts; with all of them, the run was resumed or begun anew."""
        self.sent_before += self.sent.pop(peer, 0.0)
        if self.ended or step == 0:
            self.run.points = [point for point in self.run.points if point.step <= step]
            self.counted = [one for one in self.counted if one[0] <= step]
        if self.ended and step == 0:
            self.sent, self.sent_before, self.seconds, self.told_s = {}, 0.0, 0.0, None
            self.run.utilisations.clear()
        self.ended, self.run.final_loss = False, None

    def _pass_time(self, event: Event) -> None:
        said_s = _time_s(event)
        if self.told_s is not None:
            self.seconds += said_s - self.told_s
        self.told_s = said_s

    def _point(self, step: object, loss: object) -> None:
        if isinstance(step, int) and isinstance(loss, int | float):
            tokens = step * self.tokens_of_step
            self.run.points.append(Point(step, loss, tokens, self.run.sent_bytes, self.seconds))

    def finish(self) -> None:
        """Tokens as they counted, where the log says so: peers may have come and gone."""
        if self.counted:
            self.run.points = [
                replace(p, tokens=sum(tokens for step, tokens in self.counted if step <= p.step))
                for p in self.run.points
            ]


def _time_s(event: Event) -> float:
    """When it happened: the launcher reads what peers said a little later."""
    time_s = event.get("said_s", event.get("time_s"))
    return float(time_s) if isinstance(time_s, int | float) else 0.0


def read(folder: Path) -> Run:
    """One run; FileError when there is nothing to compare in it."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tokens = config["peers"] * config["batch"] * config["model"]["context"]
        run = Run(folder, config)
        reader = _Reader(run, float(tokens))
    except (OSError, ValueError, KeyError, TypeError):
        raise FileError(
            f"{folder / 'config.json'} cannot be read as that of a `decotrain train` run"
        ) from None
    for event in sorted(Tail(folder / "events.jsonl", whole=True).read(), key=_time_s):
        reader.take(event)
    reader.finish()
    if not run.points:
        raise FileError(
            f"{folder} holds no evaluation yet (a run makes one every few rounds: every.evaluation)"
        )
    return run


def read_all(places: Sequence[Path]) -> list[Run]:
    """All runs, each with a label that says what is special about it."""
    runs = [read(folder) for folder in find(places)]
    for run, label in zip(runs, labels([_used(run.config) for run in runs]), strict=True):
        run.label = label
    told = [run.label for run in runs]
    for run in runs:
        if told.count(run.label) > 1 or not run.label:
            run.label = f"{run.folder.name} {run.label}".strip()
    return runs


def labels(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fewest keys that tell the configurations apart, those that say most first."""
    keys = [*SPEAKING, *sorted({key for config in configs for key in config} - {*SPEAKING, *NAMES})]
    chosen: list[str] = []
    groups = 1
    for key in keys:
        apart = len({tuple(repr(c.get(k)) for k in [*chosen, key]) for c in configs})
        if apart > groups:
            chosen, groups = [*chosen, key], apart
    return [
        " ".join(
            str(c.get(k)) if k in SPEAKING else f"{k}={c.get(k)}"
            for k in chosen
            if k in c or k not in SPEAKING
        )
        for c in configs
    ]


def _used(config: Mapping[str, Any]) -> dict[str, Any]:
    """By key, without the codec where the preset took none: it would tell equal runs apart."""
    flat = _flat(config)
    own = flat.get("outer.preset") in OWN_CODEC
    return {key: value for key, value in flat.items() if not (own and key.startswith("codec."))}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"outer": {"lr": 0.7}} -> {"outer.lr": 0.7}"""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


# --- the table


def table(runs: Sequence[Run]) -> str:
    """Markdown, the lowest loss first. Losses are the final ones when every run has one."""
    finals = [run.final_loss for run in runs if run.final_loss is not None]
    losses = finals if len(finals) == len(runs) else [run.last.loss for run in runs]
    head = list(HEAD) if losses is finals else [HEAD[0], LAST, *HEAD[2:]]
    cells = [
        [
            run.label, f"{loss:.4f}", str(run.last.step), f"{run.last.tokens / 1e6:.3g} M",
            size(run.sent_bytes), f"{run.seconds:.0f} s", f"{run.utilisation:.1%}",
        ]
        for loss, run in sorted(zip(losses, runs, strict=True), key=lambda pair: pair[0])
    ]  # fmt: skip
    wide = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    lines = [
        "| " + " | ".join([row[0].ljust(wide[0]), *map(str.rjust, row[1:], wide[1:])]) + " |"
        for row in [head, *cells]
    ]
    rule = "| " + " | ".join(["-" * wide[0], *("-" * (w - 1) + ":" for w in wide[1:])]) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


# --- the picture and TensorBoard


def draw(runs: Sequence[Run], path: Path) -> Any:
    """Held-out loss against tokens, bytes and time; the figure, also as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.6), dpi=110, layout="constrained")
    axes: Any = figure.subplots(1, 3, sharey=True)
    for number, run in enumerate(runs):
        turn, colour = divmod(number, COLOURS)
        look = {"color": f"C{colour}", "linestyle": LINES[turn % len(LINES)]}
        losses = [point.loss for point in run.points]
        for place, (key, scale) in zip(axes, SCALES, strict=True):
            values = [getattr(point, key) / scale for point in run.points]
            place.plot(values, losses, marker=".", label=run.label, **look)
    for place, title in zip(axes, TITLES, strict=True):
        place.set_xlabel(title)
        place.grid(alpha=0.3)
    if all(point.sent_bytes > 0 for run in runs for point in run.points):
        axes[1].set_xscale("log")
    axes[0].set_ylabel("held-out loss (nats for each byte)")
    axes[2].legend(fontsize="small")
    figure.savefig(path, metadata={"Software": None})
    return figure


def board(runs: Sequence[Run], folder: Path, figure: Any | None) -> None:
    """Configurations and figures as hyper-parameters, and the picture, for TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    for run in runs:
        values = {key: v for key, v in _flat(run.config).items() if key not in NAMES}
        values = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in values.items()}
        figures = {
            "end/held_out": run.last.loss, "end/tokens": run.last.tokens,
            "end/sent_bytes": run.sent_bytes, "end/seconds": run.seconds,
            "end/utilisation": run.utilisation,
        }  # fmt: skip
        name = "".join(c if c.isalnum() or c in "=+-._" else "_" for c in run.label)
        with SummaryWriter(str(folder / name)) as writer:
            writer.add_hparams(values, figures, run_name=".")
            for point in run.points:
                writer.add_scalar("held_out/by_ktokens", point.loss, int(point.tokens / 1e3))
                writer.add_scalar("held_out/by_sent_kB", point.loss, int(point.sent_bytes / 1e3))
                writer.add_scalar("held_out/by_ms", point.loss, int(point.seconds * 1e3))
    if figure is not None:
        with SummaryWriter(str(folder)) as writer:
            writer.add_figure("comparison", figure)


# --- the command


def main(words: Sequence[str]) -> int:
    """The exit code; what is wrong is an Error."""
    parser = argparse.ArgumentParser(prog="decotrain compare", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="of a run or a sweep")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", default=Path("comparison"),
        help="for compare.md, compare.png and tensorboard/; default: comparison",
    )  # fmt: skip
    asked = parser.parse_args(words)
    runs = read_all(asked.runs)
    text = table(runs)
    print(text)
    try:
        asked.output.mkdir(parents=True, exist_ok=True)
        (asked.output / "compare.md").write_text(f"# Comparison\n\n{text}\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{asked.output} cannot be written: {error.strerror}; choose another with -o FOLDER"
        ) from None
    written = ["compare.md", "tensorboard"]
    figure = None
    try:
        figure = draw(runs, asked.output / "compare.png")
        written.insert(1, "compare.png")
    except ImportError:
        print("no picture: matplotlib is not installed (pip install 'decotrain[plots]')")
    board(runs, asked.output / "tensorboard", figure)
    print("written: " + ", ".join(str(asked.output / name) for name in written))
    return 0
