"""Labelled texts as samples: files in, padded rows of bytes out.

A set is a file, a folder or a glob of files. A `.jsonl` file has one object for each line with
"text" and "label"; any other file one sample for each line, the label behind the last tab. One
sample in ten is held out, by the hash of its text. Everything is kept in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from decotrain.data import Order, find_files, first_sample
from decotrain.errors import ConfigError

HELD_OUT_ONE_IN = 10
CLASSES_MAX = 1 << 16
Rows = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Labelled:
    """Texts with the numbers of their labels."""

    texts: list[bytes]
    labels: npt.NDArray[np.int64]

    def rows(self, numbers: npt.NDArray[np.int64], context: int) -> Rows:
        """(texts (n, longest), lengths, labels): zeros behind what is shorter."""
        texts = [self.texts[number][:context] for number in numbers]
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        out = np.zeros((len(texts), int(lengths.max())), dtype=np.int64)
        for row, text in zip(out, texts, strict=True):
            row[: len(text)] = np.frombuffer(text, dtype=np.uint8)
        return out, lengths, self.labels[numbers]


@dataclass(frozen=True)
class Set:
    train: Labelled
    held_out: Labelled
    names: list[str]  # of the labels, sorted: the same numbers on every peer
    source: str

    def batch(self, step: int, slot: int, batch: int, seed: int, context: int) -> Rows:
        """The samples of a slot in a step; nobody else has them in that epoch."""
        numbers = np.arange(batch, dtype=np.int64) + first_sample(step, slot, batch)
        return self.train.rows(Order(len(self.train.texts), seed).places(numbers), context)

    def prior_entropy(self) -> float:
        """Nats: the loss of the best answer that does not look at the text."""
        p = np.bincount(self.held_out.labels, minlength=len(self.names)) / len(self.held_out.texts)
        p = p[p > 0]
        return float(-(p * np.log(p)).sum())


def open_set(path: str | None) -> Set:
    """The labelled texts at `path`."""
    if path is None:
        raise ConfigError("data.path is missing: labelled texts to classify, see docs/spsa.md")
    parts: tuple[list[tuple[bytes, str]], list[tuple[bytes, str]]] = ([], [])
    try:
        for name, file in find_files(path):
            for text, label in _samples(name, file):
                digest = hashlib.sha256(text).digest()
                out = int.from_bytes(digest[:8], "little") % HELD_OUT_ONE_IN == 0
                parts[out].append((text, label))
    except OSError as error:
        raise ConfigError(f"data.path={path}: {error.filename}: {error.strerror}") from error
    names = sorted({label for part in parts for _, label in part})
    if not parts[0] or not parts[1] or not 2 <= len(names) <= CLASSES_MAX:
        raise ConfigError(
            f"data.path={path}: {len(parts[0])} samples to train on, {len(parts[1])} held out,"
            f' {len(names)} labels are too few; a line is {{"text": ..., "label": ...}} or'
            " TEXT<tab>LABEL"
        )
    number = {name: index for index, name in enumerate(names)}
    train, held_out = (
        Labelled([t for t, _ in part], np.array([number[name] for _, name in part], dtype=np.int64))
        for part in parts
    )
    return Set(train, held_out, names, path)


def _samples(name: str, file: Path) -> Iterator[tuple[bytes, str]]:
    """(text, label) of every line that is not empty."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            line = line.strip(b"\r\n")
            if not line.strip():
                continue
            try:
                text, label = _of_json(line) if name.endswith(".jsonl") else _of_tab(line)
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"data.path: {name} line {number} is no sample: {error}"
                ) from None
            yield text, label


def _of_json(line: bytes) -> tuple[bytes, str]:
    values = json.loads(line)
    text, label = values["text"], values["label"]
    if not isinstance(text, str) or not text or not isinstance(label, str | int):
        raise ValueError('"text" is a text that is not empty, "label" a text or a whole number')
    return text.encode(), str(label)


def _of_tab(line: bytes) -> tuple[bytes, str]:
    text, tab, label = line.rpartition(b"\t")
    if not tab or not text or not label.strip():
        raise ValueError("a text, a tab and a label are wanted")
    return text, label.decode().strip()
