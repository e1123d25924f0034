"""Judges a history: a stream of plain dicts, from the simulator or from real processes' JSONL.

It knows no protocol and trusts nobody's word but what peers did. Events (key `ev`) and their keys:

    persist   generation view members [slow]      the record is durable; slow: observing peers that
              were active and slow, and have not been active since
    install   peer generation view members held    members: [[peer, slot, active], ...];
              held: {tag: last round whose effect or result the peer has} for tags with state
    begin     peer generation tag seq give            give: what it contributes, None for a skip
    return    peer view generation tag seq digest chunks
              chunks: [[contributors (peers), value], ...]; wait() returned
              it as stable
    state     peer view generation tag version digest seq    after the result of round `seq` was
              applied, or (seq None, or not there) after a fetch or an adoption
    passed    peer tag seq excused         a stable result of a round begun here is not applied;
              excused: a round before it was lost, or the peer was not active
    value     peer view generation tag seq chunk digest   took a chunk's result from another peer,
              or holds one when it is frozen
    stale     peer text                    took a frame of a view that is over
    complain  peer text                    the engine named another peer, or itself, without cause

`Violation` says which promise broke. Agreement is promised among peers that stay in the view's
lineage: who is not a member of the newest view concerned is out of it (V11).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Event = dict[str, Any]


class Violation(AssertionError):
    def __init__(self, rule: str, text: str) -> None:
        super().__init__(f"{rule}: {text}")
        self.rule = rule


@dataclass
class Said:
    """One peer's word on a value that must be unique."""

    peer: int
    view: int
    digest: Any


