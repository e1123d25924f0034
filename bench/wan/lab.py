"""The lab: network namespaces as sites, and the forwarder between them.

    with Lab("transatlantic", sites=4) as lab:
        server = lab.popen(0, ["python", "serve.py", lab.address(0)])
        lab.cut(0, 1)

Namespaces have no names: they live as long as this process (or a program in them), so nothing
is left behind however it ends. When the lab's process dies, the forwarder sees its stdin end and
kills what still runs inside. Addresses are from 198.18.0.0/15, the range for tests of
network devices, and exist inside the namespaces only; no packet leaves them. Linux only, IPv4
only. It knows nothing of decotrain.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.common import CannotRunError
from bench.wan.profiles import PROFILES, Profile

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "lab"
SITES_MAX = 60
CLONE_NEWNET = 0x40000000
DEVICE = "wan0"
MARK = "DT_LAB"  # environment of everything inside: pid and start time of the lab's process


class LabError(CannotRunError):
    """The lab cannot do what was asked; the message says why and what would help."""


class Lab:
    """Sites 0..n-1, linked as the profile says. `nat` names the sites behind a NAT router.

    TCP at the sites is Linux as it comes, whatever this machine's settings: 4 MiB to send, 6 MiB
    to receive, and `congestion` as its congestion control.
    """

    def __init__(
        self,
        profile: str | Profile,
        sites: int = 4,
        *,
        seed: int = 1,
        nat: Sequence[int] = (),
        congestion: str = "cubic",
        offload: bool = True,
        mtu: int = 1500,
    ) -> None:
        if isinstance(profile, str):
            if profile not in PROFILES:
                raise LabError(f"no profile {profile!r}, only {', '.join(PROFILES)}")
            profile = PROFILES[profile]
        if not 2 <= sites <= SITES_MAX:
            raise LabError(f"{sites} sites: choose 2 to {SITES_MAX}")
        self.profile = profile
        self.names = [f"s{number}" for number in range(sites)]
        self.nat = frozenset(nat)
        self._settings = (seed, offload, mtu)
        self._congestion = congestion
        self._preload: dict[str, str] = {}
        self._gateways: list[int] = []  # namespace descriptors: where the site's wan0 is
        self._inside: list[int] = []  # where its programs run; the same unless behind a NAT
        self._children: list[subprocess.Popen[Any]] = []
        self._forwarder: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._program = build()
        _remove_stale()

    # --- life

    def __enter__(self) -> Lab:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        seed, offload, mtu = self._settings
        for number in range(len(self.names)):
            self._gateways.append(new_namespace())
            inside = new_namespace() if number in self.nat else self._gateways[number]
            self._inside.append(inside)
        devices = [
            f"{name}={fd}@{self.address(number)}"
            for number, (name, fd) in enumerate(zip(self.names, self._gateways, strict=True))
        ]
        self._forwarder = subprocess.Popen(
            [self._program, "run", str(seed), str(int(offload)), *devices],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            pass_fds=self._gateways, env={**os.environ, MARK: _mark()}, start_new_session=True,
        )  # fmt: skip
        assert self._forwarder.stdout is not None
        if self._forwarder.stdout.readline() != "ready\n":
            _, errors = self._forwarder.communicate()
            raise LabError(f"the forwarder did not start: {errors.strip()}")
        for number in range(len(self.names)):
            self._configure(number, mtu)
        self.command(self.profile.path_command())
        for number, name in enumerate(self.names):
            self.command(self.profile.access_of(number).command(name))
        if self.profile.cuts is not None:
            for at_s, text in self.profile.cuts.schedule(self.names, seed):
                self.after(at_s, text)

    def _configure(self, number: int, mtu: int) -> None:
        gateway = self._gateways[number]
        self._ip(gateway, "link set lo up", f"link set {DEVICE} mtu {mtu} txqueuelen 5000 up",
                 f"addr add {self.address(number)}/15 dev {DEVICE}")  # fmt: skip
        inside = self._inside[number]
        self._configure_tcp(inside)
        if number not in self.nat:
            return
        self._ip(gateway, "link add lan0 type veth peer name eth0 netns "
                 f"/proc/{os.getpid()}/fd/{inside}",
                 "addr add 192.168.1.1/24 dev lan0", "link set lan0 up")  # fmt: skip
        self._ip(inside, "link set lo up", "addr add 192.168.1.2/24 dev eth0",
                 "link set eth0 up", "route add default via 192.168.1.1")  # fmt: skip
        self._tool(gateway, ["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"])
        rules = (
            "table ip home {\n"
            " chain out {\n  type nat hook postrouting priority 100\n"
            f"  oifname {DEVICE} masquerade\n }}\n"
            " chain guard {\n  type filter hook input priority 0\n"
            f"  iifname {DEVICE} ct state established,related accept\n  iifname {DEVICE} drop\n"
            " }\n}\n"
        )
        self._tool(gateway, ["nft", "-f", "-"], rules)

    def _configure_tcp(self, namespace: int) -> None:
        for name, value in (("rmem", "4096 131072 6291456"), ("wmem", "4096 16384 4194304")):
            knob = f"/proc/sys/net/ipv4/tcp_{name}"
            self._tool(namespace, ["sh", "-c", f'echo "$0" > {knob}', value])
        knob = "/proc/sys/net/ipv4/tcp_congestion_control"
        try:
            self._tool(namespace, ["sh", "-c", f'echo "$0" > {knob}', self._congestion])
        except LabError:  # not allowed as a default: socket by socket, then
            shim = build("congestion.cpp", "-shared", "-fPIC")
            self._preload = {"LD_PRELOAD": shim, "DT_LAB_CONGESTION": self._congestion}
            text = self._tool(namespace, ["sh", "-c", "cat /proc/sys/net/ipv4/tcp_available*"])
            if self._congestion not in text.split():
                raise LabError(f"this kernel has no {self._congestion}, only {text}") from None

    def close(self) -> None:
        """Ends everything inside. Safe to call twice."""
        if self._forwarder is not None:
            self._forwarder.stdin.close()  # type: ignore[union-attr]
            try:
                self._forwarder.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self._forwarder.kill()
                self._forwarder.wait()
            self._forwarder.stdout.close()  # type: ignore[union-attr]
            self._forwarder.stderr.close()  # type: ignore[union-attr]
            self._forwarder = None
        for child in self._children:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout, child.stderr):
                if pipe is not None:
                    pipe.close()
        self._children.clear()
        for fd in {*self._gateways, *self._inside}:
            os.close(fd)
        self._gateways.clear()
        self._inside.clear()

    # --- sites

    def address(self, site: int) -> str:
        """The site's address on the net; of a site behind a NAT, its router's."""
        return f"198.18.{site}.1"

    def local_address(self, site: int) -> str:
        """The address that programs at the site can bind to."""
        return "192.168.1.2" if site in self.nat else self.address(site)

    def namespace(self, site: int) -> str:
        """A path to the site's network namespace, while this process lives."""
        return f"/proc/{os.getpid()}/fd/{self._inside[site]}"

    def interface(self, site: int) -> str:
        return "eth0" if site in self.nat else DEVICE

    def environment(self, site: int) -> dict[str, str]:
        """What programs at the site get in addition to this process's environment."""
        return {MARK: _mark(), "DT_LAB_ADDRESS": self.local_address(site),
                "GLOO_SOCKET_IFNAME": self.interface(site), **self._preload}  # fmt: skip

    def popen(
        self, site: int, argv: Sequence[str], env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """subprocess.Popen inside the site. What still runs when the lab closes is killed; Ctrl-C
        is for who opened the lab."""
        options.setdefault("start_new_session", True)
        inside = self._inside[site]
        environment = {**os.environ, **(env or {}), **self.environment(site)}
        child = subprocess.Popen(
            [self._program, "enter", str(inside), *argv],
            env=environment, pass_fds=[inside, *options.pop("pass_fds", ())], **options,
        )  # fmt: skip
        self._children.append(child)
        return child

    def run(
        self, site: int, argv: Sequence[str], timeout_s: float = 60, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end; output as text. A failure is an error with the program's own words."""
        child = self.popen(site, argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           **options)  # fmt: skip
        out, errors = child.communicate(timeout=timeout_s)
        self._children.remove(child)
        if child.returncode != 0:
            raise LabError(f"{argv[0]} at site {site} failed: {errors.strip() or out.strip()}")
        return subprocess.CompletedProcess(argv, 0, out, errors)

    # --- links

    def command(self, text: str) -> str:
        """One command to the forwarder (forwarder.cpp says which); its answer."""
        with self._lock:
            process = self._forwarder
            if process is None or process.stdin is None or process.stdout is None:
                raise LabError("the lab is closed")
            process.stdin.write(text + "\n")
            process.stdin.flush()
            answer = process.stdout.readline().strip()
        if not answer or answer.startswith("error"):
            raise LabError(f"{text!r}: {answer or 'the forwarder died'}")
        return answer

    def set_path(self, source: int | str, target: int | str, **settings: float) -> None:
        """One direction of a path: delay_ms, jitter_ms, loss, reorder, rate_mbps, queue_bytes."""
        values = " ".join(f"{name}={value}" for name, value in settings.items())
        self.command(f"set {self._name(source)} {self._name(target)} {values}")

    def set_access(self, site: int | str, **settings: float) -> None:
        values = " ".join(f"{name}={value}" for name, value in settings.items())
        self.command(f"access {self._name(site)} {values}")

    def cut(self, a: int | str, b: int | str = "*") -> None:
        """No packet passes between a and b, in both directions, until `heal`."""
        self._both(a, b, "down")

    def heal(self, a: int | str, b: int | str = "*") -> None:
        self._both(a, b, "up")

    def after(self, delay_s: float, text: str) -> None:
        """A `set` or `access` command, so many seconds from now."""
        self.command(f"after {delay_s:.6f} {text}")

    def stats(self) -> dict[str, Any]:
        """Counters of the forwarder and of every directed path."""
        return json.loads(self.command("stats"))  # type: ignore[no-any-return]

    def path_stats(self, source: int, target: int) -> dict[str, Any]:
        wanted = (self.names[source], self.names[target])
        return next(p for p in self.stats()["paths"] if (p["from"], p["to"]) == wanted)

    def _both(self, a: int | str, b: int | str, state: str) -> None:
        self.command(f"set {self._name(a)} {self._name(b)} {state}")
        self.command(f"set {self._name(b)} {self._name(a)} {state}")

    def _name(self, site: int | str) -> str:
        return self.names[site] if isinstance(site, int) else site

    # --- tools

    def _ip(self, namespace: int, *lines: str) -> None:
        self._tool(namespace, ["ip", "-batch", "-"], "\n".join(lines) + "\n")

    def _tool(self, namespace: int, argv: Sequence[str], text: str = "") -> str:
        if shutil.which(argv[0]) is None:
            raise LabError(f"the lab needs the program {argv[0]!r} (iproute2, nftables)")
        fds = {namespace, *self._inside}
        done = subprocess.run(
            [self._program, "enter", str(namespace), *argv],
            input=text, capture_output=True, text=True, pass_fds=fds, timeout=30, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise LabError(f"{' '.join(argv)} failed: {done.stderr.strip()}\n{text}")
        return done.stdout


def new_namespace() -> int:
    """A network namespace, as a descriptor that keeps it alive."""
    made: list[int | OSError] = []

    def make() -> None:
        # unshare() moves the calling thread only, so a thread of its own can be spent on it.
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNET) != 0:
            made.append(OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno())))
            return
        made.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if isinstance(made[0], OSError):
        raise LabError(
            f"no network namespace ({made[0].strerror}): the lab needs root or user namespaces, "
            "run the same command under `unshare -Urn`"
        )
    return made[0]


