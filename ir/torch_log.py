"""torch logs a failed inference, with its traceback, before it raises what our errors say; while a thread infers, it does not.

`torch.__trace` is a private logger, to which torch reports each symbol and each question about one; where torch has none, the filter is
on a logger that nobody uses."""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_thread = threading.local()


@contextmanager
def silenced() -> Iterator[None]:
    """Within it nothing that this thread does is logged by fake tensors; with TORCH_LOGS set all is."""
    before = getattr(_thread, "silent", False)
    _thread.silent = True
    try:
        yield
    finally:
        _thread.silent = before


def _is_heard(record: logging.LogRecord) -> bool:
    return not getattr(_thread, "silent", False) or "TORCH_LOGS" in os.environ


for _name in ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes", "torch.__trace"):
    logging.getLogger(_name).addFilter(_is_heard)
