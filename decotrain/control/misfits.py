"""Peers that run a round with other tensors, another codec or other options than the others.

Whoever finds out says so, but a word is no proof: a round of one chunk shows its owner alone that
another's frames do not fit, and the owner may be the odd one. So a word only brings a FREEZE, and
the reports decide, each by what its own peer has begun: the specification that most active peers
run stands. Pure, as is all that the coordinator decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from decotrain.control import messages as m
from decotrain.control.record import RecordMember

if TYPE_CHECKING:
    from decotrain.control.coordinator import Coordinator

WAIT_S = 2.0  # for more peers to begin: each is a vote
REASON = "its tensors, codec or options differ from the run's: start it with those of"


@dataclass(frozen=True)
class Voter:
    peer: int
    slot: int
    active: bool


@dataclass(frozen=True)
class Doubtful:
    """The first word of one, until reports have decided."""

    due_s: float
    goes: int  # if no report shows two specifications: who fits less, by the word alone
    reason: str


def specification(entry: Mapping[str, Any]) -> tuple[bytes, int]:
    """What must be equal in the reports of one round: the specification, the number of chunks."""
    return entry["spec"], len(entry["owner"])


def stands(begun: Iterable[tuple[Voter, tuple[bytes, int]]]) -> tuple[tuple[bytes, int], int]:
    """Which specification goes on: that of most active peers, then of most peers, then of the
    lowest slot. And how many active peers it has more than any other."""
    sides: dict[tuple[bytes, int], list[Voter]] = {}
    for voter, spec in begun:
        sides.setdefault(spec, []).append(voter)
    votes = {spec: sum(one.active for one in side) for spec, side in sides.items()}

    def weight(spec: tuple[bytes, int]) -> tuple[int, int, tuple[bool, int]]:
        side = sides[spec]
        return -votes[spec], -len(side), min((not one.active, one.slot) for one in side)

    best = min(sides, key=weight)
    return best, votes[best] - max((votes[one] for one in sides if one != best), default=0)


def odd_ones(
    voters: Mapping[int, Voter], reports: Mapping[int, Mapping[str, Any]]
) -> tuple[dict[int, tuple[int, int, int]], bool]:
    """Peer -> (tag, seq, a peer that fits) for each that has begun a round with a specification
    that does not stand; and whether no active peer that has not begun yet could turn it."""
    begun: dict[tuple[int, int], list[tuple[Voter, tuple[bytes, int]]]] = {}
    for peer in sorted(voters.keys() & reports.keys()):
        for entry in reports[peer]["rounds"]:
            if entry["begun"]:
                key = entry["tag"], entry["seq"]
                begun.setdefault(key, []).append((voters[peer], specification(entry)))
    active = sum(voter.active for voter in voters.values())
    odd: dict[int, tuple[int, int, int]] = {}
    sure = True
    for key, votes in sorted(begun.items()):
        best, lead = stands(votes)
        fits = min((voter for voter, spec in votes if spec == best), key=lambda one: one.slot)
        losers = [voter.peer for voter, spec in votes if spec != best]
        odd |= {peer: (*key, fits.peer) for peer in losers}
        missing = active - sum(voter.active for voter, _ in votes)
        sure &= not losers or missing == 0 or lead > missing
    return odd, sure


def hear(c: Coordinator, accuser: RecordMember, said: m.Suspect, now: float) -> None:
    """A word about another, or about the accuser itself: the view runs something else."""
    accused = c.members().get(said.who)
    if accused is None or c.doubtful is not None:
        return
    if accused is accuser:
        goes, others = accuser, "the others"
    else:
        stays, goes = sorted((accuser, accused), key=lambda one: (not one.active, one.slot))
        others = c.name(stays.peer)
    reason = f"{REASON} {others} (round {said.tag}/{said.seq}: {said.detail})"
    c.doubtful = Doubtful(now + WAIT_S, goes.peer, reason)
    pair = "the others" if accused is accuser else c.name(accused.peer)
    text = f"round {said.tag}/{said.seq}, {c.name(accuser.peer)} and {pair}: {said.detail}"
    c.log("misfit", text, now)


def judge(c: Coordinator, reports: Mapping[int, Mapping[str, Any]], now: float) -> None:
    """Leaves out who does not fit, before a plan is made from the reports. Who goes by what its
    own report shows goes for good: once more would end the same."""
    here = {key: one for key, one in c.members().items() if key not in c.out}
    voters = {key: Voter(key, one.slot, one.active) for key, one in here.items()}
    odd, sure = odd_ones(voters, reports)
    due = c.doubtful is not None and now >= c.doubtful.due_s
    if odd and (sure or due):
        for peer, (tag, seq, fits) in odd.items():
            reason = f"{REASON} {c.name(fits)} (round {tag}/{seq}: it runs another specification)"
            c.leave_out(peer, "misfit", reason, now)
    elif not odd and due:
        assert c.doubtful is not None
        c.leave_out(c.doubtful.goes, "unfit", c.doubtful.reason, now)
    c.doubtful = None  # the next view hears of it again
