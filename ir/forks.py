"""What a forked process may do: nothing that waits for a thread, since of threads it has the one that forked.

torch computes on a pool of threads, which a child does not have and waits for without end; a lock that another thread held stays held.
Processes that are spawned have neither fault.
"""

import os
import threading
import weakref
from pathlib import Path

import torch

from .errors import TargetError

_locks: "weakref.WeakSet[threading.Lock | threading.RLock]" = weakref.WeakSet()
_had_threads = _is_cut_off = False


def new_lock() -> threading.Lock:
    """A lock that is open in a forked process, whoever held it."""
    lock = threading.Lock()
    _locks.add(lock)
    return lock


def new_rlock() -> threading.RLock:
    """The same, for a thread that may hold it twice."""
    lock = threading.RLock()
    _locks.add(lock)
    return lock


def check_threads() -> None:
    """Raises TargetError where a call would wait for threads that were left behind in the process that forked this one."""
    if _is_cut_off and torch.get_num_threads() > 1:
        raise TargetError(
            "this process was forked from one whose threads computed, and would wait for them without end: call "
            "torch.set_num_threads(1) first in it, or start it with the multiprocessing method spawn"
        )


def _before() -> None:
    global _had_threads
    try:
        _had_threads = len(list(Path("/proc/self/task").iterdir())) > 1
    except OSError:  # no /proc: threads there may be
        _had_threads = True


def _in_child() -> None:
    global _is_cut_off
    _is_cut_off = _is_cut_off or _had_threads
    for lock in list(_locks):
        lock._at_fork_reinit()  # type: ignore[union-attr]  # as the standard library does with locks of its own


os.register_at_fork(before=_before, after_in_child=_in_child)
