"""Link profiles as data: what the lab's sites have between them.

Times: `rtt_ms` is the round trip between any two sites without load; each direction gets
half of it. Rates are those of IP packets (a 1 Gbit/s link carries 965 Mbit/s of TCP payload
at MTU 1500). Loss is per direction and per packet of at most 1500 bytes. A queue is given as
the time its bytes take at the link's rate. `access` is what one site shares among all its
paths: that is where the capacity limit is, as it is for a machine with one uplink.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Access:
    """A site's connection to the net. 0 Mbit/s: no limit."""

    up_mbps: float
    down_mbps: float
    up_queue_ms: float = 25.0
    down_queue_ms: float = 25.0

    def command(self, site: str) -> str:
        return (
            f"access {site} up_mbps={self.up_mbps} down_mbps={self.down_mbps}"
            f" up_queue_bytes={self.up_mbps * 125 * self.up_queue_ms:.0f}"
            f" down_queue_bytes={self.down_mbps * 125 * self.down_queue_ms:.0f}"
        )


@dataclass(frozen=True)
class Cuts:
    """Paths that go dead and come back: one at a time, in both directions."""

    every_s: float
    shortest_s: float
    longest_s: float
    whole_site_share: float  # of the cuts: one site loses all its paths
    until_s: float = 3600.0

    def schedule(self, sites: list[str], seed: int) -> Iterator[tuple[float, str]]:
        """(seconds from the start, command), ascending."""
        if self.longest_s >= self.every_s / 2:
            raise ValueError("cuts would overlap")
        chance = random.Random(seed)
        start_s = 0.0
        while start_s < self.until_s:
            start_s += self.every_s * chance.uniform(0.5, 1.0)
            end_s = start_s + chance.uniform(self.shortest_s, self.longest_s)
            a, b = chance.sample(sites, 2)
            if chance.random() < self.whole_site_share:
                b = "*"
            for at_s, state in ((start_s, "down"), (end_s, "up")):
                yield at_s, f"set {a} {b} {state}"
                yield at_s, f"set {b} {a} {state}"
            start_s = end_s


@dataclass(frozen=True)
class Profile:
    name: str
    about: str
    rtt_ms: float
    access: Access
    jitter_ms: float = 0.0  # added to each direction, uniform in [0, jitter_ms]
    loss: float = 0.0
    reorder: float = 0.0
    others: Mapping[int, Access] = field(default_factory=dict)  # site number -> its own access
    cuts: Cuts | None = None

    def access_of(self, site: int) -> Access:
        return self.others.get(site, self.access)

    def path_command(self) -> str:
        return (
            f"set * * delay_ms={self.rtt_ms / 2} jitter_ms={self.jitter_ms} loss={self.loss}"
            f" reorder={self.reorder} reorder_ms={self.rtt_ms / 4}"
        )


# A modem has a deep queue for its slow side. A server's own kernel makes what it sends wait for the
# card and drops nothing (100 ms are as good as that); the port it receives from has a short queue.
HOME = Access(up_mbps=20, down_mbps=100, up_queue_ms=150, down_queue_ms=60)
GIGABIT = Access(up_mbps=1000, down_mbps=1000, up_queue_ms=100, down_queue_ms=25)

PROFILES = {
    profile.name: profile
    for profile in (
        Profile("lan", "one room, gigabit switch", 0.3, GIGABIT),
        Profile("home", "homes of one country, 20 Mbit/s up, 100 Mbit/s down", 15, HOME,
                jitter_ms=1),
        Profile("europe", "servers of one continent, 1 Gbit/s", 30, GIGABIT),
        Profile("transatlantic", "servers on two continents, 1 Gbit/s, 0.01 % loss", 90, GIGABIT,
                loss=1e-4),
        Profile("mixed", "as europe, but site 0 is at home", 30, GIGABIT, others={0: HOME}),
        Profile("flaky", "1 % loss, some reordering, cuts of 0.5 to 6 s", 40, Access(100, 100),
                jitter_ms=5, loss=1e-2, reorder=1e-3, cuts=Cuts(20, 0.5, 6, 0.25)),
    )
}  # fmt: skip
