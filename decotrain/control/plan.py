"""From the reports of frozen peers to the plan of the next view: a pure function.

What it decides: which rounds are stable, who is active, and for each chunk of each open round
either the value that stands or its owner. It sees reports only (V2): nothing that was promised
before the FREEZE, and no earlier plan. Who is in the view, and with which slot, is the
coordinator's decision. The maps are those of docs/protocol.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from decotrain.control.maps import NO_SLOT, ahead, pack_words, words
from decotrain.control.misfits import Voter, specification, stands

Key = tuple[int, int]  # tag, seq


@dataclass(frozen=True)
class Candidate:
    """A peer of the next view."""

    peer: int
    slot: int
    share: float
    was_active: bool = False  # in the recorded view
    was_member: bool = False


@dataclass
class Plan:
    install: dict[str, Any]
    active: list[int]  # peers
    conflicts: list[str] = field(default_factory=list)  # what should not happen, in words


@dataclass
class _Source:
    """One report that counts, its columns unpacked when first asked for."""

    peer: int
    slot: int | None  # of the next view; None: not in it
    report: Mapping[str, Any]
    rounds: dict[Key, dict[str, Any]]

    def column(self, key: Key, name: str) -> Any:
        entry = self.rounds[key]
        unpacked = entry.get("_" + name)
        if unpacked is None:
            raw = entry[name]
            unpacked = entry["_" + name] = raw if name == "owner" else words(raw)
        return unpacked


def make_plan(
    view_id: int,
    answers: tuple[int, int],
    candidates: list[Candidate],
    reports: Mapping[int, Mapping[str, Any]],  # by peer
    lineage: set[int],  # peers whose report says something about rounds; others are newcomers
    demoted: frozenset[int] = frozenset(),  # observing whatever they report: slow, or void state
    late: frozenset[int] = frozenset(),  # nobody waits for what only slow observers hold
    renew: bool = False,  # a new generation: rounds that its base does not cover are lost
) -> Plan:
    candidates = sorted(candidates, key=lambda candidate: candidate.slot)
    assert all(candidate.peer in reports for candidate in candidates)
    assert len({candidate.slot for candidate in candidates}) == len(candidates)
    plan = Plan(install={}, active=[])
    sources = _sources(candidates, reports, lineage)
    stable, digests = _stable_rounds(sources, renew, plan)
    rounds = _open_rounds(sources, {one.peer for one in candidates if one.was_active}, plan)
    for key in _beyond(rounds, stable, renew):
        del rounds[key]  # it was begun on rounds that are lost with the old generation
    values = {key: _values(key, entry, sources, plan) for key, entry in rounds.items()}
    for key in [key for key in rounds if key[1] <= stable[key[0]]]:
        if any(value is None for value in values[key]):  # its bytes are gone: who lacks it lost it
            del rounds[key], values[key]
    by_peer = {source.peer: source for source in sources}
    for candidate in candidates:
        if candidate.peer in demoted:
            continue
        source = by_peer.get(candidate.peer)
        report = reports[candidate.peer]
        if not candidate.was_active and source is not None:
            source = replace(source, rounds={})  # what it holds may be of a branch since redone
        if all(_covers(report, source, tag, stable[tag], values, digests) for tag in stable):
            plan.active.append(candidate.peer)
    owners = _Owners([one for one in candidates if one.peer in plan.active], sources)
    reported = late_slots = 0
    active = frozenset(plan.active)
    for candidate in candidates:
        reported |= 1 << candidate.slot
        late_slots |= (candidate.peer in late - active) << candidate.slot
    plan.install = {
        "view": {
            "id": view_id,
            "members": [
                [one.peer, one.slot, one.peer in plan.active, one.share] for one in candidates
            ],
        },
        "answers": list(answers),
        "reported": reported,
        "tags": [
            {"tag": tag, "stable": stable[tag], "digest": digests.get((tag, stable[tag]), 0)}
            for tag in sorted(stable)
        ],
        "rounds": [
            {
                **_round_plan(
                    key, rounds[key], values[key], key[1] <= stable[key[0]], late_slots, owners
                ),
                "round_digest": digests.get(key, 0) if key[1] <= stable[key[0]] else 0,
            }
            for key in sorted(rounds)
        ],
        "names": _names(sources),
    }
    return plan


def _names(sources: list[_Source]) -> list[list[int]]:
    """Whose contributions open rounds hold: they may have left before a newcomer came."""
    names: dict[int, int] = {}
    for source in sources:  # the newest view first
        for slot, peer in source.report["names"]:
            names.setdefault(slot, peer)
    return [[slot, names[slot]] for slot in sorted(names)]


def slots_in_use(reports: Mapping[int, Mapping[str, Any]]) -> int:
    """Slots that open rounds still speak of: not to be given to another peer now."""
    mask = 0
    for report in reports.values():
        for entry in report["rounds"]:
            mask |= entry["skipped"]
            for column in ("received", "contributors"):
                for word in words(entry[column]):
                    mask |= word
    return mask


def waits_for_observers(install: Mapping[str, Any], tag: int, seq: int) -> bool:
    """Does a value of this open round have to come from who is not active?"""
    active = sum(1 << slot for _, slot, is_active, _ in install["view"]["members"] if is_active)
    return any(
        held and not held & active
        for entry in install["rounds"]
        if (entry["tag"], entry["seq"]) == (tag, seq)
        for held in words(entry["holders"])
    )


def advance(report: Mapping[str, Any]) -> tuple[int, int]:
    """How far a peer is, to choose the base of a new generation: (rounds, installed view)."""
    covered = sum(1 + tag["covered"] for tag in report["tags"] if tag["state"])
    return covered, report["installed"]


def coverage(report: Mapping[str, Any]) -> dict[int, int]:
    """Tag -> last round whose effect the peer holds, for tags that carry state."""
    return {
        tag["tag"]: tag["covered"]
        for tag in report["tags"]
        if tag["covered"] >= 0 and (tag["state"] or not report["declared"])
    }


def stateful(report: Mapping[str, Any] | None) -> bool:
    """Does the application hold state, or has it not said what it holds?"""
    if report is None:
        return True
    return not report["declared"] or any(tag["state"] for tag in report["tags"])


def complete(report: Mapping[str, Any]) -> bool:
    """Does it hold a state for every tag that carries one?"""
    return all(tag["covered"] >= 0 for tag in report["tags"] if tag["state"])


def contradicts(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """True when both remember a round with different digests."""
    known = {(tag["tag"], seq): digest for tag in other["tags"] for seq, digest in tag["stable"]}
    return any(
        known.get((tag["tag"], seq), digest) != digest
        for tag in one["tags"]
        for seq, digest in tag["stable"]
    )


def _sources(
    candidates: list[Candidate],
    reports: Mapping[int, Mapping[str, Any]],
    lineage: set[int],
) -> list[_Source]:
    slots = {candidate.peer: candidate.slot for candidate in candidates}
    sources = [
        _Source(
            peer=peer,
            slot=slots.get(peer),
            report=report,
            rounds={(entry["tag"], entry["seq"]): dict(entry) for entry in report["rounds"]},
        )
        for peer, report in reports.items()
        if peer in lineage
    ]
    # The newest view first: it knows best who owns what. Then a fixed order.
    sources.sort(key=lambda one: (-one.report["installed"], one.slot is None, one.slot, one.peer))
    return sources


def _stable_rounds(
    sources: list[_Source], renew: bool, plan: Plan
) -> tuple[dict[int, int], dict[Key, int]]:
    """Tag -> last stable round, and digests of stable rounds that somebody remembers."""
    stable: dict[int, int] = {}
    for source in sources:
        for tag in source.report["tags"]:
            known = [] if renew and tag["state"] else [seq for seq, _ in tag["stable"]]
            last = max([tag["covered"], *known])
            stable[tag["tag"]] = max(stable.get(tag["tag"], -1), last)
        for tag_of_round, _ in source.rounds:
            stable.setdefault(tag_of_round, -1)
    digests: dict[Key, int] = {}
    for source in sources:
        for tag in source.report["tags"]:
            for seq, digest in tag["stable"]:
                if seq > stable[tag["tag"]] or digest == 0:
                    continue
                if digests.setdefault((tag["tag"], seq), digest) != digest:
                    plan.conflicts.append(f"round {tag['tag']}/{seq} is stable with two digests")
    return stable, digests


def _open_rounds(sources: list[_Source], active: set[int], plan: Plan) -> dict[Key, dict[str, Any]]:
    """Rounds the plan speaks of, each with the entry that says its specification."""
    rounds = {
        key: _speaks_for(key, [source for source in sources if key in source.rounds], active)
        for key in dict.fromkeys(key for source in sources for key in source.rounds)
    }
    for key, entry in list(rounds.items()):
        for source in sources:
            other = source.rounds.get(key)
            if other is not None and specification(entry) != specification(other):
                plan.conflicts.append(
                    f"peer {source.peer:x} runs another specification in round {key[0]}/{key[1]}"
                )
                del source.rounds[key]
        # Begun only by peers that were frozen already: nobody owns anything, a fresh round.
        knowing = [source for source in sources if key in source.rounds]
        begun = any(source.rounds[key]["begun"] for source in knowing)
        owned = any(set(source.column(key, "owner")) != {NO_SLOT} for source in knowing)
        valued = any(any(source.column(key, "born")) for source in knowing)
        if not (begun and owned) and not valued:
            del rounds[key]
    return rounds


def _speaks_for(key: Key, knowing: list[_Source], active: set[int]) -> dict[str, Any]:
    """The entry whose specification the round has: of who began it, if anybody did."""
    begun = [source for source in knowing if source.rounds[key]["begun"]]
    if not begun:
        return knowing[0].rounds[key]
    votes = [
        (
            Voter(one.peer, NO_SLOT if one.slot is None else one.slot, one.peer in active),
            specification(one.rounds[key]),
        )
        for one in begun
    ]
    best, _ = stands(votes)
    return next(one.rounds[key] for one in begun if specification(one.rounds[key]) == best)


def _beyond(
    rounds: Mapping[Key, Mapping[str, Any]], stable: Mapping[int, int], renew: bool
) -> list[Key]:
    """Rounds further after the last stable one than anybody can have begun since."""
    return [
        (tag, seq)
        for (tag, seq), entry in rounds.items()
        if seq > stable[tag] + (1 if renew else 2) + ahead(entry["spec"])
    ]


@dataclass
class _Value:
    digest: int
    born: int
    contributors: int
    holders: int  # slots of the next view
    count: int  # reports that hold it, also of peers that are not in the next view


def _values(
    key: Key, entry: Mapping[str, Any], sources: list[_Source], plan: Plan
) -> list[_Value | None]:
    """For each chunk the value that stands: born in the highest view (V2)."""
    holding = [
        (source, source.column(key, "born"), source.column(key, "digest"),
         source.column(key, "contributors"))
        for source in sources
        if key in source.rounds and any(source.column(key, "born"))
    ]  # fmt: skip
    values: list[_Value | None] = []
    for chunk in range(len(entry["owner"])):
        found: list[_Value] = []
        for source, borns, digests, contributors in holding:
            born, digest, mask = borns[chunk], digests[chunk], contributors[chunk]
            if born == 0:
                continue
            value = next(
                (one for one in found if (one.digest, one.contributors) == (digest, mask)), None
            )
            if value is None:
                value = _Value(digest, born, mask, 0, 0)
                found.append(value)
            value.born = max(value.born, born)
            value.count += 1
            if source.slot is not None:
                value.holders |= 1 << source.slot
        best = max(found, key=lambda one: (one.born, one.count, -one.digest), default=None)
        if best is not None and sum(one.born == best.born for one in found) > 1:
            plan.conflicts.append(f"round {key[0]}/{key[1]} chunk {chunk} has two values")
        values.append(best)
    return values


def _covers(
    report: Mapping[str, Any],
    source: _Source | None,  # None: a newcomer, whose state is not of this run
    tag: int,
    stable: int,
    values: Mapping[Key, list[_Value | None]],
    digests: Mapping[Key, int],
) -> bool:
    if stable < 0:
        return True
    entry = next((entry for entry in report["tags"] if entry["tag"] == tag), None)
    if report["declared"] and (entry is None or not entry["state"]):
        return True
    if source is None or entry is None:
        return False
    if entry["covered"] >= stable:
        return True
    for seq in range(entry["covered"] + 1, stable + 1):
        wanted = values.get((tag, seq))
        known = seq == stable or (tag, seq) in digests
        if (tag, seq) not in source.rounds or wanted is None or source.slot is None or not known:
            return False
        if not all(one is not None and one.holders >> source.slot & 1 for one in wanted):
            return False
    return True


class _Owners:
    """Who owns the chunks that have no value: the owner there was, or the least loaded."""

    def __init__(self, active: list[Candidate], sources: list[_Source]) -> None:
        self.sources = sources
        newest = max((source.report["installed"] for source in sources), default=0)
        self.newest = [source for source in sources if source.report["installed"] == newest]
        slots = {one.slot for one in active}
        self.stays = {one.slot: one for one in self.newest if one.slot in slots}
        self.able = [one for one in active if one.share > 0] or active
        self.load = {one.slot: 0 for one in self.able}

    def of(self, key: Key, chunk: int) -> tuple[int, int]:
        """(slot, what it has received)."""
        owners = (  # who has begun while frozen knows of none
            source.column(key, "owner")[chunk] for source in self.newest if key in source.rounds
        )
        slot = next((slot for slot in owners if slot != NO_SLOT), NO_SLOT)
        keeper = self.stays.get(slot)
        if keeper is not None:
            self.load[slot] = self.load.get(slot, 0) + 1
            has = key in keeper.rounds and keeper.column(key, "owner")[chunk] == slot
            return slot, keeper.column(key, "received")[chunk] if has else 0
        if not self.able:
            return NO_SLOT, 0
        heir = min(self.able, key=lambda one: (self.load[one.slot] + 1) / (one.share or 1.0))
        self.load[heir.slot] += 1
        return heir.slot, 0


def _stands(value: _Value | None, stable: bool, late: int) -> bool:
    """Of a round that may still be open, a value that only peers outside the new view hold is gone:
    nobody can send it. One that only late peers hold would be waited for at their pace, so it is
    made anew: nobody alive has returned the round, because the others lack it."""
    return value is not None and (stable or value.holders & ~late != 0)


def _round_plan(
    key: Key,
    entry: Mapping[str, Any],
    values: list[_Value | None],
    stable: bool,
    late: int,  # slots
    owners: _Owners,
) -> dict[str, Any]:
    kinds, slots = bytearray(), bytearray()
    columns: dict[str, list[int]] = {
        name: [] for name in ("received", "born", "digest", "holders", "contributors")
    }
    for chunk, value in enumerate(values):
        slot, received = NO_SLOT, 0
        if not _stands(value, stable, late):
            value = None
        if value is None:
            slot, received = owners.of(key, chunk)
        kinds.append(0 if value is None else 1)
        slots.append(slot)
        columns["received"].append(received)
        columns["born"].append(value.born if value else 0)
        columns["digest"].append(value.digest if value else 0)
        columns["holders"].append(value.holders if value else 0)
        columns["contributors"].append(value.contributors if value else 0)
    return {
        "tag": key[0],
        "seq": key[1],
        "spec": entry["spec"],
        "stable": stable,
        "kind": bytes(kinds),
        "owner": bytes(slots),
        **{name: pack_words(column) for name, column in columns.items()},
    }
