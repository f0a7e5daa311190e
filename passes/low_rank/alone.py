"""Factorizations by one thread: what LAPACK gives depends in its last bits on how many there are, and the codes of a program may not."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LOCK = threading.Lock()


@contextmanager
def one_thread() -> Iterator[None]:
    """torch has one thread inside, and as many as before behind it. One caller at a time."""
    with _LOCK:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
