"""What a user holds: rounds on tensors, and shared state that newcomers can fetch.

    comm = dt.join("203.0.113.7:29400", token_file="run.token")
    comm.register_state(tag, {"w": w}, version=0)
    missed = comm.catch_up(tag, apply)          # before each begin of the tag
    work = comm.all_reduce([w.grad], tag=tag, weight=tokens)
    result = work.wait()                        # names its contributors, or raises

Membership is hidden: a peer that joined late, was demoted or lost rounds sees *missed* rounds in
`catch_up`. Nothing here decides membership (decotrain/control does) or sends a byte itself
(csrc/node does). torch is imported only when a tensor of torch comes in; numpy is enough.

Words: the *version* of a fragment (= tag) is the number of rounds of the tag whose effect it
contains; round `seq` takes it from version seq to seq + 1.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from decotrain import codecs
from decotrain import tensors as tn
from decotrain._core import Node
from decotrain.contribution import Given, draw_chance
from decotrain.control import member as mb
from decotrain.control.agent import Agent
from decotrain.control.messages import fitting
from decotrain.errors import (
    AbandonedError,
    LeftError,
    NotFiniteError,
    OutOfMemoryError,
    RefusedError,
    RoundError,
    StateError,
)
from decotrain.farewell import end_well, say_last_words
from decotrain.joining import (
    Asked,
    ask,
    bind_errors,
    path_options,
    patience,
    told_addresses,
    wait_for_welcome,
)
from decotrain.rounds import SLICE_S, MemberInfo, Result, Work, check_memory, decode, places_for
from decotrain.shared import SharedState, Shortcut

Tensors = Any  # a torch tensor or numpy array, or a sequence of them (one round)


class Communicator:
    """One peer's part in a run. Calls of one tag belong to one thread; `leave()` ends it."""

    def __init__(self, asked: Asked, node_options: Mapping[str, Any]) -> None:
        self.name = asked.who.name
        self._asked, self._node_options = asked, path_options() | dict(node_options)
        self._templates: dict[int, list[tn.Pattern]] = {}  # what results of a tag look like
        self._ready = False
        self._left = False
        self._counters = {"rounds": 0, "lost_rounds": 0}
        self._shared = SharedState(self)
        self._agent = Agent(
            asked.address,
            asked.who,
            self._make_node,
            self._shared.versions.nothing,
            self._shared.versions.declared,
            self._shared.installed,
            lambda bound: told_addresses(bound, asked.advertise),
            token=asked.token,
        )

    def _make_node(self, peer: int) -> Any:
        """For each incarnation; on the control thread, but for the first."""
        if self._ready:
            self._shared.incarnated()
        with bind_errors():
            return Node(peer, self._asked.listen, self._asked.fingerprint, **self._node_options)

    # --- who is here

    @property
    def peer(self) -> int:
        """Id of this incarnation: 64 random bits."""
        return int(self._agent.shared.peer)

    @property
    def config(self) -> dict[str, Any]:
        """The run's configuration, as the coordinator handed it out."""
        return self._agent.shared.config or {}

    @property
    def members(self) -> tuple[MemberInfo, ...]:
        """The installed view, by slot."""
        return tuple(MemberInfo(*row[:3]) for row in self._in_view())

    @property
    def view(self) -> tuple[int, int]:
        """(term, epoch) of the installed view; it only moves forward."""
        self._in_view()
        return divmod(self._agent.shared.view, 1 << 32)

    @property
    def slot(self) -> int:
        """Our rank order in sums (0..63), constant while we are in the run."""
        return next(int(row[1]) for row in self._in_view() if row[0] == self.peer)

    @property
    def active(self) -> bool:
        """False while observing: our rounds yield the others' results and contribute nothing."""
        return any(row[0] == self.peer and row[2] for row in self._in_view())

    def _in_view(self) -> list[list[Any]]:
        """The rows of the view; waits for the first one."""
        self._be_ready()
        shared = self._agent.shared
        with shared.changed:
            while True:
                self._check_over()
                rows = shared.members
                if any(row[0] == shared.peer for row in rows):
                    return rows
                shared.changed.wait(SLICE_S)

    def wait_until(self, true: Callable[[], Any], timeout_s: float) -> bool:
        """Asks again whenever the view or the open rounds change; False when time is over."""
        deadline_s = time.monotonic() + timeout_s
        with self._agent.shared.changed:
            while not (found := true()) and (left_s := deadline_s - time.monotonic()) > 0:
                self._agent.shared.changed.wait(min(SLICE_S, left_s))
        return bool(found)

    # --- rounds

    def all_reduce(
        self,
        tensors: Tensors,
        *,
        tag: int = 0,
        op: str = "mean",  # "mean" (weighted) or "sum"
        codec: str = "f32",  # both ways, or "e2m1+int8": contributions + results
        result_codec: str | None = None,  # instead of a + in codec
        weight: float = 1.0,  # 0: skip, we only receive
        out: Tensors | None = None,  # where the result goes; None: into `tensors`
        borrow: bool = False,  # f32 only: no snapshot copy; do not write to tensors before wait()
        residual: Tensors | None = None,  # f32 or bf16 error feedback, in place (docs/codecs.md)
        owner_residual: Any = None,  # f32, as long: error feedback of the results that we own
        stochastic: bool = False,  # round contributions by chance: int8, e2m1, e3m0, no residual
        rule: str | None = None,  # "median", "trimmed_mean", "norm_clip" instead of op's own
        rule_parameter: float | None = None,  # the last two need one (docs/codecs.md)
        state_digest: int = 0,  # of the state the contribution was computed from
        chunk_elements: int | None = None,
    ) -> Work:
        """Begin the next round of the tag. All peers name the same shapes and options.

        The values are encoded before this returns: unless borrowed, tensors may be written to at
        once. NaN or Inf raises NotFiniteError naming the tensor; the round is skipped (weight 0)
        and the residual is as before. (In a borrowed tensor above 2 MiB `wait()` raises, and other
        chunks have our values.) Tensors of one GPU are encoded and decoded there.
        """
        given = tn.listed(tensors)
        places = tn.listed(out) if out is not None else given
        kept = tn.listed(residual) if residual is not None else None
        tn.check_round(tag, weight, given, places)
        codec, result_codec = codecs.pair(codec, result_codec)
        options: dict[str, Any] = {
            "tag": tag, "op": op, "codec": codec, "result_codec": result_codec, "rule": rule,
            "rule_parameter": codecs.check_rule(rule, op, rule_parameter),
            "chunk_elements": chunk_elements, "state_digest": state_digest,
        }  # fmt: skip
        chance = draw_chance(self.peer) if stochastic else None
        lent = self._shared.lent(tag, owner_residual)
        mine = Given(given, options, weight, borrow, kept, chance, owner_residual)
        mine.check()
        for n, tensor in enumerate(places):
            tn.check_writable(tensor, f"tensor {n} of the result")
        self._templates[tag] = [tn.pattern(tensor) for tensor in places]

        def begin(node: Any) -> Any:
            try:
                return mine.begin(node)
            except AbandonedError as error:
                self._shared.skip(tag, error.work, lent)
                raise
            except (NotFiniteError, OutOfMemoryError):
                self._shared.skip(tag, mine.skip(node))
                raise

        work = self._begin(tag, begin, places)
        return work.lend(lent)

    def collect(
        self, data: bytes | None, *, tag: int = 0, max_bytes: int = 1 << 16, ahead: int = 0
    ) -> Work:
        """Every peer's bytes, by slot (`Result.parts`). None contributes nothing. With `ahead`, the
        same on all peers, so many earlier rounds of the tag may be open when this one begins."""
        if data is not None and len(data) > max_bytes:
            raise RoundError(f"{len(data)} bytes to collect, the bound is max_bytes={max_bytes}")
        options = {"tag": tag, "max_bytes": max_bytes, "ahead": ahead}
        return self._begin(tag, lambda node: node.collect(data, **options), None)

    def broadcast(self, tensors: Tensors, *, root: int | None = None, tag: int = 0) -> Work:
        """Every peer gets the bits of peer id `root` (None: of the lowest slot that is active)."""

        def begin() -> Work:
            active = [one.peer for one in self.members if one.active]
            chosen = root if root is not None else active[0] if active else 0
            return self.all_reduce(tensors, tag=tag, weight=1.0 if chosen == self.peer else 0.0)

        work = begin()
        work._again = begin
        return work

    def pending(self, tag: int) -> bool:
        """True when others have begun the next round of the tag and we have not."""
        shared = self._agent.shared
        following = self._next_seq(tag)
        with shared.changed:
            return any(other == tag and seq >= following for other, seq in shared.open)

    def _next_seq(self, tag: int) -> int:
        return self._shared.versions.due(tag)

    def _begin(self, tag: int, begin: Callable[[Any], Any], out: list[Any] | None) -> Work:
        self._be_ready()
        self._check_over()
        shared = self._agent.shared
        incarnation, node = shared.incarnation, shared.node
        if tag in self._shared.fragments:
            if self._shared.behind(tag):
                return Work(self, tag, None, incarnation, out)
        elif self._shared.missed.get(tag):  # rounds that went on without us, one for each call
            work = Work(self, tag, None, incarnation, out)
            work._result = self._result(self._shared.missed[tag].popleft(), out)
            return work
        try:
            work = begin(node)
        except (TypeError, ValueError) as error:
            raise RoundError(f"round of tag {tag}: {error}") from None
        except RuntimeError as error:
            if self._between(incarnation, error):
                return Work(self, tag, None, incarnation, out)
            raise RoundError(f"round of tag {tag}: {error}") from None
        return Work(self, tag, work, incarnation, out)

    def _between(self, incarnation: int, error: RuntimeError) -> bool:
        """Did a call fail because this peer comes back as another incarnation?"""
        check_memory(self.name, str(error))
        self._check_over()
        return incarnation != self._agent.shared.incarnation or "closed" in str(error)

    def _lost(self, tag: int) -> Result:
        self._counters["lost_rounds"] += 1
        return Result(tag, self._next_seq(tag), "lost", (), True, 0)

    def _result(self, held: Any, out: list[Any] | None, keep_own: bool = False) -> Result:
        """What the core holds, in the caller's tensors: zeros where nobody contributed."""
        if held.outcome != "stable":
            return self._lost(held.tag)
        result = Result(
            tag=held.tag,
            seq=held.seq,
            outcome="stable",
            contributors=tuple(held.contributors),
            partial=held.partial,
            digest=held.digest,
            begun=held.begun,
            slots=tuple(slot for slot in range(64) if held.slots >> slot & 1),
        )
        if held.elements == 0:
            result.parts = dict(held.parts())
        else:
            places = places_for(held, self._templates.get(held.tag)) if out is None else out
            if result.contributors or not keep_own:
                decode(held, places)
            result.tensors = places
        self._shared.versions.hand_out(held.tag, held.seq)
        self._counters["rounds"] += 1
        self._agent.member.last_round = {"last_round": f"{held.tag}/{held.seq}"}
        shared = self._agent.shared
        with shared.changed:
            shared.open = {key for key in shared.open if key[0] != held.tag or key[1] > held.seq}
        return result

    # --- shared state

    def register_state(
        self,
        tag: int,
        tensors: Mapping[str, Any],
        version: int = 0,
        effect: Callable[[Result], None] | None = None,
        shortcut: Shortcut | None = None,
        layout: str = "",
    ) -> None:
        """Declare that the tag carries state: these tensors, at this version, bit-equal on peers.

        They are served to newcomers from where they lie, so write to them only inside
        `updating(tag)`. Register every tag before the first round of any.

        `effect` does what a round does to the tensors and nothing else: a newcomer keeps up while
        it fetches. `shortcut` is something smaller that may do in their place (docs/state.md).
        `layout` is what beside their shapes must be the same on all peers, such as the shapes that
        a flat buffer stands for. Who holds other tensors gets StateError when it fetches.
        """
        if self._ready:
            raise StateError(
                f"tag {tag} is registered after the first round: the run has been told what state"
                " this peer holds; register every tag before the first round or catch_up"
            )
        self._shared.register(tag, tensors, version, effect, shortcut, layout)

    @contextmanager
    def updating(self, tag: int, version: int | None = None) -> Iterator[None]:
        """Write to the tag's tensors inside; on exit the version is `version`, or the one after
        the last round that was handed out. Who has several rounds under way names it."""
        with self._shared.updating(tag, version):
            yield

    def version(self, tag: int) -> int:
        """Rounds of the tag whose effect the registered tensors contain."""
        return self._shared.fragment(tag).version

    def catch_up(
        self,
        tag: int,
        apply: Callable[[Result], None] | None,
        *,
        wait: bool = False,
        fetch: bool = True,
        timeout_s: float | None = None,
    ) -> int:
        """Bring the tag's state up to where the others are; returns its version.

        Missed results are given to `apply` in order (which does what it does with a result of
        its own: `with comm.updating(tag): ...`). When they are gone or no use (None), or we are new
        here, the state is fetched from the others into the registered tensors. Call it before each
        begin of the tag. Without `wait` it does what it can now; with it, it returns when the tag
        is current. Without `fetch` it only gives what waits here: for who has rounds in flight, and
        may hold the next result already. When every registered tag is current an observing peer
        asks to be active.
        """
        self._be_ready()
        deadline_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        return self._shared.catch_up(tag, apply, wait, deadline_s, fetch)

    @property
    def fresh(self) -> bool:
        """True when our registered state is what the run starts from: nothing to fetch."""
        self._in_view()
        return not any(self._shared.versions.void.values())

    # --- the rest

    def set_figures(self, figures: Mapping[str, float | int | str]) -> None:
        """Small figures for status (step, loss, tokens_per_s, ...), sent with heartbeats."""
        clean = fitting(figures)

        def keep() -> None:
            self._agent.member.figures = clean

        self._agent.post(keep)

    def figures(self) -> dict[str, float | int]:
        """Our own counters: bytes in and out, rounds, view, links."""
        figures: dict[str, float | int] = dict(self._counters)
        figures |= self._shared.figures()
        try:
            links = self._agent.shared.node.links()
        except RuntimeError:
            links = []
        figures["bytes_out"], figures["bytes_in"] = self._agent.traffic()
        figures["links_up"] = sum(bool(link["up"]) for link in links)
        figures["epoch"] = self._agent.shared.view & 0xFFFFFFFF
        return figures

    def leave(self, timeout_s: float = 10.0) -> None:
        """Leave cleanly: rounds we contributed to count, nobody waits for a timeout."""
        if self._left:
            return
        self._agent.post(mb.AskLeave())
        self.wait_until(lambda: self._agent.shared.over is not None, timeout_s)
        self.close()

    def close(self) -> None:
        """Stop without leaving; the others find out by themselves."""
        if self._left:
            return
        self._left = True
        self._agent.stop()
        if self._asked.server is not None:
            self._asked.server.stop()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, *exc: object) -> None:
        self.leave() if exc[0] is None else self.close()

    # --- between threads

    def _be_ready(self) -> None:
        """From now on we may be in a view: what state we hold is declared."""
        if self._left:
            raise LeftError("this communicator has left the run")
        if self._ready:
            return
        self._ready = True
        declared = self._shared.versions.declared()

        def ready() -> None:
            self._agent.node.declare(declared)

        self._agent.post(ready)
        self._agent.post(mb.Ready())

    def _on_control(self, action: Callable[[], Any]) -> Any:
        """Runs on the control thread, between its messages, and waits for it."""
        done = threading.Event()
        result: list[Any] = [None]

        def run() -> None:
            try:
                result[0] = action()
            finally:
                done.set()

        self._agent.post(run)
        while not done.wait(SLICE_S):
            self._check_over()
        return result[0]

    def _check_over(self) -> None:
        shared = self._agent.shared
        if self._left:
            raise LeftError("this communicator has left the run")
        if shared.over is None:
            return
        if shared.over_kind == "refused":
            raise RefusedError(f"the coordinator refuses this peer: {shared.over}")
        check_memory(self.name, shared.over)
        raise LeftError(f"this peer is out of the run: {shared.over}")

    def _why(self) -> str:
        shared = self._agent.shared
        if shared.view == 0:
            return f"no view yet ({shared.waiting})"
        active = [row[0] for row in shared.members if row[2]]
        role = "active" if shared.peer in active else "observing"
        return f"this peer is {role}, {len(active)} of {len(shared.members)} peers are active"


