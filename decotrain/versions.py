"""Which rounds' effects the application's shared state contains, and what to do about the others.

Pure bookkeeping: the communicator carries it out on tensors, the simulator on a model of them. A
tag's version is the number of its rounds whose effect the state contains. A *void* state is not
the run's (a newcomer's, or that of a branch the run has left): it counts for nothing and is
fetched. The rules are in docs/protocol.md, "State".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# What a void state covers. Not -1: it is not where round 0 goes on from either, and results held
# since then must not make up for it.
VOID = -2


@dataclass(frozen=True)
class Step:
    """What to do next for a tag."""

    do: str  # "apply" or "discard" a missed result, "fetch" the state, "nothing"
    seq: int = -1


class Versions:
    def __init__(self, versions: Mapping[int, int]) -> None:
        self.version = dict(versions)
        self.void: dict[int, bool] = dict.fromkeys(versions, False)
        self.stable: dict[int, int] = {}  # last stable round, as the newest plan knows it
        self.handed: dict[int, int] = {}  # last round whose result the application was given
        self.view = 0

    def __repr__(self) -> str:
        tags = [
            f"{tag}: {'void' if self.void[tag] else version}/{self.stable.get(tag, -1) + 1}"
            for tag, version in self.version.items()
        ]
        return f"<{', '.join(tags)}>"

    def add(self, tag: int, version: int) -> None:
        self.version[tag], self.void[tag] = version, False
        self.handed[tag] = version - 1

    def due(self, tag: int) -> int:
        """The round whose result the application is to be given next."""
        return max(self.version.get(tag, 0), self.handed.get(tag, -1) + 1)

    def follows(self, tag: int, seq: int) -> bool:
        """May the result of a round begun here be given to the application, after those it was
        given before and has perhaps not applied yet? Not one that the state contains: the round was
        still open here when we fetched it from somebody who had the result. Not one after a gap
        either: an observer can miss rounds altogether."""
        if seq > self.due(tag):
            self.passed(tag, seq)
            return False
        return seq >= self.version[tag]

    def hand_out(self, tag: int, seq: int) -> None:
        self.handed[tag] = max(self.handed.get(tag, -1), seq)

    def updated(self, tag: int, version: int) -> None:
        """The application has brought the state to this version by itself."""
        self.version[tag] = version
        self.stable[tag] = max(self.stable.get(tag, -1), version - 1)

    def passed(self, tag: int, seq: int) -> None:
        """A round that does not follow on our state is stable: rounds before it are missing."""
        self.stable[tag] = max(self.stable.get(tag, -1), seq)

    def declared(self) -> list[tuple[int, int]]:
        """For Engine.declare: the last round each tag's state contains, or VOID."""
        return [
            (tag, VOID if self.void[tag] else version - 1)
            for tag, version in sorted(self.version.items())
        ]

    def nothing(self) -> list[tuple[int, int]]:
        """The same of a peer whose state is not the run's."""
        return [(tag, VOID) for tag in sorted(self.version)]

    def make_void(self) -> None:
        for tag in self.void:
            self.void[tag] = True

    def installed(
        self,
        view: int,
        tags: Sequence[Mapping[str, int]],
        held: Mapping[int, int],
        void: bool,
        adopt: bool,
    ) -> bool:
        """Takes note of a plan. `held` is `declared()` from before the engine took it: rounds
        after that are of the new view. False: we hold a round that the view does not know; our
        branch is void and we must come back as a newcomer (V11). With `adopt` the run goes on from
        what we hold: a state that was void becomes the run's, as after the plan's last round."""
        self.view = view
        if void:
            self.make_void()
        if adopt and any(self.void.values()):
            last = {entry["tag"]: entry["stable"] for entry in tags}
            for tag in self.version:
                self.add(tag, last.get(tag, -1) + 1)
        ahead = False
        for entry in tags:
            tag, stable = entry["tag"], entry["stable"]
            self.stable[tag] = stable
            ahead |= held.get(tag, -1) > stable and not self.void.get(tag, True)
        return not ahead

    def next(self, tag: int, missed: Sequence[int]) -> Step:
        """`missed`: rounds whose results the engine holds for us, ascending."""
        version = self.version[tag]
        if missed and (self.void[tag] or missed[0] > version):
            return Step("fetch")
        if missed:
            return Step("apply" if missed[0] == version else "discard", missed[0])
        if self.void[tag] or self.stable.get(tag, -1) >= version:
            return Step("fetch")
        return Step("nothing")

    def applied(self, tag: int, seq: int) -> None:
        assert not self.void[tag]
        assert seq == self.version[tag], f"round {seq} applied to version {self.version[tag]}"
        self.version[tag] = seq + 1
        self.stable[tag] = max(self.stable.get(tag, -1), seq)

    def fetched(self, tag: int, version: int, view: int, member: bool, frozen: bool) -> bool:
        """May state served in `view` be taken? Not after we reported: a plan made without it could
        run the last of its rounds again. Not from who is not a member any more: its branch may be
        void. A member's rounds are in every plan since `view`, because its reports were."""
        if frozen or view > self.view or not member:
            return False
        self.add(tag, version)
        return True

    def current(self) -> bool:
        """True when nothing that is known to be stable is missing."""
        return all(
            not self.void[tag] and version - 1 >= self.stable.get(tag, -1)
            for tag, version in self.version.items()
        )
