"""What `decotrain run` is told: torchrun's options that make sense for one peer, and ours.

Imports no torch and starts nothing. Names follow torchrun, with dashes or underscores.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decotrain.control import messages as m
from decotrain.control.fields import given
from decotrain.errors import ConfigError

PROCESSES_MAX = 1024
RESTARTS = 3
STREAMS = {"0": "nothing", "1": "stdout", "2": "stderr", "3": "both"}
DESCRIPTION = """\
Runs a script as one peer of a run. The script calls `decotrain.join()` without arguments. Its
processes see RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT of their own group, as
under torchrun; other machines are reached through decotrain and not counted there.
"""
EPILOG = """\
exit code: 0 all processes ended well; 1 a process failed more often than --max-restarts; 2 wrong
options, refused or kicked: starting again does not help; 3 no coordinator answers, or its name does
not resolve: later it may; 128 + n ended by signal n.
"""


@dataclass(frozen=True)
class Options:
    """Checked options."""

    join: str | None  # address of the coordinator; None: standalone
    run: str
    name: str | None
    region: str | None
    token_file: str | None
    listen: str | None
    advertise: str | None
    insecure: bool
    dial_only: bool
    processes: int | str  # "gpu", "cpu" and "auto" are counted by the launcher, which has torch
    restarts: int
    monitor_s: float
    log_folder: Path | None
    redirects: str
    tee: str
    ranks_shown: tuple[int, ...] | None
    entrypoint: str
    arguments: tuple[str, ...]
    python: bool
    module: bool

    def environment(self) -> dict[str, str]:
        """What `decotrain.join()` reads in the script's processes, without the address."""
        values = {
            "DECOTRAIN_RUN": self.run,
            "DECOTRAIN_NAME": self.name,
            "DECOTRAIN_REGION": self.region,
            "DECOTRAIN_TOKEN_FILE": self.token_file,
            "DECOTRAIN_LISTEN": self.listen,
            "DECOTRAIN_ADVERTISE": self.advertise,
            "DECOTRAIN_INSECURE": "1" if self.insecure else None,
            "DECOTRAIN_DIAL_ONLY": "1" if self.dial_only else None,
        }
        return {key: value for key, value in values.items() if value is not None}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="decotrain run", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--join", metavar="HOST:PORT",
        help="the coordinator; default: environment DECOTRAIN_JOIN")  # fmt: skip
    add("--standalone", action="store_true", help="a run of its own: starts a coordinator too")
    add("--run", default=os.environ.get("DECOTRAIN_RUN", "default"), help="name of the run")
    add("--name", default=os.environ.get("DECOTRAIN_NAME"),
        help="of this peer, for people; default: host name and process id")  # fmt: skip
    add("--region", default=os.environ.get("DECOTRAIN_REGION"),
        help="where this machine is, for people: shown by status")  # fmt: skip
    add("--token-file", default=os.environ.get("DECOTRAIN_TOKEN_FILE"), metavar="FILE",
        help="the run's token")  # fmt: skip
    add("--insecure", action="store_true",
        help="join without a token, on a network where everybody is trusted")  # fmt: skip
    add("--listen", default=os.environ.get("DECOTRAIN_LISTEN"), metavar="HOST[:PORT],...",
        help="where peers reach this one; default: any free port of the address that leads to"
        " the coordinator")  # fmt: skip
    add("--advertise", default=os.environ.get("DECOTRAIN_ADVERTISE"), metavar="HOST[:PORT],...",
        help="what the others are told instead: a router's address and forwarded port")  # fmt: skip
    add("--dial-only", action="store_true", help="nobody can reach this machine: it dials out only")
    add("--nproc-per-node", "--nproc_per_node", "--nproc", default="1", metavar="N",
        help="processes of this peer: a number, gpu, cpu or auto")  # fmt: skip
    add("--max-restarts", "--max_restarts", type=int, default=RESTARTS, metavar="N",
        help=f"how often a script that failed is started again (default {RESTARTS})")  # fmt: skip
    add("--monitor-interval", "--monitor_interval", type=float, default=0.1, metavar="SECONDS")
    add("--log-dir", "--log_dir", type=Path, metavar="FOLDER",
        help="where --redirects write; default: a folder in TMPDIR, which is named")  # fmt: skip
    add("-r", "--redirects", default="0", choices=STREAMS,
        help="to files: 0 nothing, 1 stdout, 2 stderr, 3 both")  # fmt: skip
    add("-t", "--tee", choices=STREAMS,
        help="to files and, each line with the rank before it, to the terminal; default 3 with"
        " several processes, else 0")  # fmt: skip
    add("--local-ranks-filter", "--local_ranks_filter", metavar="0,1,...",
        help="show only these ranks on the terminal")  # fmt: skip
    add("-m", "--module", action="store_true", help="the script is a module, as in python -m")
    add("--no-python", "--no_python", action="store_true", help="the script is a program")
    add("script", help="what to run")
    add("arguments", nargs=argparse.REMAINDER, help="given to the script")
    return parser


