"""House rules that a program can check: sizes, layers, words, configuration, what lies in git.

Documents have their own file, test_docs.py. Formatting, lint, types and the length of C++ functions
belong to the tools of scripts/check.sh.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tree import ROOT, SOURCE, TEXT, files, name, none, of, read

FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70
COLUMNS_MAX = 100
BLOB_BYTES_MAX = 256 << 10

# --- sizes


def test_files_are_short() -> None:
    long = []
    for path in of(*SOURCE):
        lines = read(path).count("\n")
        if lines > FILE_LINES_MAX and path.name != "_core.pyi":
            long.append(f"{name(path)}: {lines} lines")
    none(long, f"files have at most {FILE_LINES_MAX} lines")


def test_functions_are_short() -> None:
    """Python only: clang-tidy's readability-function-size says the same for C++."""
    long = []
    for path in of(".py"):
        for item in ast.walk(ast.parse(read(path))):
            if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (item.end_lineno or 0) - item.lineno + 1
                if lines > FUNCTION_LINES_MAX:
                    long.append(f"{name(path)}:{item.lineno} {item.name}: {lines} lines")
    none(long, f"functions have at most {FUNCTION_LINES_MAX} lines")


def test_lines_are_short() -> None:
    """Code and scripts. A table in a document may be as wide as it needs."""
    wide = [
        f"{name(path)}:{number}: {len(line)} columns"
        for path in of(*SOURCE, ".toml", ".yaml")
        if path.name != "_core.pyi"
        for number, line in enumerate(read(path).splitlines(), 1)
        if len(line) > COLUMNS_MAX
    ]
    none(wide, f"lines have at most {COLUMNS_MAX} columns")


# --- words

# Written in pieces, so that this file does not contain what it forbids.
LEFTOVERS = re.compile(r"\b(TO" r"DO|FIX" r"ME|X" r"XX|HA" r"CK)\b")
MACHINE = re.compile(r"(?<![\w.$}~*/-])/(home|root|opt|work|mnt|Users)/\w+")
PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE" r" KEY-----|curve\.secret|AKIA[0-9A-Z]{16}")


@pytest.mark.parametrize(
    ("pattern", "rule"),
    [
        (LEFTOVERS, "nothing is left to do in a comment: open an issue"),
        (MACHINE, "no path of one machine"),
        (PRIVATE_KEY, "no key material in git"),
    ],
    ids=["leftovers", "machine", "keys"],
)
def test_words(pattern: re.Pattern[str], rule: str) -> None:
    found = [
        f"{name(path)}:{number}: {match.group()}"
        for path in files()
        if path.suffix in TEXT or not path.suffix
        for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1)
        if (match := pattern.search(line))
    ]
    none(found, rule)


def test_no_amnesty_for_flaky_tests() -> None:
    """A skip says why; an expected failure is strict; nothing is retried until it passes."""
    pattern = re.compile(
        r"strict=" r"False|reruns|flaky\(|mark\.skip\b(?!if)(?!\(reason=)|pytest\.skip\(\)"
    )
    found = [
        f"{name(path)}:{number}: {line.strip()}"
        for path in of(".py", under="tests")
        for number, line in enumerate(read(path).splitlines(), 1)
        if pattern.search(line) and path != Path(__file__)
    ]
    none(found, "no amnesty for flaky tests")


# --- what lies in git


def test_no_large_file() -> None:
    sizes = {name(p): p.stat().st_size for p in files()}
    large = [f"{k}: {size >> 10} KiB" for k, size in sizes.items() if size > BLOB_BYTES_MAX]
    none(large, f"nothing above {BLOB_BYTES_MAX >> 10} KiB in git")


def test_no_build_output() -> None:
    bad = {".so", ".o", ".pyc", ".whl", ".pem", ".key", ".pt", ".safetensors", ".npy"}
    none([name(p) for p in files() if p.suffix in bad], "no build output, weights or keys in git")


def test_scripts_are_executable() -> None:
    programs = [p for p in [*of(".sh", under="scripts"), ROOT / ".ci/run"] if p.name != "lib.sh"]
    none([name(p) for p in programs if not p.stat().st_mode & 0o100], "scripts can be executed")


# --- layers


def layers() -> list[list[str]]:
    """The lines of docs/architecture.md that name modules, top first: ["decotrain.cli"], ..."""
    found = []
    for line in read(ROOT / "docs/architecture.md").splitlines():
        if match := re.match(r"    decotrain/([^\s,]+(?:, \w+\.py)*)", line):
            parts = [part.strip().removesuffix(".py") for part in match.group(1).split(",")]
            found.append(
                ["decotrain." + part.strip("/").replace("/", ".") for part in parts if part]
            )
    return found


