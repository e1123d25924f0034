"""`decotrain doctor`: what stands in the way of a run on this machine, each finding with a remedy.

It changes nothing. Without an address it looks at this machine; with one at the way to the
coordinator and its peers; with --to at the way to another machine that answers.
"""

from __future__ import annotations

import argparse
import platform
import resource
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from decotrain import __version__, probe
from decotrain.control import client
from decotrain.control.token import Secret, find, probe_key
from decotrain.control.transport import check_trust, libzmq, split_address
from decotrain.errors import Error, RefusedError

DESCRIPTORS_MIN = 4096
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - looked at, not written to
SHARED_MEMORY_MIN_BYTES = 256 << 20
WINDOW_MIN_BYTES = 4 << 20
DISK_MIN_BYTES = 1 << 30
CLOCK_MAX_S = 2.0  # beyond it logs of two machines cannot be compared
RTT_LONG_S = 0.3
STREAMS = (1, 2, 4, 8, 16)
MEASURE_S = 1.0
PEER_DIALS_MAX = 64


@dataclass(frozen=True)
class Finding:
    what: str
    seen: str
    remedy: str = ""  # empty: nothing to do

    def line(self) -> str:
        mark = "!!" if self.remedy else "ok"
        return f"{mark} {self.what}: {self.seen}" + (
            f"\n   -> {self.remedy}" if self.remedy else ""
        )


def main(words: list[str]) -> int:
    """Looks for what stands in the way of a run, and says what to do about it."""
    parser = argparse.ArgumentParser(
        prog="decotrain doctor", description=main.__doc__,
        epilog="exit code: 0 nothing found, 1 something to remedy, 2 wrong options,"
        " 3 no coordinator answers",
    )  # fmt: skip
    add = parser.add_argument
    add("address", nargs="?", metavar="HOST:PORT", help="of the coordinator")
    add("--run", default="", help="name of the run; whichever is there without it")
    add("--token-file", metavar="FILE", help="the run's token")
    add("--answer", type=int, metavar="PORT",
        help="answers a doctor elsewhere that has the same token, until Ctrl-C")  # fmt: skip
    add("--to", metavar="HOST:PORT", help="measures the way to a machine that answers")
    add("--port", type=int, default=0, help="of ours, which the other side tries to dial back")
    add("--insecure", action="store_true", help="with --answer and no token: answers everybody")
    asked = parser.parse_args(words)
    if asked.answer is not None:
        token = find(asked.token_file)
        check_trust("0.0.0.0", token, asked.insecure)  # noqa: S104 - what it is about to do
        answerer = probe.Answerer("", asked.answer, probe_key(token))
        print(f"answers on port {answerer.port}; on the other machine: decotrain doctor --to"
              f" HOST:{answerer.port}", flush=True)  # fmt: skip
        answerer.thread.join()
        return 0
    found = 0
    for finding in _all(asked):
        print(finding.line(), flush=True)
        found += bool(finding.remedy)
    print(f"{found} to remedy" if found else "nothing to remedy")
    return 1 if found else 0


def _all(asked: argparse.Namespace) -> Iterator[Finding]:
    yield from versions()
    yield from limits()
    token = find(asked.token_file)
    if asked.address:
        known = client.status(asked.address, asked.run, token=token)
        yield from coordinator(asked.address, known, time.time())
        yield from way_to_coordinator(asked, token)
    if asked.to:
        yield from path(probe.Way(*split_address(asked.to), probe_key(token)), asked.port)


