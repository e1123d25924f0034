"""Prints what pip must install before decotrain itself is built without isolation.

usage: requirements.py run|dev. Reads pyproject.toml, the one list there is. Needs only the standard
library and what every pip carries (Python 3.10 has no TOML parser of its own).
"""

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib


def requirements(level: str) -> list[str]:
    """Build, run and, for dev, development requirements."""
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text)
    found = [*table["build-system"]["requires"], "cmake", "ninja"]
    found += table["project"]["dependencies"]
    if level == "dev":
        found += table["project"]["optional-dependencies"]["dev"]
    return found


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1])))
