"""The configuration files of the package: where they lie, and what one about `outer` says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from decotrain.errors import ConfigError


def configs() -> Path:
    """configs/: in the package when installed, at the top of a source tree otherwise."""
    here = Path(__file__).resolve().parent
    for place in (here / "configs", here.parent / "configs"):
        if (place / "train.yaml").is_file():
            return place
    raise ConfigError(f"configs/ is missing beside {here}; install decotrain again")


def outer_options(preset: str) -> dict[str, Any]:
    """What `decotrain train outer=PRESET` starts, when nothing else is said of the outer options.

    What names another key (`${peers}`) stays as it is written.
    """
    from omegaconf import OmegaConf

    read = OmegaConf.to_container(OmegaConf.load(configs() / "outer" / f"{preset}.yaml"))
    assert isinstance(read, dict)
    whole = read.get("outer", read)  # a file that sets more than its group has it one level down
    return {str(key): value for key, value in whole.items()}