def versions() -> Iterator[Finding]:
    """What is installed here. Imports none of it: a broken torch is to be found, not to be hit."""
    yield Finding("decotrain", f"{__version__}, Python {platform.python_version()}")
    yield Finding("libzmq", *libzmq())
    try:
        torch = version("torch")
        yield Finding("torch", torch)
    except PackageNotFoundError:
        yield Finding("torch", "missing", "pip install torch (a coordinator needs none)")
    smi = shutil.which("nvidia-smi")
    if smi is None:
        yield Finding("CUDA", "no NVIDIA driver: this machine trains on its processor")
        return
    query = [smi, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(  # noqa: S603 - nvidia-smi, no shell
            query, capture_output=True, text=True, check=False, timeout=20
        )
        gpus = done.stdout.strip().replace("\n", "; ")
    except (OSError, subprocess.TimeoutExpired):
        gpus = ""
    driver = "the driver does not answer: load it (modprobe nvidia) or restart the machine"
    yield Finding("CUDA", gpus or "no GPU seen", "" if gpus else driver)


def limits() -> Iterator[Finding]:
    """What the system allows a process here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ask = f"ulimit -n {min(hard, 65536)}, or LimitNOFILE= in the service"
    yield Finding(
        "descriptors", f"{soft} of at most {hard}", "" if soft >= DESCRIPTORS_MIN else ask
    )
    scratch = tempfile.gettempdir()
    for place, least, remedy in (
        (SHARED_MEMORY, SHARED_MEMORY_MIN_BYTES, "docker run --shm-size=1g, or a larger tmpfs"),
        (scratch, DISK_MIN_BYTES, "make room there, or set TMPDIR"),
        (".", DISK_MIN_BYTES, "make room, or start in another folder: checkpoints go here"),
    ):
        try:
            free = shutil.disk_usage(place).free
        except OSError as error:
            yield Finding(f"room in {place}", error.strerror or str(error), remedy)
            continue
        yield Finding(f"room in {place}", f"{free / 1e9:.1f} GB", "" if free >= least else remedy)
    for name in ("tcp_rmem", "tcp_wmem"):
        values = _kernel(name).split()
        if len(values) == 3:
            low = int(values[2]) < WINDOW_MIN_BYTES
            raise_it = f"sysctl -w net.ipv4.{name}='{values[0]} {values[1]} {WINDOW_MIN_BYTES}'"
            yield Finding(name, f"at most {int(values[2]) >> 10} KiB", raise_it if low else "")
    yield from long_paths()


def long_paths() -> Iterator[Finding]:
    """What TCP does over tens of milliseconds, where CUBIC needs seconds to be up to speed."""
    control = _kernel("tcp_congestion_control")
    if not control:
        return
    allowed = _kernel("tcp_allowed_congestion_control").split()
    if control == "bbr" or "bbr" in allowed:
        yield Finding("congestion control", f"{control}; bbr for links of 5 ms and more")
        return
    yield Finding(
        "congestion control", f"{control}, and no BBR for links of 5 ms and more",
        "modprobe tcp_bbr && sysctl -w net.ipv4.tcp_allowed_congestion_control='"
        + " ".join([*allowed, "bbr"]) + "'",
    )  # fmt: skip
    idle = _kernel("tcp_slow_start_after_idle")
    slow = "sysctl -w net.ipv4.tcp_slow_start_after_idle=0" if idle == "1" else ""
    seen = {"0": "no", "1": "yes: every round begins slowly without BBR"}
    yield Finding("slow start after a pause", seen.get(idle, "unknown"), slow)


def _kernel(name: str) -> str:
    try:
        return Path(f"/proc/sys/net/ipv4/{name}").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def coordinator(address: str, known: dict[str, Any], now_s: float) -> Iterator[Finding]:
    """The way to the coordinator, and to the peers that say where they can be dialled."""
    host, port = split_address(address)
    rtt_s = probe.round_trip_s(host, port)
    far = "far away: use fewer, larger rounds (outer.sync_every)" if rtt_s > RTT_LONG_S else ""
    yield Finding("coordinator", f"run {known['run']!r}, round trip {1e3 * rtt_s:.1f} ms", far)
    offset_s = known["wall_s"] - now_s
    off = "set this machine's clock (timedatectl set-ntp true)"
    yield Finding("clock", f"{offset_s:+.1f} s from the coordinator's",
                  off if abs(offset_s) > CLOCK_MAX_S else "")  # fmt: skip
    for peer in known["peers"][:PEER_DIALS_MAX]:
        yield _peer(peer)


def _peer(peer: dict[str, Any]) -> Finding:
    what = f"peer {peer['name']}"
    if not peer.get("heard", True):  # a port that nobody holds open says nothing about a firewall
        return _unheard(what, peer)
    places = [text for text in peer["addresses"] if text.startswith("tcp://")]
    if not places or not peer["dialled"]:
        return Finding(what, "dials out only")
    if any(probe.can_dial(*split_address(place)) for place in places):
        return Finding(what, f"can be dialled at {', '.join(places)}")
    return Finding(what, f"cannot be dialled at {', '.join(places)}",
                   "on that machine: open the port in the firewall and forward it in the router"
                   " (--listen, --advertise), or start it with --dial-only")  # fmt: skip


def _unheard(what: str, peer: dict[str, Any]) -> Finding:
    if peer["state"] not in ("silent", "away"):
        return Finding(what, peer["state"])  # the run does what there is to do
    since = peer["silent_s"]
    seen = "away since the coordinator started" if since is None else f"silent for {since:.0f} s"
    return Finding(what, f"{seen}: its process has ended, or its way to the coordinator is cut",
                   "look on its machine: start it again if it has ended (log, `dmesg` for a lack of"
                   " memory), else run decotrain doctor there")  # fmt: skip


def way_to_coordinator(asked: argparse.Namespace, token: Secret | None) -> Iterator[Finding]:
    """Both directions: it dials us back, and opens a port for a minute to measure bandwidth."""
    ours = probe.Answerer("", asked.port, secrets.token_bytes(32))
    try:
        answer = client.probe(asked.address, asked.run, ours.port, token=token)
    except RefusedError as error:  # another doctor is there: the rest can be looked at
        yield Finding("dialled back, bandwidth", f"not known: {error}",
                      "try again when it is done, within a minute")  # fmt: skip
        return
    finally:
        ours.close()
    yield _dialled(ours.port, answer.dialled, f" (it sees us at {answer.place})")
    host, _ = split_address(asked.address)
    if probe.can_dial(host, answer.port):
        way = probe.Way(host, answer.port, answer.key)
        yield from bandwidth(way)
        with suppress(Error):  # it sees by itself after a while
            way.done()
        return
    seen = f"not measured: port {answer.port} of the coordinator is closed to us"
    yield Finding("bandwidth", f"{seen}; --answer there and --to here do it at a port of choice")


def _dialled(port: int, back: bool, more: str = "") -> Finding:
    remedy = (
        "open a port here and forward it in the router (--port here; --listen, --advertise of"
        " `decotrain run`), or run with --dial-only"
    )
    seen = f"port {port}, " + ("yes" if back else "no") + more
    return Finding("dialled back", seen, "" if back else remedy)


def path(way: probe.Way, own_port: int) -> Iterator[Finding]:
    """The way to a machine that answers, both directions."""
    rtt_s = probe.round_trip_s(way.host, way.port)
    yield Finding("round trip", f"{1e3 * rtt_s:.2f} ms")
    offset_s = way.clock_offset_s()
    off = "set the clock of one of them (timedatectl set-ntp true)"
    yield Finding("clock", f"{offset_s:+.2f} s", off if abs(offset_s) > CLOCK_MAX_S else "")
    ours = probe.Answerer("", own_port, way.key)
    try:
        back = way.dials_back(ours.port)
    finally:
        ours.close()
    yield _dialled(ours.port, back)
    yield from bandwidth(way)


def bandwidth(way: probe.Way) -> Iterator[Finding]:
    for give, name in ((False, "bandwidth to it"), (True, "bandwidth from it")):
        rates = [way.rate_bps(count, give, MEASURE_S) for count in STREAMS]
        shown = ", ".join(
            f"{n}: {r / 1e6:.{0 if r > 1e8 else 1}f}" for n, r in zip(STREAMS, rates, strict=True)
        )
        yield Finding(name, f"Mbit/s by number of streams: {shown}")
