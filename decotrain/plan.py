"""How busy a trainer stays on given links, by outer optimizer, and which of them to choose.

The closed form: a round every `period_s` seconds of computing moves `bits` bits through every
peer's link each way; what takes longer than the computing it is hidden behind is waited for.

    utilisation = period / (period + max(0, bits / bandwidth + latency - hidden))

    decotrain plan params=1e9 peers=8 bandwidth=1Gbit/s rtt=80ms step_time=0.8s

The suites `wan-utilisation` and `wan-home` measure the same over limited links. It knows neither
the machine nor the run: links are symmetric and lossless, encoding is free, and what an optimizer
costs in loss is the order of `choices`, taken from the literature. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from decotrain import shipped
from decotrain.errors import ConfigError
from decotrain.outer_options import PEERS_MAX, fragments_of
from decotrain.units import parse_bits_per_s, parse_count, parse_seconds, rate, size

# Bits of one value on the wire, scales included: docs/codecs.md. topk: 64 of 4096 values.
CODEC_BITS = {
    "f32": 32.0, "bf16": 16.0, "f16": 16.0, "int8": 8.125, "e2m1": 4.2578125, "e3m0": 4.0625,
    "int2": 2.125, "topk": 0.2265625,
}  # fmt: skip
# The backward pass is two thirds of a step: what per-step averaging can hide behind.
BACKWARD = 2 / 3
# Of a large round: OPEN, contribution, result, DONE, each half a round trip.
ROUND_RTTS = 2.0
# Of a link's rate that rounds get as payload, with IP's and TCP's headers (5 %), slow starts and
# queues that overflow: 0.82 to 0.9 at 20 Mbit/s, 0.75 to 0.9 at 100 (20 ms, 4 peers, CUBIC).
LINK_SHARE = 0.85
GOAL = 0.95  # utilisation that is good enough to prefer what learns best


@dataclass(frozen=True)
class Choice:
    """An outer optimizer as the planner sees it. Steps are inner steps."""

    preset: str
    codec: str  # contributions+results, or one name for both
    sync_every: float  # steps between two rounds of the same values
    fragments: int = 1
    hidden: float = 0.0  # steps of computing that a round has before it is waited for
    to_the_end: bool = False  # what it sends last is ready only when nothing is left to hide behind
    layers: int | None = None  # in a fragment, where the layers of the model are known

    @property
    def options(self) -> dict[str, Any]:
        """Of `outer.`: those that the form rests on."""
        if self.preset == "ddp":  # in every step; its sync_every is about the log
            return {}
        found: dict[str, Any] = {"sync_every": int(self.sync_every)}
        if self.preset == "streaming":
            found["overlap"] = int(self.hidden)
            if self.layers is not None:
                found["layers"] = self.layers
        return found


@dataclass(frozen=True)
class Links:
    """What training meets."""

    parameters: float
    peers: float
    bandwidth_bps: float  # of every peer, each way; the slower one where they differ
    rtt_s: float
    step_s: float


@dataclass(frozen=True)
class Cost:
    """What a choice comes to on some links."""

    choice: Choice
    utilisation: float
    bytes_per_step: float  # sent by each peer, mean over steps
    needed_bps: float  # bandwidth at which the utilisation is GOAL


def choices(sync_every: int = 100, fragments: int = 8, overlap: int = 5) -> list[Choice]:
    """All presets, those that learn best from the same tokens first.

    Published losses (ALGORITHMS of their papers, 0.5 G parameters): per-step averaging 2.67, DiLoCo
    and streaming with 4 bits 2.67 to 2.69, eager 2.69, one naive round late 3.01.
    """
    late = float(sync_every)
    return [
        Choice("ddp", "f32", 1, 1, BACKWARD, to_the_end=True),
        Choice("diloco", "f32", sync_every),
        Choice("streaming", "e2m1+int8", sync_every, fragments, overlap),
        Choice("muloco", "e2m1+int8", sync_every),
        Choice("eager", "e2m1+int8", sync_every, 1, late),
        Choice("sparseloco", "topk", sync_every),
        Choice("delayed_nesterov", "f32", sync_every),
        Choice("local_sgd", "f32", sync_every),
        Choice("co2", "f32", sync_every, 1, late),
    ]


def round_bits(choice: Choice, parameters: float, peers: float) -> float:
    """What each peer sends, and receives, in one round of one fragment."""
    if choice.codec == "topk":  # everybody's contribution to everybody, no common result
        bits = CODEC_BITS["topk"] * (peers - 1)
    else:
        contribution, _, result = choice.codec.partition("+")
        both = CODEC_BITS[contribution] + CODEC_BITS[result or contribution]
        bits = both * (peers - 1) / peers
    return parameters * bits / choice.fragments


def utilisation(
    period_s: float,  # of computing, between two rounds
    bits: float,  # of one round, through each link each way
    bandwidth_bps: float,
    latency_s: float,
    hidden_s: float,  # of computing that the round runs behind
) -> float:
    """Computing / total: the closed form."""
    waited_s = max(0.0, bits / bandwidth_bps + latency_s - hidden_s)
    return period_s / (period_s + waited_s)


def needed_bandwidth(
    goal: float, period_s: float, bits: float, latency_s: float, hidden_s: float
) -> float:
    """The bandwidth at which the utilisation is `goal`; infinite when latency alone is too much."""
    spare_s = period_s * (1 / goal - 1) + hidden_s - latency_s
    return bits / spare_s if spare_s > 0 else float("inf")


def cost(choice: Choice, links: Links) -> Cost:
    """What a choice comes to."""
    bits = round_bits(choice, links.parameters, links.peers) if links.peers > 1 else 0.0
    period_s = choice.sync_every / choice.fragments * links.step_s
    # A round that is still under way when its turn comes again is waited for.
    hidden_s = min(choice.hidden, choice.sync_every) * links.step_s
    latency_s = ROUND_RTTS * links.rtt_s if links.peers > 1 else 0.0
    rate_bps = LINK_SHARE * links.bandwidth_bps
    needed_bps = needed_bandwidth(GOAL, period_s, bits, latency_s, hidden_s) / LINK_SHARE
    if choice.to_the_end:  # the latency is not hidden, however fast the link
        hidden_s = min(hidden_s, bits / rate_bps)
        needed_bps = needed_bps if latency_s < period_s * (1 / GOAL - 1) else float("inf")
    return Cost(
        choice,
        utilisation(period_s, bits, rate_bps, latency_s, hidden_s),
        bytes_per_step=bits / 8 * choice.fragments / choice.sync_every,
        needed_bps=needed_bps,
    )


def best(costs: Sequence[Cost]) -> Cost:
    """The first (it learns best) that keeps the trainer busy enough; else the busiest."""
    for one in costs:
        if one.utilisation >= GOAL:
            return one
    return max(costs, key=lambda one: one.utilisation)


# --- the command

HELP = """\
decotrain plan params=N peers=N bandwidth=RATE rtt=TIME step_time=TIME [key=value ...]

