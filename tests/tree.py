"""The repository as tests of its form see it: which files there are, and how a rule fails."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh", ".sh"}
TEXT = SOURCE | {".md", ".toml", ".txt", ".yaml", ".json", ".cmake"}


@cache
def files() -> list[Path]:
    """Everything in git, or, without git (an unpacked sdist), whatever is no build output."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.splitlines()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        listed = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*")]
        listed = [name for name in listed if not re.match(r"(build|dist|runs|\.\w+)/", name)]
    found = [ROOT / name for name in sorted(listed)]
    return [p for p in found if p.is_file() and "third_party" not in p.parts]


def of(*suffixes: str, under: str = "") -> list[Path]:
    """Files with one of the suffixes, in a folder of the repository."""
    base = ROOT / under
    return [p for p in files() if p.suffix in suffixes and base in (p, *p.parents)]


def name(path: Path) -> str:
    """The path as a reader of a failure wants it."""
    return path.relative_to(ROOT).as_posix()


def read(path: Path) -> str:
    """The text of a file; all text here is UTF-8."""
    return path.read_text(encoding="utf-8")


def none(found: list[str], rule: str) -> None:
    """Fails with the rule and everything that breaks it."""
    assert not found, rule + ":\n  " + "\n  ".join(found)
