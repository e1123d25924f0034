"""Shared state of one peer: registered fragments, their versions, and how they catch up.

What to do is decided by decotrain/versions.py, bytes are served and fetched by the core's Node.
Versions and what the engine is told of them change on the control thread only, where no FREEZE can
come in between; tensors are written by the trainer's thread and by fetches it waits for.
"""

from __future__ import annotations

import hashlib
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from decotrain import tensors as tn
from decotrain.contribution import flat
from decotrain.control import member as mb
from decotrain.errors import RoundError, StateError, WaitTimeoutError
from decotrain.versions import VOID, Versions

if TYPE_CHECKING:
    from decotrain.communicator import Communicator
    from decotrain.rounds import Result, Work

Effect = Callable[["Result"], None]  # of one round on a tag's tensors, element by element

FETCH_PAUSE_S = 0.1  # between attempts to fetch state
FETCH_SLICE_S = 0.1  # between looks at a fetch under way
FOLLOW_SLICE_S = 0.01  # when results that come meanwhile are applied to what is there
QUIET_S = 1.0  # for the answers under way, before what is there moves
SHORTCUT_TRIES = 3  # peers to ask, when the first has not what we lack
FETCH_STALL_S = 10.0  # without a byte: asks again from the start


class Shortcut(Protocol):
    """Bytes that every peer serves, of one size, from which a newcomer may make the tensors."""

    tag: int  # under which they are served; no round has it
    buffer: Any  # contiguous uint8; written to inside `updating` of the tensors' tag

    def take(self, found: Any, seconds: float) -> int | None:
        """Another peer's buffer, and how long it took to come: makes the tensors, returns their
        version. None: it cannot be done, or a fetch of the tensors is cheaper."""


@dataclass
class Fragment:
    """The registered tensors of one tag."""

    arrays: list[Any]  # their bytes, where they lie
    bytes: int
    version: int
    effect: Effect | None
    shortcut: Shortcut | None
    kind: int  # a digest of what the tensors are: who holds others does not serve us
    void: bool = False
    mixed: bool = False  # a fetch has begun to write to the tensors, and was not completed


def kind_of(tensors: Sequence[Any], layout: str) -> int:
    """A digest of their shapes and dtypes, and of what else must be the same. Names are not in it:
    wrappers put words before them (`module.`, `_orig_mod.`)."""
    facts = [f"{list(one.shape)} {str(one.dtype).removeprefix('torch.')}" for one in tensors]
    text = "; ".join([*facts, layout])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") | 1


def misfit(tag: int, theirs_bytes: int, ours_bytes: int) -> str:
    """Why nobody can serve us."""
    if theirs_bytes == ours_bytes:
        what = f"the {ours_bytes} bytes of tag {tag} are tensors of other shapes or types"
    else:
        what = f"the state of tag {tag} has {theirs_bytes} bytes, and here {ours_bytes}"
    return (
        f"this is not the run's model: there {what}. Start this peer with the model and the outer"
        " optimizer that the others have"
    )


