"""The fuzz targets on their corpora, and on seeded damage to them: no fuzzer needed."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.targets import CORPUS, TARGETS

DAMAGED = 1500  # of each target


@pytest.mark.parametrize("name", TARGETS)
def test_corpus_and_damage(name: str) -> None:
    corpus = [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
    assert len(corpus) >= 2
    for data in corpus:
        TARGETS[name](data)
    draw = random.Random(name)
    for _ in range(DAMAGED):
        data = bytearray(draw.choice(corpus))
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(data) + 1)
            kind = draw.randrange(4)
            if kind == 0 and at < len(data):
                data[at] ^= 1 << draw.randrange(8)
            elif kind == 1:
                data[at:at] = draw.randbytes(draw.randint(1, 8))
            elif kind == 2:
                del data[at : at + draw.randint(1, 8)]
            else:
                other = draw.choice(corpus)
                start = draw.randrange(len(other) + 1)
                data[at:at] = other[start : start + draw.randint(1, 40)]
        TARGETS[name](bytes(data))


def test_a_target_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    data = next(iter(sorted((CORPUS / "messages").iterdir()))).read_bytes()

    def broken(_: bytes) -> None:
        raise IndexError("a parser that trusts its input")

    monkeypatch.setattr("tests.fuzz.targets.m.decode", broken)
    with pytest.raises(IndexError):
        TARGETS["messages"](data)
