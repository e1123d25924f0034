"""What reads bytes of strangers in Python: messages, the coordinator's record, checkpoint headers.

Each target takes any bytes and raises only when the code under it does something else than accept
them or refuse them with its own error. atheris drives them (__main__.py, scripts/fuzz.sh), the
default tests with a few thousand damaged examples. The C++ parsers are fuzzed in csrc/fuzz.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save

from decotrain import checkpoint
from decotrain.control import messages as m
from decotrain.control import record as rec
from decotrain.errors import FileError, MessageError

CORPUS = Path(__file__).parent / "corpus"


def messages(data: bytes) -> None:
    """What is accepted is a message, and the same one when it is sent on."""
    try:
        message = m.decode(data)
    except MessageError:
        return
    if isinstance(message, m.Foreign):  # told who it is talking to, and not sent on
        return
    if m.encode(m.decode(m.encode(message))) != m.encode(message):  # a NaN is not equal to itself
        raise AssertionError(f"{message} changes on its way")


def record(data: bytes) -> None:
    """As it is, and as the content of a file whose checksum is right."""
    with suppress(FileError):
        rec.unpack(data, "record")
    digest = hashlib.blake2b(data, digest_size=rec._DIGEST_BYTES).digest()
    try:
        known = rec.unpack(rec._MAGIC + digest + data, "record")
    except FileError:
        return
    if rec.pack(rec.unpack(rec.pack(known), "record")) != rec.pack(known):
        raise AssertionError(f"{known} changes on the disk")


@functools.cache
def _folder() -> Path:
    """A checkpoint whose tensors are whole."""
    folder = Path(tempfile.mkdtemp(prefix="decotrain-fuzz-"))
    for name in ("model", "state"):
        (folder / f"{name}.safetensors").write_bytes(tensors())
    return folder


def tensors() -> bytes:
    return bytes(save({"w": torch.zeros(2)}))


def checkpoint_header(data: bytes) -> None:
    folder = _folder()
    (folder / checkpoint.META).write_bytes(data)
    with suppress(FileError):
        checkpoint.read(folder)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "messages": messages,
    "record": record,
    "checkpoint": checkpoint_header,
}
