"""From a base and a seed log to the parameters at any step, without a model.

The same arithmetic as in the run: the bits equal those that every peer held.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from decotrain.errors import FileError
from decotrain.spsa import kernels, seedlog
from decotrain.spsa.pool import Pool
from decotrain.spsa.recipe import Recipe, Term, Update
from decotrain.spsa.space import DTYPES, Layout, Space, digest

BLOCK_STEPS = 1024  # replayed at once between two reports of progress

# Rates of one core; a measured figure beats them (bench/spsa.py).
SIGN_ADDS_PER_S = 1e10
MEASURED_ELEMENTS, MEASURED_TERMS = 1 << 18, 64


@dataclass
class Values:
    """The masters of a space that has no model: what `Pool` and the kernels need."""

    layout: Layout
    masters: list[torch.Tensor]

    def digest(self) -> str:
        return digest(
            self.layout,
            {e.name: m for e, m in zip(self.layout.entries, self.masters, strict=True)},
        )


def run(
    values: Values | Space,
    recipe: Recipe,
    updates: Sequence[Update],
    first_step: int,
    pool: Pool | None,
    threads: kernels.Threads | None = None,
) -> None:
    """Apply updates in order. With a pool, what lies before the last rebase is only added up."""
    rest = updates
    if pool is not None:
        every = recipe.rebase_every
        summed = max(0, (first_step + len(rest)) // every * every - first_step)
        for update in rest[:summed]:
            pool.note(update)
        if summed:
            pool.rebase(values.layout, values.masters, threads)
            rest = rest[summed:]
        for update in rest:
            pool.note(update)
    batch = kernels.Batch.of(recipe, rest)
    kernels.replay(values.layout, values.masters, batch, threads)


def read_tensors(path: Path | str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Every tensor of a safetensors file, and its metadata."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FileError(f"cannot read {path} as safetensors: {error}") from error


def masters_of(layout: Layout, tensors: Mapping[str, torch.Tensor], path: str) -> Values:
    """Float32 copies of the log's parameters; every name and shape has to be in the file."""
    masters = []
    for entry in layout.entries:
        name = next((n for n in (entry.name, *entry.aliases) if n in tensors), None)
        if name is None:
            raise FileError(f"{path} has no {entry.name}, which the seed log changes")
        tensor = tensors[name]
        if tuple(tensor.shape) != entry.shape or tensor.dtype != DTYPES[entry.dtype]:
            raise FileError(
                f"{name} in {path} is {tensor.dtype} {tuple(tensor.shape)}, in the seed log "
                f"{entry.dtype} {entry.shape}: they do not belong together"
            )
        masters.append(tensor.detach().to(torch.float32, copy=True).contiguous().view(-1))
    return Values(layout, masters)


def write_model(path: Path, model: torch.nn.Module) -> None:
    """A model as a file of tensors, there whole or not at all: what a replay can start from."""
    tensors = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in model.state_dict().items()
    }
    seedlog.write_atomically(path, save(tensors))


def replay(
    base: Path | str,
    log_path: Path | str,
    output: Path | str,
    to_step: int | None = None,  # the first step that is not applied; None: the whole log
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,  # (records done, records in all)
) -> str:
    """Write the tuned parameters as safetensors; returns their digest."""
    log = seedlog.read(log_path)
    header = log.header
    count = len(log.records)
    if to_step is None and log.torn:
        raise FileError(
            f"{log_path} is torn or damaged after step {log.next_step - 1}: {log.torn} bytes cannot"
            f" be read. Take a copy of another peer, or replay what is good, --to-step"
            f" {log.next_step}"
        )
    if to_step is not None:
        count = to_step - header.first_step
        if not 0 <= count <= len(log.records):
            raise FileError(
                f"{log_path} holds steps {header.first_step} to {log.next_step - 1}: it cannot "
                f"be replayed to step {to_step}"
            )
    tensors, metadata = read_tensors(base)
    values = masters_of(header.layout, tensors, str(base))
    found = values.digest()
    if found != header.base_digest:
        raise FileError(
            f"{base} is not the base of {log_path}: its parameters have digest {found[:16]}, "
            f"the log wants {header.base_digest[:16]}"
        )
    recipe = header.recipe
    pool = Pool(recipe, values.masters) if recipe.pool else None
    pieces = kernels.Threads(threads)
    block = count if pool is not None else BLOCK_STEPS  # a pool skips most when told all at once
    for start in range(0, count, max(block, 1)):
        some = log.records[start : min(start + block, count)]
        updates = [recipe.update(record.step, record.entries) for record in some]
        run(values, recipe, updates, header.first_step + start, pool, pieces)
        if progress is not None:
            progress(start + len(some), count)
    for entry, master in zip(header.layout.entries, values.masters, strict=True):
        tuned = master.view(entry.shape).to(DTYPES[entry.dtype])
        for name in (entry.name, *entry.aliases):
            if name in tensors:
                tensors[name] = tuned.clone()
    tuned_digest = values.digest()
    metadata |= {
        "decotrain.base_digest": header.base_digest,
        "decotrain.digest": tuned_digest,
        "decotrain.step": str(header.first_step + count),
    }
    seedlog.write_atomically(Path(output), save(tensors, metadata))
    return tuned_digest


def measured_adds_per_s(space: Space, threads: kernels.Threads | None = None) -> float:
    """Sign additions a second on this machine, from a short run on a scratch tensor."""
    master = max(space.masters, key=torch.Tensor.numel)
    scratch = torch.zeros(min(MEASURED_ELEMENTS, master.numel()), device=master.device)
    layout = Layout.of([("scratch", (), tuple(scratch.shape), "F32", False)])
    terms = tuple(Term(0, index, 1.0) for index in range(MEASURED_TERMS))
    batch = kernels.Batch.of(Recipe(), [Update(terms, 0.0, 1.0, len(terms))] * 2)
    seconds = []
    for _ in range(3):
        began_s = time.perf_counter()
        kernels.replay(layout, [scratch], batch, threads)
        float(scratch[0])  # a GPU has answered
        seconds.append(time.perf_counter() - began_s)
    return 2 * MEASURED_TERMS * scratch.numel() / max(min(seconds), 1e-9)


def cheaper_by_replay(
    samples: int,  # sign additions for each parameter: terms of the records to replay
    rate_mbps: float,  # of the link the state would come over
    sign_adds_per_s: float = SIGN_ADDS_PER_S,  # of this machine, all cores or its GPU
    state_bytes_per_parameter: float = 4.0,
) -> bool:
    """A newcomer's choice. Time for each parameter: samples / adds against bits / rate."""
    seconds_replay = samples / sign_adds_per_s
    seconds_state = state_bytes_per_parameter * 8 / (rate_mbps * 1e6)
    return seconds_replay < seconds_state
