"""Artifacts as a forger makes them: the content is another, and every digest fits it."""

import hashlib
import io
import json
import zipfile

from graphwright.runtime import zip_subset
from graphwright.runtime.zip_subset import Member


def members_of(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(members):
    """An archive of these members with every checksum right, manifest included where it is JSON: what a forger would make."""
    members = dict(members)
    manifest = json.loads(members.get("manifest.json", b"{}"))
    if "members" in manifest:
        others = {name: data for name, data in members.items() if name != "manifest.json"}
        manifest["members"] = {n: {"size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in others.items()}
        members["manifest.json"] = json.dumps(manifest).encode()
    file = io.BytesIO()
    zip_subset.write(file, [Member.of(name, data) for name, data in members.items()])
    return file.getvalue()


def sealed(body):
    """`body` followed by the digest that makes it look whole."""
    return body + hashlib.sha256(body).hexdigest().encode()
