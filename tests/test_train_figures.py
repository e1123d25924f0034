"""Journals, the board and its views: what is written is shown, and half a line harms nobody."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from decotrain.train.metrics import Journal, RoundMeans, RunLog, Tail
from decotrain.train.summary import Summary, describe, per_step_bytes
from decotrain.train.table import Board, PeerRow, View, draw, headline
from decotrain.units import size


def make_board() -> Board:
    return Board("test", 100, 10, 3.0, {f"peer-{n}": PeerRow(f"peer-{n}") for n in (1, 2, 3)})


def test_a_tail_sees_whole_lines_once(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    tail = Tail(path)
    assert list(tail.read()) == []
    journal = Journal(path)
    journal.write("start", step=1)
    journal.write("progress", step=2)
    assert [e["event"] for e in tail.read()] == ["start", "progress"]
    assert list(tail.read()) == []
    with path.open("a") as file:
        file.write('{"event": "half')
        file.flush()
        assert list(tail.read()) == []
        file.write('"}\nno json\n[1]\n{"event": 3}\n{"event": "end"}\n')
    assert [e["event"] for e in tail.read()] == ["half", "end"]
    journal.close()


def test_a_tail_starts_where_the_journal_is(tmp_path: Path) -> None:
    """A resumed run does not hear again what its first part said."""
    journal = Journal(tmp_path / "j.jsonl")
    journal.write("end")
    tail = Tail(tmp_path / "j.jsonl")
    journal.write("start")
    assert [e["event"] for e in tail.read()] == ["start"]
    journal.close()


def test_the_log_of_a_run_has_lines_and_scalars(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    log = RunLog(tmp_path)
    log.note("lost", peer="peer-2")
    for step in (10, 20):
        log.take("peer-1", {"event": "progress", "step": step, "loss": 3.0 - step / 10})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["lost", "progress", "progress"]
    assert lines[1]["peer"] == "peer-1"
    found = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "peer-1"))
    found.Reload()
    assert [(s.step, s.value) for s in found.Scalars("loss")] == [(10, 2.0), (20, 1.0)]


def line(number: int, contributors: int, tokens: int, loss: float) -> dict[str, Any]:
    return {"event": "round", "round": number, "step": 10 * number, "contributors": contributors,
            "counted_tokens": tokens, "counted_loss": loss}  # fmt: skip


def test_the_loss_of_a_round_is_that_of_the_tokens_that_counted_in_it() -> None:
    means = RoundMeans()
    assert means.take(line(1, 2, 100, 3.0)) == []
    (first,) = means.take(line(1, 2, 300, 2.0))
    assert first == {"round": 1, "step": 10, "loss": 2.25, "tokens": 400, "peers": 2}
    # A third one observes, and is waived: it is in no mean until it is counted, with all it has.
    assert means.take(line(2, 2, 0, 0.0)) == []
    assert means.take(line(2, 2, 100, 2.0)) == []
    (second,) = means.take(line(2, 2, 100, 1.0))
    assert (second["loss"], second["peers"]) == (1.5, 2)
    for tokens, loss in ((100, 1.0), (100, 1.0)):
        assert means.take(line(3, 3, tokens, loss)) == []
    (third,) = means.take(line(3, 3, 600, 2.0))
    assert (third["loss"], third["tokens"], third["peers"]) == (1.75, 800, 3)


def test_a_round_is_told_without_who_died_before_it_spoke() -> None:
    means = RoundMeans()
    assert means.take(line(1, 3, 100, 3.0)) == []
    assert means.take(line(1, 3, 100, 2.0)) == []
    assert means.take(line(2, 2, 100, 2.0)) == []
    assert [one["round"] for one in means.take(line(2, 2, 100, 2.0))] == [1, 2]
    assert means.take(line(1, 3, 100, 9.0)) == [], "told twice"
    assert means.take(line(3, 3, 100, 2.0)) == []
    assert [one["round"] for one in means.take(line(5, 3, 100, 2.0))] == [3], "waits for the dead"


def test_means_go_on_when_everybody_starts_again_from_what_was_saved() -> None:
    means = RoundMeans()
    for number in range(1, 9):
        assert means.take(line(number, 1, 100, 1.0))
    assert means.take({"event": "start", "round": 8, "step": 80}) == []
    assert means.take(line(8, 1, 100, 1.0)) == []
    assert means.take({"event": "start", "round": 4, "step": 40}) == []
    assert [one["round"] for one in means.take(line(5, 1, 100, 1.0))] == [5]


def test_the_log_has_the_means_of_the_run(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    log = RunLog(tmp_path)
    log.mean({"round": 1, "step": 10, "loss": 2.25, "tokens": 400, "peers": 2})
    log.close()
    (told,) = [json.loads(one) for one in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert (told["event"], told["loss"]) == ("mean", 2.25)
    found = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "run"))
    found.Reload()
    assert [(s.step, s.value) for s in found.Scalars("loss")] == [(10, 2.25)]


def test_the_board_names_who_is_lost_and_counts_all_bytes() -> None:
    board = make_board()
    for name in board.rows:
        board.take(name, {"event": "start", "step": 0, "id": 7})
        board.take(name, {"event": "progress", "step": 9, "loss": 2.5, "sent_bytes": 1000})
    assert board.sent_bytes == 3000
    board.lost("peer-3", "killed by SIGKILL")
    assert board.events[-1].endswith("peer-3 lost (killed by SIGKILL), 2 remain")
    assert board.rows["peer-3"].state == "lost"
    row = board.rows["peer-3"]
    row.incarnation, row.state = 1, "starting"
    board.take("peer-3", {"event": "start", "step": 10, "id": 8})
    assert "peer-3 is back at step 10" in board.events[-1]
    board.take("peer-3", {"event": "progress", "step": 11, "sent_bytes": 500})
    assert board.sent_bytes == 3500
    assert row.peer_id == 8


def test_the_table_shows_every_peer_and_the_headline_the_loss() -> None:
    board = make_board()
    board.take("peer-1", {"event": "progress", "step": 42, "loss": 1.25, "tokens_per_s": 8000})
    board.take("peer-1", {"event": "evaluation", "step": 40, "held_out": 1.5})
    board.lost("peer-2", "exit code 1")
    out = io.StringIO()
    Console(file=out, width=120).print(draw(board))
    text = out.getvalue()
    for part in ("peer-1", "peer-2", "peer-3", "8,000", "1.250", "42", "lost"):
        assert part in text
    assert "peer-2 lost (exit code 1), 2 remain" in text
    assert "held-out 1.500 nats (unigram 3.000)" in headline(board)


def test_without_a_terminal_events_become_lines() -> None:
    out = io.StringIO()
    board = make_board()
    with View(board, Console(file=out, force_terminal=False, soft_wrap=True)) as view:
        view.refresh()
        board.lost("peer-2", "killed by SIGKILL")
        view.refresh()
        view.refresh()
    text = out.getvalue()
    assert text.count("peer-2 lost") == 1
    assert "\x1b" not in text
    assert "step 0/100" in text


def test_on_a_terminal_the_table_is_drawn_in_place() -> None:
    out = io.StringIO()
    board = make_board()
    with View(board, Console(file=out, force_terminal=True, width=100)) as view:
        board.lost("peer-2", "killed by SIGKILL")
        view.refresh()
    text = out.getvalue()
    assert "\x1b[" in text, "nothing was drawn in place"
    assert "peer-2 lost (killed by SIGKILL), 2 remain" in text
    assert "tokens/s" in text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB")]
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


def make_summary(**changes: object) -> Summary:
    values: dict[str, object] = {
        "rounds": 40, "peers": 3, "parameters": 1000, "held_out_nats": 1.5, "unigram_nats": 3.0,
        "alone_nats": 1.6, "sent_bytes": 1e6, "per_step_bytes": 3e7,
        "digests": {"peer-1": "ab", "peer-2": "ab"}, "seconds": 10.0, "sample": "def f():\n  x",
    }  # fmt: skip
    return Summary(**{**values, **changes})  # type: ignore[arg-type]


def test_the_summary_says_what_was_reached() -> None:
    text = "\n".join(describe(make_summary()))
    assert f"1.500 nats = {1.5 / math.log(2):.3f} bits" in text
    assert "the loss is 50% of it" in text
    assert "together is lower" in text
    assert "30.0 times as much" in text
    assert "  equal on all peers" in text
    assert "  def f():" in text
    assert "NOT lower" in "\n".join(describe(make_summary(alone_nats=1.4)))


def test_the_summary_does_not_hide_a_difference() -> None:
    summary = make_summary(digests={"peer-1": "ab", "peer-2": "cd"})
    assert not summary.digests_equal
    assert "NOT EQUAL" in "\n".join(describe(summary))


def test_a_sample_cannot_command_the_terminal() -> None:
    text = "\n".join(describe(make_summary(sample="a\x1b[31mb\x07\tc\rd")))
    assert "a·[31mb·\tc·d" in text


def test_bytes_of_per_step_averaging() -> None:
    assert per_step_bytes(parameters=1000, peers=4, steps=10) == 10 * 4 * (2 * 3 / 4) * 4000
    assert per_step_bytes(1000, 1, 10) == 0
