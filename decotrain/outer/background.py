"""A function on a thread of its own, so that a training step is not held up by it.

torch and the core release the GIL. Nothing is queued: one thread for each call, gone with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

T = TypeVar("T")


def in_background(call: Callable[[], T], name: str) -> Future[T]:
    """Its result, or the error it ended with, in time."""
    future: Future[T] = Future()
    threads = torch.get_num_threads()

    def run() -> None:
        torch.set_num_threads(threads)  # a new thread would take every core
        try:
            with torch.no_grad():
                future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def ready(value: T) -> Future[T]:
    """What is known already."""
    future: Future[T] = Future()
    future.set_result(value)
    return future
