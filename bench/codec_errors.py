"""How large the error of a round is, by codec: whole rounds between nodes of this process.

`nmse_percent` is the error of the mean of n peers in percent of the mean's power, for values with
heavy tails (t4 rows of log-normal scale, half of the spread common to all), averaged over two
seeds; `table_percent` is ALGORITHMS f's, where it has one. `sum_percent` is the error of the sum of
32 rounds of two peers with a common drift: without error feedback, with it, with its residual in
bf16, and with the owners' feedback beside the senders'. "c+f32" leaves results exact: then all of
the error is the senders'.
Nothing is timed and sums run in rank order: every machine gives these figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.common import Report, Settings, log
from decotrain import _core

F32 = NDArray[np.float32]
PEERS = (2, 8, 32)
ROUNDS = 32
SEEDS = 2
WAIT_S = 120.0
VIEW = 1 << 32 | 1
# n = 2, 8, 32
TABLE: dict[str, tuple[float, float, float]] = {
    "int8": (0.022, 0.017, 0.018),
    "e2m1": (1.9, 1.4, 1.2),
    "e3m0": (6.3, 4.7, 3.7),
    "int2": (28, 25, 26),
    "e2m1+int8": (0.42, 0.39, 0.17),
    "e3m0+int8": (1.3, 1.2, 0.55),
}
CODECS = ("bf16", *TABLE)
SUMMED = ("int8", "e2m1", "e3m0", "int2", "e2m1+int8", "e2m1+f32", "e3m0+f32", "int2+f32")


def run(settings: Settings) -> Report:
    report = Report("codec-errors", "Error of rounds, by codec", settings)
    for n in PEERS[:2] if settings.quick else PEERS:
        with team(n) as nodes:
            log(f"{n} peers")
            _means(report, settings, nodes)
            if n == 2:
                _sums(report, settings, nodes)
    report.table("mean", ["nmse_percent", "table_percent"], where={"what": "mean"},
                 title="Error of the mean")  # fmt: skip
    report.table("sum", "sum_percent", columns="residual", where={"what": "sum"},
                 title=f"Error of the sum of {ROUNDS} rounds, two peers, by residual")  # fmt: skip
    report.note(__doc__.split("\n\n")[1].replace("\n", " "))
    return report


@contextmanager
def team(count: int) -> Iterator[list[_core.Node]]:
    nodes = [_core.Node(10 + i, ["unix://"], run_fingerprint=1, streams=1) for i in range(count)]
    try:
        everybody = [(node.peer, i, node.addresses) for i, node in enumerate(nodes)]
        plan = {
            "view": {"id": VIEW, "members": [[n.peer, i, True, 1.0] for i, n in enumerate(nodes)]},
            "answers": [1, 1], "reported": (1 << count) - 1, "tags": [], "rounds": [], "names": [],
        }  # fmt: skip
        for node in nodes:
            node.set_peers(everybody)
            node.freeze(1, 1)
        for node in nodes:
            assert node.install(plan)
        yield nodes
    finally:
        for node in nodes:
            node.close()


def mean_of(
    nodes: list[_core.Node],
    given: list[F32],
    codec: str,
    residuals: list[Any] | None = None,
    owners: list[F32] | None = None,
) -> F32:
    """One round; all peers have the same bits of its result."""
    contribution, result_codec = _core.codec_pair(codec)
    works = [
        node.begin([values], codec=contribution, result_codec=result_codec,
                   residual=None if residuals is None else [residuals[i]],
                   owner_residual=None if owners is None else owners[i])
        for i, (node, values) in enumerate(zip(nodes, given, strict=True))
    ]  # fmt: skip
    results = []
    for i, work in enumerate(works):
        assert work.wait(WAIT_S)
        results.append(work.result())
        if owners is not None:
            results[-1].keep_lost(owners[i])
    assert len({result.digest for result in results}) == 1
    out = np.empty_like(given[0])
    results[-1].decode_into([out])
    return out


def heavy_tailed(peers: int, seed: int, rows: int) -> list[F32]:
    random = np.random.default_rng(seed)
    scale = np.exp(random.normal(0, 1, (rows, 1)))
    common = 0.5 * random.standard_t(4, (rows, 1024))
    return [
        (scale * (common + random.standard_t(4, (rows, 1024)))).astype(np.float32).ravel()
        for _ in range(peers)
    ]


def _means(report: Report, settings: Settings, nodes: list[_core.Node]) -> None:
    n, errors = len(nodes), dict[str, list[float]]()
    for seed in range(settings.seed, settings.seed + SEEDS):
        given = heavy_tailed(n, seed, 8 if settings.quick else 256)
        exact = np.mean([values.astype(np.float64) for values in given], axis=0)
        for codec in CODECS:
            error = np.square(mean_of(nodes, given, codec) - exact).mean() / np.square(exact).mean()
            errors.setdefault(codec, []).append(float(error) * 100)
    for codec, seen in errors.items():
        figures = {"nmse_percent": float(np.mean(seen))}
        if codec in TABLE:
            figures["table_percent"] = TABLE[codec][PEERS.index(n)]
        report.add({"what": "mean", "codec": codec, "n": n}, **figures)


def _sums(report: Report, settings: Settings, nodes: list[_core.Node]) -> None:
    elements = 1 << (13 if settings.quick else 16)
    for codec in SUMMED:
        for residual, kept in (("none", None), ("f32", np.float32), ("bf16", np.uint16)):
            report.add({"what": "sum", "codec": codec, "residual": residual},
                       sum_percent=_sum(nodes, codec, kept, elements, settings.seed))  # fmt: skip
        if not codec.endswith("+f32"):
            both = _sum(nodes, codec, np.float32, elements, settings.seed, owners=True)
            report.add({"what": "sum", "codec": codec, "residual": "f32, owners too"},
                       sum_percent=both)  # fmt: skip


def _sum(
    nodes: list[_core.Node], codec: str, kept: Any, elements: int, seed: int, owners: bool = False
) -> float:
    random = np.random.default_rng(seed)
    scale = np.exp(random.normal(0, 1, elements // 1024)).repeat(1024)
    drift = 0.5 * random.standard_t(4, elements)
    residuals: list[Any] | None = None
    if kept is not None:
        arrays = [np.zeros(elements, kept) for _ in nodes]
        residuals = [(one, "bf16") if kept is np.uint16 else one for one in arrays]
    owned = [np.zeros(elements, np.float32) for _ in nodes] if owners else None
    meant, got = np.zeros(elements), np.zeros(elements)
    for _ in range(ROUNDS):
        given = [
            (scale * (drift + random.standard_t(4, elements))).astype(np.float32) for _ in nodes
        ]
        meant += np.mean([values.astype(np.float64) for values in given], axis=0)
        got += mean_of(nodes, given, codec, residuals, owned)
    return float(np.square(got - meant).mean() / np.square(meant).mean() * 100)
