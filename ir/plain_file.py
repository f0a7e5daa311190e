"""Files that somebody else may have made: only plain ones are opened, since a pipe keeps its reader waiting and a device has no end."""

import errno
import os
import stat
from io import BufferedReader


def open_plain(path: "str | os.PathLike[str]") -> BufferedReader:
    """The file at `path`, opened to be read.

    Raises:
        OSError: it is missing, cannot be read, or is no plain file; a name that no file can have is one of these.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except ValueError as error:  # a NUL in it, or half a surrogate pair
        raise FileNotFoundError(errno.ENOENT, f"No file has such a name ({error})", ascii(path)) from error
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    raise OSError(errno.EINVAL, "Is a directory" if stat.S_ISDIR(mode) else "Is a pipe or a device, and no plain file", str(path))


def read_plain(path: "str | os.PathLike[str]", most: int) -> bytes:
    """The content of the file at `path`, which is of at most so many bytes.

    Raises:
        OSError: as `open_plain` does, or the file is larger, of which nothing is read.
    """
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"Has {size} bytes, more than the limit of {most}", str(path))
        return file.read()
