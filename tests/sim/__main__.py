"""Histories of a run: python -m tests.sim --seed N [--trace], --seeds FIRST END, --hunt SECONDS,
or --plants, which looks for each planted bug and prints the table of docs/simulator.md.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.sim.plants import CONTROL, ENGINE, use_planted_core

PLANT_SEEDS = 500


def run(
    seed: int, plant: str = "", trace: bool = False, seen: dict[str, list[int]] | None = None
) -> Exception | None:
    """seen: the seeds of each case that histories go through."""
    from tests.sim.world import World

    world = World(seed, plant, print if trace else None)
    try:
        world.run()
    except Exception as error:
        return error
    for case in world.visits.seen if seen is not None else ():
        seen.setdefault(case, []).append(seed)
    return None


def print_visits(seen: dict[str, list[int]]) -> None:
    from tests.sim.visits import CASES

    print("| case | histories | first seed |")
    print("| --- | --- | --- |")
    for case in CASES:
        seeds = seen.get(case, [])
        print(f"| {case} | {len(seeds)} | {seeds[0] if seeds else '-'} |")


def rule_of(error: Exception) -> str:
    return getattr(error, "rule", type(error).__name__)


def hunt_plants(names: list[str]) -> int:
    """One row for each planted bug: which rule caught it, and with what seed."""
    missed = 0
    print("| planted bug | in | caught by | first seed | caught in 100 seeds |")
    print("| --- | --- | --- | --- | --- |")
    for name in names:
        first, rule, count = -1, "", 0
        for seed in range(PLANT_SEEDS):
            error = run(seed, name)
            if error is not None and not isinstance(error, AssertionError | ValueError):
                raise error  # a fault of the simulator proves nothing
            if error is not None:
                count += seed < 100
                if first < 0:
                    first, rule = seed, rule_of(error)
            if first >= 0 and seed >= 99:
                break
        missed += first < 0
        place = "engine" if name in ENGINE else "control plane"
        words = name.replace("_", " ")
        row = f"{rule} | {first} | {count}" if first >= 0 else "nothing | - | 0"
        print(f"| {words} | {place} | {row} |", flush=True)
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--seeds", type=int, nargs=2, metavar=("FIRST", "END"))
    parser.add_argument("--hunt", type=float, metavar="SECONDS")
    parser.add_argument("--trace", action="store_true", help="print the whole history")
    parser.add_argument("--plant", default="", help="with this planted bug")
    parser.add_argument("--plants", action="store_true", help="look for every planted bug")
    parser.add_argument("--visits", action="store_true", help="print the cases they went through")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at a failure")
    arguments = parser.parse_args()
    if arguments.plants or arguments.plant in ENGINE:
        planted = use_planted_core()
        if not planted and arguments.plant:
            print("the engine's bugs need `cmake --preset plant && cmake --build --preset plant`")
            return 2
        if arguments.plants:
            return hunt_plants([*(ENGINE if planted else {}), *CONTROL])
    if arguments.seed is not None:
        error = run(arguments.seed, arguments.plant, arguments.trace)
        print(f"seed {arguments.seed}: {error if error is not None else 'clean'}")
        return error is not None
    return run_seeds(arguments)


def run_seeds(arguments: argparse.Namespace) -> int:
    first, end = arguments.seeds or (0, 2000)
    if arguments.hunt is not None:
        first = time.time_ns() // 1000 % 10**9
        end = sys.maxsize
    start_s, failed, seed = time.monotonic(), 0, first
    seen: dict[str, list[int]] = {}
    while seed < end:
        error = run(seed, arguments.plant, seen=seen)
        if error is not None:
            failed += 1
            print(f"seed {seed}: {rule_of(error)}: {str(error)[:1500]}", flush=True)
            if not arguments.keep_going:
                return 1
        seed += 1
        if arguments.hunt is not None and time.monotonic() - start_s > arguments.hunt:
            break
    spent_s = time.monotonic() - start_s
    print(f"{seed - first} seeds, {failed} failed, {spent_s:.1f} s")
    if arguments.visits:
        print_visits(seen)
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
