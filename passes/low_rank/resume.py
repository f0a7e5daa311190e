"""What calibration has gathered, kept in a folder so that a run that was ended goes on: one safetensors file a site.

A file is whole or not there, and one that was damaged since is as if it were not there.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...ir.errors import InputError
from ...ir.program import content_digest
from .statistics import Watch

SAVE_SECONDS = 30.0  # at least so long from one writing to the next,
SAVE_SHARE = 0.05  # which together take at most this share of the time


class ResumeFolder:
    """The files of one calibration, which `key` tells from others.

    Raises:
        InputError: the folder is not there and cannot be made.
    """

    def __init__(self, path: Path, key: str):
        self._path, self._key = Path(path), key
        self._saved, self._cost = time.monotonic(), 0.0
        try:
            self._path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"the folder {path} to resume calibration from cannot be made ({error.strerror}): give another") from error

    def load(self, sites: Mapping[str, Watch]) -> None:
        """Brings each site to where its file was written; one without such a file stays as it is."""
        for site, watch in sites.items():
            found = read_state(self._file(site))
            if found is not None:
                watch.restore(*found)

    def save_when_due(self, sites: Mapping[str, Watch]) -> None:
        """Saves where enough time has passed since this was done last."""
        if time.monotonic() - self._saved >= max(SAVE_SECONDS, self._cost / SAVE_SHARE):
            self.save(sites)

    def save(self, sites: Mapping[str, Watch]) -> None:
        """Writes the state of each site. A full disk is not worth losing a calibration for: then nothing is kept."""
        began = time.monotonic()
        for site, watch in sites.items():
            with suppress(OSError, SafetensorError):
                write_state(self._file(site), *watch.state())
        self._saved = time.monotonic()
        self._cost = self._saved - began

    def _file(self, site: str) -> Path:
        return self._path / f"{hashlib.sha256(f'{self._key} {site}'.encode()).hexdigest()}.safetensors"


def read_state(file: Path) -> tuple[dict[str, Tensor], Any] | None:
    """The tensors and the plain data that `write_state` wrote; None where there is no such file, or it was damaged."""
    try:
        with safe_open(file, "pt") as opened:
            tensors, text = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()["state"]  # noqa: SIM118
            is_whole = opened.metadata()["digest"] == _digest(tensors, text)
        return (tensors, json.loads(text)) if is_whole else None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def write_state(file: Path, tensors: Mapping[str, Tensor], data: Any) -> None:
    """Writes tensors and plain data, whole or not at all.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    text, temporary = json.dumps(data), file.with_suffix(".tmp")
    save_file(dict(tensors), temporary, {"state": text, "digest": _digest(tensors, text)})
    with temporary.open("rb") as written:
        os.fsync(written.fileno())
    os.replace(temporary, file)


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    parts = [f"{key} {content_digest(tensors[key])}" for key in sorted(tensors)]
    return hashlib.sha256("\n".join([text, *parts]).encode()).hexdigest()
