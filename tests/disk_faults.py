"""Writers of durable files under disk_faults.cpp: each system call in turn is the last, or fails.

    LD_PRELOAD=disk_faults.so python -m tests.disk_faults FOLDER

Every call has a process of its own, forked from this one. To stdout go a line for each scenario and
mode, with the number of calls tried, and one for everything that is wrong.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from decotrain import checkpoint
from decotrain.control import record as rc
from decotrain.errors import FileError
from decotrain.spsa import seedlog
from decotrain.spsa.recipe import Recipe
from decotrain.spsa.record import Record
from decotrain.spsa.space import Layout

MODES = {"count": 0, "kill": 1, "full": 2}
REFUSED, BAD = 3, 4  # exit codes of a process: FileError as it should be, another error
VALUES = 20_000  # of the tensors: more than a buffered file keeps to itself


@dataclass(frozen=True)
class Scenario:
    prepare: Callable[[Path], None]
    change: Callable[[Path], None]  # under faults
    wrong: Callable[[Path, bool], str]  # (folder, did the change go through) -> "" when all is well
    after: Callable[[Path], str]  # the next change, without faults; "" when all is well


# --- checkpoints


def tensors(number: int) -> dict[str, Any]:
    return {"w": torch.full((VALUES,), float(number))}


def save(folder: Path, number: int, value: int, keep: int) -> None:
    checkpoint.write(folder, number, tensors(value), tensors(value), {"value": value}, keep)


def newest_is(folder: Path, allowed: dict[int, int]) -> str:
    """allowed: value -> its round."""
    found = checkpoint.newest(folder)
    if found is None:
        return "there is no checkpoint left"
    value = int(found.meta["value"])
    if allowed.get(value) != found.round_number or not torch.equal(
        found.model["w"], tensors(value)["w"]
    ):
        return f"the newest checkpoint is round {found.round_number} with {value}"
    return ""


def next_checkpoint(folder: Path, keep: int) -> str:
    save(folder, 9, 9, keep)
    names = sorted(path.name for path in folder.iterdir())
    if len(names) > keep or any(not name.startswith("round-") for name in names):
        return f"left over: {names}"
    return newest_is(folder, {9: 9})


def checkpoints(folder: Path) -> None:
    for number in (1, 2):
        save(folder, number, number, 2)


CHECKPOINT = Scenario(
    checkpoints,
    lambda folder: save(folder, 3, 3, 2),
    lambda folder, done: newest_is(folder, {3: 3} if done else {2: 2, 3: 3}),
    lambda folder: next_checkpoint(folder, 2),
)
CHECKPOINT_AGAIN = Scenario(  # the same round, and none other that could stand in
    lambda folder: save(folder, 2, 2, 1),
    lambda folder: save(folder, 2, 5, 1),
    lambda folder, done: newest_is(folder, {5: 2} if done else {2: 2, 5: 2}),
    lambda folder: next_checkpoint(folder, 1),
)


# --- the coordinator's record


def record_of(epoch: int) -> rc.Record:
    return rc.Record("run", config={"text": "x" * 20_000}, term=1, epoch=epoch)


def save_record(folder: Path, epoch: int) -> None:
    rc.RecordFile(folder).save(record_of(epoch))


def record_is(folder: Path, epochs: set[int]) -> str:
    found = rc.RecordFile(folder).load()
    good = found is not None and found.epoch in epochs and found == record_of(found.epoch)
    return "" if good else f"the record is {found}"


RECORD = Scenario(
    lambda folder: save_record(folder, 1),
    lambda folder: save_record(folder, 2),
    lambda folder, done: record_is(folder, {2} if done else {1, 2}),
    lambda folder: save_record(folder, 3) or record_is(folder, {3}),
)


# --- the seed log


def header() -> seedlog.Header:
    layout = Layout.from_json([["w", [], [VALUES], "F32", True]])
    return seedlog.Header(Recipe(seed=7), layout, "0" * 64)


def entries_at(step: int) -> Record:
    return Record(step, {0: bytes([step % 200, 1]), 3: bytes([7, step % 100])})


def append(folder: Path, until: int) -> None:
    log = seedlog.Writer(folder / "run.seedlog", header(), sync_every=2)
    try:
        while log.next_step < until:
            log.append(entries_at(log.next_step))
    finally:
        log.close()


def log_has(folder: Path, least: int, most: int) -> str:
    path = folder / "run.seedlog"
    if least == 0 and not path.exists():
        return ""
    log = seedlog.read(path)
    if log.records != [entries_at(step) for step in range(len(log.records))]:
        return f"the log holds other records: {log.records}"
    if not least <= len(log.records) <= most:
        return f"the log has {len(log.records)} records, not {least} to {most}"
    return ""


def go_on(folder: Path) -> str:
    append(folder, 30)
    return log_has(folder, 30, 30)


SEED_LOG = Scenario(
    lambda folder: append(folder, 6),
    lambda folder: append(folder, 13),
    lambda folder, done: log_has(folder, 13 if done else 6, 13),
    go_on,
)
NEW_SEED_LOG = Scenario(
    lambda folder: None,
    lambda folder: append(folder, 3),
    lambda folder, done: log_has(folder, 3 if done else 0, 3),
    go_on,
)

SCENARIOS = {
    "checkpoint": CHECKPOINT,
    "checkpoint-again": CHECKPOINT_AGAIN,
    "record": RECORD,
    "seed-log": SEED_LOG,
    "new-seed-log": NEW_SEED_LOG,
}


# --- one process for each call


def attempt(scenario: Scenario, folder: Path, mode: str, at: int, library: Any) -> int:
    """What a process that meets the fault ends with; in mode count, how many calls it made."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        code = 0
        library.disk_faults_arm(MODES[mode], at)
        try:
            scenario.change(folder)
        except FileError as error:
            code = REFUSED if "\n" not in str(error) and str(folder) in str(error) else BAD
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
            code = BAD
        finally:
            calls = library.disk_faults_count()
            if mode == "count":
                os.write(writing, str(calls).encode())
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if mode == "count":
        return int(said)
    code = os.waitstatus_to_exitcode(status)
    if code == BAD:
        print(f"WRONG {mode} at call {at}: {said or 'an error that does not say where'}")
    return code


def run(name: str, mode: str, place: Path, library: Any) -> None:
    scenario = SCENARIOS[name]

    def fresh() -> Path:
        folder = place / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        scenario.prepare(folder)
        return folder

    calls = attempt(scenario, fresh(), "count", -1, library)
    for at in range(calls):
        folder = fresh()
        code = attempt(scenario, folder, mode, at, library)
        try:
            wrong = scenario.wrong(folder, code == 0) or scenario.after(folder)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            print(f"WRONG {name}, {mode} at call {at} of {calls}: {wrong}")
    print(f"{name} {mode} {calls}")


def main(place: Path) -> None:
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    torch.set_num_threads(1)
    for name in SCENARIOS:
        for mode in ("kill", "full"):
            run(name, mode, place, library)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
