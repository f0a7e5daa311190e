"""Files appear whole or not at all: written beside their place, flushed, then renamed over it."""

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<boot>[^-]+)-(?P<pid>[0-9]+)-[0-9a-f]+\.tmp", re.DOTALL)


@contextmanager
def atomic_write(path: Path, mode: int | None = None) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends well; on any exception `path` is as before and nothing is left.

    A link stays, and what it leads to is replaced; the new file has the permissions `mode`, else those of the old one. What a
    killed writer of the same file left behind is removed first.

    Raises:
        OSError: the file cannot be written, as `check_writable` says or while it is.
    """
    path = Path(os.path.realpath(path))
    old = check_writable(path)
    permissions = old if mode is None else mode
    remove_debris(path.parent, path.name)
    temporary = path.with_name(f".{path.name}.{_boot()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666 if permissions is None else 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            if permissions is not None:
                os.fchmod(file.fileno(), permissions)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def check_writable(path: Path) -> int | None:
    """The permissions of the file at `path`, None where there is none.

    Raises:
        OSError: it is a folder, a device or a pipe, which nothing can take the place of, or `open` would not write it, although its
            folder may be written.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    os.close(os.open(path, os.O_WRONLY))
    return stat.S_IMODE(mode)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_debris(folder: Path, name: str | None = None) -> None:
    """Removes what killed writers of `name`, or of any file, left in `folder`."""
    with suppress(OSError):
        for entry in os.scandir(folder):
            temporary = _TEMPORARY.fullmatch(entry.name)
            if temporary is not None and name in (None, temporary["name"]) and _is_dead(temporary["boot"], temporary["pid"]):
                with suppress(OSError):
                    os.unlink(entry.path)


def _is_dead(boot: str, pid: str) -> bool:
    return boot != _boot() or not os.path.exists(f"/proc/{pid}")


def _boot() -> str:
    """Which start of the machine this is: process ids repeat after the next."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return "0"
