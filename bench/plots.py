"""Plots of a report as PNG files, from its data alone. The only module that needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.common import selected

LABELS_MAX = 70  # characters side by side under the bars; more are slanted


def draw(data: Mapping[str, Any], plot: Mapping[str, Any], path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=120)
    series = _series(data, plot)
    text = any(isinstance(x, str) for points in series.values() for x, _ in points)
    (_bars if text else _curves)(axes, series)
    axes.set_xlabel(plot["x"])
    axes.set_ylabel(plot["metric"])
    axes.set_title(plot["title"] or data["title"])
    if plot["log_x"] and not text:
        axes.set_xscale("log", base=2)
    if plot["log_y"]:
        axes.set_yscale("log")
    if len(series) > 1:
        axes.legend(title=plot["lines"])
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    figure.tight_layout()
    # No software version or date in the file: the same data gives the same bytes.
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)
    return path


def _series(
    data: Mapping[str, Any], plot: Mapping[str, Any]
) -> dict[str, list[tuple[Any, dict[str, Any]]]]:
    series: dict[str, list[tuple[Any, dict[str, Any]]]] = {}
    for row in selected(data, plot["where"]):
        if plot["metric"] not in row["metrics"] or plot["x"] not in row["case"]:
            continue
        name = str(row["case"].get(plot["lines"], "")) if plot["lines"] else ""
        point = (row["case"][plot["x"]], row["metrics"][plot["metric"]])
        series.setdefault(name, []).append(point)
    return series


def _curves(axes: Any, series: Mapping[str, list[tuple[Any, dict[str, Any]]]]) -> None:
    for name, points in series.items():
        points = sorted(points, key=lambda p: p[0])
        xs = [x for x, _ in points]
        medians = [s["median"] for _, s in points]
        low = [s["median"] - s["q1"] for _, s in points]
        high = [s["q3"] - s["median"] for _, s in points]
        axes.errorbar(xs, medians, yerr=[low, high], marker="o", capsize=3, label=name)


def _bars(axes: Any, series: Mapping[str, list[tuple[Any, dict[str, Any]]]]) -> None:
    places = list(dict.fromkeys(str(x) for points in series.values() for x, _ in points))
    width = 0.8 / max(1, len(series))
    for number, (name, points) in enumerate(series.items()):
        at = [places.index(str(x)) + (number - (len(series) - 1) / 2) * width for x, _ in points]
        axes.bar(at, [s["median"] for _, s in points], width=width, label=name)
    axes.set_xticks(range(len(places)), places)
    if sum(map(len, places)) > LABELS_MAX:
        axes.tick_params(axis="x", labelrotation=30)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")