class SharedState:
    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.fragments: dict[int, Fragment] = {}
        self.versions = Versions({})
        self.missed: dict[int, deque[Any]] = {}  # taken from the engine, not applied yet
        # Works of rounds the caller never saw, and the owner's residual that each has spent.
        self.skipped: dict[int, list[tuple[Any, Any]]] = {}
        self.lenders: dict[int, weakref.ref[Work]] = {}  # the last work with an owner's residual
        self.ended: set[int] = set()  # tags whose missed results are of an ended generation
        self.fetches = 0
        self.fetched_bytes = 0
        self.shortcuts = 0  # taken in place of a fetch
        self.restarts = 0  # of fetches whose version moved

    def register(
        self,
        tag: int,
        tensors: Mapping[str, Any],
        version: int,
        effect: Effect | None,
        shortcut: Shortcut | None,
        layout: str = "",
    ) -> None:
        if not tensors or version < 0:
            raise StateError(f"tag {tag} needs at least one tensor and a version of at least 0")
        names = sorted(tensors)
        arrays = [tn.raw_bytes(tensors[name], f"{name} of tag {tag}") for name in names]
        total = sum(array.nbytes for array in arrays)
        kind = kind_of([tensors[name] for name in names], layout)
        fragment = Fragment(arrays, total, version, effect, shortcut, kind)
        if not fragment.bytes:
            raise StateError(f"the tensors of tag {tag} have no values")
        self.fragments[tag] = fragment
        self.versions.add(tag, version)
        self._publish(self.comm._agent.shared.node, tag, fragment)

    def _publish(self, node: Any, tag: int, fragment: Fragment) -> None:
        """Serve what is the run's state, and nothing else."""
        shortcut = fragment.shortcut
        if fragment.void:
            node.withdraw(tag)
            if shortcut is not None:
                node.withdraw(shortcut.tag)
            return
        node.publish(tag, fragment.arrays, fragment.version, fragment.kind)
        if shortcut is not None:
            node.publish(shortcut.tag, [shortcut.buffer], fragment.version, fragment.kind)

    def figures(self) -> dict[str, int]:
        """Counters, for status."""
        return {
            "fetches": self.fetches,
            "fetched_bytes": self.fetched_bytes,
            "shortcuts": self.shortcuts,
        }

    def fragment(self, tag: int) -> Fragment:
        if tag not in self.fragments:
            raise StateError(f"tag {tag} has no state: call register_state first")
        return self.fragments[tag]

    @contextmanager
    def updating(self, tag: int, version: int | None) -> Iterator[None]:
        fragment = self.fragment(tag)
        node = self.comm._agent.shared.node
        if version is None:
            version = max(fragment.version, self.versions.handed.get(tag, -1)) + 1
        tags = [tag] if fragment.shortcut is None else [tag, fragment.shortcut.tag]
        for one in tags:
            node.begin_update(one)
        try:
            yield
            fragment.version = version
        finally:
            for one in tags:
                node.end_update(one, fragment.version)
        if not self.versions.void[tag]:
            self.versions.updated(tag, version)
            # Results handed to us count as covered until the engine hears of this.
            self.comm._agent.post(lambda: self._set_covered(tag, version))

    def _set_covered(self, tag: int, version: int) -> None:
        """On the control thread."""
        if not self.versions.void[tag]:
            self.comm._agent.node.set_covered(tag, version - 1)

    # --- catching up

    def behind(self, tag: int) -> bool:
        """Our state lacks rounds: what is computed from it must not be contributed."""
        missed = [held.seq for held in self.missed.get(tag, ())]
        # A round that we skipped, after an error, moves the state though its caller has no Work.
        return bool(self.skipped.get(tag)) or self.versions.next(tag, missed).do != "nothing"

    def lent(self, tag: int, residual: Any) -> Any:
        """The owner's residual, flat; RoundError while an earlier round has yet to write it."""
        if residual is None:
            return None
        work = self.lenders[tag]() if tag in self.lenders else None
        if work is not None and work.lends():
            raise RoundError(
                f"round {work.seq} of tag {tag} has not written its owner_residual back: wait for"
                " it first, or both rounds would add the same"
            )
        return flat(residual)

    def skip(self, tag: int, work: Any, residual: Any = None) -> None:
        """A round of the core that its caller has no Work of, after an error: its result is missed,
        and `catch_up` brings it, so that no state is fetched for it."""
        self.skipped.setdefault(tag, []).append((work, residual))

    def follows(self, held: Any) -> bool:
        """May the result of a round begun here be applied to our state?"""
        if held.tag not in self.fragments or held.outcome != "stable":
            return True
        return self.versions.follows(held.tag, held.seq)

    def catch_up(
        self,
        tag: int,
        apply: Callable[[Result], None] | None,
        wait: bool,
        deadline_s: float,
        fetch: bool = True,
    ) -> int:
        comm, fragment = self.comm, self.fragment(tag)
        shared = comm._agent.shared
        while True:
            comm._check_over()
            if shared.view:
                step = self.versions.next(tag, self.take_missed(tag))
                if step.do == "nothing" and not (wait and self.skipped.get(tag)):
                    break
                if step.do == "discard" or (step.do == "apply" and apply is not None):
                    held = self.missed[tag].popleft()
                    if step.do == "apply" and apply is not None:
                        self._apply(fragment, held, apply)
                    continue
                before = -1 if self.versions.void[tag] else fragment.version
                lacking = fetch and step.do != "nothing"
                if lacking and self._fetch(tag, fragment) and fragment.version > before:
                    continue  # else whoever served us has not applied its last results yet
            if not wait:
                break
            if time.monotonic() >= deadline_s:
                raise WaitTimeoutError(f"the state of tag {tag} is not current: {comm._why()}")
            with shared.changed:
                shared.changed.wait(FETCH_PAUSE_S)
        comm._agent.post(mb.Current(self.versions.current()))
        return fragment.version

    def _apply(self, fragment: Fragment, held: Any, apply: Callable[[Result], None]) -> None:
        before = fragment.version
        apply(self.comm._result(held, None))
        if fragment.version <= before:
            raise StateError(
                f"round {held.seq} of tag {held.tag} was given to apply, but the state's version"
                " did not move: write to the state inside `with comm.updating(tag)`"
            )

    def take_missed(self, tag: int) -> list[int]:
        """Rounds whose results wait here, in order."""
        queue = self.missed.setdefault(tag, deque())
        if tag in self.ended:
            self.ended.discard(tag)
            queue.clear()
        if queue:
            return [held.seq for held in queue]
        try:
            skipped = self.skipped.get(tag, [])
            while skipped and skipped[0][0].done():
                work, residual = skipped.pop(0)
                held = work.result()
                if held is not None and residual is not None:
                    held.keep_lost(residual)
                if held is not None and held.outcome == "stable":
                    queue.append(held)
            queue.extend(self.comm._agent.shared.node.take_missed(tag))
        except RuntimeError:
            self.comm._check_over()  # else it was the node of an incarnation that has just ended
        return [held.seq for held in queue]

    def next_missed(self, tag: int) -> Any:
        self.take_missed(tag)
        assert self.missed[tag], "the core said that results wait"
        return self.missed[tag].popleft()

    # --- fetching

    def _fetch(self, tag: int, fragment: Fragment) -> bool:
        """One attempt; the fragment is void unless it succeeds."""
        comm, shared = self.comm, self.comm._agent.shared
        servers = self._servers()
        if not servers:
            return False
        node = shared.node
        if not fragment.void:
            comm._on_control(lambda: self._set_void(tag))  # a mixture until it is complete
        try:
            shortcut = fragment.shortcut
            if shortcut is not None and not fragment.mixed and self._by_shortcut(tag, shortcut):
                return True
            fragment.mixed = True
            follows = fragment.effect is not None
            work = node.fetch(tag, servers, fragment.arrays, follows, fragment.kind)
            if not self._wait_for(node, work, servers, tag):
                node.cancel(work)
                return False
        except RuntimeError:
            comm._check_over()  # else the incarnation has just ended
            return False
        self.fetches += 1
        self.restarts += work.restarts
        self.fetched_bytes += fragment.bytes
        return bool(comm._on_control(lambda: self._take(tag, work.version, servers)))

    def _by_shortcut(self, tag: int, shortcut: Shortcut) -> bool:
        """What is smaller, from one peer after the other: each serves what it has by itself."""
        comm = self.comm
        for server in self._servers()[:SHORTCUT_TRIES]:
            node = comm._agent.shared.node
            found = shortcut.buffer.copy()
            began_s = time.monotonic()
            kind = self.fragment(tag).kind
            work = node.fetch(shortcut.tag, [server], [found], False, kind)
            if not self._wait_for(node, work, [server], shortcut.tag):
                node.cancel(work)
                continue
            version = shortcut.take(found, time.monotonic() - began_s)
            if version is not None:
                taken = partial(self._take, tag, version, [server])
                self.shortcuts += 1
                return bool(comm._on_control(taken))
        return False

    def _servers(self) -> list[int]:
        """Who may serve us: active peers, or else whoever is in the view."""
        shared = self.comm._agent.shared
        with shared.changed:
            rows = [row for row in shared.members if row[0] != shared.peer]
        return [row[0] for row in rows if row[2]] or [row[0] for row in rows]

    def _wait_for(self, node: Any, work: Any, servers: list[int], tag: int) -> bool:
        """False when a server has left the view (its branch may be void) or nothing comes."""
        comm, shared = self.comm, self.comm._agent.shared
        moved_s, bytes_before = time.monotonic(), 0
        slice_s = FETCH_SLICE_S if self._effect(tag) is None else FOLLOW_SLICE_S
        while not work.wait(slice_s):
            comm._check_over()
            here = {row[0] for row in shared.members}
            if shared.node is not node or not here.issuperset(servers):
                return False
            if work.other_bytes:
                node.cancel(work)
                raise StateError(misfit(tag, work.other_bytes, work.total_bytes))
            if not self._follow(node, work, tag):
                return False
            if work.bytes != bytes_before:
                moved_s, bytes_before = time.monotonic(), work.bytes
            if time.monotonic() - moved_s > FETCH_STALL_S:
                return False
        return True

    def _effect(self, tag: int) -> Effect | None:
        fragment = self.fragments.get(tag)  # None: of a shortcut
        return None if fragment is None else fragment.effect

    def _follow(self, node: Any, work: Any, tag: int) -> bool:
        """Rounds that end during a fetch move what is there, so that it need not start again.
        False when one of them is missing here."""
        effect = self._effect(tag)
        if effect is None or work.version is None or not self.take_missed(tag):
            return True
        results = self.missed[tag]
        paused = False
        for _ in range(len(results)):  # a newer one waits until more of the state is here
            if results[0].seq > work.version:
                return False
            held = results.popleft()
            if held.seq < work.version:
                continue
            if not paused:
                node.pause_fetch(work)
                work.wait_quiet(QUIET_S)
                paused = True
            if not node.lock_fetch(work):
                results.appendleft(held)
                break  # all is there
            effect(self.comm._result(held, None))
            node.advance_fetch(work, held.seq + 1)
        return True

    def _take(self, tag: int, version: int, servers: list[int]) -> bool:
        """On the control thread: may what was fetched be our state?"""
        member = self.comm._agent.member
        here = {row[0] for row in member.members}
        if not self.versions.fetched(
            tag, version, member.view, here.issuperset(servers), member.frozen
        ):
            return False
        fragment = self.fragments[tag]
        fragment.version, fragment.void, fragment.mixed = version, False, False
        node = self.comm._agent.node
        node.set_covered(tag, version - 1)
        self._publish(node, tag, fragment)
        return True

    def _set_void(self, tag: int) -> None:
        """On the control thread."""
        self.versions.void[tag] = True
        self.fragments[tag].void = True
        self.comm._agent.node.set_covered(tag, VOID)
        self._publish(self.comm._agent.node, tag, self.fragments[tag])

    # --- views; on the control thread

    def incarnated(self) -> None:
        """A new id and a new engine: nothing we hold is the run's."""
        self.missed.clear()
        self.skipped.clear()
        self.make_void()

    def installed(
        self,
        view: int,
        tags: list[dict[str, int]],
        held: dict[int, int],
        void: bool,
        adopt: bool,
    ) -> bool:
        """Right after the engine took a plan. False: our branch is void."""
        ours = self.versions.installed(view, tags, held, void, adopt)
        for tag, fragment in self.fragments.items():
            if adopt and fragment.void:
                fragment.version, fragment.void = self.versions.version[tag], False
                self.comm._agent.node.set_covered(tag, fragment.version - 1)
                self._publish(self.comm._agent.node, tag, fragment)
                self.comm._agent.node.take_missed(tag)  # of the generation that has ended
                self.ended.add(tag)
        if void or not ours:
            self.make_void()
            for tag in self.fragments:
                self.comm._agent.node.withdraw(tag)
        return ours

    def make_void(self) -> None:
        self.versions.make_void()
        for fragment in self.fragments.values():
            fragment.void = True
