"""What can go wrong because of the world, as a handful of exceptions.

Each message says what happened, to whom, and the remedy. Mistakes of ours are assertions, not
errors. The core throws its own exception, which the bindings turn into `RoundError`.
"""

from __future__ import annotations


class Error(Exception):
    """Base of everything decotrain raises on purpose."""


class ConfigError(Error):
    """An option, argument or configuration value is wrong, or two of them do not fit."""


class MessageError(Error):
    """Bytes from the network are no message of ours. Only the sender's message is dropped."""


class RefusedError(Error):
    """The coordinator does not admit this peer: other run, configuration or version."""


class UnreachableError(Error):
    """Nobody answers at an address within the time given."""


class RoundError(Error):
    """A round cannot give a result: bad tensors, mismatched specifications, poisoned values."""


class NotFiniteError(RoundError):
    """A contribution contains NaN or an infinity. The message names the tensor."""


class AbandonedError(RoundError):
    """A GPU failed while a contribution crossed from it: others go on without the rest of it."""

    def __init__(self, text: str, work: object = None) -> None:
        super().__init__(text)
        self.work = work  # of the core: the round's result is missed here


class OutOfMemoryError(Error, MemoryError):
    """This process cannot have the memory that a round or a fetch needs. The others go on."""


class WaitTimeoutError(Error):
    """The result is not there within the time the caller gave. The round goes on."""


class LeftError(Error):
    """This communicator has left the run, or was left out and cannot come back."""


class StateError(Error):
    """Shared state could not be fetched, or does not fit what is registered here."""


class FileError(Error):
    """A durable file (record, checkpoint, seed log) is torn, foreign or cannot be written."""
