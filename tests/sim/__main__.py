"""python -m tests.sim --seed N [--trace] | --seeds A B | --hunt SECONDS: histories of a run."""

from __future__ import annotations

import argparse
import sys
import time

from tests.sim.world import World


def run(seed: int, plant: str = "", trace: bool = False) -> Exception | None:
    world = World(seed, plant, print if trace else None)
    try:
        world.run()
    except Exception as error:
        return error
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--seeds", type=int, nargs=2, metavar=("FIRST", "END"))
    parser.add_argument("--hunt", type=float, metavar="SECONDS")
    parser.add_argument("--trace", action="store_true", help="print the whole history")
    parser.add_argument("--plant", default="", help="with this planted bug")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at a failure")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        error = run(arguments.seed, arguments.plant, arguments.trace)
        print(f"seed {arguments.seed}: {error if error is not None else 'clean'}")
        return error is not None
    first, end = arguments.seeds or (0, 2000)
    if arguments.hunt is not None:
        first = time.time_ns() // 1000 % 10**9
        end = sys.maxsize
    start_s, failed, seed = time.monotonic(), 0, first
    while seed < end:
        error = run(seed, arguments.plant)
        if error is not None:
            failed += 1
            print(f"seed {seed}: {type(error).__name__} {str(error)[:1500]}", flush=True)
            if not arguments.keep_going:
                return 1
        seed += 1
        if arguments.hunt is not None and time.monotonic() - start_s > arguments.hunt:
            break
    spent_s = time.monotonic() - start_s
    print(f"{seed - first} seeds, {failed} failed, {spent_s:.1f} s")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
