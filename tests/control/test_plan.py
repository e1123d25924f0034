"""The plan beside a dumb twin that knows one chunk at a time and no columns."""

from __future__ import annotations

import random
from typing import Any

from decotrain.control.maps import NO_SLOT, check_install, check_report, pack_words, words
from decotrain.control.plan import Candidate, make_plan, waits_for_observers

CHUNKS = 3
VIEW = (1 << 32) | 9


def draw_world(draw: random.Random) -> tuple[list[Candidate], dict[int, Any], set[int]]:
    """Reports of up to five peers about round 0/4, whose values may be of several views."""
    peers = list(range(101, 101 + draw.randint(1, 5)))
    newest = (1 << 32) | 5
    owners = [draw.randrange(len(peers)) for _ in range(CHUNKS)]
    values = [{view: draw.randrange(1, 99) for view in (3, 4, 5)} for _ in range(CHUNKS)]
    reports: dict[int, Any] = {}
    for slot, peer in enumerate(peers):
        installed = newest if draw.random() < 0.8 else newest - 1
        born = [draw.choice((0, 0, 3, 4, 5)) for _ in range(CHUNKS)]
        entry = {
            "tag": 0,
            "seq": 4,
            "spec": b"spec",
            "begun": draw.random() < 0.8,
            "skipped": 0,
            "owner": bytes(owners),
            "received": pack_words(draw.randrange(32) if o == slot else 0 for o in owners),
            "born": pack_words((1 << 32 | view) if view else 0 for view in born),
            "digest": pack_words(v.get(view, 0) for v, view in zip(values, born, strict=True)),
            "contributors": pack_words(7 if view else 0 for view in born),
        }
        covered = draw.choice((3, 3, 3, 4, 2))
        reports[peer] = check_report(
            {
                "installed": installed,
                "declared": True,
                "tags": [{"tag": 0, "state": True, "covered": covered, "stable": []}],
                "rounds": [entry] if draw.random() < 0.9 else [],
                "names": [[slot, peer]],
            }
        )
    staying = [one for one in enumerate(peers) if draw.random() < 0.8] or list(enumerate(peers))
    candidates = [Candidate(peer, slot, 1.0, True) for slot, peer in staying]
    return candidates, reports, set(peers)


def values_of(reports: dict[int, Any], chunk: int) -> dict[int, tuple[int, int]]:
    """Peer -> (born, digest) of the chunk's value, where it holds one."""
    held = {}
    for peer, report in reports.items():
        for entry in report["rounds"]:
            born, digest = words(entry["born"])[chunk], words(entry["digest"])[chunk]
            if born:
                held[peer] = (born, digest)
    return held


def test_the_plan_is_what_the_dumb_twin_says() -> None:
    draw = random.Random(3)
    seen = {"value": 0, "owner": 0, "stable": 0, "moved": 0, "late": 0}
    for _ in range(3000):
        candidates, reports, lineage = draw_world(draw)
        late = frozenset(one.peer for one in candidates if draw.random() < 0.3)
        demoted = frozenset(peer for peer in late if draw.random() < 0.8)
        plan = make_plan(VIEW, (1, 2), candidates, reports, lineage, demoted, late)
        assert not demoted & set(plan.active)
        install = check_install(plan.install)
        slots = {one.peer: one.slot for one in candidates}
        stable = max(report["tags"][0]["covered"] for report in reports.values())
        assert install["tags"] == [{"tag": 0, "stable": stable, "digest": 0}]
        for peer in plan.active:
            covered = reports[peer]["tags"][0]["covered"]
            assert covered >= stable - 1, "who lacks two rounds cannot be active"
        for peer in slots:
            if reports[peer]["tags"][0]["covered"] == stable and peer not in demoted:
                assert peer in plan.active
        fast = slots.keys() - (late - set(plan.active))
        for entry in install["rounds"]:
            assert entry["stable"] == (stable >= 4)
            for chunk in range(CHUNKS):
                compare(entry, chunk, reports, slots, plan.active, fast, seen)
    assert all(count > 100 for count in seen.values()), seen


def compare(
    entry: Any,
    chunk: int,
    reports: dict[int, Any],
    slots: dict[int, int],
    active: list[int],
    fast: set[int],
    seen: dict[str, int],
) -> None:
    held = values_of(reports, chunk)
    best = max(held.values(), default=None)
    # The same bytes are the same value, whenever they were made.
    same = [peer for peer, value in held.items() if best is not None and value[1] == best[1]]
    holders = [slots[peer] for peer in same if peer in slots]
    # What is held by slow observers alone is not waited for.
    alone = bool(holders) and not entry["stable"] and not fast & set(same)
    seen["late"] += alone
    if best is not None and (holders or entry["stable"]) and not alone:
        seen["stable" if entry["stable"] else "value"] += 1
        assert entry["kind"][chunk] == 1
        assert (words(entry["born"])[chunk], words(entry["digest"])[chunk]) == best
        assert words(entry["holders"])[chunk] == sum(1 << slot for slot in holders)
        return
    assert entry["kind"][chunk] == 0
    owner = entry["owner"][chunk]
    if not active:
        return
    by_slot = {slot: peer for peer, slot in slots.items()}
    assert owner != NO_SLOT
    assert by_slot[owner] in active
    received = words(entry["received"])[chunk]
    if received:
        seen["owner"] += 1
        own = next(one for one in reports[by_slot[owner]]["rounds"])
        assert received == words(own["received"])[chunk]
    else:
        seen["moved"] += 1


def test_a_round_waits_for_observers_when_no_active_peer_has_a_value_of_it() -> None:
    members = [[101, 0, True, 1.0], [102, 1, False, 1.0], [103, 2, True, 1.0]]
    holders = {4: (0b011, 0), 5: (0b001, 0b010), 6: (0, 0)}  # by round: of its two chunks
    rounds = [
        {"tag": 0, "seq": seq, "holders": pack_words(masks)} for seq, masks in holders.items()
    ]
    install = {"view": {"members": members}, "rounds": rounds}
    assert [waits_for_observers(install, 0, seq) for seq in (4, 5, 6, 7)] == [0, 1, 0, 0]
    assert not waits_for_observers(install, 1, 5)
