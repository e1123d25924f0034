"""Text as samples: what is held out, where a sample lies, whose it is; and bad input."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decotrain import data
from decotrain.data import (
    Batches,
    Corpus,
    Numbers,
    SampleOrder,
    find_files,
    open_corpus,
    unigram_entropy,
)
from decotrain.errors import ConfigError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECOTRAIN_CACHE", str(tmp_path / "cache"))


def write_folder(folder: Path, files: int, size: int = 1000) -> None:
    for number in range(files):
        place = folder / f"part{number % 3}" / f"{number}.txt"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(bytes([1 + number % 251]) * size)


def test_every_byte_is_trained_on_or_held_out(tmp_path: Path) -> None:
    write_folder(tmp_path / "text", 100)
    corpus = open_corpus(str(tmp_path / "text"), 16)
    assert len(corpus.train) + len(corpus.held_out) == 100_000
    assert len(corpus.held_out) > 0
    both = set(np.unique(corpus.train)) & set(np.unique(corpus.held_out))
    assert not both, "a file is in both parts"
    assert corpus.files == 100


def test_what_is_held_out_does_not_depend_on_place_or_on_other_files(tmp_path: Path) -> None:
    write_folder(tmp_path / "one", 60)
    write_folder(tmp_path / "two", 80)
    one, two = (open_corpus(str(tmp_path / name), 16) for name in ("one", "two"))
    assert set(np.unique(one.held_out)) <= set(np.unique(two.held_out))


def test_blocks_of_a_single_file_are_held_out(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_bytes(os.urandom(data.BLOCK_BYTES * 70))
    corpus = open_corpus(str(file), 16)
    assert 0 < len(corpus.held_out) < len(corpus.train)
    assert len(corpus.held_out) % data.BLOCK_BYTES == 0


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_bytes(b"a" * data.BLOCK_BYTES * 60)
    assert 98 not in open_corpus(str(file), 16).train
    file.write_bytes(b"b" * data.BLOCK_BYTES * 61)
    assert 98 in open_corpus(str(file), 16).train


def test_a_glob_takes_what_matches(tmp_path: Path) -> None:
    write_folder(tmp_path, 9)
    (tmp_path / "part0" / "other.md").write_text("no")
    found = find_files(str(tmp_path / "**" / "*.txt"))
    assert len(found) == 9
    assert find_files(str(tmp_path / "part1"))[0][0].endswith(".txt")


def test_pictures_in_a_folder_are_no_text(tmp_path: Path) -> None:
    write_folder(tmp_path / "text", 3)
    (tmp_path / "text" / "picture").write_bytes(b"\x89PNG\0\0" * 100)
    (tmp_path / "text" / ".hidden").write_bytes(b"words")
    names = [name for name, _ in find_files(str(tmp_path / "text"))]
    assert names == ["part0/0.txt", "part1/1.txt", "part2/2.txt"]


def test_the_default_text_is_the_standard_library() -> None:
    names = [name for name, _ in find_files(None)]
    assert "argparse.py" in names
    assert not [name for name in names if "site-packages" in name or not name.endswith(".py")]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no file there"),
        (lambda p: p.write_bytes(b""), "is empty"),
        (lambda p: p.write_bytes(b"short"), "too few"),
        (lambda p: p.mkdir(), "no file there"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, make, message: str) -> None:
    place = tmp_path / "text"
    make(place)
    with pytest.raises(ConfigError, match=message) as caught:
        open_corpus(str(place), 16)
    assert str(place) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_torn_cache_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "text", 60)
    open_corpus(str(tmp_path / "text"), 16)
    (torn,) = (tmp_path / "cache").glob("*/train.bin")
    torn.write_bytes(b"x")
    with pytest.raises(ConfigError, match="torn"):
        open_corpus(str(tmp_path / "text"), 16)


def test_unigram_entropy() -> None:
    uniform = np.arange(256, dtype=np.uint8).repeat(9)
    assert unigram_entropy(uniform) == pytest.approx(math.log(256))
    assert unigram_entropy(np.zeros(10, dtype=np.uint8)) == 0
    half = np.array([1, 2] * 50, dtype=np.uint8)
    assert unigram_entropy(half) == pytest.approx(math.log(2))


# --- the order


@given(text=st.integers(200, 20_000), context=st.integers(4, 64), seed=st.integers(0, 2**31))
def test_an_epoch_visits_every_window_once(text: int, context: int, seed: int) -> None:
    order = SampleOrder(text, context, seed)
    for epoch in (0, 1, 5):
        numbers = np.arange(order.samples, dtype=np.int64) + epoch * order.samples
        starts = order.starts(numbers)
        assert len(np.unique(starts)) == order.samples
        assert (np.sort(starts)[1:] - np.sort(starts)[:-1] >= context).all()
        assert starts.min() >= 0
        assert starts.max() + context + 1 <= text


def test_the_order_is_shuffled_and_differs_by_seed_and_epoch() -> None:
    order = SampleOrder(1 << 20, 64, seed=1)
    first = order.starts(np.arange(1000))
    assert not (np.diff(first) > 0).all()
    assert not np.array_equal(first, SampleOrder(1 << 20, 64, seed=2).starts(np.arange(1000)))
    assert not np.array_equal(first, order.starts(np.arange(1000) + order.samples))
    # neighbours in the order lie far apart: the mean distance of random places is a third
    assert abs(np.abs(np.diff(first)).mean() / (1 << 20) - 1 / 3) < 0.05


def test_a_sample_does_not_depend_on_how_it_is_asked_for() -> None:
    order = SampleOrder(100_003, 32, seed=3)
    together = order.starts(np.arange(500, dtype=np.int64))
    alone = [int(order.starts(np.array([number]))[0]) for number in range(500)]
    assert together.tolist() == alone


class Counted(SampleOrder):
    """Notes which samples are asked for."""

    def starts(self, numbers: Numbers) -> Numbers:
        self.asked = numbers.tolist()
        return super().starts(numbers)


def test_together_the_lanes_visit_every_sample_once() -> None:
    """Also when one of them is away for a while: it leaves out its own, and moves nobody's."""
    text = np.zeros(5000, dtype=np.uint8)
    order = Counted(5000, 16, 0)
    batches = Batches(Corpus(text, text, 1, ""), order, 16, batch=4, lanes=3)
    seen = []
    for step in range(20):
        for lane in range(3):
            if lane != 1 or not 5 <= step < 9:
                batches.at(step, lane)
                seen += order.asked
    left_out = {n for step in range(5, 9) for n in range((step * 3 + 1) * 4, (step * 3 + 2) * 4)}
    assert sorted(seen) == [n for n in range(240) if n not in left_out]


def test_batches_are_windows_of_the_text() -> None:
    text = np.frombuffer(os.urandom(5000), dtype=np.uint8)
    corpus = Corpus(text, text, 1, "")
    batches = Batches(corpus, SampleOrder(5000, 16, 0), 16, batch=4, lanes=6)
    one = batches.at(2, 5)
    assert one.shape == (4, 17)
    for row in one:
        assert bytes(row.astype(np.uint8)) in text.tobytes()
    assert not np.array_equal(one, batches.at(2, 4))


def test_held_out_windows_are_the_same_for_all() -> None:
    text = np.frombuffer(os.urandom(5000), dtype=np.uint8)
    corpus = Corpus(text, text, 1, "")
    windows = corpus.held_out_windows(8, 16)
    assert windows.shape == (8, 17)
    assert corpus.held_out_windows(10_000, 16).shape == (312, 17)
