"""Results that cost time, kept in a folder: content-addressed, atomic, shared between processes, bounded.

    FOLDER/KIND/DIGEST    "graphwright cache 1 SHA256\\n" {"kind": .., "key": {..}} "\\n" value

DIGEST is the SHA-256 of kind and key, and SHA256 that of all that follows its line, so that what is read is what was written for that
very key, or a miss. An entry may be code. It is trusted as ssh trusts a key file: the folders from the root down to it, and the file, must
belong to this user (or, of the folders, to root) and be writable by nobody else. Who can write there as this user can run code as this user
anyway. Whoever sets the folder to one that others write (a group's, a network share's) has no cache, and `problem` says so.
"""

import errno
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..ir.errors import ArtifactError, InputError
from .atomic import atomic_write, remove_debris
from .strict_json import strict_json

MAX_BYTES = 2**30
KINDS = ("passes", "types", "code", "pieces", "native", "probe", "tuning")  # what graphwright keeps
_MAGIC = b"graphwright cache 1 "
_MAX_HEADER = 2**20
_KIND = re.compile(r"[a-z][a-z0-9-]*")
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True)
class Entry:
    """What is known of an entry without its value: its key, its size in bytes, and when it was last of use (seconds since 1970)."""

    kind: str
    key: Mapping[str, str]
    nbytes: int
    used: float

    def differing(self, key: Mapping[str, str]) -> dict[str, tuple[str | None, str | None]]:
        """The parts in which `key` is another, as (here, in `key`), None where there is no such part."""
        names = sorted({*self.key, *key})
        return {name: (self.key.get(name), key.get(name)) for name in names if self.key.get(name) != key.get(name)}


