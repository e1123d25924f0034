"""Runs one peer: its processes under torch's local elastic agent, and the coordinator told of ends.

torch's agent starts the processes of the group, restarts them all when one fails, forwards signals
and writes their logs. Each start is a new incarnation of the peer; the one before it is reported
as ended at once, so that nobody waits for a timeout. It decides no membership.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous import registry as rendezvous
from torch.distributed.launcher.api import elastic_launch  # noqa: F401 - registers the backends

from decotrain.control import client
from decotrain.control import messages as m
from decotrain.control.coordinator import Options as RunOptions
from decotrain.control.server import ServerThread
from decotrain.control.token import find, whole
from decotrain.errors import ConfigError, Error
from decotrain.farewell import FILE, last_words
from decotrain.launch.options import Options
from decotrain.train.processes import describe_exit

ASK_S = 8.0  # for the coordinator, before anything is started
TELL_S = 1.0  # for the coordinator, when a process has ended
PREFIX = "[${local_rank}] "


class PeerAgent(LocalElasticAgent):
    """torch's agent, and a word to the coordinator when the processes have ended."""

    def __init__(
        self, spec: WorkerSpec, logs: DefaultLogsSpecs, tell: Callable[[str], None], farewell: Path
    ) -> None:
        super().__init__(spec, logs, log_line_prefix_template=PREFIX)
        self.tell, self.farewell = tell, farewell

    def _monitor_workers(self, worker_group: Any) -> RunResult:
        """One of torch's three extension points. All processes have ended when it says failed."""
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY):
            why = describe_failures(result)
            self.tell(why)
            if last_words(self.farewell) is not None:
                self._remaining_restarts = 0  # starting again would not mend it
            elif self._remaining_restarts:
                _say(f"{why}; it is started again ({self._remaining_restarts} restarts left)")
        return result

    def _shutdown(self, *given: Any, **more: Any) -> None:
        if given:  # a signal: without one the group has ended by itself
            _say(f"stopping; its processes have {more.get('timeout', 30)} s to leave")
        super()._shutdown(*given, **more)


class Peer:
    """One `decotrain run`."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.launch = secrets.token_hex(8)
        self.address = ""

    def run(self) -> int:
        """The exit code."""
        with ExitStack() as stack:
            token = find(self.options.token_file)
            if self.options.join is None:
                server = ServerThread(
                    RunOptions(run=self.options.run), token=whole(token, self.options.token_file)
                )
                stack.callback(server.stop)
                self.address = server.address
                _say(f"run {self.options.run!r} at {self.address.removeprefix('tcp://')}")
            else:
                self.address = self.options.join
                client.status(self.address, self.options.run, timeout_s=ASK_S, token=token)
            handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
            for number in handlers:  # until torch's agent has its own
                signal.signal(number, _ended_early)
            try:
                return self._run_group(stack)
            except SignalException as stopped:
                return 128 + int(stopped.sigval)
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)

    def _run_group(self, stack: ExitStack) -> int:
        try:
            folder = self.options.log_folder or self._kept_folder()
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="decotrain-"))
            logs = DefaultLogsSpecs(
                log_dir=str(folder or scratch),
                redirects=Std.from_str(self.options.redirects),
                tee=Std.from_str(self.options.tee),
                local_ranks_filter=set(self.options.ranks_shown or ()) or None,
            )
        except OSError as error:
            raise ConfigError(
                f"cannot write to {error.filename}: {error.strerror}; make room there or choose"
                " another folder (--log-dir, or TMPDIR for temporary files)"
            ) from None
        farewell = Path(scratch) / "farewell"
        self._set_environment(farewell)
        agent = PeerAgent(self._spec(), logs, self._tell, farewell)
        try:
            result = agent.run()
        finally:
            self._tell("its process ended")
        words = last_words(farewell)
        if words is not None and m.ASKED_TO_LEAVE in str(words):
            _say(str(words))
            return 0
        if words is not None:
            raise words
        if not result.is_failed():
            return 0
        where = f"; its output is in {folder}" if folder else ""
        print(f"decotrain: {describe_failures(result)}{where}", file=sys.stderr)
        return 1

    def _kept_folder(self) -> Path | None:
        """For what --redirects takes from the terminal, when nobody says where: kept and named, as
        torchrun does. What is shown as well goes to a folder that ends with us."""
        if self.options.redirects == "0":
            return None
        folder = Path(tempfile.mkdtemp(prefix="decotrain-logs-"))
        _say(f"output goes to {folder} (--log-dir names another folder)")
        return folder

    def _set_environment(self, farewell: Path) -> None:
        """torch's agent gives its own environment to the processes."""
        os.environ.update(self.options.environment())
        os.environ["DECOTRAIN_JOIN"] = self.address
        os.environ["DECOTRAIN_LAUNCH"] = self.launch
        os.environ[FILE] = str(farewell)
        for name in list(logging.root.manager.loggerDict):  # its words would come beside ours
            if name.startswith("torch.distributed.elastic"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
        if count_processes(self.options.processes) > 1:
            os.environ.setdefault("OMP_NUM_THREADS", "1")

    def _spec(self) -> WorkerSpec:
        options = self.options
        group = RendezvousParameters(
            backend="c10d", endpoint="127.0.0.1:0", run_id=self.launch, min_nodes=1, max_nodes=1,
            local_addr="127.0.0.1",
        )  # fmt: skip
        command = [options.entrypoint]
        if options.python:
            command = [sys.executable, "-u", *(["-m"] if options.module else []), *command]
        return WorkerSpec(
            role="peer",
            local_world_size=count_processes(options.processes),
            rdzv_handler=rendezvous.get_rendezvous_handler(group),
            entrypoint=command[0],
            args=(*command[1:], *options.arguments),
            max_restarts=options.restarts,
            monitor_interval=options.monitor_s,
            local_addr="127.0.0.1",
        )

    def _tell(self, why: str) -> None:
        """Nothing stops a run: a coordinator that does not answer finds out by itself."""
        try:
            client.exited(
                self.address, self.options.run, host=socket.gethostname(), launch=self.launch,
                detail=why[:500], timeout_s=TELL_S,
            )  # fmt: skip
        except Error:
            return


def count_processes(processes: int | str) -> int:
    """As torchrun counts them."""
    if isinstance(processes, int):
        return processes
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if processes == "gpu" and not gpus:
        raise ConfigError("--nproc-per-node gpu: torch sees no GPU here; name a number")
    return gpus if gpus and processes != "cpu" else os.cpu_count() or 1


def describe_failures(result: RunResult) -> str:
    """The process that failed first, for people."""
    if not result.failures:
        return "its processes are unhealthy"
    rank, first = min(result.failures.items(), key=lambda item: item[1].timestamp)
    return f"process {rank} ended: {describe_exit(first.exitcode)}"


def _say(text: str) -> None:
    print(f"decotrain run: {text}", file=sys.stderr, flush=True)


def _ended_early(number: int, _: object) -> None:
    raise SignalException("ended before it began", signal.Signals(number))
