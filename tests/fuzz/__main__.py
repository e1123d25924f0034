"""`python -m tests.fuzz NAME SECONDS FOLDER`: atheris on one target, from its corpus.

What it finds new goes to FOLDER. Needs the package atheris; scripts/fuzz.sh runs every target where
it is installed.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=["decotrain", "msgpack"]):
        from tests.fuzz.targets import CORPUS, TARGETS
    name, seconds, folder = sys.argv[1:4]
    Path(folder).mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={seconds}", "-rss_limit_mb=2048", "-timeout=10",
               f"-artifact_prefix={folder}/../{name}-"]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, folder, str(CORPUS / name)], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