def parse(words: Sequence[str]) -> Options:
    """Checked options; ConfigError says which is wrong."""
    asked = _parser().parse_args(list(words))
    if asked.standalone and asked.join:
        raise ConfigError(
            "--standalone starts a run of its own and --join joins one: leave one out"
        )
    join = None if asked.standalone else asked.join or os.environ.get("DECOTRAIN_JOIN")
    if not asked.standalone and not join:
        raise ConfigError(
            "no coordinator to join: give --join HOST:PORT, or --standalone for a run of its own"
        )
    if asked.module and asked.no_python:
        raise ConfigError("-m names a Python module, so it does not go with --no-python")
    if asked.max_restarts < 0:
        raise ConfigError(f"--max-restarts {asked.max_restarts} must be 0 or more")
    if not 0.001 <= asked.monitor_interval <= 3600:
        raise ConfigError(f"--monitor-interval {asked.monitor_interval:g} lies not in 0.001..3600")
    if asked.dial_only and (asked.listen or asked.advertise):
        raise ConfigError("--dial-only says that nobody reaches this machine: leave out"
                          " --listen and --advertise")  # fmt: skip
    given("--run", m.name, asked.run)
    if asked.name:
        given("--name", m.name, asked.name)
    given("--region", m.region, asked.region or "")
    processes = _processes(asked.nproc_per_node)
    return Options(
        join=join,
        run=asked.run,
        name=asked.name,
        region=asked.region,
        token_file=asked.token_file,
        listen=asked.listen,
        advertise=asked.advertise,
        insecure=asked.insecure,
        dial_only=asked.dial_only,
        processes=processes,
        restarts=asked.max_restarts,
        monitor_s=asked.monitor_interval,
        log_folder=asked.log_dir,
        redirects=asked.redirects,
        tee=asked.tee or ("0" if processes == 1 else "3"),
        ranks_shown=_ranks(asked.local_ranks_filter),
        entrypoint=_entrypoint(asked),
        arguments=tuple(asked.arguments),
        python=not asked.no_python,
        module=asked.module,
    )


def _processes(text: str) -> int | str:
    if text in ("gpu", "cpu", "auto"):
        return text
    if not text.isdecimal() or not 1 <= int(text) <= PROCESSES_MAX:
        raise ConfigError(
            f"--nproc-per-node {text}: a number in 1..{PROCESSES_MAX}, gpu, cpu or auto"
        )
    return int(text)


def _ranks(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise ConfigError(f"--local-ranks-filter {text}: numbers with commas between them")
    return tuple(int(part) for part in text.split(","))


def _entrypoint(asked: Any) -> str:
    """What is missing is said now and not by several processes that fail."""
    script: str = asked.script
    if asked.no_python:
        if shutil.which(script) is None:
            raise ConfigError(f"{script} is no program that can be executed here")
    elif not asked.module and not Path(script).is_file():
        hint = " (for a module: -m)" if Path(script).suffix != ".py" else ""
        raise ConfigError(f"there is no script {script}{hint}")
    return script