@dataclass
class Checker:
    # (tag, what the contributors gave, chunk) -> the value the chunk must have
    expect: Callable[[int, list[Any], int], Any] | None = None
    check_persist: bool = True  # real histories may lack the coordinator's side
    members: dict[int, dict[int, bool]] = field(default_factory=dict)  # view -> peer -> active
    generation: dict[int, int] = field(default_factory=dict)  # view -> generation
    durable: set[int] = field(default_factory=set)
    installed: dict[int, int] = field(default_factory=dict)  # peer -> view
    was_active: set[int] = field(default_factory=set)
    given: dict[tuple[int, int, int], Any] = field(default_factory=dict)
    returned: dict[tuple[int, int, int], list[Said]] = field(default_factory=dict)
    states: dict[tuple[int, int, int], list[Said]] = field(default_factory=dict)
    contains: dict[tuple[int, int], int] = field(default_factory=dict)  # peer, tag -> version
    # (generation, tag, seq, chunk) -> digest -> peer -> view in which it took it
    # (generation, tag) -> peer -> view -> last round it returned in that view
    values: dict[tuple[int, int, int, int], dict[str, dict[int, int]]] = field(default_factory=dict)
    last_returned: dict[tuple[int, int], dict[int, dict[int, int]]] = field(default_factory=dict)
    # the same key, digest and peer -> view with which the value was given up
    given_up: dict[tuple[Any, ...], int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def take(self, event: Event) -> None:
        kind = event["ev"]
        self.counts[kind] = self.counts.get(kind, 0) + 1
        getattr(self, "_" + kind)(event)

    def _fail(self, rule: str, text: str) -> None:
        raise Violation(rule, text)

    # --- views

    def _view(self, event: Event) -> dict[int, bool]:
        view, roles = event["view"], {row[0]: bool(row[2]) for row in event["members"]}
        if self.members.setdefault(view, roles) != roles:
            self._fail("one-view", f"view {name(view)} has two memberships")
        if self.generation.setdefault(view, event["generation"]) != event["generation"]:
            self._fail("one-view", f"view {name(view)} is in two generations")
        return roles

    def _persist(self, event: Event) -> None:
        if self.durable and event["view"] < max(self.durable):
            self._fail("epochs", f"view {name(event['view'])} after {name(max(self.durable))}")
        roles = self._view(event)
        self.durable.add(event["view"])
        self._give_up(event, roles, set(event.get("slow", ())))

    def _install(self, event: Event) -> None:
        peer, view = event["peer"], event["view"]
        roles = self._view(event)
        if peer not in roles:
            self._fail("membership", f"{peer:x} installed {name(view)}, which it is not in")
        if view <= self.installed.get(peer, 0):
            self._fail("epochs", f"{peer:x} went back to {name(view)}")
        if self.check_persist and view not in self.durable:
            self._fail("durable", f"{peer:x} installed {name(view)}, which is in no record")
        self.installed[peer] = view
        if roles[peer]:
            self.was_active.add(peer)
            self._holds_all(event, roles)

    def _holds_all(self, event: Event, roles: dict[int, bool]) -> None:
        """An active peer holds every round that a member of its view has returned (P5)."""
        for tag, held in event["held"].items():
            returned = self.last_returned.get((event["generation"], tag), {})
            for other in roles:
                for view, seq in returned.get(other, {}).items():
                    if view < event["view"] and seq > held:
                        self._fail(
                            "newcomer",
                            f"{event['peer']:x} is active in {name(event['view'])} holding "
                            f"{tag}/{held}; {other:x} has returned {tag}/{seq} in {name(view)}",
                        )

    # --- rounds

    def _begin(self, event: Event) -> None:
        key = (event["peer"], event["tag"], event["seq"])
        generation, _ = self.given.get(key, (-1, None))
        if generation >= event["generation"]:
            self._fail("begin", f"{event['peer']:x} begins {event['tag']}/{event['seq']} twice")
        self.given[key] = (event["generation"], event["give"])

    def _return(self, event: Event) -> None:
        peer, tag, seq, view = event["peer"], event["tag"], event["seq"], event["view"]
        generation = event["generation"]
        if peer not in self.members.get(view, {}):
            self._fail("membership", f"{peer:x} returns {tag}/{seq} in {name(view)}, not its view")
        where = f"round {tag}/{seq} (generation {generation})"
        self._unique(
            self.returned.setdefault((generation, tag, seq), []),
            Said(peer, view, event["digest"]),
            "agreement",
            where,
        )
        last = self.last_returned.setdefault((generation, tag), {}).setdefault(peer, {})
        last[view] = max(last.get(view, -1), seq)
        for chunk, (contributors, value) in enumerate(event["chunks"]):
            if len(set(contributors)) != len(contributors):
                self._fail("counted-once", f"{where} chunk {chunk} names a contributor twice")
            strangers = [one for one in contributors if one not in self.was_active]
            if strangers:
                self._fail("membership", f"{where} chunk {chunk} contains {strangers[0]:x}")
            if self.expect is None:
                continue
            given = [self.given.get((one, tag, seq), (0, None))[1] for one in contributors]
            if None in given:
                self._fail("counted-once", f"{where} chunk {chunk} counts who gave nothing")
            expected = self.expect(tag, given, chunk)
            if value != expected:
                self._fail(
                    "counted-once",
                    f"{where} chunk {chunk} is {value}, its contributors make {expected}",
                )

    def _state(self, event: Event) -> None:
        """Results are applied one after the other, without a gap, whatever the state's digest."""
        place, seq = (event["peer"], event["tag"]), event.get("seq")
        before = self.contains.get(place, 0)
        if seq is not None and not before == seq == event["version"] - 1:
            self._fail(
                "gap",
                f"{event['peer']:x} applies round {event['tag']}/{seq} to version {before} and has"
                f" version {event['version']}",
            )
        self.contains[place] = event["version"]
        key = (event["generation"], event["tag"], event["version"])
        self._unique(
            self.states.setdefault(key, []),
            Said(event["peer"], event["view"], event["digest"]),
            "state",
            f"state of tag {event['tag']} at version {event['version']}",
        )

    def _passed(self, event: Event) -> None:
        peer, tag, seq = event["peer"], event["tag"], event["seq"]
        before = self.contains.get((peer, tag), 0)
        if seq == before or (seq > before and not event["excused"]):
            self._fail("passed-over", f"{peer:x} drops round {tag}/{seq} at version {before}")

    def _unique(self, said: list[Said], new: Said, rule: str, what: str) -> None:
        for old in said:
            if old.digest == new.digest:
                continue
            roles = self.members[max(old.view, new.view)]
            if old.peer in roles and new.peer in roles:
                self._fail(
                    rule,
                    f"{what}: {old.peer:x} in {name(old.view)} and {new.peer:x} in "
                    f"{name(new.view)} differ",
                )
        if not any(old.peer == new.peer and old.digest == new.digest for old in said):
            said.append(new)

    def _value(self, event: Event) -> None:
        """R1: one value for a chunk among the live peers of a view and its successors."""
        key = (event["generation"], event["tag"], event["seq"], event["chunk"])
        if event["view"] < self.given_up.get((*key, event["digest"], event["peer"]), 0):
            return  # it has not heard of it yet
        digests = self.values.setdefault(key, {})
        digests.setdefault(event["digest"], {})[event["peer"]] = event["view"]
        roles = self.members[event["view"]]
        for digest, holders in digests.items():
            for holder, view in holders.items():
                if digest != event["digest"] and holder in roles and view <= event["view"]:
                    self._fail(
                        "one-value",
                        f"chunk {key[3]} of round {key[1]}/{key[2]} is made again in "
                        f"{name(event['view'])} although {holder:x} has it since {name(view)}",
                    )

    def _give_up(self, event: Event, roles: dict[int, bool], slow: set[int]) -> None:
        """A value that no member holds but slow observers, of a round that no member has returned,
        may be made again: they must drop it with this view."""
        for key, digests in self.values.items() if slow else ():
            said = self.returned.get(key[:3], [])
            if key[0] != event["generation"] or any(one.peer in roles for one in said):
                continue
            for digest, holders in digests.items():
                here = roles.keys() & holders.keys()
                if here <= slow:
                    for one in here:
                        del holders[one]
                        self.given_up[(*key, digest, one)] = event["view"]

    def _stale(self, event: Event) -> None:
        self._fail("stale", f"{event['peer']:x} {event['text']}")

    def _complain(self, event: Event) -> None:
        self._fail("complaint", f"{event['peer']:x}: {event['text']}")


def name(view: int) -> str:
    return f"{view >> 32}.{view & 0xFFFFFFFF}"
