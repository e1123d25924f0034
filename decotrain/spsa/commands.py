"""What `decotrain replay` and `decotrain seedlog show` do; cli.py calls `main`.

decotrain replay base.safetensors run.seedlog -o tuned.safetensors [--to-step N] [--threads N]
decotrain seedlog show run.seedlog [--steps]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from decotrain.spsa import code, seedlog


def main(words: Sequence[str]) -> int:
    """Runs `replay ...` or `seedlog show ...`; its exit code."""
    parser = argparse.ArgumentParser(prog="decotrain")
    add_parsers(parser.add_subparsers(required=True))
    arguments = parser.parse_args(words)
    code: int = arguments.func(arguments)
    return code


def add_parsers(commands: Any) -> None:
    """Both commands as argparse's sub-parsers; each sets `func`."""
    parser = commands.add_parser("replay", help="base + seed log -> tuned model")
    parser.add_argument("base", help="safetensors file the run started from")
    parser.add_argument("log", help="seed log of the run")
    parser.add_argument("-o", "--output", required=True, help="safetensors file to write")
    parser.add_argument("--to-step", type=int, help="stop before this step")
    parser.add_argument("--threads", type=int, default=1)
    parser.set_defaults(func=replay)
    parser = commands.add_parser("seedlog", help="look into a seed log")
    kinds = parser.add_subparsers(required=True)
    parser = kinds.add_parser("show", help="what a seed log holds")
    parser.add_argument("log")
    parser.add_argument("--steps", action="store_true", help="every record, too")
    parser.set_defaults(func=show)


def replay(arguments: argparse.Namespace) -> int:
    from decotrain.spsa import replay as machine

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\rreplayed {done} of {total} steps", end=end, file=sys.stderr, flush=True)

    digest = machine.replay(
        arguments.base,
        arguments.log,
        arguments.output,
        arguments.to_step,
        arguments.threads,
        progress,
    )
    print(f"{arguments.output}: parameters {digest}")
    return 0


def show(arguments: argparse.Namespace) -> int:
    log = seedlog.read(arguments.log)
    for name, value in seedlog.summary(log).items():
        if name != "recipe":
            print(f"{name:18} {value}")
    for name, value in log.header.recipe.to_json().items():
        print(f"recipe.{name:18} {value}")
    if arguments.steps:
        for record in log:
            parts = (
                f"{slot}:" + ",".join(f"{value:.3g}" for value in code.decode(codes))
                for slot, codes in sorted(record.entries.items())
            )
            print(f"step {record.step:<8} {'  '.join(parts)}")
    return 0
