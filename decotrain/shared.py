"""Shared state of one peer: registered fragments, their versions, and how they catch up.

What to do is decided by decotrain/versions.py, bytes are moved by decotrain/state.py. Versions and
what the engine is told of them change on the control thread only, where no FREEZE can come in
between; tensors are written by the trainer's thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from decotrain import tensors as tn
from decotrain.control import member as mb
from decotrain.errors import StateError, WaitTimeoutError
from decotrain.state import Fetched, Fragment, Source, StateServer, fetch
from decotrain.versions import Versions

if TYPE_CHECKING:
    from decotrain.communicator import Communicator
    from decotrain.rounds import Result

FETCH_PAUSE_S = 0.1  # between attempts to fetch state
PIN_AFTER = 2  # attempts that failed because the state moved on


class SharedState:
    def __init__(self, comm: Communicator, host: str, fingerprint: int) -> None:
        self.comm = comm
        self.fingerprint = fingerprint
        self.fragments: dict[int, Fragment] = {}
        self.versions = Versions({})
        self.missed: dict[int, deque[Any]] = {}  # taken from the engine, not applied yet
        self.skipped: dict[int, list[Any]] = {}  # works of rounds the caller never saw
        self.server = StateServer(host, fingerprint, self.fragments)
        self.fetches = 0
        self.fetched_bytes = 0

    def register(self, tag: int, tensors: Mapping[str, Any], version: int) -> None:
        if not tensors or version < 0:
            raise StateError(f"tag {tag} needs at least one tensor and a version of at least 0")
        names = sorted(tensors)
        self.fragments[tag] = Fragment(
            names=names,
            kinds=[f"{tn.dtype_name(tensors[n])}{list(tensors[n].shape)}" for n in names],
            buffers=[tn.raw_bytes(tensors[n], f"{n} of tag {tag}") for n in names],
            version=version,
        )
        self.versions.add(tag, version)

    def fragment(self, tag: int) -> Fragment:
        if tag not in self.fragments:
            raise StateError(f"tag {tag} has no state: call register_state first")
        return self.fragments[tag]

    @contextmanager
    def updating(self, tag: int, version: int | None, last_seq: int) -> Iterator[None]:
        fragment = self.fragment(tag)
        with fragment.lock:
            yield
            if version is None:
                version = max(fragment.version, last_seq) + 1
            fragment.version = version
        self.comm._on_control(lambda: self._set_version(tag, version))

    def _set_version(self, tag: int, version: int) -> None:
        if not self.versions.void[tag]:
            self.versions.updated(tag, version)
            self.comm._agent.node.set_covered(tag, version - 1)

    # --- catching up

    def behind(self, tag: int) -> bool:
        """Our state lacks rounds: what is computed from it must not be contributed."""
        missed = [held.seq for held in self.missed.get(tag, ())]
        return self.versions.next(tag, missed).do != "nothing"

    def catch_up(
        self, tag: int, apply: Callable[[Result], None], wait: bool, deadline_s: float
    ) -> int:
        comm, fragment = self.comm, self.fragment(tag)
        shared = comm._agent.shared
        failures = 0
        while True:
            comm._check_over()
            if shared.view:
                step = self.versions.next(tag, self.take_missed(tag))
                if step.do == "nothing":
                    break
                if step.do != "fetch":
                    held = self.missed[tag].popleft()
                    if step.do == "apply":
                        self._apply(fragment, held, apply)
                    continue
                if self._fetch(tag, fragment, pinned=failures >= PIN_AFTER):
                    continue
                failures += 1
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
        try:
            skipped = self.skipped.get(tag, [])
            while skipped and skipped[0].done():
                held = skipped.pop(0).result()
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

    def _fetch(self, tag: int, fragment: Fragment, pinned: bool) -> bool:
        sources = self._sources()
        if not sources:
            return False
        with fragment.lock:
            fragment.void = True  # a mixture until it is complete: served to nobody
        try:
            got = fetch(tag, fragment, sources, self.fingerprint, pinned)
        except StateError as error:
            if "differs from what is registered" in str(error):
                raise
            self.comm._on_control(lambda: self._set_void(tag))
            return False
        self.fetches += 1
        self.fetched_bytes += got.bytes
        return bool(self.comm._on_control(lambda: self._take(tag, fragment, got)))

    def _sources(self) -> list[Source]:
        """Who may serve us, active peers first."""
        shared = self.comm._agent.shared
        with shared.changed:
            rows, contacts = shared.members, shared.contacts
        active = {row[0] for row in rows if row[2]}
        sources = [
            Source(contact["peer"], tuple(contact["state"]))
            for contact in contacts
            if contact["peer"] != shared.peer
        ]
        return sorted(sources, key=lambda source: source.peer not in active)

    def _take(self, tag: int, fragment: Fragment, got: Fetched) -> bool:
        """On the control thread."""
        member = self.comm._agent.member
        here = {row[0] for row in member.members}
        good = all(
            self.versions.fetched(tag, got.version, view, peer in here, member.frozen)
            for peer, view in got.served
        )
        if not good:
            self._set_void(tag)
            return False
        fragment.version, fragment.void = got.version, False
        self.comm._agent.node.set_covered(tag, got.version - 1)
        return True

    def _set_void(self, tag: int) -> None:
        """On the control thread."""
        self.versions.void[tag] = True
        self.fragments[tag].void = True
        self.comm._agent.node.set_covered(tag, -1)

    # --- views; on the control thread

    def incarnated(self, peer: int) -> None:
        """A new id and a new engine: nothing we hold is the run's."""
        self.server.peer, self.server.view = peer, 0
        self.missed.clear()
        self.skipped.clear()

    def installed(self, view: int, tags: list[dict[str, int]], void: bool) -> bool:
        """Right after the engine took a plan. False: our branch is void."""
        self.server.view = view
        ours = self.versions.installed(view, tags, void)
        if void or not ours:
            self.make_void()
        return ours

    def make_void(self) -> None:
        self.versions.make_void()
        for fragment in self.fragments.values():
            fragment.void = True
