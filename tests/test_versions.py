"""Versions: which plan says that what we hold is of another branch."""

from __future__ import annotations

from decotrain.versions import Versions

PLAN = [{"tag": 0, "stable": 9}]


def test_a_round_that_the_plan_did_not_know_is_of_another_branch() -> None:
    versions = Versions({0: 11})
    versions.mark()
    assert not versions.installed(5, PLAN, False, False)


def test_a_round_that_the_plan_completed_is_none() -> None:
    """A thread applies it between the engine's install and the note of it."""
    versions = Versions({0: 10})
    versions.mark()
    versions.applied(0, 10)
    assert versions.installed(5, PLAN, False, False)
    assert versions.next(0, []).do == "nothing"
    versions.mark()
    assert versions.installed(6, [{"tag": 0, "stable": 10}], False, False)
