"""How a view is made: FREEZE, reports, plan, record, INSTALL. The second half of Coordinator.

Pure like coordinator.py, whose state it reads and writes (one object in two files: a view change
needs to know everybody). The rules V1..V12 it keeps are in docs/protocol.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from decotrain.control import messages as m
from decotrain.control import misfits
from decotrain.control.ownership import Ownership
from decotrain.control.plan import (
    Candidate,
    Plan,
    advance,
    complete,
    contradicts,
    coverage,
    make_plan,
    slots_in_use,
    stateful,
)
from decotrain.control.rebuild import rebuild
from decotrain.control.record import RecordMember
from decotrain.control.roster import settle_s
from decotrain.control.slots import give_slots

if TYPE_CHECKING:
    from decotrain.control.coordinator import Coordinator

SETTLE_S = 0.5  # at most, before observers are frozen after the active peers
_GOES_FOR_GOOD = ("left", "kicked", "misfit")  # who does not come back by itself
_NOT_BELIEVED = ("diverged", "unfit", "misfit", "void")  # whose report no plan is made from
_ASKED_LAST = ("heard", "unfit", "stuck", "diverged", "misfit", "kicked", "left")  # if need be
_NOT_ASKED = ("exited", "kicked", "diverged", "unfit", "misfit", "void")


@dataclass
class _Freeze:
    number: tuple[int, int]
    targets: set[int]
    started_s: float
    deadline_s: float
    sent_s: float
    # An observer that wants to be active must not miss what the active peers settled just before
    # they froze: it is frozen after them, when that has had time to arrive.
    all_asked: bool
    settle_s: float  # at least
    ask_s: float | None = None  # when
    reports: dict[int, dict[str, Any]] = field(default_factory=dict)
    generation: int = 0  # highest that a report is of: our record may have been lost since


@dataclass
class _Installing:
    view: int
    messages: dict[int, m.Install]
    started_s: float
    sent_s: float
    pushing: bool = True


class Changes:
    def __init__(self, coordinator: Coordinator) -> None:
        self.c = coordinator
        self.number = 0  # of FREEZEs in this term
        self.freeze: _Freeze | None = None
        self.installing: _Installing | None = None
        self.ownership = Ownership(coordinator)
        self.calm_s = 0.0  # no joins or promotions before

    def busy(self) -> bool:
        return self.freeze is not None

    def phase(self) -> str:
        if self.c.lost_s is not None:
            return "rebuilding"
        if self.freeze is not None:
            return "freezing"
        if self._lacking():
            return "installing"
        if self.c.record.view == 0:
            return "waiting"
        return "recovering" if self.c.recovering else "steady"

    def report(self, message: m.Report, now: float) -> None:
        freeze = self.freeze
        if freeze is None or tuple(message.freeze) != freeze.number:
            return
        known = message.peer in self.c.members() or self.c.peers[message.peer].hello.view
        if message.report["installed"] and not known:
            # An old hello, a view that is in no record: what it holds speaks of that view's slots.
            self.c.send(message.peer, m.AskHello(self.c.record.run, freeze.number[0], message.peer))
        elif message.peer in freeze.targets:
            freeze.reports[message.peer] = message.report
            freeze.generation = max(freeze.generation, message.generation)
            if self.c.out.get(message.peer, ("",))[0] == "silent":
                del self.c.out[message.peer]  # V10: a suspect that answers is none

    def advance(self, now: float) -> None:
        c = self.c
        if c.lost_s is not None:
            rebuild(c, now)
        if self.freeze is None and self._due(now):
            self._begin(now)
        if self.freeze is not None:
            self._collect(self.freeze, now)
        if self.installing is not None:
            self._push(self.installing, now)

    # --- when

    def _due(self, now: float) -> bool:
        c = self.c
        if c.lost_s is not None:
            return False
        if c.record.view == 0:
            return len(c.ready()) >= c.min_peers()
        if c.recovering:
            assert c.started_s is not None
            away = [key for key in c.members() if key not in c.peers and key not in c.out]
            if away and now - c.started_s < c.options.recover_s:
                return False
            return bool(c.ready())
        if not (c.out or c.demoted):
            c.due_s = None  # the suspect was only slow
        elif c.due_s is None or now >= c.due_s:
            return True
        if c.doubtful is not None and now >= c.doubtful.due_s:
            return True
        if self._lacking() or now < self.calm_s:
            return False
        members = c.members()
        return (
            bool(self._promotable(now))
            or any(key not in members and peer.hello.ready for key, peer in c.peers.items())
            or self.ownership.due(now)
        )

    def _promotable(self, now: float) -> list[int]:
        c = self.c
        return [
            member.peer
            for member in c.record.members
            if not member.active
            and (peer := c.peers.get(member.peer)) is not None
            and peer.current
            and peer.view == c.record.view
            and now >= peer.promote_after_s
        ]

    # --- FREEZE

    def _begin(self, now: float) -> None:
        c = self.c
        for key in c.members():
            if key not in c.peers:
                c.leave_out(key, "silent", "not heard since the coordinator started", now)
        c.recovering, c.due_s, self.installing = False, None, None
        self.number += 1
        self.freeze = _Freeze(
            number=(c.record.term, self.number),
            targets=c.members().keys() | c.ready(),
            started_s=now,
            deadline_s=max(now + c.options.report_timeout_s, c.patient_until_s),
            sent_s=now,
            all_asked=not self._promotable(now),
            settle_s=settle_s(c.peers[key] for key in self._promotable(now)),
        )
        self._send_freeze(self.freeze)

    def _send_freeze(self, freeze: _Freeze) -> None:
        c = self.c
        members = c.members()
        for key in sorted(freeze.targets - freeze.reports.keys()):
            if not (freeze.all_asked or (key in members and members[key].active)):
                continue
            if c.out.get(key, ("",))[0] not in _NOT_ASKED:
                c.send(key, m.Freeze(c.record.run, list(freeze.number)))

    def _collect(self, freeze: _Freeze, now: float) -> None:
        c = self.c
        members = c.members()
        freeze.targets &= members.keys() | c.peers.keys()
        waiting = {
            key
            for key in freeze.targets - freeze.reports.keys()
            if c.out.get(key, ("left",))[0] == "left"
        }
        actives = any(key in members and members[key].active for key in waiting)
        patient = now < (freeze.started_s + freeze.deadline_s) / 2
        if freeze.ask_s is None and not (actives and patient):
            freeze.ask_s = now + min(SETTLE_S, max(freeze.settle_s, now - freeze.started_s))
        if not freeze.all_asked and freeze.ask_s is not None and now >= freeze.ask_s:
            freeze.all_asked = True
            self._send_freeze(freeze)
        anchored = any(self._anchors(freeze, member) for member in members.values())
        late = now >= freeze.deadline_s
        if (not waiting or late) and (anchored or c.record.view == 0):
            for key in sorted(waiting):
                c.leave_out(key, "silent", "no report after a freeze", now)
            if self._plan(freeze, now):
                return
            self._widen(freeze, now)
        elif not waiting or late:
            # No active peer has answered: ask suspects too, and in the end go on without (V10).
            self._widen(freeze, now)
            hopeless = all(
                c.out.get(member.peer, ("",))[0] in _NOT_ASKED
                for member in members.values()
                if member.active
            )
            patient = now - freeze.started_s < c.options.generation_s
            if (hopeless or not patient) and self._new_generation(freeze, now):
                return
        if now - freeze.sent_s >= c.options.resend_s:
            freeze.sent_s = now
            self._send_freeze(freeze)

    def _widen(self, freeze: _Freeze, now: float) -> None:
        """Nobody can be active: asks who has come meanwhile, keeps whom it meant to leave out."""
        c = self.c
        if c.ready() - freeze.targets:
            freeze.targets |= c.ready()
            freeze.deadline_s = now + c.options.report_timeout_s
        for key in [key for key, (kind, _) in c.out.items() if kind in _ASKED_LAST]:
            if key in c.peers:
                del c.out[key]

    def _anchors(self, freeze: _Freeze, member: RecordMember) -> bool:
        """An active peer of the recorded view knows every round that is stable."""
        kind = self.c.out.get(member.peer, ("",))[0]
        return member.active and member.peer in freeze.reports and kind not in _NOT_BELIEVED

    # --- the plan

    def _plan(self, freeze: _Freeze, now: float) -> bool:
        c = self.c
        members = c.members()
        if c.record.view == 0:
            if len(freeze.reports.keys() & c.peers.keys() - c.out.keys()) < c.min_peers():
                self.freeze = None  # somebody left while we asked: wait for the barrier again
                return True
            here = {
                key: report
                for key, report in freeze.reports.items()
                if key in c.peers and key not in c.out
            }
            lineage = self._most_advanced(here)[1]
            base = lineage
        else:
            base = set()
            misfits.judge(c, freeze.reports, now)
            lineage = {
                key
                for key in freeze.reports
                if key in members and c.out.get(key, ("",))[0] not in _NOT_BELIEVED
            }
        candidates = self._candidates(freeze.reports, set(freeze.reports))
        if not candidates:
            heard = any(kind == "heard" for kind, _ in c.out.values())  # to be asked last
            if c.record.view == 0 or heard or c.ready() - c.out.keys():
                return False
            self._record_empty(freeze, now)
            return True
        # Newcomers with state fetch it first: what the run starts from need not be theirs.
        void = frozenset(
            key
            for key, peer in c.peers.items()
            if key not in base
            and (peer.void or (key not in lineage and stateful(freeze.reports.get(key))))
        )
        plan = self._make(freeze, candidates, lineage, void | c.demoted.keys())
        if not plan.active and c.demoted:
            plan = self._make(freeze, candidates, lineage, void)
        if not plan.active:
            return self._new_generation(freeze, now)
        self._install(freeze, candidates, plan, c.record.generation, now)
        return True

    def _new_generation(self, freeze: _Freeze, now: float) -> bool:
        """From the most advanced peer that lives. Agreement starts anew."""
        c = self.c
        here = c.peers.keys() - c.out.keys()
        reports = {key: report for key, report in freeze.reports.items() if key in here}
        if not reports:
            return False
        survivors = any(report["installed"] for report in reports.values())
        if not survivors and len(reports) < c.min_peers():
            return False
        base, lineage = self._most_advanced(reports)
        newcomers = {key for key, report in reports.items() if not report["installed"]}
        candidates = self._candidates(reports, lineage | newcomers)
        void = frozenset(key for key in newcomers - lineage if stateful(reports[key]))
        plan = self._make(freeze, candidates, lineage, void, renew=True)
        if not plan.active:
            return False
        for key in sorted(reports.keys() - lineage - newcomers):
            c.leave_out(key, "void", "its branch is not the one the run goes on from", now)
        rounds = ", ".join(
            f"{tag}/{seq}" for tag, seq in sorted(coverage(reports[base]).items())[:8]
        )
        number = 1 + max(c.record.generation, freeze.generation)
        text = f"{number}: no active peer is left; goes on from {c.name(base)}"
        c.log("generation", f"{text}, last rounds held: {rounds or 'none'}", now)
        self._install(freeze, candidates, plan, number, now)
        return True

    def _most_advanced(self, reports: Mapping[int, dict[str, Any]]) -> tuple[int, set[int]]:
        """The base of a generation and all peers that hold exactly the same."""
        peers = self.c.peers
        base = max(sorted(reports), key=lambda key: (not peers[key].void, advance(reports[key])))
        if peers[base].void or (reports[base]["installed"] and not complete(reports[base])):
            return base, {base}  # what it holds is not told by its report
        same = {
            key
            for key, report in reports.items()
            if not peers[key].void
            and coverage(report) == coverage(reports[base])
            and report["installed"] == reports[base]["installed"]
            and not contradicts(report, reports[base])
        }
        return base, same

    def _candidates(self, reports: Mapping[int, dict[str, Any]], able: set[int]) -> list[Candidate]:
        c = self.c
        members = c.members()
        taken = slots_in_use(reports) | sum(1 << member.slot for member in members.values())
        here = sorted(
            (key for key in able if key in reports and key in c.peers and key not in c.out),
            key=lambda key: (key not in members, self._joined(key)),
        )
        wishes = {key: c.peers[key].hello.slot for key in here if key not in members}
        given = give_slots(wishes, taken, c.record.slots_used)
        candidates = []
        for key in here:
            was = members.get(key)
            slot = was.slot if was else given.get(key)
            if slot is not None:  # else it waits for a slot
                candidates.append(Candidate(key, slot, 0.0, bool(was and was.active), bool(was)))
        return self.ownership.give(candidates)

    def _joined(self, key: int) -> tuple[float, int]:
        peer = self.c.peers.get(key)
        return (peer.joined_s if peer else 0.0, key)

    def _make(
        self,
        freeze: _Freeze,
        candidates: list[Candidate],
        lineage: set[int],
        demoted: frozenset[int],
        renew: bool = False,
    ) -> Plan:
        record = self.c.record
        late = frozenset(self.c.demoted) | {key for key, peer in self.c.peers.items() if peer.slow}
        view = record.term << 32 | record.epoch + 1
        reports = {
            key: report
            for key, report in sorted(freeze.reports.items())
            if key in lineage or any(one.peer == key for one in candidates)
        }
        return make_plan(view, freeze.number, candidates, reports, lineage, demoted, late, renew)

    # --- INSTALL

    def _record_empty(self, freeze: _Freeze, now: float) -> None:
        """Everybody left: the run sleeps until somebody comes."""
        self._settle([], set(), self.c.record.generation, now)
        self.c.log("view", "nobody is left in the run", now)
        self.freeze = None

    def _settle(
        self, candidates: list[Candidate], active: set[int], generation: int, now: float
    ) -> None:
        """Writes the view to the record, before anybody hears of it."""
        c = self.c
        members = []
        for one in sorted(candidates, key=lambda one: one.slot):
            hello = c.peers[one.peer].hello
            members.append(
                RecordMember(
                    peer=one.peer,
                    slot=one.slot,
                    active=one.peer in active,
                    share=one.share,
                    name=hello.name,
                    host=hello.host,
                    launch=hello.launch,
                    addresses=hello.addresses,
                    key=hello.key,
                )
            )
        stay = {member.slot for member in members}
        freed = [member.slot for member in c.record.members if member.slot not in stay]
        used = [slot for slot in c.record.slots_used if slot not in freed] + freed
        before = c.members()
        c.persist(
            replace(
                c.record,
                generation=generation,
                epoch=c.record.epoch + 1,
                view=c.record.term << 32 | c.record.epoch + 1,
                members=tuple(members),
                slots_used=tuple(used),
            )
        )
        for key in sorted((before.keys() | c.out.keys()) - {member.peer for member in members}):
            kind, reason = c.out.pop(key, ("silent", "did not answer"))
            again = kind not in _GOES_FOR_GOOD
            c.gone.add(key, reason, again)
            c.peers.pop(key, None)
            c.send(key, m.Evicted(c.record.run, key, reason, again))
        c.demoted.clear()

    def _install(
        self,
        freeze: _Freeze,
        candidates: list[Candidate],
        plan: Plan,
        generation: int,
        now: float,
    ) -> None:
        c = self.c
        active = set(plan.active)
        for peer in (c.peers[key] for key in c.demoted if key in c.peers):
            peer.slow, peer.promote_after_s = True, now + c.options.promote_retry_s
        self._settle(candidates, active, generation, now)
        for conflict in plan.conflicts:
            c.log("conflict", conflict, now)
        contacts = [
            {
                "peer": member.peer,
                "name": member.name,
                "host": member.host,
                "addresses": member.addresses,
                "key": b"",  # the shell knows the token
            }
            for member in c.record.members
        ]
        message = m.Install(c.record.run, generation, plan.install, contacts)
        self.freeze = None
        self.installing = _Installing(
            c.record.view, {one.peer: message for one in candidates}, now, now
        )
        for one in candidates:
            c.send(one.peer, message)
            peer = c.peers[one.peer]
            peer.tried(one.peer in active, now + c.options.promote_retry_s)
            if one.peer not in active and not one.was_member:
                peer.void = True  # until it says that it has fetched
        c.log(
            "view",
            f"{c.record.term}.{c.record.epoch}: {len(active)} active, "
            f"{len(candidates) - len(active)} observing, {len(plan.install['rounds'])} open rounds",
            now,
        )

    def _lacking(self) -> list[int]:
        """Members that have not installed the view."""
        installing, c = self.installing, self.c
        if installing is None:
            return []
        return [
            key
            for key in sorted(installing.messages)
            if key in c.peers and c.peers[key].view < installing.view and key not in c.out
        ]

    def _push(self, installing: _Installing, now: float) -> None:
        """INSTALL until acknowledged (V7), also to who was silent and is heard again."""
        c = self.c
        waiting = self._lacking()
        if not waiting:
            if installing.pushing:
                installing.pushing = False
                self.calm_s = now + c.options.calm_s
            return
        if not installing.pushing:
            installing.pushing, installing.started_s = True, now
        if now - installing.started_s > c.options.install_timeout_s:
            for key in waiting:
                c.leave_out(key, "stuck", "does not install the view", now)
        elif now - installing.sent_s >= c.options.resend_s:
            installing.sent_s = now
            for key in waiting:
                c.send(key, installing.messages[key])