Predicts which part of the time a peer computes, for each outer optimizer; says which to choose.

  params=1e9           parameters of the model (10M, 1e9, 7B)
  peers=8
  bandwidth=1Gbit/s    of each peer; the slower direction where they differ (20Mbit/s, 12MB/s)
  rtt=80ms             round trip between two peers
  step_time=0.8s       one inner step of one peer
  sync_every=100       inner steps between two rounds of the same parameters
  fragments=8          of streaming: the embeddings, and the layers in 7 parts
  layers=24            of the model: how many are in a fragment then, and how many fragments that is
  overlap=5            inner steps that a round of streaming has before it is waited for
  codec=NAME           instead of each preset's own: int8, e2m1+int8, bf16, ... (not for top-k)
"""
NEEDED = ("params", "peers", "bandwidth", "rtt", "step_time")
SYNC_EVERY, FRAGMENTS, OVERLAP = 100, 8, 5  # where nobody says otherwise, and they fit
OPTIONAL = ("sync_every", "fragments", "overlap", "layers", "codec")


def main(words: Sequence[str]) -> int:
    """The exit code; what is wrong is a ConfigError."""
    if any(word in ("-h", "--help") for word in words):
        print(HELP, end="")
        return 0
    asked = _pairs(words)
    links = Links(
        parameters=parse_count("params", asked["params"]),
        peers=_whole("peers", asked["peers"], 1, PEERS_MAX),
        bandwidth_bps=parse_bits_per_s("bandwidth", asked["bandwidth"]),
        rtt_s=parse_seconds("rtt", asked["rtt"], zero=True),
        step_s=parse_seconds("step_time", asked["step_time"]),
    )
    print("\n".join(describe([cost(choice, links) for choice in planned(asked)], links)))
    return 0


def planned(asked: Mapping[str, str]) -> list[Choice]:
    """What there is to choose from, for what was asked."""
    known = choices(*_periods(asked))
    if "layers" in asked:
        known = [_by_layers(c, _whole("layers", asked["layers"], 1, 1000)) for c in known]
    if "codec" in asked:
        _check_codec(asked["codec"])
        known = [c if c.codec == "topk" else replace(c, codec=asked["codec"]) for c in known]
    return known


def describe(costs: Sequence[Cost], links: Links) -> list[str]:
    """The table and the advice, for people."""
    lines = [f"{'preset':<18}{'codec':<11}{'round every':>12}{'computing':>11}{'sent a step':>13}"
             f"{'a round':>11}{'95 % needs':>15}"]  # fmt: skip
    for one in costs:
        choice = one.choice
        every = f"{round(choice.sync_every / choice.fragments, 2):g} steps"
        sent = one.bytes_per_step * choice.sync_every
        needs = rate(one.needed_bps) if one.needed_bps < float("inf") else "a shorter rtt"
        lines.append(
            f"{choice.preset:<18}{choice.codec:<11}{every:>12}{one.utilisation:>11.1%}"
            f"{size(one.bytes_per_step):>13}{size(sent / choice.fragments):>11}{needs:>15}"
        )
    chosen = best(costs)
    why = "learns best of those that compute at least 95 % of the time"
    if chosen.utilisation < GOAL:
        why = "none computes 95 % of the time, it is the nearest; a larger sync_every helps"
    return [*lines, f"choose {advice(chosen.choice)}: {why}{_parts(chosen.choice)}"]


def advice(choice: Choice) -> str:
    """The words for `decotrain train` that start what the form was asked about: those options that
    the preset does not ship so are among them."""
    words = [f"outer={choice.preset}"]
    if choice.codec != "topk":
        words.append(f"codec={choice.codec}")
    ships = shipped.outer_options(choice.preset)
    words += [f"outer.{key}={v}" for key, v in choice.options.items() if ships.get(key) != v]
    return " ".join(words)


def _parts(choice: Choice) -> str:
    """What a number of fragments means: the preset has an option for layers in one only."""
    if choice.preset != "streaming":
        return ""
    parts = choice.fragments - 1
    text = f"; its {choice.fragments} fragments are the embeddings and {parts} parts of the layers"
    if choice.layers is not None:
        return f"{text}, {choice.layers} in each"
    return f"{text}: for N layers outer.layers=N/{parts} rounded up (layers=N says it)"


def _periods(asked: Mapping[str, str]) -> tuple[int, int, int]:
    """sync_every, fragments, overlap. What nobody gave is made as small as the others need it: a
    round of streaming is over when the next fragment's begins."""
    given = {
        key: _whole(key, asked[key], least, 10**6)
        for key, least in (("sync_every", 1), ("fragments", 2), ("overlap", 0))
        if key in asked
    }
    every = given.get("sync_every", SYNC_EVERY)
    room = max(every - 1, 0)  # overlap x fragments at most
    most = room // max(given.get("overlap", 1), 1)
    fragments = given.get("fragments", max(2, min(FRAGMENTS, most)))
    overlap = given.get("overlap", min(OVERLAP, room // fragments))
    if overlap * fragments > room:
        raise ConfigError(
            f"overlap={overlap} steps do not fit between two fragments, which are sync_every /"
            f" fragments = {every} / {fragments} = {every / fragments:g} steps apart; from"
            f" sync_every={overlap * fragments + 1} on they do"
        )
    return every, fragments, overlap


def _by_layers(choice: Choice, layers: int) -> Choice:
    """Streaming with whole layers in its fragments: at most as many of these as before."""
    if choice.preset != "streaming":
        return choice
    each = -(-layers // (choice.fragments - 1))
    return replace(choice, layers=each, fragments=fragments_of(layers, each))


def _pairs(words: Sequence[str]) -> Mapping[str, str]:
    known = [*NEEDED, *OPTIONAL]
    asked: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not value:
            raise ConfigError(f"{word}: write key=value; `decotrain plan --help` lists the keys")
        if key not in known:
            raise ConfigError(f"unknown key {key}; there are {', '.join(known)}")
        if key in asked:
            raise ConfigError(f"{key} is given twice")
        asked[key] = value
    if missing := [key for key in NEEDED if key not in asked]:
        raise ConfigError(f"{', '.join(missing)} missing; for example decotrain plan params=1e9"
                          " peers=8 bandwidth=1Gbit/s rtt=80ms step_time=0.8s")  # fmt: skip
    return asked


def _whole(key: str, text: str, least: int, most: int) -> int:
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1
    if not least <= value <= most:
        raise ConfigError(f"{key}={text}: a whole number from {least} to {most}")
    return value


def _check_codec(name: str) -> None:
    names = [key for key in CODEC_BITS if key != "topk"]
    parts = name.split("+")
    if len(parts) > 2 or not set(parts) <= set(names):
        raise ConfigError(f"codec={name}: one of {', '.join(names)}, or two as in e2m1+int8")
