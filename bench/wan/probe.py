"""Small programs for the lab's sites: echo and ping over UDP, sink and source over TCP.

Standard library only, so that they start fast. A server prints its port on its first line.
Every program prints one JSON line as its result.
"""

from __future__ import annotations

import argparse
import itertools
import json
import selectors
import socket
import statistics
import struct
import sys
import time

CHUNK_BYTES = 1 << 20


def listen(address: str, kind: socket.SocketKind) -> socket.socket:
    server = socket.socket(socket.AF_INET, kind)
    server.bind((address, 0))
    if kind == socket.SOCK_STREAM:
        server.listen(64)
    print(server.getsockname()[1], flush=True)
    return server


def echo(address: str) -> None:
    with listen(address, socket.SOCK_DGRAM) as server:
        while True:
            data, sender = server.recvfrom(65536)
            server.sendto(data, sender)


def ping(address: str, port: int, count: int, interval_s: float, wait_s: float) -> None:
    """RTTs of `count` datagrams; those not back within `wait_s` of the last are lost."""
    rtts: dict[int, float] = {}
    order: list[int] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect((address, port))
        start = time.monotonic()
        sent = 0
        end = start + count * interval_s + wait_s
        while (now := time.monotonic()) < end and len(rtts) < count:
            due = start + sent * interval_s
            if sent < count and now >= due:
                client.send(struct.pack("!Id", sent, now))
                sent += 1
                continue
            client.settimeout(max(1e-4, (due if sent < count else end) - now))
            try:
                data = client.recv(64)
            except TimeoutError:
                continue
            number, at = struct.unpack("!Id", data)
            rtts[number] = time.monotonic() - at
            order.append(number)
    times = sorted(1000 * rtt for rtt in rtts.values())
    print(json.dumps({
        "sent": sent, "back": len(rtts),
        "late": sum(a > b for a, b in itertools.pairwise(order)),
        "rtt_min_ms": times[0] if times else None,
        "rtt_median_ms": statistics.median(times) if times else None,
        "rtt_max_ms": times[-1] if times else None,
    }))  # fmt: skip


def sink(address: str, streams: int, skip_s: float, measure_s: float) -> None:
    """Goodput of all streams together, from `skip_s` after the first byte."""
    picker = selectors.DefaultSelector()
    buffer = bytearray(CHUNK_BYTES)
    with listen(address, socket.SOCK_STREAM) as server:
        for _ in range(streams):
            connection, _ = server.accept()
            picker.register(connection, selectors.EVENT_READ)
        start = begin = 0.0
        total = 0
        while True:
            for key, _ in picker.select():
                assert isinstance(key.fileobj, socket.socket)
                got = key.fileobj.recv_into(buffer)
                if got == 0:
                    raise SystemExit("a source ended early")
                total += got
            now = time.monotonic()
            start = start or now
            if not begin and now - start >= skip_s:
                begin, total = now, 0
            if begin and now - begin >= measure_s:
                break
    print(json.dumps({"mbps": 8e-6 * total / (now - begin), "seconds": now - begin}), flush=True)


def source(address: str, port: int, streams: int) -> None:
    """Sends on all streams until the sink has enough."""
    picker = selectors.DefaultSelector()
    data = memoryview(bytes(CHUNK_BYTES))
    for _ in range(streams):
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        connection.connect((address, port))
        connection.setblocking(False)
        picker.register(connection, selectors.EVENT_WRITE)
    try:
        while True:
            for key, _ in picker.select():
                assert isinstance(key.fileobj, socket.socket)
                key.fileobj.send(data)
    except (ConnectionResetError, BrokenPipeError):
        return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["echo", "ping", "sink", "source"])
    parser.add_argument("address")
    parser.add_argument("port", nargs="?", type=int, default=0)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--interval-s", type=float, default=0.01)
    parser.add_argument("--wait-s", type=float, default=1.0)
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--skip-s", type=float, default=1.0)
    parser.add_argument("--measure-s", type=float, default=3.0)
    args = parser.parse_args()
    if args.what == "echo":
        echo(args.address)
    elif args.what == "ping":
        ping(args.address, args.port, args.count, args.interval_s, args.wait_s)
    elif args.what == "sink":
        sink(args.address, args.streams, args.skip_s, args.measure_s)
    else:
        source(args.address, args.port, args.streams)
    return 0


if __name__ == "__main__":
    sys.exit(main())
