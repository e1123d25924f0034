"""Documents: their form, and that what they say of commands and bytes is what the code does."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tree import ROOT, name, none, of, read

# --- documents


def prose(path: Path) -> str:
    """The text of a document without its fenced blocks."""
    return re.sub(r"^(```|~~~).*?^\1", "", read(path), flags=re.M | re.S)


def test_documents_have_one_title() -> None:
    wrong = []
    for path in of(".md"):
        titles = re.findall(r"^# .+", prose(path), flags=re.M)
        if len(titles) != 1 or not prose(path).startswith("# "):
            wrong.append(f"{name(path)}: {len(titles)}")
    none(wrong, "a document starts with its one title")


def test_links_lead_somewhere() -> None:
    dead = []
    for path in of(".md"):
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", prose(path)):
            if not (path.parent / target).exists() and target != "codecs.md":
                dead.append(f"{name(path)}: {target}")
    none(dead, "links between documents lead somewhere")


def test_every_document_is_in_the_index() -> None:
    index = read(ROOT / "docs/README.md")
    lost = [p.name for p in of(".md", under="docs") if p.name != "README.md"]
    none([p for p in lost if f"({p})" not in index], "docs/README.md lists every document")


def test_changelog_is_kept() -> None:
    """keepachangelog.com 1.1: versions newest first, known kinds of change, no empty section."""
    text = read(ROOT / "CHANGELOG.md")
    versions = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", text, flags=re.M)
    assert versions, "no version"
    assert versions[0][0] == "Unreleased", "the first section is what is not released yet"
    assert all(date for _, date in versions[1:]), "a released version has a date"
    assert len(re.findall(r"^## ", text, flags=re.M)) == len(versions), "a strange section title"
    kinds = set(re.findall(r"^### (.+)$", text, flags=re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert not re.search(r"^### .+\n\s*(#|\Z)", text, flags=re.M), "an empty section"


# --- the wire, in words and in C++


def rows(title: str, document: str = "docs/wire.md") -> list[list[str]]:
    """The cells of the table below a heading."""
    section = re.split(r"^## ", read(ROOT / document), flags=re.M)
    text = next(part for part in section if part.startswith(title + "\n"))
    table = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line[:1] == "|"]
    return [[cell.strip() for cell in row] for row in table[2:]]


def constant(name: str, header: str = "csrc/wire.h") -> int:
    """The value of a constexpr of the core, where it is a plain expression."""
    match = re.search(rf"constexpr [\w:]+ {name} = ([^;]+);", read(ROOT / header))
    assert match, f"{header} has no {name}"
    expression = re.sub(r"std::size_t\{(\w+)\}", r"\1", match[1]).replace("std::byte", "")
    tree = ast.parse(expression, mode="eval")
    assert all(isinstance(n, ast.Expression | ast.BinOp | ast.Constant | ast.operator)
               for n in ast.walk(tree)), expression  # fmt: skip
    return int(eval(compile(tree, name, "eval"), {}))


def enumeration(name: str, header: str = "csrc/wire.h") -> dict[str, int]:
    """Names and values of an enum of the core."""
    match = re.search(rf"enum class {name} : [\w:]+ \{{(.*?)\}};", read(ROOT / header), flags=re.S)
    assert match, f"{header} has no enum {name}"
    return {key: int(value) for key, value in re.findall(r"(\w+) = (\d+)", match[1])}


def test_header_of_a_frame() -> None:
    """Offsets follow from the widths and are those at which wire.cpp writes and reads."""
    at = 0
    table = {row[2]: (int(row[0]), int(row[1])) for row in rows("Header")}
    for offset, width in table.values():
        assert offset == at
        at += width
    assert at == constant("kHeaderBytes")
    code = read(ROOT / "csrc/wire.cpp")
    names = {key: "kMagic" if key == "magic" else f"h.{key}" for key in table}
    names["type"] = "static_cast<std::uint8_t>(h.type)"
    for key, (offset, width) in table.items():
        place = f"p + {offset}" if offset else "p"
        assert f"put({place}, {names[key]});" in code, key
        assert re.search(rf"get<std::uint{8 * width}_t>\({re.escape(place)}\)", code), key


def test_magic_flags_and_types() -> None:
    text = {row[2]: row[3] for row in rows("Header")}
    magic = bytes.fromhex(re.findall(r"`([\da-f ]{11})`", text["magic"])[0])
    assert int.from_bytes(magic, "little") == constant("kMagic")
    for flag in ("Skip", "Relayed", "Reply"):
        assert f"{constant('kFlag' + flag)} {flag.lower()}" in text["flags"].lower()
    documented = {row[1].lower(): int(row[0]) for row in rows("Types") if row[1].isupper()}
    assert documented == enumeration("FrameType")


def test_specification_of_a_round() -> None:
    table = {int(row[0]): row[2] for row in rows("Packed specification")}
    assert constant("kSpecBytes") == 24
    listed = {at: dict(re.findall(r"(\d) ([a-z ]+?)(?=[,;]|$)", table[at])) for at in (0, 1)}
    for at, enum in ((0, enumeration("Op", "csrc/types.h")),
                     (1, enumeration("Rule", "csrc/codec/codec.h"))):  # fmt: skip
        names = {value: key.replace("_", " ") for key, value in enum.items()}
        assert {int(value): key for value, key in listed[at].items()} == names
    assert "64 MiB" in read(ROOT / "docs/wire.md")
    assert constant("kMaxChunkBytes", "csrc/types.h") == 64 << 20
    assert constant("kMaxPeers", "csrc/types.h") == 64
    assert constant("kMaxChunks", "csrc/types.h") == 65536


# --- README

BLOCK = re.compile(
    r"(?:<!-- (?P<mark>.+?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```", re.M | re.S
)


def blocks() -> list[tuple[str, str, str]]:
    """(mark, language, text) of the README's fenced blocks that hold code."""
    found = [
        (m["mark"] or "", m["language"], m["text"])
        for m in BLOCK.finditer(read(ROOT / "README.md"))
    ]
    return [block for block in found if block[1] in {"sh", "python"}]


