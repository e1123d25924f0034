"""Write the figures of a text from bench/results/: what stands between two markers.

    <!-- figures:codecs.speed -->
    (replaced by the table `speed` of bench/results/codecs.json)
    <!-- /figures -->

`figures:SUITE` is the suite's first table, `figures:SUITE.NAME` a table or a plot by name.
With `--check` nothing is written and a stale text is an error. It never runs a benchmark.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.common import RESULTS, default_table, read_results, table_text  # noqa: E402

TEXTS = [ROOT / "README.md", ROOT / "docs" / "figures.md"]
BLOCK = re.compile(
    r"(?P<open><!-- figures:(?P<suite>[\w-]+)(?:\.(?P<name>[\w-]+))? -->\n)"
    r"(?P<body>.*?)(?P<close><!-- /figures -->)",
    re.DOTALL,
)


def figure(suite: str, name: str | None, results: Path, beside: Path) -> str:
    """The Markdown of one table or plot; `beside` is the folder of the text it goes into."""
    path = results / f"{suite}.json"
    if not path.exists():
        raise SystemExit(f"{path} is missing: run `python -m bench {suite}` first")
    data = read_results(path)
    tables = data["tables"] or [default_table(data)]
    source = f"\nMeasured {data['started'][:10]} on {data['machine']['cpu']}, "
    source += f"{data['machine']['cores']} cores, commit {data['machine']['commit']}.\n"
    if name is None:
        return table_text(data, tables[0]) + source
    for table in tables:
        if table["name"] == name:
            return table_text(data, table) + source
    for plot in data["plots"]:
        if plot["name"] == name:
            image = os.path.relpath(results / f"{suite}-{name}.png", beside)
            return f"![{plot['title'] or data['title']}]({image})\n"
    known = [entry["name"] for entry in [*tables, *data["plots"]]]
    raise SystemExit(f"{path} has no figure {name!r}, only {', '.join(known)}")


def rewrite(text: str, results: Path, beside: Path) -> str:
    if len(re.findall(r"<!-- figures:", text)) != len(BLOCK.findall(text)):
        raise SystemExit("a figures marker is not closed: write <!-- /figures --> after it")

    def replace(match: re.Match[str]) -> str:
        body = figure(match["suite"], match["name"], results, beside)
        return match["open"] + body + match["close"]

    return BLOCK.sub(replace, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", nargs="*", type=Path, default=TEXTS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="write nothing, fail when stale")
    args = parser.parse_args()
    stale = 0
    for path in args.texts:
        old = path.read_text()
        new = rewrite(old, args.results.resolve(), path.resolve().parent)
        if new == old:
            continue
        stale += 1
        if args.check:
            print(f"{path}: figures are stale, run scripts/readme_figures.py", file=sys.stderr)
        else:
            path.write_text(new)
            print(f"{path}: figures rewritten")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
