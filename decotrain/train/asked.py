"""What a run at an address does: whoever came first has said so. Joins nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from decotrain.control import client
from decotrain.control.token import VARIABLE, find
from decotrain.control.transport import INSECURE
from decotrain.errors import ConfigError


def as_the_run_says(
    config: Mapping[str, Any], named: Sequence[str], keys: Sequence[str], command: str
) -> dict[str, Any]:
    """The configuration, with what a run that is joined by address says itself."""
    trust(config)
    join = config.get("join")
    if not join:
        return dict(config)
    run = shared_by(str(join), keys, command)
    for line in overruled(named, config, run, keys):
        print(f"decotrain: {line}", file=sys.stderr)
    return {**config, **run}


def trust(config: Mapping[str, Any]) -> None:
    """The token and --insecure, where this process and those that it starts look for them."""
    if config.get("token_file"):
        os.environ[VARIABLE] = str(Path(str(config["token_file"])).expanduser().absolute())
    if config.get("insecure"):
        os.environ[INSECURE] = "1"


def shared_by(address: str, keys: Sequence[str], command: str) -> dict[str, Any]:
    """The run's name, and of its configuration the keys that all peers of a `command` share."""
    known = client.status(address, token=find())
    shared = known["config"]
    if shared is None:
        return {"name": known["run"]}
    if lacking := [key for key in keys if key not in shared]:
        raise ConfigError(
            f"run {known['run']!r} at {address} is not one of `decotrain {command}`: its"
            f" configuration has no {', '.join(lacking)}; join it with the program that its peers"
            " run"
        )
    return {"name": known["run"], **{key: shared[key] for key in keys}}


def overruled(
    named: Sequence[str], asked: Mapping[str, Any], run: Mapping[str, Any], keys: Sequence[str]
) -> list[str]:
    """What somebody who joins has asked for and does not get: a line for each key, with both
    values. `named`: the overrides of the command line; the rest is nobody's wish."""
    words = {word.partition("=")[0].lstrip("+~").partition("@")[0] for word in named}
    lines, holds = [], dict(_flat(run))
    for key, value in _flat({key: asked[key] for key in ("name", *keys)}):
        wanted = key in words or any(key.startswith(f"{group}.") for group in words)
        if wanted and holds.get(key, value) != value:
            lines.append(f"{key}={holds[key]} holds here, as the run has it, and not {value}")
    return lines


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
