"""The model a fine-tune starts from: found, built, loaded.

A base is a run of `decotrain train` (its newest checkpoint), one checkpoint, or a safetensors file
whose model a function of the user's makes. Every tensor has to fit; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from decotrain import checkpoint, named
from decotrain.errors import ConfigError, FileError
from decotrain.finetune.settings import Settings
from decotrain.model import ModelConfig, Transformer
from decotrain.spsa.replay import read_tensors


@dataclass(frozen=True)
class Base:
    """Where the tensors are, and the shapes when they are a checkpoint of ours."""

    file: Path
    shapes: Mapping[str, int] | None


def find(path: str) -> Base:
    """What lies at the path."""
    place = Path(path).expanduser()
    if place.is_file():
        return Base(place, None)
    if (place / checkpoint.META).is_file():
        return _of_checkpoint(checkpoint.read(place))
    found = [one for folder in place.glob("checkpoints/*") if (one := checkpoint.newest(folder))]
    if not found:
        what = "no checkpoint in it" if place.is_dir() else "nothing there"
        raise ConfigError(
            f"base={path}: {what}; name a run of `decotrain train`, a checkpoint's folder or a"
            " safetensors file"
        )
    return _of_checkpoint(max(found, key=lambda one: one.round_number))


def _of_checkpoint(saved: checkpoint.Checkpoint) -> Base:
    config = saved.meta.get("config")
    model = config.get("model") if isinstance(config, dict) else None
    names = ("layers", "width", "heads", "kv_heads", "hidden", "context")
    if not isinstance(model, dict) or not all(type(model.get(n)) is int for n in names):
        raise FileError(f"checkpoint {saved.path} does not say what its model looks like")
    return Base(saved.path / "model.safetensors", {name: model[name] for name in names})


def build(settings: Settings, base: Base) -> tuple[nn.Module, int]:
    """The model with the base's values, and the longest input it takes, in bytes."""
    torch.manual_seed(settings.seed)
    if settings.factory is not None:
        model = named.function("factory", settings.factory)()
        if not isinstance(model, nn.Module):
            raise ConfigError(f"factory={settings.factory} returned no torch.nn.Module")
        context = settings.context
        if not context:
            raise ConfigError("with factory=... say context=N, the longest input in bytes")
    elif base.shapes is not None:
        model = Transformer(ModelConfig(**base.shapes))
        context = settings.context or base.shapes["context"]
        if context > base.shapes["context"]:
            raise ConfigError(f"context={context}: the base takes at most {base.shapes['context']}")
    else:
        raise ConfigError(
            f"base={settings.base} is a file of tensors: say what model they belong to with"
            " factory=module:function"
        )
    load(model, base.file)
    return model.eval(), context


def load(model: nn.Module, file: Path) -> None:
    """Every tensor of the model, from the file; ones that are tied may be there once."""
    tensors, _ = read_tensors(file)
    wanted = model.state_dict(keep_vars=True)
    there = {id(value) for name, value in wanted.items() if name in tensors}
    missing = [n for n, value in wanted.items() if n not in tensors and id(value) not in there]
    strange = [name for name in tensors if name not in wanted]
    wrong = [n for n, t in tensors.items() if n in wanted and t.shape != wanted[n].shape]
    for names, what in (
        (missing, "lacks"),
        (strange, "has besides"),
        (wrong, "has other shapes of"),
    ):
        if names:
            raise ConfigError(f"{file} does not fit the model: it {what} {', '.join(names[:3])}")
    model.load_state_dict(tensors, strict=False)
