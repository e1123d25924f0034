"""The frame of the benchmarks: statistics, interleaving, result files, tables, README figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import common
from bench.__main__ import SUITES, main
from bench.baselines import name_them
from bench.common import CannotRunError, Report, Settings, Stats, interleave

ROOT = Path(__file__).resolve().parent.parent


def example() -> Report:
    report = Report("example", "An example", Settings(quick=True, repeats=3))
    for codec, factor in (("f32", 1.0), ("int8", 4.0)):
        for mib in (1, 64):
            report.add({"codec": codec, "mib": mib}, rate_gbs=[factor * s for s in (1, 2, 9)])
    report.skip({"codec": "hivemind", "mib": 1}, "not installed")
    report.skip({"what": "PCCL"}, "PCCL is absent")  # in no case of the others: below the tables
    report.table("rates", "rate_gbs", columns="mib")
    report.plot("rates-plot", "mib", "rate_gbs", lines="codec", log_x=True)
    return report


def test_quartiles_are_inclusive() -> None:
    stats = Stats.of([4, 1, 3, 2, 5])
    assert (stats.q1, stats.median, stats.q3, stats.n) == (2, 3, 4, 5)
    assert Stats.of(7).q1 == 7


def test_variants_take_turns() -> None:
    calls: list[str] = []

    def variant(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    samples = interleave({n: lambda n=n: variant(n) for n in "abc"}, repeats=3, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert samples["a"] == [4, 9, 11]


def test_results_survive_the_file_and_the_table_shows_them(tmp_path: Path) -> None:
    data = example().data()
    names = [p.name for p in common.write_results(data, tmp_path)]
    assert names == ["example.json", "example.md", "example-rates-plot.png"]
    assert common.read_results(tmp_path / "example.json") == json.loads(json.dumps(data))
    table = common.table_text(data, data["tables"][0])
    assert table.splitlines()[0] == "| codec | mib 1 | mib 64 |"
    assert "| int8 | 8 [6, 22] | 8 [6, 22] |" in table
    assert "| hivemind | not run |" in table
    assert len(table.splitlines()) == 5
    text = (tmp_path / "example.md").read_text()
    assert "not installed" in text
    assert "PCCL is absent" in text


def test_a_file_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps({**example().data(), "schema": 0}))
    with pytest.raises(ValueError, match="schema 0"):
        common.read_results(path)


def test_results_do_not_say_where_this_machine_keeps_things() -> None:
    told = common.Settings(options={"keep": "/var/kept", "seeds": "2"}).told()
    assert told["options"] == {"seeds": "2"}


def test_machine_facts_name_no_host() -> None:
    import platform

    text = json.dumps(common.machine_facts())
    assert "cores" in text
    assert len(platform.node()) < 4 or platform.node() not in text


def test_figures_of_a_text_come_from_the_results(tmp_path: Path) -> None:
    common.write_results(example().data(), tmp_path)
    text = tmp_path / "README.md"
    text.write_text("# A\n<!-- figures:example.rates -->\nold\n<!-- /figures -->\nB\n")
    argv = [sys.executable, str(ROOT / "scripts/readme_figures.py"), str(text),
            "--results", str(tmp_path)]  # fmt: skip
    stale = subprocess.run([*argv, "--check"], capture_output=True, text=True)
    assert stale.returncode == 1
    assert "stale" in stale.stderr
    subprocess.run(argv, check=True)
    assert "| int8 | 8 [6, 22] |" in text.read_text()
    assert "old" not in text.read_text()
    assert text.read_text().endswith("<!-- /figures -->\nB\n")
    subprocess.run([*argv, "--check"], check=True)


def test_the_figures_of_our_own_texts_are_those_of_the_results() -> None:
    argv = [sys.executable, str(ROOT / "scripts/readme_figures.py"), "--check"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_suite_is_named() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "nonsense", "wan-homes"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no such suite: nonsense, wan-homes (did you mean wan-home?)" in done.stderr


def test_baselines_that_are_not_measured_are_named() -> None:
    report = Report("example", "An example", Settings())
    name_them(report)
    assert {row["case"]["what"]: "skipped" in row for row in report.rows} == {
        "PCCL": True,
        "hivemind": True,
    }
    assert "PCCL is not installed" in common.markdown(report.data())


def test_without_arguments_the_suites_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert main(["--list"]) == 0
    assert capsys.readouterr().out == listed
    names = [line.split()[0] for line in listed.partition("\n\n")[0].splitlines()]
    assert names == list(SUITES)
    assert "--quick" in listed


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_is_a_module_that_says_what_it_shows(name: str) -> None:
    module = ROOT / (SUITES[name][0].replace(".", "/") + ".py")
    text = module.read_text()
    assert "def run(settings: Settings) -> Report:" in text
    assert text.startswith('"""')


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "example was interrupted: no result of it was written"),
        (CannotRunError("no rights; become root"), 1, "example cannot run: no rights"),
    ],
)
def test_how_a_suite_may_end(
    error: BaseException,
    code: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(settings: Settings) -> Report:
        raise error

    monkeypatch.setitem(sys.modules, "bench.example", SimpleNamespace(run=run))
    monkeypatch.setitem(SUITES, "example", ("bench.example", "nothing"))
    assert main(["example", "--out", str(tmp_path)]) == code
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
