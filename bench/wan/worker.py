"""One peer of a WAN benchmark: a program that runs inside a site and takes tasks as JSON lines.

    python worker.py RANK PEERS ADDRESS OPTIONS

It says where it listens, gets the addresses of all, and then runs all-reduces in place until its
input ends. The view is made by hand and installed at every node: there is no coordinator, so that
links and rounds are measured and nothing else. It knows neither the lab nor profiles.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import deque
from datetime import timedelta
from typing import Any

import numpy as np

from decotrain import _core

VIEW = 1 << 32 | 1  # term 1, epoch 1
FINGERPRINT = 7
WAIT_S = 240.0


def say(what: object) -> None:
    print(json.dumps(what), flush=True)


def hear() -> Any:
    line = sys.stdin.readline()
    return json.loads(line) if line else None


class Ours:
    """A node with a view of everybody."""

    def __init__(self, rank: int, peers: int, address: str, options: dict[str, Any]) -> None:
        self.rank, self.peers = rank, peers
        self.node = _core.Node(
            rank + 1, [f"tcp://{address}:0"], FINGERPRINT, streams=options.get("streams", 0),
            congestion=options.get("control", "bbr"), pace=options.get("pace", True),
        )  # fmt: skip

    def install(self, everybody: list[dict[str, Any]]) -> None:
        members = [[r + 1, r, True, who.get("share", 1.0)] for r, who in enumerate(everybody)]
        plan = {
            "view": {"id": VIEW, "members": members},
            "answers": [1, 1],
            "reported": (1 << self.peers) - 1,
            "tags": [],
            "rounds": [],
            "names": [],
        }
        self.node.set_peers([(r + 1, r, who["addresses"]) for r, who in enumerate(everybody)])
        self.node.freeze(1, 1)
        assert self.node.install(plan)

    def begin(self, buffer: Any, task: dict[str, Any], tag: int = 0) -> Any:
        codec = task.get("codec", "f32")
        return self.node.begin(
            [buffer],
            tag=tag,
            borrow=True,
            codec=codec,
            result_codec=task.get("result_codec", codec),
            chunk_elements=task.get("chunk_elements"),
        )

    def end(self, work: Any, buffer: Any) -> None:
        if not work.wait(WAIT_S):
            raise SystemExit(f"no result in {WAIT_S} s; links: {self.node.links()}")
        work.result().decode_into([buffer])

    def run(self, buffer: Any, task: dict[str, Any]) -> None:
        """`fragments` rounds, each of an equal part of the buffer, two of them under way."""
        parts = np.array_split(buffer, task.get("fragments", 1))
        under_way: deque[Any] = deque()
        for tag, part in enumerate(parts):
            under_way.append((self.begin(part, task, tag), part))
            if len(under_way) > 2:
                self.end(*under_way.popleft())
        for work, part in under_way:
            self.end(work, part)


class Gloo:
    """torch.distributed's all-reduce between the same sites."""

    def __init__(self, rank: int, peers: int, address: str) -> None:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        self.rank, self.peers, self.address = rank, peers, address
        self.torch, self.dist = torch, dist
        self.store: Any = None
        if rank == 0:
            self.store = dist.TCPStore(address, 0, peers, is_master=True, wait_for_workers=False)

    def install(self, everybody: list[dict[str, Any]]) -> None:
        if self.store is None:
            host, port = everybody[0]["store"]
            self.store = self.dist.TCPStore(host, port, self.peers, is_master=False)
        self.dist.init_process_group(
            "gloo", store=self.store, rank=self.rank, world_size=self.peers,
            timeout=timedelta(seconds=WAIT_S),
        )  # fmt: skip

    def run(self, buffer: Any) -> None:
        self.dist.all_reduce(self.torch.from_numpy(buffer))
        buffer *= 1.0 / self.peers  # a mean, as ours

    @property
    def where(self) -> list[Any] | None:
        return [self.address, self.store.port] if self.store is not None else None


def sent_bytes(node: Any) -> int:
    return sum(int(link["sent_bytes"]) for link in node.links())


def steps(ours: Ours, task: dict[str, Any]) -> dict[str, Any]:
    """Collect rounds with `ahead` more begun than waited for: SPSA's exchange, and nothing else."""
    node, dice = ours.node, random.Random(ours.rank)
    under_way: deque[Any] = deque()
    before, start = sent_bytes(node), time.perf_counter()
    for number in range(task["calls"] + task["ahead"]):
        if number < task["calls"]:
            data = dice.randbytes(task["bytes"])
            work = node.collect(data, tag=1, max_bytes=task["bytes"], ahead=task["ahead"])
            under_way.append(work)
        if number >= task["ahead"]:
            work = under_way.popleft()
            if not work.wait(WAIT_S) or len(work.result().parts()) != ours.peers:
                raise SystemExit(f"a round without all peers; links: {node.links()}")
    wall_s = time.perf_counter() - start
    calls = task["calls"]
    return {"wall_s": wall_s / calls, "sent_bytes": (sent_bytes(node) - before) / calls}


def main() -> int:
    rank, peers, address = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    options = json.loads(sys.argv[4])
    ours = Ours(rank, peers, address, options)
    gloo = Gloo(rank, peers, address) if options.get("gloo") else None
    say({"addresses": ours.node.addresses, "share": options.get("share", 1.0),
         "store": gloo.where if gloo else None})  # fmt: skip
    everybody = hear()
    ours.install(everybody)
    if gloo is not None:
        gloo.install(everybody)
    ours.run(np.ones(4, np.float32), {})  # links are up, everybody is here
    say("ready")
    buffer = np.empty(0, np.float32)
    while (task := hear()) is not None:
        if "ahead" in task:
            ours.run(np.ones(4, np.float32), {})  # start together
            say(steps(ours, task))
            continue
        if len(buffer) != task["elements"]:
            buffer = np.empty(task["elements"], np.float32)
        buffer.fill(1.0 + rank)
        ours.run(np.ones(4, np.float32), {})  # start together
        for _ in range(task.get("warm", 0)):  # not counted: slow start
            ours.run(buffer, task)
        before = sent_bytes(ours.node)
        cpu, start = time.process_time(), time.perf_counter()
        for _ in range(task["calls"]):
            if task["variant"] == "gloo":
                assert gloo is not None
                gloo.run(buffer)
            else:
                ours.run(buffer, task)
        wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
        mean = (peers + 1) / 2
        if task.get("codec", "f32") == "f32" and abs(float(buffer[-1]) - mean) > 1e-3 * mean:
            raise SystemExit(f"wrong result: {buffer[-1]}, not {mean}")
        links = [
            [link[what] for what in ("peer", "streams", "rtt_s", "congestion", "pace_bps")]
            for link in ours.node.links()
        ]
        say({"wall_s": wall_s / task["calls"], "cpu_s": cpu_s / task["calls"], "links": links,
             "uplink_bps": ours.node.measures()["uplink_bps"],
             "sent_bytes": (sent_bytes(ours.node) - before) / task["calls"]})  # fmt: skip
    ours.node.close()
    if gloo is not None:
        gloo.dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