def module_of(path: Path) -> str:
    """decotrain/a/b.py -> decotrain.a.b; a package's __init__ is the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def rank_of(module: str) -> int | None:
    """The layer of a module, 0 on top; None for the package's own __init__."""
    for rank, names in enumerate(layers()):
        if any(module == known or module.startswith(known + ".") for known in names):
            return rank
    return None


def at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """All parts but those under `if TYPE_CHECKING`: names of types tie no module to another."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from at_run_time(child)


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every import in a file, those inside functions too."""
    found = []
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for item in at_run_time(ast.parse(read(path))):
        if isinstance(item, ast.Import):
            found += [(item.lineno, alias.name) for alias in item.names]
        elif isinstance(item, ast.ImportFrom):
            base = item.module or ""
            if item.level:
                above = package.split(".")[: len(package.split(".")) - item.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            if base == "decotrain":  # from decotrain import data: the module is the name
                found += [(item.lineno, f"decotrain.{alias.name}") for alias in item.names]
            else:
                found.append((item.lineno, base))
    return found


def test_every_module_has_a_layer() -> None:
    homeless = [
        name(p)
        for p in of(".py", under="decotrain")
        if module_of(p) != "decotrain" and rank_of(module_of(p)) is None
    ]
    none(homeless, "docs/architecture.md names a layer for every module")


def test_imports_point_down() -> None:
    up = []
    for path in of(".py", under="decotrain"):
        here = rank_of(module_of(path))
        if here is None:
            continue
        for line, module in imports(path):
            there = rank_of(module) if module.startswith("decotrain.") else None
            if there is not None and there < here:
                up.append(f"{name(path)}:{line} imports {module}")
    none(up, "imports point down in docs/architecture.md")


# Third-party modules with a fence around them, and where they may be imported.
FENCES = {
    "torch": (
        "model",
        "data",
        "checkpoint",
        "outer",
        "spsa",
        "train",
        "launch",
        "finetune",
        "communicator",
        "tensors",
        "cuda",
        "device",
    ),
    "zmq": ("control",),
    "msgpack": ("control", "state", "spsa"),
    "hydra": ("cli", "train"),
    "rich": ("cli", "train"),
    "matplotlib": ("train",),
    "cupy": ("cuda", "spsa"),
}


def test_dependencies_stay_behind_their_fences() -> None:
    out = []
    for path in of(".py", under="decotrain"):
        part = (module_of(path) + ".").split(".")[1]
        for line, module in imports(path):
            allowed = FENCES.get(module.split(".")[0])
            if allowed is not None and part and part not in allowed:
                out.append(f"{name(path)}:{line} imports {module}")
    none(out, "dependencies are used where they belong")


@pytest.mark.parametrize(
    "module",
    [
        "decotrain",
        "decotrain.errors",
        "decotrain.cli",
        "decotrain.operate",
        "decotrain.screen",
        "decotrain.control.client",
        "decotrain.control.server",
        "decotrain.launch.options",
        "decotrain.doctor",
    ],
)
def test_light_modules_do_not_import_torch(module: str) -> None:
    """`decotrain --help` and the coordinator work, at once, on a machine without torch."""
    if not list(ROOT.glob(module.replace(".", "/") + "*")):
        pytest.skip(f"{module} is not written yet")
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# --- configuration


def test_every_config_key_is_read() -> None:
    """A key nobody reads is a promise nobody keeps. Names count wherever code can read them."""
    yaml = pytest.importorskip("yaml")
    known: set[str] = set()
    for path in of(".py", under="decotrain"):
        for item in ast.walk(ast.parse(read(path))):
            if isinstance(item, ast.Attribute):
                known.add(item.attr)
            elif isinstance(item, ast.Constant) and isinstance(item.value, str):
                known.update(re.split(r"[.\s]", item.value) if len(item.value) < 80 else [])
            elif isinstance(item, ast.arg | ast.keyword):
                known.add(str(item.arg))
    unread = []
    for path in of(".yaml", under="configs"):
        stack: list[object] = [yaml.safe_load(read(path))]
        while stack:
            value = stack.pop()
            if isinstance(value, dict):
                keys = [k for k in value if str(k) not in {"defaults", "hydra"}]
                unread += [f"{name(path)}: {k}" for k in keys if str(k) not in known]
                stack += [value[k] for k in keys]
            elif isinstance(value, list):
                stack += value
    none(unread, "every configuration key is read in decotrain/")
