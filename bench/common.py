"""What every benchmark shares: samples, statistics, machine facts, the result file and its tables.

A suite is a module with `run(settings: Settings) -> Report`; bench/__main__.py names them all.
A report is data (JSON); tables and plots are drawn from it, here and by
scripts/readme_figures.py, so that a figure in a text can always be traced to a file.
This module measures nothing by itself and imports neither torch nor decotrain.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

SCHEMA = 1  # of the result file; a reader refuses another
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

Value = str | int | float | bool


class CannotRunError(Exception):
    """A suite cannot do what was asked here; the message says why and what would help."""


@dataclass(frozen=True)
class Settings:
    """How a suite is run. `options` are the suite's own, from `--set name=value`."""

    quick: bool = False  # a smoke run: seconds, figures good for nothing
    repeats: int = 5
    seed: int = 1
    options: Mapping[str, str] = field(default_factory=dict)

    def option(self, name: str, default: str) -> str:
        return self.options.get(name, default)

    def told(self) -> dict[str, Any]:
        """What a file of results says of them: nothing of where this machine keeps what."""
        options = {name: one for name, one in self.options.items() if not one.startswith("/")}
        return {**asdict(self), "options": options}


@dataclass(frozen=True)
class Stats:
    """Samples of one metric. Quartiles are inclusive; one sample is its own quartiles."""

    median: float
    q1: float
    q3: float
    n: int
    samples: list[float]

    @classmethod
    def of(cls, samples: float | Iterable[float]) -> Stats:
        values = [float(samples)] if isinstance(samples, int | float) else [*map(float, samples)]
        if not values:
            raise ValueError("no samples")
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1, values)
        q1, q2, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(q2, q1, q3, len(values), values)


