"""The planner: units, the closed form against the published table, and what it advises."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from decotrain import plan, shipped, units
from decotrain.errors import ConfigError
from decotrain.outer import Staggered
from decotrain.train.settings import parse

# --- units


@pytest.mark.parametrize(
    ("text", "value"), [("1e9", 1e9), ("10M", 1e7), ("1.5B", 1.5e9), ("2k", 2000), (" 7 b ", 7e9)]
)
def test_counts(text: str, value: float) -> None:
    assert units.parse_count("params", text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("80ms", 0.08), ("0.8s", 0.8), ("2 min", 120), ("5us", 5e-6), ("1e-3s", 1e-3)],
)
def test_times(text: str, value: float) -> None:
    assert units.parse_seconds("rtt", text) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1Gbit/s", 1e9), ("20Mbps", 2e7), ("12.5MB/s", 1e8), ("1 kB/s", 8000), ("5b/s", 5),
     ("1Mbytes/s", 8e6)],
)  # fmt: skip
def test_rates(text: str, value: float) -> None:
    assert units.parse_bits_per_s("bandwidth", text) == value


@pytest.mark.parametrize(
    ("parse", "text", "word"),
    [
        (units.parse_seconds, "80", "needs its unit"),
        (units.parse_seconds, "80 furlongs", "no unit of time"),
        (units.parse_seconds, "0s", "more than 0"),
        (units.parse_seconds, "-1s", "more than 0"),
        (units.parse_bits_per_s, "1", "needs its unit"),
        (units.parse_bits_per_s, "1Gbit", "no unit of a rate"),
        (units.parse_bits_per_s, "1mB", "no unit of a rate"),
        (units.parse_bits_per_s, "fast", "no number with a unit"),
        (units.parse_bits_per_s, "1e999Gbit/s", "more than 0"),
        (units.parse_count, "many", "no number"),
        (units.parse_count, "1Q", "'Q'"),
        (units.parse_count, "nan", "no number"),
    ],
)
def test_bad_units_say_what_is_wrong(parse: object, text: str, word: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(word)) as caught:
        parse("key", text)  # type: ignore[operator]
    assert str(caught.value).startswith("key=")


# --- the published table: Gbit/s needed for a utilisation (arXiv 2501.18512, table 4)

GRID = 1.21  # one step of the simulator's logarithmic grid of bandwidths
GOALS = (0.50, 0.80, 0.90, 0.95, 0.99)
# parameters, fragments (3 layers each), seconds a step
MODELS = {"1B": (1e9, 8, 0.1), "10B": (1e10, 16, 0.8), "100B": (1e11, 36, 4.9)}
# fmt: off
PUBLISHED = {
    "data-parallel": {"1B": (86.8, 152.6, 184.2, 222.3, 569),
                      "10B": (104.8, 222.3, 222.3, 268.3, 471.5),
                      "100B": (184.2, 323.8, 390.7, 390.7, 471.5)},
    "diloco": {"1B": (1.4, 6.2, 13.3, 23.3, 86.8), "10B": (1.7, 7.5, 16.0, 33.9, 104.8),
               "100B": (3.0, 11.0, 23.3, 49.4, 184.2)},
    "streaming": {"1B": (1.4, 5.2, 9.1, 16.0, 28.1), "10B": (1.7, 5.2, 9.1, 13.3, 19.3),
                  "100B": (2.4, 6.2, 9.1, 11.0, 19.3)},
    "overlap": {"1B": (1.4, 4.3, 6.2, 9.1, 11.0), "10B": (1.7, 3.6, 5.2, 6.2, 7.5),
                "100B": (1.7, 3.6, 4.3, 5.2, 5.2)},
    "overlap, 4 bit": {"1B": (0.4, 0.9, 1.7, 2.0, 3.0), "10B": (0.4, 0.9, 1.4, 1.4, 1.7),
                       "100B": (0.5, 0.9, 1.1, 1.1, 1.4)},
    "eager, 4 bit": {"1B": (0.1, 0.2, 0.2, 0.2, 0.2), "10B": (0.1, 0.2, 0.2, 0.3, 0.3),
                     "100B": (0.2, 0.3, 0.3, 0.3, 0.4)},
}
# fmt: on
# The row's period in steps (H = 100), overlap in steps, and bits of a value; M = 2.
ROWS = {
    "data-parallel": (1, False, 0, 16),
    "diloco": (100, False, 0, 16),
    "streaming": (100, True, 0, 16),
    "overlap": (100, True, 1, 16),
    "overlap, 4 bit": (100, True, 1, 4),
    # All its cells are those of half the bits that the rule moves in a round's time; why, the
    # publication does not say. What is planned with counts all of them.
    "eager, 4 bit": (100, False, 100, 2),
}
OUTSIDE = {("data-parallel", m, 0.99) for m in ("1B", "10B")} | {("streaming", "100B", 0.99)}


def needed_gbps(row: str, model: str, goal: float, inside_step: float) -> float:
    """The closed form, with the part of a step that the published simulator overlaps besides."""
    period, streams, overlap, bits = ROWS[row]
    parameters, fragments, step_s = MODELS[model]
    parts = fragments if streams else 1
    bits_of_round = parameters * bits * 2 * (2 - 1) / 2 / parts
    hidden_s = min(overlap + inside_step, period) * step_s
    bandwidth = plan.needed_bandwidth(goal, period * step_s / parts, bits_of_round, 0, hidden_s)
    # what is needed is what gives the goal
    reached = plan.utilisation(period * step_s / parts, bits_of_round, bandwidth, 0, hidden_s)
    assert reached == pytest.approx(goal)
    return bandwidth / 1e9


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("row", ROWS)
def test_published_table_within_its_grid(row: str, model: str) -> None:
    """87 of 90 cells, with the backward pass overlapped as the published simulator does.

    Its grid rounds to about 20 %, the printed figures to one decimal.
    """
    for goal, published in zip(GOALS, PUBLISHED[row][model], strict=True):
        ours = needed_gbps(row, model, goal, plan.BACKWARD)
        if (row, model, goal) in OUTSIDE:
            assert ours < published / GRID
            continue
        low, high = (published - 0.05) / GRID, (published + 0.05) * GRID
        assert low <= ours <= high, f"{row} {model} {goal}: {ours:.2f}, published {published}"


@pytest.mark.parametrize("model", MODELS)
def test_without_that_overlap_the_form_is_never_hopeful(model: str) -> None:
    """What `decotrain plan` uses, for what it plans: a little more than the table, never less."""
    for row in ("diloco", "overlap", "overlap, 4 bit"):
        for goal, published in zip(GOALS, PUBLISHED[row][model], strict=True):
            ratio = needed_gbps(row, model, goal, 0.0) / published
            most = 1.31 if row == "diloco" and goal <= 0.95 else 1.9
            assert 0.9 <= ratio <= most, f"{row} {goal}: {ratio:.2f}"


# --- costs


def test_bits_are_those_of_the_core() -> None:
    core = pytest.importorskip("decotrain._core", reason="the core is not built")
    count = 1 << 20
    for codec, bits in plan.CODEC_BITS.items():
        if codec != "topk":
            assert core.codec_bytes(codec, count) * 8 / count == pytest.approx(bits, rel=1e-3), (
                codec
            )


HOME = plan.Links(parameters=1e7, peers=8, bandwidth_bps=20e6, rtt_s=0.015, step_s=1.0)


def costs_of(links: plan.Links) -> dict[str, plan.Cost]:
    return {choice.preset: plan.cost(choice, links) for choice in plan.choices()}


def test_at_home_streaming_is_chosen() -> None:
    costs = costs_of(HOME)
    assert costs["streaming"].utilisation >= 0.95
    assert costs["ddp"].utilisation < 0.05
    assert plan.best(list(costs.values())).choice.preset == "streaming"
    # 1e7 values, 64 bits in and out, 7/8 of them, every 100 steps
    assert costs["diloco"].bytes_per_step == pytest.approx(1e7 * 8 * 7 / 8 / 100)
    assert costs["ddp"].bytes_per_step / costs["streaming"].bytes_per_step > 100


def test_on_a_fast_network_the_plainest_is_chosen() -> None:
    fast = plan.Links(1e7, 8, 1e12, 0.0001, 1.0)
    assert plan.best(list(costs_of(fast).values())).choice.preset == "ddp"


def test_when_nothing_is_enough_the_nearest_is_named() -> None:
    slow = plan.Links(1e11, 8, 1e6, 0.1, 0.01)
    costs = costs_of(slow)
    best = plan.best(list(costs.values()))
    assert best.utilisation == max(cost.utilisation for cost in costs.values()) < plan.GOAL
    assert "none computes" in plan.describe(list(costs.values()), slow)[-1]


def test_one_peer_waits_for_nobody() -> None:
    alone = plan.Links(1e9, 1, 1e6, 1.0, 0.1)
    assert all(
        cost.utilisation == 1 and cost.bytes_per_step == 0 for cost in costs_of(alone).values()
    )


def test_a_round_is_waited_for_when_its_turn_comes_again() -> None:
    """Hidden behind at most the steps between two rounds of the same values."""
    choice = plan.Choice("eager", "f32", 10, hidden=1000)
    assert plan.cost(choice, HOME).utilisation < 0.5


def test_all_presets_are_planned() -> None:
    from decotrain.outer import PRESETS

    assert {choice.preset for choice in plan.choices()} == {*PRESETS, "ddp"}


# --- the command

ASKED = ["params=1e9", "peers=8", "bandwidth=1Gbit/s", "rtt=80ms", "step_time=0.8s"]


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(ASKED) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(
        "choose outer=streaming codec=e2m1+int8 outer.sync_every=100 outer.overlap=5: "
    )
    assert "for N layers outer.layers=N/7 rounded up" in lines[-1]
    assert {line.split()[0] for line in lines[1:-1]} == {c.preset for c in plan.choices()}
    assert plan.main([*ASKED, "codec=int8", "sync_every=200"]) == 0
    assert "e2m1" not in capsys.readouterr().out
    assert plan.main(["--help"]) == 0
    assert "bandwidth=1Gbit/s" in capsys.readouterr().out


def started(words: list[str], layers: int) -> tuple[str, int, int, int]:
    """preset, sync_every, overlap and fragments of what `decotrain train` makes of these words."""
    with initialize_config_dir(str(shipped.configs()), version_base="1.3"):
        config = compose("train", ["name=x", f"model.layers={layers}", "steps=72000", *words])
    whole = OmegaConf.to_container(config, resolve=True)
    assert isinstance(whole, dict)
    outer = parse({str(key): value for key, value in whole.items()}).outer
    overlap = outer.overlap or 0
    if outer.preset != "streaming":
        return outer.preset, outer.sync_every, overlap, 1
    assert outer.layers
    names = ["embedding", *(f"blocks.{layer}.w" for layer in range(layers))]
    parts = Staggered(outer.sync_every, outer.layers, "strided", overlap).fragments(names)
    return outer.preset, outer.sync_every, overlap, len(parts)


@pytest.mark.parametrize(
    ("layers", "more"),
    [(24, []), (100, []), (6, ["sync_every=30"]), (24, ["sync_every=3"]), (1, ["overlap=20"]),
     (24, ["fragments=40"])],
)  # fmt: skip
def test_what_is_advised_starts_what_was_planned(layers: int, more: list[str]) -> None:
    """By the same code that reads the words for a run."""
    every_preset = plan.planned(plan._pairs([*ASKED, f"layers={layers}", *more]))
    for choice in every_preset if layers == 100 else every_preset[2:3]:
        preset, every, overlap, fragments = started(plan.advice(choice).split(), layers)
        assert preset == choice.preset
        assert every == choice.sync_every or preset == "ddp"
        if preset == "streaming":
            assert (overlap, fragments) == (choice.hidden, choice.fragments)


def test_what_the_preset_ships_is_not_repeated() -> None:
    ships = shipped.outer_options("streaming")
    words = [f"{key}={ships[key]}" for key in ("sync_every", "overlap")]
    (choice,) = [
        c for c in plan.planned(plan._pairs([*ASKED, *words, "layers=7"]))
        if c.preset == "streaming"
    ]  # fmt: skip
    assert choice.layers == ships["layers"]
    assert plan.advice(choice) == "outer=streaming codec=e2m1+int8"
    other = replace(choice, sync_every=60, hidden=2, layers=3)
    assert plan.advice(other).split()[2:] == [
        "outer.sync_every=60", "outer.overlap=2", "outer.layers=3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "fits"),
    [
        ([], (100, 8, 5)),
        (["sync_every=30"], (30, 8, 3)),
        (["sync_every=3"], (3, 2, 1)),
        (["sync_every=1"], (1, 2, 0)),
        (["overlap=20"], (100, 4, 20)),
        (["overlap=0"], (100, 8, 0)),
        (["fragments=40"], (100, 40, 2)),
        (["fragments=400"], (100, 400, 0)),
        (["sync_every=30", "overlap=1"], (30, 8, 1)),
    ],
)
def test_what_nobody_gave_fits_what_was_given(words: list[str], fits: tuple[int, ...]) -> None:
    assert plan._periods(plan._pairs([*ASKED, *words])) == fits


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "params, peers, bandwidth, rtt, step_time missing"),
        ([*ASKED, "rtt=1ms"], "twice"),
        ([*ASKED[:-1], "step_time=1"], "step_time=1: a time needs its unit"),
        ([*ASKED, "speed=1"], "unknown key speed"),
        ([*ASKED, "overlap=20", "fragments=5"], "overlap=20 steps do not fit"),
        ([*ASKED, "overlap=50"], "from sync_every=101 on they do"),
        ([*ASKED, "fragments=1"], "fragments=1: a whole number from 2"),
        ([*ASKED, "layers=0"], "layers=0: a whole number from 1 to 1000"),
        ([*ASKED, "codec=int9"], "codec=int9"),
        ([*ASKED, "codec=int8+"], "codec=int8+"),
        (["params", "1e9"], "write key=value"),
        (["peers=1.5", *ASKED[:1], *ASKED[2:]], "peers=1.5: a whole number from 1 to 64"),
    ],
)
def test_bad_input_is_one_clear_error(words: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(part)):
        plan.main(words)