def build(source: str = "forwarder.cpp", *flags: str) -> str:
    """A program, compiled into build/lab/ on first use and again when a source changed."""
    sources = sorted([*HERE.glob("*.h"), HERE / source])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    program = CACHE / f"{Path(source).stem}-{digest}"
    if program.exists():
        return str(program)
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise LabError("the lab needs a C++20 compiler (c++, or set CXX)")
    CACHE.mkdir(parents=True, exist_ok=True)
    draft = program.with_name(f"{program.name}.{os.getpid()}")
    done = subprocess.run(
        [compiler, "-std=c++20", "-O2", *flags, str(HERE / source), "-o", str(draft)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise LabError(f"{compiler} cannot compile {source}:\n{done.stderr}")
    draft.replace(program)
    return str(program)


# --- what a lab leaves when it and its forwarder were both killed at once


def _start_time(pid: int) -> str | None:
    """Start time of a process in clock ticks; with its id, a name that is not used twice."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def _mark() -> str:
    return f"{os.getpid()}:{_start_time(os.getpid())}"


def _remove_stale() -> list[int]:
    """Ends programs of labs that are no more, and says which."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        marks = [
            v[len(MARK) + 1 :].decode() for v in environment if v.startswith(f"{MARK}=".encode())
        ]
        if not marks:
            continue
        pid, _, started = marks[0].partition(":")
        if pid.isdigit() and _start_time(int(pid)) != started:
            os.kill(int(entry.name), signal.SIGKILL)
            found.append(int(entry.name))
    return found
