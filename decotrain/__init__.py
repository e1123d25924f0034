"""decotrain: train one model on machines that share nothing but the internet.

    import decotrain as dt

    comm = dt.join("203.0.113.7:29400", token_file="run.token")
    outer = dt.outer.make("streaming", model, optimizer, comm, sync_every=100)
    for batch in loader:
        loss(model, batch).backward(); optimizer.step(); optimizer.zero_grad()
        outer.step(tokens=batch.numel())

Importing this imports no torch; the names below do when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from decotrain.errors import Error

if TYPE_CHECKING:
    from decotrain import outer
    from decotrain.communicator import Communicator, join

__version__ = "0.1.0"
__all__ = ["Communicator", "Error", "__version__", "join", "outer"]

_HOMES = {
    "Communicator": "decotrain.communicator",
    "join": "decotrain.communicator",
}


def __getattr__(name: str) -> Any:
    if name == "outer":
        return import_module("decotrain.outer")
    if name not in _HOMES:
        raise AttributeError(f"module 'decotrain' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
