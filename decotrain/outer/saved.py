"""An outer optimizer's state as tensors and facts, and back: a resumed run equals one that went on.

*Shared* facts and tensors (outer parameters, buffers, versions, the global step) are the run's, and
any peer's do. *Private* ones (local parameters, residuals, rounds under way) are one peer's own: a
peer that resumes from another's state leaves them out and starts from the outer parameters. Error
feedback may be switched on and off by a resume: residuals are its sender's business alone.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from decotrain.errors import StateError
from decotrain.outer.background import ready
from decotrain.outer.flight import Flight, Landed
from decotrain.outer.fragment import Fragment

if TYPE_CHECKING:
    from decotrain.outer.gradients import GradientAveraging
    from decotrain.outer.optimizer import OuterOptimizer

KINDS = {  # of what is kept -> by whom, of what
    "residual": ("error feedback", "contributions"),
    "owner_residual": ("owner feedback", "results"),
}

logger = logging.getLogger("decotrain.peer")


def save(outer: OuterOptimizer) -> dict[str, Any]:
    """Waits for rounds under way; their results are in the outer parameters, and noted as due."""
    outer.settle()
    shared: dict[str, Tensor] = {}
    private: dict[str, Tensor] = {}
    for f in outer.fragments:
        shared |= {f"{f.tag}.{key}": tensor for key, tensor in f.state.items()}
        private[f"{f.tag}.local"] = f.read_local(torch.empty_like(f.theta))
        private |= {f"{f.tag}.{key}": tensor for key, tensor in _own(outer, f).items()}
    private |= residuals_of(outer)
    flights = {}
    for tag, flight in outer._flights.items():
        landed = flight.done.result()
        private[f"{tag}.sent"] = flight.delta.clone()  # the next rounds have this memory
        if flight.residual is not None:
            private[f"{tag}.residual_before"] = flight.residual.clone()
        flights[str(tag)] = {
            "due": flight.due,
            "tokens": flight.tokens,
            "lost": landed.lost,
            "counted": landed.counted(outer.comm.peer),
            "contributors": len(landed.contributors),
            "version": landed.version,
            "digest": landed.digest.hex(),
        }
    return {
        "shared": shared,
        "private": {key: tensor.cpu() for key, tensor in private.items()},
        "facts": {
            "step": outer.global_step,
            "rounds_at": _rounds_at(outer),
            "versions": [outer.comm.version(f.tag) for f in outer.fragments],
            "entered": [f.version for f in outer.fragments],
            "digests": [f.digest.hex() for f in outer.fragments],
            "tokens": [f.tokens for f in outer.fragments],
            "flights": flights,
        },
    }


def _rounds_at(outer: OuterOptimizer) -> list[list[int]]:
    """The schedule, in short: with another one the step would not tell how many rounds there were,
    and peers would begin them at different steps."""
    return [[outer.schedule.sent_at(f.tag, number) for number in (1, 2)] for f in outer.fragments]


def _listed(rounds_at: list[list[int]]) -> str:
    shown = ["+".join(str(step) for step in steps) for steps in rounds_at[:8]]
    return ", ".join(shown) + (", ..." if len(rounds_at) > 8 else "")


def _own(outer: OuterOptimizer, fragment: Fragment) -> dict[str, Tensor]:
    """What is private and lies where it will be used again."""
    merged = {f"merge.{key}": tensor for key, tensor in outer.merge.private(fragment).items()}
    return {"base": fragment.base, **merged}


def residuals_of(outer: OuterOptimizer | GradientAveraging) -> dict[str, Tensor]:
    """What error feedback keeps, by the names it is saved under."""
    kept = zip(KINDS, (outer.residuals, outer.owner_residuals), strict=True)
    return {f"{tag}.{kind}": tensor for kind, tags in kept for tag, tensor in tags.items()}


def load_residuals(outer: OuterOptimizer | GradientAveraging, private: dict[str, Tensor]) -> None:
    """Feedback that was off has lost nothing so far: zeros. Of one that is off now, what it kept is
    in no later round, and people are told."""
    places = residuals_of(outer)
    for key in places.keys() - private.keys():
        places.pop(key).zero_()
    put(private, places)
    for kind, (feedback, whose) in KINDS.items():
        dropped = [
            tensor
            for key, tensor in private.items()
            if key.partition(".")[2] == kind and key not in places
        ]
        if dropped:
            logger.warning(
                "%s is off here and was on in the saved state: what %s of %d values have lost is"
                " dropped, and comes with no later round",
                feedback, whose, sum(one.numel() for one in dropped),
            )  # fmt: skip


def load(outer: OuterOptimizer, state: dict[str, Any]) -> list[int]:
    """Puts a state back; the versions of the outer parameters. Without "private": those alone."""
    facts, private = state["facts"], state.get("private")
    versions = [int(version) for version in facts["versions"]]
    if len(versions) != len(outer.fragments):
        raise StateError(
            f"the saved state has {len(versions)} fragments, this schedule has "
            f"{len(outer.fragments)}; resume with the options the run was started with"
        )
    theirs, ours = facts.get("rounds_at"), _rounds_at(outer)
    if theirs not in (None, ours):
        raise StateError(
            f"the saved state is of rounds that begin after steps {_listed(theirs)}, and this"
            f" schedule's begin after {_listed(ours)} (sync_every, fragments); resume with the"
            " options the run was started with"
        )
    outer.global_step = int(facts["step"])
    for f in outer.fragments:
        put(state["shared"], {f"{f.tag}.{key}": t for key, t in f.state.items()})
        f.pull()
        f.base.copy_(f.theta)
        if private is None:
            f.write(f.theta)
            f.version, f.digest = versions[f.tag], f.state_digest()
            continue
        local = torch.empty_like(f.theta)
        put(private, {f"{f.tag}.{key}": t for key, t in _own(outer, f).items()})
        put(private, {f"{f.tag}.local": local})
        f.write(local)
        f.version = int(facts["entered"][f.tag])
        f.digest = bytes.fromhex(facts["digests"][f.tag])
        f.tokens = float(facts["tokens"][f.tag])
        if (flight := facts["flights"].get(str(f.tag))) is not None:
            outer._flights[f.tag] = _flight(outer, f, flight, private)
    if private is not None:
        load_residuals(outer, private)
    return versions


def _flight(
    outer: OuterOptimizer, fragment: Fragment, facts: dict[str, Any], private: dict[str, Tensor]
) -> Flight:
    """A round that was under way has landed since; only its result is still to be used."""
    tag, peer = fragment.tag, outer.comm.peer
    before = private.get(f"{tag}.residual_before") if tag in outer.residuals else None
    others = range(1, int(facts["contributors"]) + (0 if facts["counted"] else 1))
    return Flight(
        due=int(facts["due"]),
        tokens=float(facts["tokens"]),
        delta=private[f"{tag}.sent"].to(fragment.theta.device, copy=True),
        residual=None if before is None else before.clone(),  # not the caller's: it is used again
        done=ready(
            Landed(
                lost=bool(facts["lost"]),
                contributors=((peer,) if facts["counted"] else ()) + tuple(-n for n in others),
                version=int(facts["version"]),
                digest=bytes.fromhex(facts["digest"]),
            )
        ),
    )


def put(saved: dict[str, Tensor], places: dict[str, Tensor]) -> None:
    """Copies what was saved to where it is used; every place must find its own, in its shape."""
    for key, place in places.items():
        found = saved.get(key)
        if found is None or found.shape != place.shape:
            what = "nothing" if found is None else f"shape {tuple(found.shape)}"
            raise StateError(
                f"the saved state has {what} for {key}, expected {tuple(place.shape)};"
                " resume with the options the run was started with"
            )
        place.copy_(found)