class Cache:
    """Entries by kind (`passes`, `tuning`) and key (named parts, such as program, device and versions), of `max_bytes` in all.

    Neither a damaged entry nor a full disk is an error: what cannot be read is a miss, and what cannot be written is not kept.
    Beyond `max_bytes`, entries go that were not used for longest.
    """

    def __init__(self, folder: str | Path, max_bytes: int = MAX_BYTES):
        self.folder, self.max_bytes = Path(folder), max_bytes
        self._room = 0  # bytes that may be written before all entries are looked at again

    def __repr__(self) -> str:
        return f"Cache({str(self.folder)!r})"

    def get(self, kind: str, key: Mapping[str, str]) -> bytes | None:
        """The value that was put under this key; None for a miss, which a damaged, unreadable or untrusted entry is too.

        Raises:
            InputError: `kind` is no short name.
        """
        header, path = _header(kind, key), self._path(kind, key)
        if _distrusted(path.parent) is not None:
            return None
        try:
            with _opened(path) as file:
                content = file.read()
                with suppress(OSError):
                    os.utime(file.fileno())
        except OSError:
            return None
        begin = _begin(header, content)
        return None if begin is None else content[begin:]

    def put(self, kind: str, key: Mapping[str, str], value: bytes) -> None:
        """Keeps `value` under this key, in the place of what was there. Nothing is kept where the disk is full, the folder is not
        trusted or cannot be written, or `value` alone is larger than the cache may be.

        Raises:
            InputError: `kind` is no short name.
        """
        header, path = _header(kind, key), self._path(kind, key)
        checked = hashlib.sha256(header)
        checked.update(value)
        first = _MAGIC + checked.hexdigest().encode() + b"\n"
        if len(first) + len(header) + len(value) > self.max_bytes:
            return
        with suppress(OSError):
            _make_private(path.parent)
            if _distrusted(path.parent) is not None:
                return
            with atomic_write(path, mode=0o600) as file:
                file.write(first + header)
                file.write(value)
            self._room -= len(first) + len(header) + len(value)
            if self._room < 0:
                self._evict()

    def entries(self, kind: str | None = None) -> list[Entry]:
        """All entries, or those of one kind, the last used first. Their values are not checked."""
        found = []
        for each in self._files():
            with suppress(OSError, ArtifactError):
                entry = _entry(each)
                found += [entry] if kind in (None, entry.kind) else []
        return sorted(found, key=lambda entry: -entry.used)

    def nearest(self, kind: str, key: Mapping[str, str]) -> Entry | None:
        """The entry of this kind whose key differs from `key` in the fewest parts, the last used of several; None where there is none."""
        return min(self.entries(kind), key=lambda entry: len(entry.differing(key)), default=None)

    def clear(self, kind: str | None = None) -> int:
        """Removes all entries, or those of one kind, damaged ones too; returns how many."""
        removed = 0
        for path in self._files():
            if kind in (None, path.parent.name):
                with suppress(OSError):
                    path.unlink()
                    removed += 1
        return removed

    @property
    def problem(self) -> str | None:
        """Why this cache keeps nothing new, or gives nothing, in a sentence; None when it does both."""
        present = next(each for each in (self.folder.absolute(), *self.folder.absolute().parents) if each.exists())
        if not os.access(present, os.W_OK | os.X_OK):
            return f"{present} cannot be written"
        return _distrusted(self.folder / "kind")  # where entries would lie

    def _path(self, kind: str, key: Mapping[str, str]) -> Path:
        return self.folder / kind / hashlib.sha256(_header(kind, key)).hexdigest()

    def _files(self) -> Iterator[Path]:
        """Every entry's file; what killed writers left is removed on the way."""
        for folder in sorted(_scan(self.folder)):
            if _KIND.fullmatch(folder.name) and folder.is_dir() and _distrusted(folder) is None:
                remove_debris(folder)
                yield from (path for path in _scan(folder) if not path.name.startswith("."))

    def _evict(self) -> None:
        """Removes what was not used for longest until all is within `max_bytes`. A reader that has an entry open still reads it whole."""
        known = []
        for path in self._files():
            with suppress(OSError):
                found = path.stat()
                known.append((found.st_mtime_ns, found.st_size, path))
        excess = sum(size for _, size, _ in known) - self.max_bytes
        for _, size, path in sorted(known):
            if excess <= 0:
                break
            with suppress(OSError):
                path.unlink()
            excess -= size
        self._room = min(-excess, self.max_bytes // 16)  # other processes write as well


def default_cache() -> Cache:
    """The user's cache: in GRAPHWRIGHT_CACHE_DIR, else in `graphwright` of XDG_CACHE_HOME, else in ~/.cache/graphwright."""
    own, shared = os.environ.get("GRAPHWRIGHT_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME", "")
    if own:
        return Cache(own)
    if os.path.isabs(shared):  # its specification has a relative one ignored
        return Cache(Path(shared) / "graphwright")
    try:
        return Cache(Path.home() / ".cache" / "graphwright")
    except RuntimeError:  # a user without a home
        return Cache(Path(tempfile.gettempdir()) / f"graphwright-{os.geteuid()}")


def _header(kind: str, key: Mapping[str, str]) -> bytes:
    if not _KIND.fullmatch(kind):
        raise InputError(f"an entry's kind is {kind!r}: use lower case letters, digits and dashes, such as tuning")
    return json.dumps({"kind": kind, "key": dict(key)}, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _begin(header: bytes, content: bytes) -> int | None:
    """Where the value begins in an undamaged entry for `header`; None for any other content."""
    line = len(_MAGIC) + 65
    if content[line : line + len(header)] != header:
        return None
    digest = hashlib.sha256(memoryview(content)[line:]).hexdigest()
    return line + len(header) if content[:line] == _MAGIC + digest.encode() + b"\n" else None


def _opened(path: Path) -> BinaryIO:
    """Raises OSError where it cannot be read, or is no file of this user's that nobody else may write."""
    file = open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")  # a pipe would keep an opener waiting
    found = os.fstat(file.fileno())
    if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & _WRITABLE_BY_OTHERS:
        return file
    file.close()
    raise PermissionError(errno.EPERM, "Not a file of this user alone", str(path))


def _entry(path: Path) -> Entry:
    """Raises OSError or ArtifactError where there is none."""
    with _opened(path) as file:
        first, header = file.readline(_MAX_HEADER), strict_json(file.readline(_MAX_HEADER))
        found = os.fstat(file.fileno())
    match header:
        case {"kind": str(kind), "key": dict(key)} if len(header) == 2 and all(isinstance(part, str) for part in key.values()):
            if first.startswith(_MAGIC):
                return Entry(kind, key, found.st_size, found.st_mtime)
    raise ArtifactError(f"{path} is no entry of a cache")


def _scan(folder: Path) -> list[Path]:
    try:
        return [Path(entry.path) for entry in os.scandir(folder)]
    except OSError:
        return []


def _make_private(folder: Path) -> None:
    """`folder` and what it lies in, where missing, for this user alone, as the specification of XDG_CACHE_HOME wants them."""
    for each in reversed([folder, *folder.parents]):
        if not each.exists():
            with suppress(FileExistsError):  # another process was quicker
                each.mkdir(mode=0o700)


def _distrusted(folder: Path) -> str | None:
    """Why code that lies in `folder` is not to be run, in a sentence; None where only this user and root can have put it there."""
    folder = Path(os.path.realpath(folder))
    for each in (folder, *folder.parents):
        try:
            found = each.stat()
        except FileNotFoundError:
            continue
        except OSError as error:
            return f"{each} cannot be looked at ({error.strerror or error})"
        if found.st_uid != os.geteuid() and (found.st_uid != 0 or each == folder):
            return f"{each} belongs to another user: set GRAPHWRIGHT_CACHE_DIR to a folder of your own"
        # In a sticky folder, such as /tmp, others cannot move or remove what is this user's.
        if found.st_mode & _WRITABLE_BY_OTHERS and (each == folder or not found.st_mode & stat.S_ISVTX):
            return f"{each} can be written by others: take their permission away (chmod go-w), or set GRAPHWRIGHT_CACHE_DIR"
    return None
