"""Text as training samples: files in, windows of bytes out, in an order that no peer decides.

- `open_corpus` takes a file, a folder or a glob, puts everything into two flat files in a cache
  (training part, held-out part) and memory-maps them. What is held out is fixed by hash.
- `Order` maps a global sample number to one of n places: a seeded permutation, another one in each
  epoch; `SampleOrder` to the start of a window of a text. They know nothing of peers.
- `first_sample` is for who draws by step and slot (fine-tuning); outer optimizers agree who trains
  on what (decotrain/outer/allotment.py).

A sample is `context + 1` bytes. Nothing here tokenises, and nothing is random but by seed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from decotrain.errors import ConfigError

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]

HELD_OUT_ONE_IN = 20  # files of a large set, or blocks of a small one
FILES_FOR_WHOLE = 40  # from so many files on whole files are held out, below blocks of each file
BLOCK_BYTES = 16 << 10  # less in a text of less than 1 MiB, so that some of it is held out, too
BLOCK_BYTES_MIN, BLOCKS_MIN = 1 << 10, 64
COPY_BYTES = 1 << 20
LANES = 64  # slots of a run (kMaxPeers)
PROBE_BYTES = 1 << 10
FEISTEL_ROUNDS = 6


@dataclass(frozen=True)
class Corpus:
    """A text, memory-mapped, in its training part and its held-out part."""

    train: Bytes
    held_out: Bytes
    files: int
    source: str  # what was asked for, for people

    def held_out_windows(self, count: int, context: int) -> Numbers:
        """(count, context + 1): the same windows on every peer, spread over the held-out part."""
        places = max((len(self.held_out) - 1) // context, 1)
        count = min(count, places)
        starts = np.arange(count, dtype=np.int64) * places // count * context
        return windows(self.held_out, starts, context)


def windows(text: Bytes, starts: Numbers, context: int) -> Numbers:
    """(len(starts), context + 1) bytes as integers."""
    found: Numbers = text[starts[:, None] + np.arange(context + 1)].astype(np.int64)
    return found


def unigram_entropy(text: Bytes) -> float:
    """Nats for each byte: the loss of the best model that ignores all context."""
    counts = np.zeros(256, dtype=np.int64)
    for start in range(0, len(text), COPY_BYTES):
        counts += np.bincount(text[start : start + COPY_BYTES], minlength=256)
    p = counts[counts > 0] / max(len(text), 1)
    return float(-(p * np.log(p)).sum())


# --- from files to one text


def default_path() -> str:
    """The Python standard library's own sources: tens of megabytes of real text everywhere."""
    return sysconfig.get_path("stdlib")


def find_files(path: str | None) -> list[tuple[str, Path]]:
    """(name, path) of every file, by name; the name does not depend on where a folder lies."""
    asked = path or default_path()
    root = Path(asked).expanduser()
    if root.is_file():
        return [(root.name, root)]
    if root.is_dir():
        pattern = "*" if path else "*.py"
        found = (p for p in root.rglob(pattern) if p.is_file())
        named = [(p.relative_to(root).as_posix(), p) for p in found]
        named = [item for item in named if not _ignored(item[0]) and _is_text(item[1])]
    else:
        matches = [Path(p) for p in glob.glob(os.path.expanduser(asked), recursive=True)]
        named = [(p.as_posix(), p) for p in matches if p.is_file()]
    if not named:
        raise ConfigError(f"data.path={asked}: no file there; give a text file, a folder or a glob")
    return sorted(named)


def _ignored(name: str) -> bool:
    parts = name.split("/")
    foreign = {"site-packages", "dist-packages", "__pycache__"}
    return any(part in foreign or part.startswith(".") for part in parts)


def _is_text(path: Path) -> bool:
    """Of the files of a folder, those without a zero byte at the start."""
    with path.open("rb") as file:
        return b"\0" not in file.read(PROBE_BYTES)


def _held_out(name: str, block: int) -> bool:
    digest = hashlib.sha256(f"{name}\0{block}".encode()).digest()
    return int.from_bytes(digest[:8], "little") % HELD_OUT_ONE_IN == 0