def interleave(
    variants: Mapping[str, Callable[[], float]], repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Call each variant `repeats` times, in turns, and collect what they return.

    In turns (the order rotates), so that a machine that warms up or is disturbed
    does so for all of them alike.
    """
    names = list(variants)
    for _ in range(warmup):
        for name in names:
            variants[name]()
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            samples[name].append(float(variants[name]()))
    return samples


def timed(call: Callable[[], object], inner: int = 1) -> Callable[[], float]:
    """A variant for `interleave`: seconds per call, mean over `inner` calls."""

    def run() -> float:
        start = time.perf_counter()
        for _ in range(inner):
            call()
        return (time.perf_counter() - start) / inner

    return run


class Report:
    """Rows of one suite: a case (what was run) and its metrics (units last in their names)."""

    def __init__(self, suite: str, title: str, settings: Settings) -> None:
        self.suite = suite
        self.title = title
        self.settings = settings
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.tables: list[dict[str, Any]] = []
        self.plots: list[dict[str, Any]] = []
        self._started = datetime.datetime.now(datetime.timezone.utc)
        self._start = time.perf_counter()

    def add(self, case: Mapping[str, Value], **metrics: float | Sequence[float]) -> None:
        row = {name: asdict(Stats.of(samples)) for name, samples in metrics.items()}
        self.rows.append({"case": dict(case), "metrics": row})

    def skip(self, case: Mapping[str, Value], reason: str) -> None:
        """A case that could not be run (a baseline that is not installed): named, not hidden."""
        self.rows.append({"case": dict(case), "metrics": {}, "skipped": reason})

    def note(self, text: str) -> None:
        self.notes.append(text)

    def table(
        self,
        name: str,
        metric: str | Sequence[str],
        columns: str | None = None,
        title: str = "",
        where: Mapping[str, Value] | None = None,
        drop: Sequence[str] = (),
    ) -> None:
        """A table drawn from the rows.

        Without `columns`: one line per case, one column for each metric. With `columns`, the name
        of a case key: one column for each of its values (one metric only). `where` selects rows,
        `drop` leaves case keys out. Rows with none of the metrics are not shown.
        """
        metrics = [metric] if isinstance(metric, str) else list(metric)
        if columns is not None and len(metrics) != 1:
            raise ValueError("a table with `columns` shows one metric")
        self.tables.append(
            {"name": name, "title": title, "metrics": metrics, "columns": columns,
             "where": dict(where or {}), "drop": list(drop)}
        )  # fmt: skip

    def plot(
        self,
        name: str,
        x: str,
        metric: str,
        lines: str | None = None,
        title: str = "",
        where: Mapping[str, Value] | None = None,
        log_x: bool = False,
        log_y: bool = False,
    ) -> None:
        """Medians of `metric` over the case key `x` (bars for text), a line for each `lines`."""
        self.plots.append(
            {"name": name, "title": title, "x": x, "metric": metric, "lines": lines,
             "where": dict(where or {}), "log_x": log_x, "log_y": log_y}
        )  # fmt: skip

    def data(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "suite": self.suite,
            "title": self.title,
            "started": self._started.isoformat(timespec="seconds"),
            "duration_s": round(time.perf_counter() - self._start, 3),
            "settings": self.settings.told(),
            "machine": machine_facts(),
            "notes": self.notes,
            "rows": self.rows,
            "tables": self.tables,
            "plots": self.plots,
        }


# --- the result file


def write_results(data: Mapping[str, Any], folder: Path) -> list[Path]:
    """SUITE.json, SUITE.md and SUITE-PLOT.png in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    check(data)
    suite = data["suite"]
    written = [folder / f"{suite}.json", folder / f"{suite}.md"]
    _write(written[0], json.dumps(data, indent=1) + "\n")
    _write(written[1], markdown(data))
    if data["plots"]:
        from bench.plots import draw  # matplotlib is needed for plots only

        written += [draw(data, plot, folder / f"{suite}-{plot['name']}.png")
                    for plot in data["plots"]]  # fmt: skip
    return written


def read_results(path: Path) -> dict[str, Any]:
    data = json.loads(path.read_text())
    check(data, str(path))
    return data  # type: ignore[no-any-return]


def check(data: Mapping[str, Any], where: str = "result") -> None:
    """The schema, by hand: it is small, and a bad file gets a sentence instead of a KeyError."""
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{where}: schema {data.get('schema')!r}, this version reads {SCHEMA}")
    # fmt: off
    wanted = {"suite": str, "title": str, "started": str, "duration_s": float, "settings": dict,
              "machine": dict, "notes": list, "rows": list, "tables": list, "plots": list}
    # fmt: on
    for key, kind in wanted.items():
        if not isinstance(data.get(key), kind):
            raise ValueError(f"{where}: {key} should be a {kind.__name__}")
    for number, row in enumerate(data["rows"]):
        if not isinstance(row.get("case"), dict) or not isinstance(row.get("metrics"), dict):
            raise ValueError(f"{where}: row {number} needs a case and metrics")
        for name, stats in row["metrics"].items():
            if len(stats["samples"]) != stats["n"]:
                raise ValueError(f"{where}: row {number}, {name}: n is not the number of samples")


def _write(path: Path, text: str) -> None:
    draft = path.with_name(path.name + ".part")
    draft.write_text(text)
    draft.replace(path)


# --- tables


def selected(data: Mapping[str, Any], where: Mapping[str, Value]) -> list[dict[str, Any]]:
    rows = data["rows"]
    return [r for r in rows if all(r["case"].get(k) == v for k, v in where.items())]


def table_text(data: Mapping[str, Any], table: Mapping[str, Any]) -> str:
    """One table as Markdown."""
    rows = [r for r in selected(data, table["where"])
            if "skipped" in r or any(m in r["metrics"] for m in table["metrics"])]  # fmt: skip
    # What was not run at all, and so in no case of these, is listed below the tables.
    always = [set(r["case"]) for r in rows if "skipped" not in r]
    rows = [r for r in rows if not always or set.intersection(*always) <= set(r["case"])]
    dropped = {*table["drop"], *table["where"]}
    keys = list(dict.fromkeys(k for r in rows for k in r["case"] if k not in dropped))
    if table["columns"] is None:
        metrics = table["metrics"]
        lines = [[_cell(r["case"].get(k)) for k in keys] + [_figure(r, m) for m in metrics]
                 for r in rows]  # fmt: skip
        return markdown_table([*keys, *metrics], lines)
    pivot, metric = table["columns"], table["metrics"][0]
    keys = [k for k in keys if k != pivot]
    values = list(dict.fromkeys(r["case"].get(pivot) for r in rows))
    cells: dict[tuple[Any, ...], dict[Any, str]] = {}
    for r in rows:
        line = cells.setdefault(tuple(r["case"].get(k) for k in keys), {})
        line[r["case"].get(pivot)] = _figure(r, metric)
    lines = [[*map(_cell, key), *(line.get(v, "") for v in values)] for key, line in cells.items()]
    return markdown_table([*keys, *(f"{pivot} {_cell(v)}" for v in values)], lines)


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    text = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    text += ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join(text) + "\n"


def markdown(data: Mapping[str, Any]) -> str:
    """The whole report as Markdown."""
    facts = ", ".join(f"{k} {v}" for k, v in data["machine"].items() if not isinstance(v, dict))
    parts = [f"# {data['title']}\n", f"{data['started']}, {facts}.\n"]
    if data["settings"]["quick"]:
        parts.append("A quick run: the figures are good for nothing but its own test.\n")
    tables = data["tables"] or [default_table(data)]
    for table in tables:
        if table["title"]:
            parts.append(f"## {table['title']}\n")
        parts.append(table_text(data, table))
    skipped = [f"- {r['case']}: {r['skipped']}" for r in data["rows"] if "skipped" in r]
    if skipped:
        parts.append("Not run:\n\n" + "\n".join(skipped) + "\n")
    parts += [f"{note}\n" for note in data["notes"]]
    parts += [f"![{p['title'] or p['name']}]({data['suite']}-{p['name']}.png)\n"
              for p in data["plots"]]  # fmt: skip
    return "\n".join(parts)


def default_table(data: Mapping[str, Any]) -> dict[str, Any]:
    metrics = list(dict.fromkeys(m for r in data["rows"] for m in r["metrics"]))
    return {"name": "all", "title": "", "metrics": metrics, "columns": None, "where": {},
            "drop": []}  # fmt: skip


def _figure(row: Mapping[str, Any], metric: str) -> str:
    stats = row["metrics"].get(metric)
    if stats is None:
        return "not run" if "skipped" in row else ""
    if stats["n"] == 1:
        return number_text(stats["median"])
    return (
        f"{number_text(stats['median'])} [{number_text(stats['q1'])}, {number_text(stats['q3'])}]"
    )


def number_text(value: float) -> str:
    """Three significant digits, no exponent between 0.001 and a million."""
    if value == 0 or not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return number_text(value)
    return "" if value is None else str(value)


# --- the machine


def machine_facts() -> dict[str, Any]:
    """What a figure depends on. No host name, no address, no user."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_1min": round(os.getloadavg()[0], 2),
        "commit": _commit(),
    }
    gpu = _output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    if gpu:
        facts["gpu"] = gpu.splitlines()[0]
    facts["packages"] = {}
    for name in ("torch", "numpy", "pyzmq", "msgpack"):
        try:
            facts["packages"][name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return facts


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


def _commit() -> str:
    commit = _output(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"])
    if not commit:
        return "unknown"
    changed = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return commit + ("+changes" if changed else "")


def _output(argv: Sequence[str]) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def log(text: str) -> None:
    """Progress goes to stderr: stdout belongs to tables and JSON."""
    print(text, file=sys.stderr, flush=True)
