"""Checkpoints: folders that are there whole or not at all, and are checked when read.

    <folder>/round-000120/model.safetensors     what to use: the outer parameters, by name
                          state.safetensors     what a resume needs beside it
                          meta.json             facts, and the SHA-256 of both files

Written beside the final place, flushed to disk, then renamed. One process writes to a folder. No
pickle: nothing in a checkpoint is ever executed. It does not know what the tensors mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from decotrain.errors import FileError

FORMAT = 2
META = "meta.json"
META_BYTES_MAX = 16 << 20
NAME = re.compile(r"round-(\d{1,12})(-before)?$")  # before: until another one is in its place
DRAFT = ".writing-"


@dataclass(frozen=True)
class Checkpoint:
    """What was saved."""

    path: Path
    round_number: int
    model: dict[str, Tensor]
    state: dict[str, Tensor]
    meta: dict[str, Any]


def write(
    folder: Path,
    round_number: int,
    model: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Saves a checkpoint and removes all but the newest `keep`."""
    final = folder / f"round-{round_number:06d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for torn in folder.glob(DRAFT + "*"):  # of a process that died
            shutil.rmtree(torn, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=DRAFT, dir=folder))
        try:
            digests = {}
            for name, tensors in (("model", model), ("state", state)):
                data = save({key: t.detach().cpu().contiguous() for key, t in tensors.items()})
                digests[name] = hashlib.sha256(data).hexdigest()
                _write_file(temporary / f"{name}.safetensors", data)
            facts = {"format": FORMAT, "round": round_number, "sha256": digests, "meta": meta}
            _write_file(temporary / META, json.dumps(facts, indent=1).encode())
            _flush_folder(temporary)
            if final.exists():  # the same round again, after a resume: it takes the old one's place
                before = final.with_name(final.name + "-before")
                shutil.rmtree(before, ignore_errors=True)
                final.rename(before)
            temporary.rename(final)
            _flush_folder(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise FileError(
            f"checkpoint {final} cannot be written: {error.strerror or error}; make room there"
        ) from error
    found = _found(folder)
    kept = [number for number, path in found if not path.name.endswith("-before")][:keep]
    for number, old in found:
        if number not in kept or old.name.endswith("-before"):
            shutil.rmtree(old, ignore_errors=True)  # what stays of it goes with the next one
    return final


def read(path: Path) -> Checkpoint:
    """The checkpoint at this path; FileError when any of it is torn or foreign."""
    try:
        facts = _facts(path)
        parts = {}
        for name in ("model", "state"):
            data = (path / f"{name}.safetensors").read_bytes()
            if hashlib.sha256(data).hexdigest() != facts["sha256"][name]:
                raise FileError(f"checkpoint {path} is torn: {name}.safetensors has changed")
            parts[name] = load(data)
        return Checkpoint(path, int(facts["round"]), parts["model"], parts["state"], facts["meta"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise FileError(f"checkpoint {path} cannot be read: {error}") from error


def meta_of(path: Path) -> dict[str, Any]:
    """The facts alone, without the tensors; FileError when they cannot be read."""
    try:
        meta = _facts(path)["meta"]
    except (OSError, ValueError, KeyError) as error:
        raise FileError(f"checkpoint {path} cannot be read: {error}") from error
    if not isinstance(meta, dict):
        raise FileError(f"checkpoint {path} has no facts")
    return meta


def _facts(path: Path) -> dict[str, Any]:
    if (path / META).stat().st_size > META_BYTES_MAX:
        raise FileError(f"{path / META} is too large to be ours")
    facts = json.loads((path / META).read_bytes())
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise FileError(f"checkpoint {path} has another format than {FORMAT}")
    return facts


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in the folder that can be read, or None."""
    for _, path in _found(folder):
        try:
            return read(path)
        except FileError:
            continue
    return None


def _found(folder: Path) -> list[tuple[int, Path]]:
    """(round, path), newest first."""
    if not folder.is_dir():
        return []
    found = [(NAME.match(path.name), path) for path in folder.iterdir()]
    numbered = [(int(m[1]), path) for m, path in found if m]
    return sorted(numbered, key=lambda one: (-one[0], one[1].name))


def _write_file(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- the state of a torch optimizer, without pickle


def pack_optimizer(
    optimizer: torch.optim.Optimizer, name: str = "inner"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, facts): an optimizer's state_dict with its tensors apart, as name.number.key."""
    saved = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for number, entries in saved["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{name}.{number}.{key}"] = value
            else:
                values.setdefault(str(number), {})[key] = value
    return tensors, {"groups": saved["param_groups"], "values": values}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    name: str = "inner",
) -> None:
    """Puts back what `pack_optimizer` gave. Hyper-parameters stay the optimizer's own."""
    state: dict[int, dict[str, Any]] = {
        int(number): dict(values) for number, values in facts["values"].items()
    }
    for place, tensor in tensors.items():
        kind, _, rest = place.partition(".")
        if kind == name:
            number, _, key = rest.partition(".")
            state.setdefault(int(number), {})[key] = tensor
    known = [len(group["params"]) for group in optimizer.state_dict()["param_groups"]]
    if known != [len(group["params"]) for group in facts["groups"]]:
        raise FileError("the checkpoint's inner optimizer has other parameter groups than this one")
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
