"""SPSA's exchange over the lab's links: steps a second against the RTT, and bytes of a step.

A step is a collect round of each peer's bytes: 4 of overhead, one for each sample. With staleness
s a peer begins s more rounds before it waits for one, as `SPSA(staleness=s)` does; between two
rounds it computes nothing here, so this is the ceiling that the network sets. Bytes are those that
one peer writes to its streams, frame headers included, IP's and TCP's (40 for each segment) not.

Options (`--set`): profiles=lan,europe,transatlantic, peers=2,4, staleness=0,1,4, samples=4.
"""

from __future__ import annotations

from bench.common import Report, Settings, interleave, log
from bench.wan.allreduce import Team, lab_of, mean
from bench.wan.profiles import PROFILES, Profile
from decotrain.spsa.record import HEAD

SECONDS = 2.0  # about, of one sample: with five repeats the suite takes four minutes


def _measure(report: Report, settings: Settings, profile: Profile, peers: int) -> None:
    samples = int(settings.option("samples", "4"))
    ahead = [int(s) for s in settings.option("staleness", "0,1,4").split(",")]
    repeats = 1 if settings.quick else settings.repeats
    bytes_of: dict[str, list[float]] = {str(s): [] for s in ahead}
    with lab_of(profile, peers, settings) as lab:
        team = Team(lab, {})

        def run(staleness: int) -> float:
            wanted = (1 + staleness) * SECONDS / max(1.5e-3 * profile.rtt_ms, 1e-3)
            calls = 5 if settings.quick else max(20, int(wanted))
            said = team.run(ahead=staleness, calls=calls, bytes=HEAD.size + samples)
            bytes_of[str(staleness)].append(mean(one["sent_bytes"] for one in said))
            return 1.0 / mean(float(one["wall_s"]) for one in said)

        rates = interleave({str(s): lambda s=s: run(s) for s in ahead}, repeats)
        team.close()
    for staleness, rate in rates.items():
        log(f"  {profile.name} n={peers} staleness {staleness}: {rate[-1]:.1f} steps/s")
        report.add(
            {
                "profile": profile.name,
                "rtt_ms": profile.rtt_ms,
                "peers": peers,
                "staleness": int(staleness),
            },
            steps_per_s=rate,
            steps_per_rtt=[one * profile.rtt_ms / 1e3 for one in rate],
            bytes_per_peer_and_step=bytes_of[staleness][-len(rate) :],
        )


def run(settings: Settings) -> Report:
    """The suite."""
    report = Report("wan-spsa", "SPSA's exchange over the lab's links", settings)
    names = settings.option("profiles", "lan" if settings.quick else "lan,europe,transatlantic")
    counts = settings.option("peers", "2" if settings.quick else "2,4")
    for name in names.split(","):
        for peers in counts.split(","):
            _measure(report, settings, PROFILES[name], int(peers))
    figures = ["steps_per_s", "steps_per_rtt", "bytes_per_peer_and_step"]
    report.table("steps", figures, title="Steps a second and bytes of each peer and step")
    report.note((__doc__ or "").split("\n\n")[1].replace("\n", " "))
    return report