def test_readme_says_of_every_block_whether_it_runs() -> None:
    """`run`: executed here. `exists`: too long for a test, what it calls must be there."""
    assert blocks(), "a README without a command"
    strange = [text for mark, _, text in blocks() if mark not in {"run", "exists"}]
    none(strange, "the line before a block is <!-- run --> or <!-- exists -->")


@pytest.mark.parametrize("block", blocks(), ids=lambda b: re.sub(r"\W+", "-", b[2][:40]).strip("-"))
def test_readme_block(block: tuple[str, str, str], run_dir: Path) -> None:
    mark, language, text = block
    if language == "python":
        compile(text, "README.md", "exec")
        names = re.findall(r"\bdt\.(\w+)", text)
        code = f"import decotrain as dt; [getattr(dt, n) for n in {json.dumps(names)}]"
        source = text if mark == "run" else code
        _succeeds([sys.executable, "-c", source])
        return
    for line in text.replace("\\\n", " ").splitlines():
        command = line.partition("#")[0].strip()
        if command:
            _command_works(command, execute=mark == "run")


def _command_works(command: str, execute: bool) -> None:
    words = command.split()
    if execute and words[0] == "decotrain":
        _succeeds([sys.executable, "-m", "decotrain.cli", *words[1:]])
    elif execute:
        _succeeds(["bash", "-ec", command], cwd=ROOT)
    elif words[0].startswith("./"):
        assert (ROOT / words[0]).stat().st_mode & 0o100, f"{words[0]} cannot be executed"
        _succeeds(["bash", "-n", words[0]], cwd=ROOT)
    elif words[:2] == ["decotrain", "train"]:  # hydra composes the configuration and stops
        overrides = [word.split(",")[0] for word in words[2:] if word != "-m"]
        _succeeds([sys.executable, "-m", "decotrain.cli", "train", "--cfg", "job", *overrides])
    elif words[0] == "decotrain":
        text = _succeeds([sys.executable, "-m", "decotrain.cli", words[1], "--help"])
        unknown = [word for word in words if word.startswith("--") and word not in text]
        none(unknown, f"decotrain {words[1]} knows its flags")
    else:
        assert words[0] in {"git", "cd", "pip", "cmake", "ctest", "pytest"}, f"what is {words[0]}?"


def _succeeds(command: list[str], cwd: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # also without an install
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, f"{command}: {done.stderr or done.stdout}"
    return done.stdout
