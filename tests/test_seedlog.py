"""The seed log and what is made from it: torn tails, damage, sizes, replay onto a file."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from decotrain import cli
from decotrain.errors import FileError
from decotrain.spsa import SPSA, Recipe, seedlog
from decotrain.spsa.record import Record
from decotrain.spsa.replay import cheaper_by_replay, replay
from decotrain.spsa.space import Layout

LAYOUT = Layout.of([("w", (), (3, 5), "F32", True), ("b", ("c",), (5,), "BF16", False)])


def records(count: int, seed: int = 0, samples: int = 4) -> list[Record]:
    """Peers that come and go, now and then nobody."""
    random = np.random.default_rng(seed)
    slots = [0, 2, 5]
    made = []
    for step in range(count):
        if random.random() < 0.02:
            slots = [s for s in range(8) if random.random() < 0.5]
        made.append(Record(step, {slot: random.bytes(samples) for slot in slots}))
    return made


def written(path: Path, many: list[Record], recipe: Recipe | None = None) -> bytes:
    writer = seedlog.Writer(path, seedlog.Header(recipe or Recipe(), LAYOUT, "ab" * 32))
    try:
        for record in many:
            writer.append(record)
    finally:
        writer.close()
    return path.read_bytes()


def test_what_was_written_is_read(tmp_path: Path) -> None:
    many = records(700)
    written(tmp_path / "a", many)
    log = seedlog.read(tmp_path / "a")
    assert log.records == many
    assert (log.torn, log.next_step) == (0, 700)
    assert log.header == seedlog.Header(Recipe(), LAYOUT, "ab" * 32)


def test_a_log_written_in_pieces_has_the_same_bytes(tmp_path: Path) -> None:
    many = records(600)
    whole = written(tmp_path / "whole", many)
    for start, stop in ((0, 1), (1, 256), (256, 257), (257, 600)):
        pieces = written(tmp_path / "pieces", many[start:stop])
    assert pieces == whole


def test_a_tail_torn_anywhere_is_cut_and_the_log_goes_on(tmp_path: Path) -> None:
    """At every length: what is read is a prefix, and appending the rest gives the whole file."""
    many = records(260)
    whole = written(tmp_path / "whole", many)
    start = len(written(tmp_path / "empty", []))
    for length in [*range(start, start + 60), *range(len(whole) - 60, len(whole))]:
        (tmp_path / "torn").write_bytes(whole[:length])
        log = seedlog.read(tmp_path / "torn")
        assert log.records == many[: len(log.records)]
        assert written(tmp_path / "torn", many[len(log.records) :]) == whole


def test_a_changed_byte_is_noticed_and_never_repaired_by_guessing(tmp_path: Path) -> None:
    many = records(9000, samples=8)
    whole = bytearray(written(tmp_path / "a", many))
    whole[len(whole) // 3] ^= 1
    (tmp_path / "a").write_bytes(whole)
    log = seedlog.read(tmp_path / "a")
    assert 0 < len(log.records) < 4000
    assert log.records == many[: len(log.records)]
    with pytest.raises(FileError, match=f"damaged at step {log.next_step}"):
        written(tmp_path / "a", [])


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "no seed log"),
        (b"DTSEEDL2" + bytes(99), "no seed log"),
        (b"DTSEEDL1\xff\xff\xff\xff", "torn or damaged"),
        (b"DTSEEDL1\x04\x00\x00\x00aaaabbbbbbbb", "torn or damaged"),
    ],
)
def test_foreign_files_are_refused(data: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(FileError, match=match):
        seedlog.read(tmp_path / "a")


@pytest.mark.parametrize(
    "text",
    [
        b"not json",
        b"{}",
        b'{"base_digest": "a", "first_step": -1, "recipe": {}, "parameters": []}',
        b'{"base_digest": "a", "first_step": 0, "recipe": {"samples": 1e9}, "parameters": []}',
        b'{"base_digest": "a", "first_step": 0, "recipe": {}, "parameters": [["w"]]}',
        b'{"base_digest": "a", "first_step": 0, "recipe": {},'
        b' "parameters": [["w", [], [1099511627775, 1099511627775], "F32", true]]}',
    ],
)
def test_a_header_with_a_good_sum_but_bad_words_is_refused(text: bytes, tmp_path: Path) -> None:
    packed = zlib.compress(text)
    body = seedlog.MAGIC + len(packed).to_bytes(4, "little") + packed
    (tmp_path / "a").write_bytes(body + seedlog.chained(b"", body))
    with pytest.raises(FileError):
        seedlog.read(tmp_path / "a")


def test_a_log_of_another_run_is_not_continued(tmp_path: Path) -> None:
    written(tmp_path / "a", records(3))
    with pytest.raises(FileError, match="another run"):
        written(tmp_path / "a", [], Recipe(lr=0.5))
    with pytest.raises(FileError, match="goes on with step 3"):
        written(tmp_path / "a", records(3)[:1])


def test_twenty_thousand_steps_of_sixteen_samples_stay_below_400_kilobytes(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    many = [Record(s, {p: random.bytes(4) for p in range(4)}) for s in range(20_000)]
    assert len(written(tmp_path / "a", many)) < 400_000


# --- replay


@pytest.mark.parametrize("options", [{}, {"pool": 32, "rebase_every": 10}, {"noise": "gaussian"}])
def test_base_and_log_give_the_model(options: dict[str, object], tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(6, 700), nn.Linear(700, 6).to(torch.bfloat16))
    base, log, output = (str(tmp_path / n) for n in ("base.safetensors", "log", "out.safetensors"))
    save_file({**model.state_dict(), "untouched": torch.ones(2)}, base)
    x = torch.ones(2, 6)
    spsa = SPSA(model, lr=1e-3, samples=3, log=log, **options)  # type: ignore[arg-type]
    digests = []
    for _ in range(25):
        spsa.step(lambda: model[1](model[0](x).bfloat16()).float().square().sum())
        digests.append(spsa.digest())
    spsa.finish()
    for step in (25, 13, 1):
        arguments = ["replay", base, log, "-o", output, "--to-step", str(step)]
        assert cli.main(arguments) == 0
        assert replay(base, log, output, step, threads=2) == digests[step - 1]
        if step == 25:
            tuned = load_file(output)
            assert torch.equal(tuned.pop("untouched"), torch.ones(2))
            state = model.state_dict()
            assert all(torch.equal(tuned[name], state[name]) for name in state)
            assert len(tuned) == len(state)


def test_replay_refuses_what_does_not_fit(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    base, log, output = (tmp_path / n for n in ("base.safetensors", "log", "out.safetensors"))
    save_file(model.state_dict(), base)
    spsa = SPSA(model, log=log)
    spsa.step(lambda: model(torch.ones(1, 3)).sum())
    spsa.finish()
    save_file(model.state_dict(), tmp_path / "moved.safetensors")
    with pytest.raises(FileError, match="not the base"):
        replay(tmp_path / "moved.safetensors", log, output)
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(FileError, match="do not belong"):
        replay(tmp_path / "other.safetensors", log, output)
    save_file({"weight": model.weight.detach()}, tmp_path / "half.safetensors")
    with pytest.raises(FileError, match="no bias"):
        replay(tmp_path / "half.safetensors", log, output)
    with pytest.raises(FileError, match="to step 2"):
        replay(base, log, output, to_step=2)
    with pytest.raises(FileError, match="cannot read"):
        replay(log, log, output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda data: data[:-3], "torn or damaged after step 38"),
        (lambda data: data[:-40] + bytes([data[-40] ^ 1]) + data[-39:], "torn or damaged after"),
        (lambda data: data[:20], "header"),
        (lambda data: b"", "no seed log"),
    ],
)
def test_replay_says_in_one_line_what_is_wrong_with_a_log(
    harm: Callable[[bytes], bytes],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = nn.Linear(3, 3)
    base, log, output = (tmp_path / n for n in ("base.safetensors", "log", "out.safetensors"))
    save_file(model.state_dict(), base)
    spsa = SPSA(model, log=log)
    for _ in range(40):
        spsa.step(lambda: model(torch.ones(1, 3)).sum())
    spsa.finish()
    log.write_bytes(harm(log.read_bytes()))
    assert cli.main(["replay", str(base), str(log), "-o", str(output)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not output.exists()
    good = seedlog.read(log).next_step if "damaged" in said else 0
    if good:
        words = ["replay", str(base), str(log), "-o", str(output), "--to-step", str(good)]
        assert cli.main(words) == 0
        assert output.exists()


def test_a_run_goes_on_where_its_log_ends(tmp_path: Path) -> None:
    x = torch.ones(1, 3)
    digests = []
    for stops in ((8,), (3, 8)):
        log = tmp_path / f"log{len(stops)}"
        for stop in stops:
            torch.manual_seed(9)
            model = nn.Linear(3, 3)
            spsa = SPSA(model, lr=1e-3, samples=2, log=log)
            while spsa.version < stop:
                spsa.step(lambda m=model: m(x).square().sum())
            spsa.finish()
        digests.append((spsa.digest(), log.read_bytes()))
    assert digests[0] == digests[1]


def test_show_prints_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "a", records(5))
    assert cli.main(["seedlog", "show", str(tmp_path / "a"), "--steps"]) == 0
    out = capsys.readouterr().out
    assert "steps              5" in out
    assert "step 4" in out


def test_the_newcomers_choice_follows_the_formula() -> None:
    """K < 32 R / W: 270 samples at 8.5e9 sign additions/s and 1 Gbit/s."""
    assert cheaper_by_replay(250, 1000, 8.5e9)
    assert not cheaper_by_replay(290, 1000, 8.5e9)
