"""The one form of zip that artifacts have: members stored, sorted, dated 1980-01-01, and the SHA-256 of all before as the comment.

Any unzip reads it. Our reader takes no other form: it builds the headers anew from what it found and compares every byte, so a
second member of one name, a stray byte, a link, a flag or a local header that disagrees with the directory cannot pass.
"""

import hashlib
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from ..ir.errors import ArtifactError

MAGIC = b"PK"  # with which every archive begins
_NAME = re.compile(r"[a-z0-9_./-]{1,128}")
_STORED, _DATE_1980, _MANY = 0, 0x21, 0xFFFFFFFF
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_DIGEST_LENGTH = 64  # hex digits of SHA-256


@dataclass(frozen=True)
class Member:
    """A file inside: `chunks()` gives its bytes, as often as asked."""

    name: str
    size: int
    chunks: Callable[[], Iterable[Any]]

    @staticmethod
    def of(name: str, payload: bytes) -> "Member":
        return Member(name, len(payload), lambda: (payload,))

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()

    def crc32(self) -> int:
        checksum = 0
        for chunk in self.chunks():
            checksum = zlib.crc32(chunk, checksum)
        return checksum


@dataclass(frozen=True)
class _Entry:
    name: str
    size: int
    crc: int
    offset: int

    @property
    def local_header(self) -> bytes:
        extra = struct.pack("<2H2Q", 1, 16, self.size, self.size) if self.size >= _MANY else b""
        size = min(self.size, _MANY)
        version = 45 if extra else 20
        name = self.name.encode()
        return _LOCAL.pack(b"PK\3\4", version, 0, _STORED, 0, _DATE_1980, self.crc, size, size, len(name), len(extra)) + name + extra

    @property
    def central_header(self) -> bytes:
        large = ([self.size, self.size] if self.size >= _MANY else []) + ([self.offset] if self.offset >= _MANY else [])
        extra = struct.pack(f"<2H{len(large)}Q", 1, 8 * len(large), *large) if large else b""
        version, size, name = 45 if extra else 20, min(self.size, _MANY), self.name.encode()
        fields = (b"PK\1\2", version, version, 0, _STORED, 0, _DATE_1980, self.crc, size, size, len(name), len(extra), 0, 0, 0, 0)
        return _CENTRAL.pack(*fields, min(self.offset, _MANY)) + name + extra

    @property
    def begin(self) -> int:
        return self.offset + len(self.local_header)

    @property
    def end(self) -> int:
        return self.begin + self.size


def write(file: BinaryIO, members: Sequence[Member]) -> None:
    """Writes the archive of `members`."""
    digest = hashlib.sha256()

    def put(chunk: Any) -> None:
        file.write(chunk)
        digest.update(chunk)

    entries = _laid_out(members)
    by_name = {member.name: member for member in members}
    for entry in entries:
        put(entry.local_header)
        for chunk in by_name[entry.name].chunks():
            put(chunk)
    put(_directory(entries))
    file.write(digest.hexdigest().encode())


def begins(members: Sequence[Member]) -> dict[str, int]:
    """Where each member's bytes will begin in the archive."""
    return {entry.name: entry.begin for entry in _laid_out(members)}


def _laid_out(members: Sequence[Member]) -> list[_Entry]:
    entries: list[_Entry] = []
    for member in sorted(members, key=lambda m: m.name):
        entries.append(_Entry(member.name, member.size, member.crc32(), entries[-1].end if entries else 0))
    return entries


def _directory(entries: Sequence[_Entry]) -> bytes:
    """What follows the members: central headers and end records, the comment's length, all but the comment."""
    begin = entries[-1].end if entries else 0
    central = b"".join(entry.central_header for entry in entries)
    end64 = b""
    if begin >= _MANY:
        count, at = len(entries), begin + len(central)
        end64 = _END64.pack(b"PK\6\6", _END64.size - 12, 45, 45, 0, 0, count, count, len(central), begin)
        end64 += _LOCATOR.pack(b"PK\6\7", 0, at, 1)
    count = len(entries)
    return central + end64 + _END.pack(b"PK\5\6", 0, 0, count, count, len(central), min(begin, _MANY), _DIGEST_LENGTH)


def read(content: torch.Tensor) -> dict[str, tuple[int, int]]:
    """Where each member's bytes lie in `content` (u8[n]): name -> (begin, end). Every byte of the archive is accounted for.

    Raises:
        ArtifactError: the bytes are not such an archive, or not as they were written.
    """
    view = content.numpy().data
    if len(view) < _END.size + _DIGEST_LENGTH or bytes(view[: len(MAGIC)]) != MAGIC:
        raise ArtifactError("it is no .gw file, or was cut off")
    if hashlib.sha256(view[:-_DIGEST_LENGTH]).hexdigest().encode() != bytes(view[-_DIGEST_LENGTH:]):
        raise ArtifactError("it was cut off or edited: its bytes do not have the SHA-256 that it ends with")
    try:
        entries = list(_entries(view[:-_DIGEST_LENGTH]))
    except (struct.error, UnicodeDecodeError) as error:
        raise ArtifactError(f"its directory is broken ({error})") from error
    _check_layout(entries, view[:-_DIGEST_LENGTH])
    return {entry.name: (entry.begin, entry.end) for entry in entries}


def _entries(view: memoryview) -> Iterator[_Entry]:
    """The directory as it says; nothing is believed before `_check_layout`."""
    _, _, _, _, count, _, at, _ = _END.unpack_from(view, len(view) - _END.size)
    if at == _MANY:
        *_, at = _END64.unpack_from(view, len(view) - _END.size - _LOCATOR.size - _END64.size)
    for _ in range(count):
        *_, crc, size, _, name_length, extra_length, _, _, _, _, offset = _CENTRAL.unpack_from(view, at)
        at += _CENTRAL.size
        name, extra = bytes(view[at : at + name_length]).decode("ascii"), view[at + name_length : at + name_length + extra_length]
        large = list(struct.unpack_from(f"<{max(len(extra) - 4, 0) // 8}Q", extra, 4)) if extra_length else []
        if size == _MANY and len(large) >= 2:
            size, large = large[0], large[2:]
        if offset == _MANY and large:
            offset = large[0]
        yield _Entry(name, size, crc, offset)
        at += name_length + extra_length


def _check_layout(entries: Sequence[_Entry], view: memoryview) -> None:
    names = [entry.name for entry in entries]
    for name in names:
        if not _NAME.fullmatch(name) or any(part in ("", ".", "..") for part in name.split("/")):
            raise ArtifactError(f"it has a member of the forbidden name {name[:128]!r}")
    if names != sorted(set(names)):
        raise ArtifactError("its members are not sorted, or two have one name")
    position = 0
    for entry in entries:
        if entry.offset != position or entry.end > len(view):
            raise ArtifactError(f"its member {entry.name} does not lie where the member before it ends")
        if bytes(view[entry.offset : entry.begin]) != entry.local_header:
            raise ArtifactError(f"the header of its member {entry.name} disagrees with the directory")
        if zlib.crc32(view[entry.begin : entry.end]) != entry.crc:
            raise ArtifactError(f"its member {entry.name} does not have the checksum that the directory gives")
        position = entry.end
    if bytes(view[position:]) != _directory(entries):
        raise ArtifactError("its directory is not in the form that graphwright writes")