def _blocks(files: Sequence[tuple[str, Path]]) -> Iterator[tuple[bool, bytes]]:
    """(held out, bytes), in order."""
    whole = len(files) >= FILES_FOR_WHOLE
    total = sum(path.stat().st_size for _, path in files)
    size = min(BLOCK_BYTES, max(BLOCK_BYTES_MIN, total // BLOCKS_MIN))
    for name, path in files:
        with path.open("rb") as file:
            block = 0
            while data := file.read(size):
                yield _held_out(name, 0 if whole else block), data
                block += 1


def _fingerprint(files: Sequence[tuple[str, Path]]) -> str:
    digest = hashlib.sha256(f"2 {HELD_OUT_ONE_IN} {FILES_FOR_WHOLE} {BLOCK_BYTES}".encode())
    for name, path in files:
        facts = path.stat()
        digest.update(f"{name}\0{path.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def cache_folder() -> Path:
    """Where flattened texts are kept: DECOTRAIN_CACHE, else the user's cache folder."""
    if chosen := os.environ.get("DECOTRAIN_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "decotrain"


def _build(files: Sequence[tuple[str, Path]], folder: Path) -> None:
    """Writes train.bin, held_out.bin and index.json into `folder`, which appears at once, whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        sizes = {"train": 0, "held_out": 0}
        with (
            (temporary / "train.bin").open("wb") as train,
            (temporary / "held_out.bin").open("wb") as held_out,
        ):
            for out, data in _blocks(files):
                (held_out if out else train).write(data)
                sizes["held_out" if out else "train"] += len(data)
        (temporary / "index.json").write_text(json.dumps(sizes))
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "index.json").is_file():  # else another process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _map(path: Path, size: int) -> Bytes:
    if path.stat().st_size != size:
        raise ConfigError(f"{path} is torn; delete the folder {path.parent} and start again")
    if size == 0:
        return np.zeros(0, dtype=np.uint8)
    return np.memmap(path, dtype=np.uint8, mode="r")


def open_corpus(path: str | None, context: int) -> Corpus:
    """The text at `path` (None: the Python standard library's sources), ready to draw from."""
    asked = path or default_path()
    try:
        files = find_files(path)
        total = sum(file.stat().st_size for _, file in files)
        if total == 0:
            raise ConfigError(f"data.path={asked}: the text is empty; give one with some text")
        folder = cache_folder() / _fingerprint(files)
        if not (folder / "index.json").is_file():
            _build(files, folder)
        sizes = json.loads((folder / "index.json").read_text())
        train = _map(folder / "train.bin", int(sizes["train"]))
        held_out = _map(folder / "held_out.bin", int(sizes["held_out"]))
    except OSError as error:
        where = error.filename or asked
        raise ConfigError(f"data.path={asked}: {where}: {error.strerror}") from error
    least = context + 2
    if len(train) < least or len(held_out) < least:
        raise ConfigError(
            f"data.path={asked}: {total} bytes are too few for model.context={context}: "
            f"{len(train)} to train on and {len(held_out)} held out; "
            "give more text or a smaller context"
        )
    return Corpus(train, held_out, len(files), asked)


# --- from a sample number to a place in the text


def _mix(x: npt.NDArray[np.uint64], key: int) -> npt.NDArray[np.uint64]:
    """A 64-bit finaliser (splitmix64): every output bit depends on every input bit."""
    x = (x + np.uint64(key)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


def _permute(values: npt.NDArray[np.uint64], size: int, key: int) -> npt.NDArray[np.uint64]:
    """A keyed permutation of 0..size-1: a Feistel network, walked until it lands inside."""
    half = max((size - 1).bit_length() + 1, 2) // 2
    low = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    out: npt.NDArray[np.uint64] = values.copy()
    todo = np.arange(len(values))
    while len(todo):
        left, right = out[todo] >> shift, out[todo] & low
        for number in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (_mix(right, key + number) & low)
        out[todo] = (left << shift) | right
        todo = todo[out[todo] >= size]
    return out


class Order:
    """Sample number -> place 0..size-1: each place once in an epoch, another order in each."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self._seed = size, seed

    def places(self, numbers: Numbers) -> Numbers:
        """The places of these samples."""
        out = np.empty(len(numbers), dtype=np.int64)
        epochs = numbers // self.size
        for epoch in np.unique(epochs):
            here = epochs == epoch
            inside = (numbers[here] % self.size).astype(np.uint64)
            out[here] = _permute(inside, self.size, self.key(int(epoch))).astype(np.int64)
        return out

    def key(self, epoch: int) -> int:
        """What an epoch's order is made from."""
        digest = hashlib.sha256(f"{self._seed} {epoch}".encode()).digest()
        return int.from_bytes(digest[:7], "little")


class SampleOrder:
    """Sample number -> start of its window in the training text; every window once in an epoch."""

    def __init__(self, text_bytes: int, context: int, seed: int) -> None:
        # One window less than fit: each epoch shifts all windows by its own offset.
        self.samples = max((text_bytes - 1) // context - 1, 1)
        self._order = Order(self.samples, seed)
        self._shift = min(max(text_bytes - context * self.samples, 1), context)
        self._context = context

    def starts(self, numbers: Numbers) -> Numbers:
        """Where the windows of these samples start."""
        epochs, inverse = np.unique(numbers // self.samples, return_inverse=True)
        shifts = np.array([self._order.key(int(one)) % self._shift for one in epochs])
        starts: Numbers = self._order.places(numbers) * self._context + shifts[inverse]
        return starts


def first_sample(step: int, lane: int, samples_each: int, lanes: int = LANES) -> int:
    """The first of the samples that belong to a lane in a step.

    A lane belongs to one peer: no two of them ever draw the same sample of an epoch, and nobody's
    samples move when another one comes or goes. (What belongs to a lane that nobody has is left
    out of that epoch.)
    """
    assert 0 <= lane < lanes
    return (step * lanes + lane) * samples_each


class Batches:
    """The samples of one peer: asks `first_sample` where it is, and reads the text there."""

    def __init__(
        self, corpus: Corpus, order: SampleOrder, context: int, batch: int, lanes: int = LANES
    ) -> None:
        self._corpus, self._order = corpus, order
        self._context, self._batch, self._lanes = context, batch, lanes

    def at(self, step: int, lane: int) -> Numbers:
        """(batch, context + 1): what the lane's peer learns from in step 0, 1, ..."""
        first = first_sample(step, lane, self._batch, self._lanes)
        numbers = np.arange(first, first + self._batch, dtype=np.int64)
        return windows(self._corpus.train, self._order.starts(numbers), self._context)