def join(
    address: str | None = None,  # of the coordinator; None: DECOTRAIN_JOIN; "local": a run of one
    *,
    name: str | None = None,  # for people; default DECOTRAIN_NAME or host:pid
    run: str | None = None,  # the run's name; default DECOTRAIN_RUN or "default"
    token_file: str | None = None,  # default DECOTRAIN_TOKEN_FILE
    config: Mapping[str, Any] | None = None,  # ours; a mismatch with the run's is refused
    min_peers: int | None = None,  # the first view waits for so many (coordinator's word wins)
    listen: str | Sequence[str] | None = None,  # HOST or HOST:PORT; [] when nobody can dial us;
    #                                    default DECOTRAIN_LISTEN, or a free port towards `address`
    advertise: str | Sequence[str] | None = None,  # told to others; default DECOTRAIN_ADVERTISE
    timeout_s: float | None = None,  # None: wait for ever for the coordinator and the first view
    grace_s: float = 0.0,  # waive who is not in so long after a quorum; 0: wait for all
    quorum: float = 0.5,  # of the active peers' weight in the round before
    late_s: float | None = None,  # later than the others by so much: observing until it is
    #                               current again; None: 4 grace_s, at least 2; 0: never
    insecure: bool = False,  # without a token, on a network where everybody is trusted
    slot: int | None = None,  # asked for, as the one we had before a resume; taken: another one
) -> Communicator:
    """Join a run; returns when the coordinator has welcomed this peer and `config` is known.

    The peer enters a view (active, or observing in a live run) when it is ready: at its first
    round, `catch_up` or look at `members`. Until then nobody waits for it, so register state and
    build models in between.
    """
    say_last_words()
    asked = ask(
        address, name, run, token_file, config, min_peers, listen, advertise, insecure, slot
    )
    comm = Communicator(asked, {**patience(grace_s, quorum, late_s), **asked.tls()})
    try:
        wait_for_welcome(comm, asked.address, timeout_s)
    except BaseException:
        comm.close()
        raise
    end_well(comm.leave)
    return comm


__all__ = ["Communicator", "MemberInfo", "Result", "Work", "join"]
