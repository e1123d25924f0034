"""`python -m bench SUITE...`: run suites, write JSON, Markdown and PNG. `--list` names them.

Results of a real run go to bench/results/ (the committed set), those of `--quick` elsewhere.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.common import RESULTS, ROOT, CannotRunError, Settings, log, markdown, write_results
from decotrain.errors import Error

# Every suite: name -> (module with `run(settings) -> Report`, what it shows).
SUITES = {
    "codecs": ("bench.codecs", "encode, decode and combine against torch and memcpy"),
    "codec-errors": (
        "bench.codec_errors",
        "the error of rounds by codec, with and without feedback",
    ),
    "allreduce": ("bench.allreduce", "rounds on the loopback by size and codec, against Gloo"),
    "crypto": ("bench.crypto", "what TLS costs, and a round while strangers knock"),
    "spsa": ("bench.spsa", "SPSA's kernels against MeZO in PyTorch, and the memory of a step"),
    "spsa_learning": ("bench.spsa_learning", "fine-tuning with SPSA: 4 peers, 1 peer, float32"),
    "outer": ("bench.outer", "every outer optimizer on equal tokens: loss, bytes, peak"),
    "recovery": ("bench.recovery", "a peer dies at half of a round: the cost, against redoing it"),
    "join": ("bench.join", "a newcomer fetches a live run's state, and what the others notice"),
    "kills": ("bench.kills", "a peer killed at a random instant of a round: are all sums right?"),
    "memory": ("bench.memory", "memory of a round, times its encoded size, beside Gloo's"),
    "starts": ("bench.starts", "many peers started at once, again and again"),
    "storm": ("bench.storm", "minutes of faults: violations, goodput, descriptors, memory"),
    "link-drop": ("bench.link_drop", "a link between two peers dropped: rounds go on"),
    "coordinator-down": ("bench.coordinator_down", "rounds while the coordinator is away"),
    "wan-spsa": ("bench.wan.spsa", "SPSA's exchange over each profile: steps a second, bytes"),
    "wan-links": ("bench.wan.links", "the lab itself: RTT and TCP goodput of each profile"),
    "wan-utilisation": (
        "bench.wan.utilisation",
        "how busy peers stay at 20 and 100 Mbit/s, against the plan's closed form",
    ),
    "wan-home": ("bench.wan.home", "8 homes, 10 M parameters: streaming with 4 bits against ddp"),
    "wan-churn": (
        "bench.wan.churn",
        "an hour of churn in ten minutes over flaky links: violations",
    ),
    "wan-recovery": ("bench.wan.recovery", "recovery over each profile's links"),
    "wan-join": ("bench.wan.join", "a newcomer over each profile's links, against one TCP stream"),
    "wan-training": ("bench.wan.training", "loss against wall-clock: the main job at home"),
    "wan-codecs": (
        "bench.wan.codecs",
        "every codec on a link of 100 Mbit/s: is a byte saved time?",
    ),
    "wan-ownership": ("bench.wan.ownership", "one slow peer: equal shares against measured ones"),
    "wan-allreduce": ("bench.wan.allreduce", "rounds over each profile, against Gloo"),
}

HINT = """\
python -m bench SUITE... runs them; --quick shows within seconds that a suite works.
The options of a suite (--set NAME=VALUE) are in the first lines of its module.
wan-* and link-drop need a lab of network namespaces: root, or `unshare -Urn` (docs/lab.md)."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="names, see --list")
    parser.add_argument("--list", action="store_true", help="name the suites and exit")
    parser.add_argument("--quick", action="store_true", help="a smoke run, seconds per suite")
    parser.add_argument("--repeats", type=int, default=5, help="samples of each case")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help="an option of the suite itself")  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder for the results")
    args = parser.parse_args(argv)
    if args.list or not args.suites:
        print(listing())
        return 0
    settings = Settings(args.quick, args.repeats, args.seed, _options(parser, args.set))
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    unknown = [name for name in args.suites if name not in SUITES]
    if unknown:
        parser.error(f"no such suite: {', '.join(unknown)}{_meant(unknown)}; --list names them")
    folder = args.out or (ROOT / "build" / "bench" if args.quick else RESULTS)
    for name in args.suites:
        log(f"== {name}: {SUITES[name][1]}")
        try:
            data = importlib.import_module(SUITES[name][0]).run(settings).data()
        except KeyboardInterrupt:
            log(f"\n{name} was interrupted: no result of it was written")
            return 128 + signal.SIGINT
        except (CannotRunError, Error) as error:
            log(f"{name} cannot run: {error}")
            return 1
        for path in write_results(data, folder):
            log(f"wrote {path}")
        print(markdown(data))
    return 0


def listing() -> str:
    """Every suite with what it shows, and what to do with it."""
    width = max(map(len, SUITES))
    lines = [f"{name:{width}}  {text}" for name, (_, text) in SUITES.items()]
    return "\n".join([*lines, "", HINT])


def _meant(unknown: Sequence[str]) -> str:
    near = [found for name in unknown for found in difflib.get_close_matches(name, SUITES, 1)]
    return f" (did you mean {', '.join(near)}?)" if near else ""


def _options(parser: argparse.ArgumentParser, pairs: Sequence[str]) -> dict[str, str]:
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            parser.error(f"--set {pair}: write NAME=VALUE")
        options[name] = value
    return options


if __name__ == "__main__":
    sys.exit(main())
