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

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Tensors = Any  # a torch CPU tensor or numpy array, or a sequence of them (one round)


@dataclass(frozen=True)
class MemberInfo:
    """A peer of the view, as every peer sees it."""

    peer: int  # 64-bit id of this incarnation
    slot: int
    active: bool  # else observing: receives, contributes and owns nothing


@dataclass
class Result:
    """What a round gave: the same bits on every peer that has it."""

    tag: int
    seq: int
    outcome: str  # "stable"; "lost": completed without us and its bytes are gone: catch_up fetches
    contributors: tuple[int, ...]  # peer ids that are in at least one chunk, by slot
    partial: bool  # some chunk lacks a contributor that another chunk has, or nobody contributed
    digest: int  # of all result bytes and contributor sets
    tensors: list[Any] = field(default_factory=list)  # like the input; empty for collect
    parts: dict[int, bytes] = field(default_factory=dict)  # collect: slot -> its bytes
    begun: bool = True  # false: it came to us as an observer, or was missed

    @property
    def tensor(self) -> Any:
        """The one tensor of a round begun with one tensor."""
        assert len(self.tensors) == 1, f"this round has {len(self.tensors)} tensors"
        return self.tensors[0]


class Work:
    """A round that was begun. The caller's tensors change only inside `wait()`."""

    tag: int
    seq: int

    def done(self) -> bool:
        """True when `wait()` would return at once."""
        raise NotImplementedError

    def wait(self, timeout_s: float | None = None) -> Result:
        """The result. Raises WaitTimeoutError (the round goes on), RoundError or LeftError."""
        raise NotImplementedError


class Communicator:
    """One peer's part in a run. Calls of one tag belong to one thread; `leave()` ends it."""

    peer: int  # id of this incarnation
    name: str
    config: dict[str, Any]  # the run's configuration, as the coordinator handed it out

    # --- who is here

    @property
    def members(self) -> tuple[MemberInfo, ...]:
        """The installed view, by slot."""
        raise NotImplementedError

    @property
    def view(self) -> tuple[int, int]:
        """(term, epoch) of the installed view; it only moves forward."""
        raise NotImplementedError

    @property
    def slot(self) -> int:
        """Our rank order in sums (0..63), constant while we are in the run."""
        raise NotImplementedError

    @property
    def active(self) -> bool:
        """False while observing: our rounds yield the others' results and contribute nothing."""
        raise NotImplementedError

    # --- rounds

    def all_reduce(
        self,
        tensors: Tensors,
        *,
        tag: int = 0,
        op: str = "mean",  # "mean" (weighted) or "sum"
        codec: str = "f32",  # of contributions
        result_codec: str | None = None,  # of results; None: the same as codec
        weight: float = 1.0,  # 0: skip, we only receive
        out: Tensors | None = None,  # where the result goes; None: into `tensors`
        borrow: bool = False,  # f32 only: no snapshot copy; do not write to tensors before wait()
        residual: Tensors | None = None,  # f32 error feedback e, updated in place:
        #                                   x = tensors + e is sent, e = x - decode(encode(x))
        rule: str | None = None,  # "median", "trimmed_mean", "norm_clip" instead of op's own
        rule_parameter: float = 0.0,
        state_digest: int = 0,  # of the state the contribution was computed from
        chunk_elements: int | None = None,
    ) -> Work:
        """Begin the next round of the tag. All peers name the same shapes and options.

        The values are encoded before this returns, so the tensors may be written to at once
        (unless borrowed). NaN or Inf raises NotFiniteError naming the tensor; the round is then
        skipped (weight 0) so that nobody waits for us.
        """
        raise NotImplementedError

    def collect(self, data: bytes | None, *, tag: int = 0, max_bytes: int = 1 << 16) -> Work:
        """Every peer's bytes, by slot (`Result.parts`). None contributes nothing."""
        raise NotImplementedError

    def broadcast(self, tensors: Tensors, *, root: int | None = None, tag: int = 0) -> Work:
        """Every peer gets the bits of peer id `root` (None: of the lowest slot that is active)."""
        raise NotImplementedError

    def pending(self, tag: int) -> bool:
        """True when others have begun the next round of the tag and we have not."""
        raise NotImplementedError

    # --- shared state

    def register_state(self, tag: int, tensors: Mapping[str, Any], version: int = 0) -> None:
        """Declare that the tag carries state: these tensors, at this version, bit-equal on peers.

        They are served to newcomers from where they lie, so write to them only inside
        `updating(tag)`. Register every tag before the first round of any.
        """
        raise NotImplementedError

    @contextmanager
    def updating(self, tag: int, version: int | None = None) -> Iterator[None]:
        """Write to the tag's tensors inside; on exit the version is `version`, or one more."""
        raise NotImplementedError
        yield

    def version(self, tag: int) -> int:
        """Rounds of the tag whose effect the registered tensors contain."""
        raise NotImplementedError

    def catch_up(
        self,
        tag: int,
        apply: Callable[[Result], None],
        *,
        wait: bool = False,
        timeout_s: float | None = None,
    ) -> int:
        """Bring the tag's state up to where the others are; returns its version.

        Missed results are given to `apply` in order (which does what it does with a result of
        its own: `with comm.updating(tag): ...`). When results are gone, or we are new here, the
        state is fetched from the others into the registered tensors first. Call it before each
        begin of the tag. Without `wait` it does what it can now; with it, it returns when the tag
        is current. When every registered tag is current an observing peer asks to be active.
        """
        raise NotImplementedError

    @property
    def fresh(self) -> bool:
        """True when our registered state is what the run starts from: nothing to fetch."""
        raise NotImplementedError

    # --- the rest

    def set_figures(self, figures: Mapping[str, float | int | str]) -> None:
        """Small figures for status (step, loss, tokens_per_s, ...), sent with heartbeats."""
        raise NotImplementedError

    def figures(self) -> dict[str, float | int]:
        """Our own counters: bytes in and out, rounds, view changes, links."""
        raise NotImplementedError

    def leave(self, timeout_s: float = 10.0) -> None:
        """Leave cleanly: rounds we contributed to count, nobody waits for a timeout."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop without leaving; the others find out by themselves."""
        raise NotImplementedError

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, *exc: object) -> None:
        self.leave() if exc[0] is None else self.close()


def join(
    address: str | None = None,  # of the coordinator; None: DECOTRAIN_JOIN; "local": a run of one
    *,
    name: str | None = None,  # for people; default DECOTRAIN_NAME or host:pid
    run: str | None = None,  # the run's name; default DECOTRAIN_RUN or "default"
    token_file: str | None = None,  # default DECOTRAIN_TOKEN_FILE
    config: Mapping[str, Any] | None = None,  # ours; a mismatch with the run's is refused
    min_peers: int | None = None,  # the first view waits for so many (coordinator's word wins)
    listen: str | Sequence[str] | None = None,  # data addresses, default DECOTRAIN_LISTEN or any
    timeout_s: float | None = None,  # None: wait for ever for the coordinator and the first view
    grace_s: float = 0.0,
    quorum: float = 1.0,
) -> Communicator:
    """Join a run; returns when this peer is in a view (active, or observing in a live run)."""
    raise NotImplementedError
