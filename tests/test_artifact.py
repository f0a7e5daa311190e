"""A `.gw` file gives back the model that was saved, or an ArtifactError; saving replaces a file whole or not at all."""

import errno
import hashlib
import io
import json
import os
import random
import re
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir import Weight
from graphwright.ir.errors import ArtifactError
from graphwright.runtime import artifact, atomic, zip_subset
from graphwright.runtime.compiled import Compilation, CompiledModel
from graphwright.runtime.zip_subset import Member
from graphwright.tests.forged import members_of, packed, sealed


class Net(nn.Module):
    """Tied weights, a buffer, a state, a weight that is not contiguous, and several dtypes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.arange(12).reshape(3, 4).t())
        self.register_buffer("low", torch.randn(7).half())
        self.register_buffer("flag", torch.tensor([True, False, True]))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x, scale=1.5, *, mode="plain"):
        self.count.add_(1)
        extra = self.table.sum() + self.low.float().sum() + self.flag.sum() + self.empty.sum()
        return {"y": self.second(self.first(x)) * scale + extra, "count": self.count + 0}


X = torch.randn(3, 6)


@pytest.fixture(scope="module")
def model():
    rows = torch.export.Dim("rows", max=50)
    return gw.compile(Net().eval(), example_inputs=(X,), dynamic_shapes={"x": {0: rows}}, backend="aten", cleanups=False)


@pytest.fixture(scope="module")
def content(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "net.gw"
    model.save(path)
    return path.read_bytes()


def load_bytes(content, tmp_path, **options):
    path = tmp_path / "bytes.gw"
    path.write_bytes(content)
    return gw.load(path, backend="aten", **options)


# --- kernels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_artifact_carries_the_sources_of_its_kernels_and_passes_them_on(tmp_path):
    net = nn.Sequential(nn.LayerNorm(6), nn.GELU()).eval()
    program = gw.ir.capture(net, (X,), {})
    model = CompiledModel(Compilation(program, "triton_interpreter"))
    model.save(tmp_path / "net.gw")
    (kernel,) = model.kernels()
    held = members_of((tmp_path / "net.gw").read_bytes())
    assert [data.decode() for name, data in held.items() if name.startswith("kernels/")] == [kernel.source]
    loaded = gw.load(tmp_path / "net.gw", backend="aten")
    assert torch.equal(loaded(X), net(X)), "what runs is made anew"
    loaded.save(tmp_path / "again.gw")
    assert (tmp_path / "again.gw").read_bytes() == (tmp_path / "net.gw").read_bytes()


@pytest.mark.parametrize("name", ["kernels/x.py", "kernels/../a.py", "kernels/0123456789abcdeF.py", "kernels/0123456789abcdef.sh"])
def test_what_is_called_otherwise_than_a_kernel_is_refused(name, content, tmp_path):
    with pytest.raises(ArtifactError):
        load_bytes(packed({**members_of(content), name: b"x"}), tmp_path)


def test_a_kernel_that_is_no_text_is_refused(content, tmp_path):
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_bytes(packed({**members_of(content), "kernels/0123456789abcdef.py": b"\xff"}), tmp_path)


# --- what is saved comes back ------------------------------------------------------------------------------------------------


def test_a_loaded_model_is_the_one_that_was_saved(content, tmp_path):
    net = Net().eval()
    model = gw.compile(net, example_inputs=(X,), dynamic_shapes={"x": {0: torch.export.Dim("rows", max=50)}}, backend="aten")
    model(X)
    model.save(tmp_path / "net.gw")
    loaded = gw.load(tmp_path / "net.gw", backend="aten")
    assert loaded.report().contract == model.report().contract and loaded.program.pipeline == model.program.pipeline
    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {k: v.dtype for k, v in model.state_dict().items()}
    for rows in (2, 7):
        x = torch.randn(rows, 6)
        ours, theirs = loaded(scale=1.5, x=x), model(x)
        assert torch.equal(ours["y"], theirs["y"]) and torch.equal(ours["count"], theirs["count"])
    assert loaded(X)["count"] == 4


def test_weights_that_the_module_changed_since_are_saved_as_they_are(tmp_path):
    net = nn.Linear(6, 6).eval()
    model = gw.compile(net, example_inputs=(X,), backend="aten")
    str(model.program)
    for change in (lambda: nn.init.ones_(net.weight), lambda: net.bias.data.add_(1)):
        change()
        model.save(tmp_path / "net.gw")
        assert torch.equal(gw.load(tmp_path / "net.gw", backend="aten")(X), net(X))


def test_two_saves_are_equal_bytes(model, content, tmp_path):
    model.save(tmp_path / "again.gw")
    assert (tmp_path / "again.gw").read_bytes() == content
    load_bytes(content, tmp_path).save(tmp_path / "from_loaded.gw")
    assert (tmp_path / "from_loaded.gw").read_bytes() == content


def test_no_time_is_saved_so_that_equal_compiles_are_equal_bytes(tmp_path):
    module, reports = Net().eval(), []
    for n in range(2):
        model = gw.compile(module, example_inputs=(X,), backend="aten", cache=False)
        assert re.search(r"  \d+\.\d\d s", str(model.report()))
        model.save(tmp_path / f"{n}.gw")
        reports += json.loads(members_of((tmp_path / f"{n}.gw").read_bytes())["manifest.json"])["reports"]
    assert reports and not any(re.search(r"  \d+\.\d\d s", report) for report in reports)
    assert (tmp_path / "0.gw").read_bytes() == (tmp_path / "1.gw").read_bytes()


def test_tied_weights_are_stored_once(tmp_path):
    weights = {name: Weight.of(name, tensor) for tensor in (torch.randn(4, 4),) for name in ("a", "b")}
    stored, tied = artifact._untied(weights)
    assert list(stored) == ["a"] and tied == {"b": "a"}


def test_any_unzip_and_safetensors_read_it(content, tmp_path):
    from safetensors.torch import load

    assert zipfile.ZipFile(io.BytesIO(content)).testzip() is None
    assert torch.equal(load(members_of(content)["weights.safetensors"])["table"], torch.arange(12).reshape(3, 4).t())


def test_weights_are_used_where_they_were_read(content, tmp_path):
    saved = artifact.load(write(tmp_path, content))
    storages = {w.tensor.untyped_storage().data_ptr() for w in saved.program.weights.values() if w.tensor.numel() and w.name != "table"}
    assert len(storages) == 1


def write(folder, content):
    path = folder / "written.gw"
    path.write_bytes(content)
    return path


def test_loaded_members_beyond_four_gigabytes_are_described_in_zip64():
    large = zip_subset._Entry("weights.safetensors", 5 * 2**30, 0, 0)
    after = zip_subset._Entry("x", 1, 0, large.end)
    assert struct.pack("<Q", 5 * 2**30) in large.local_header and struct.pack("<Q", large.end) in after.central_header
    directory = zip_subset._directory([large, after])
    assert b"PK\6\6" in directory and b"PK\6\7" in directory


# --- damage ----------------------------------------------------------------------------------------------------------------


def test_every_byte_flip_is_found(content, tmp_path):
    seed = 20240611
    rng = random.Random(seed)
    for _ in range(400):
        at, bit = rng.randrange(len(content)), rng.randrange(8)
        damaged = bytearray(content)
        damaged[at] ^= 1 << bit
        with pytest.raises(gw.ArtifactError):
            load_bytes(damaged, tmp_path)
            pytest.fail(f"seed {seed}: bit {bit} of byte {at} may flip unseen")


def test_every_truncation_and_every_addition_is_found(content, tmp_path):
    for length in [0, 1, 2, 21, 22, 63, 64, 86, *range(0, len(content), max(len(content) // 150, 1)), len(content) - 1]:
        with pytest.raises(gw.ArtifactError):
            load_bytes(content[:length], tmp_path)
    for extra in (b"\0", b"PK", content):
        with pytest.raises(gw.ArtifactError):
            load_bytes(content + extra, tmp_path)
        with pytest.raises(gw.ArtifactError):
            load_bytes(extra + content, tmp_path)


def test_byte_flips_that_a_forger_seals_again_give_a_model_or_an_artifact_error(content, tmp_path):
    body = content[:-64]
    rng = random.Random(7)
    for _ in range(150):
        damaged = bytearray(body)
        damaged[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
        with pytest.raises(gw.ArtifactError):
            load_bytes(sealed(bytes(damaged)), tmp_path)


# --- forgeries -------------------------------------------------------------------------------------------------------------


def stored(members, **flags):
    """A zip by Python's own writer, sealed: right in content, wrong in form."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", flags.pop("compression", zipfile.ZIP_STORED)) as archive:
        for name, data in members:
            archive.writestr(name, data)
        archive.comment = b"0" * 64
    return sealed(file.getvalue()[:-64])


@pytest.mark.parametrize("name", ["../net", "/etc/passwd", "a//b", "a/./b", "A.txt", "a" * 129, "a\\b", "program.txt/", "naïve"])
def test_path_like_names_are_refused(name, content, tmp_path):
    with pytest.raises(gw.ArtifactError, match="forbidden name|is broken"):
        load_bytes(stored([*members_of(content).items(), (name, b"")]), tmp_path)


def test_other_forms_of_zip_are_refused(content, tmp_path):
    members = list(members_of(content).items())
    for forged in (stored(members), stored(members, compression=zipfile.ZIP_DEFLATED)):
        with pytest.raises(gw.ArtifactError):
            load_bytes(forged, tmp_path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_may_not_come_twice_nor_out_of_order(content, tmp_path):
    members = list(members_of(content).items())
    for forged in (stored([*members, members[1]]), stored(members[::-1])):
        with pytest.raises(gw.ArtifactError, match="not sorted, or two have one name"):
            load_bytes(forged, tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "program.txt", "weights.safetensors"])
def test_a_missing_or_an_unknown_member_is_named(name, content, tmp_path):
    members = members_of(content)
    kept = {n: data for n, data in members.items() if n != name}
    with pytest.raises(gw.ArtifactError, match="it holds .*, not manifest.json"):
        load_bytes(packed(kept), tmp_path)
    with pytest.raises(gw.ArtifactError, match="it holds .*extra.txt"):
        load_bytes(packed(members | {"extra.txt": b""}), tmp_path)


def with_manifest(content, **changes):
    members = members_of(content)
    members["manifest.json"] = json.dumps(json.loads(members["manifest.json"]) | changes).encode()
    return packed(members)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "it has format 2, and this graphwright reads format 1"),
        ({"format": None}, "it has format None"),
        ({"format": True}, "it has format True"),
        ({"format": 1.0}, "it has format 1.0"),
        ({"surprise": 1}, "other keys than format 1"),
        ({"contract": "certain"}, "unknown contract"),
        ({"parameters": [3]}, "a list of dict"),
        ({"parameters": [{"name": 3, "keyword_only": False}]}, "describes a parameter that is none"),
        ({"parameters": [{"name": "x", "keyword_only": False, "default": [1]}]}, "no plain value"),
        ({"reports": "text"}, "a list of str"),
        ({"training": 1}, "says neither that the model was captured in train mode"),
        ({"other_mode": 1}, "gives what the other mode changes as something else than text"),
        ({"tied": {"first.bias": "nothing"}}, "ties weights to none that are stored"),
        ({"tied": {"new": "first.bias"}}, "not those that its program names"),
    ],
)
def test_a_manifest_that_says_something_else_is_refused(changes, message, content, tmp_path):
    with pytest.raises(gw.ArtifactError, match=message):
        load_bytes(with_manifest(content, **changes), tmp_path)


def test_a_report_that_a_file_brought_writes_nothing_to_a_terminal_but_text(content, tmp_path):
    said = str(load_bytes(with_manifest(content, reports=["\x1b[2J\u202e"]), tmp_path).report())
    assert r"\x1b[2J\u202e" in said and said.replace("\n", "").isprintable()


def test_a_model_whose_manifest_does_not_say_its_mode_is_in_eval_mode(content, tmp_path):
    members = members_of(content)
    manifest = json.loads(members["manifest.json"])
    del manifest["training"], manifest["other_mode"]
    assert not load_bytes(packed(members | {"manifest.json": json.dumps(manifest).encode()}), tmp_path).training


@pytest.mark.parametrize(
    "text", [b'{"a": 1, "a": 2}', b'{"a": NaN}', b'{"a": Infinity}', b"[" * 100_000, b"\xff", b"", b"[]", b"3"], ids=lambda t: str(t[:12])
)
def test_json_beyond_the_standard_is_refused(text, content, tmp_path):
    file = io.BytesIO()
    zip_subset.write(file, [Member.of(n, d) for n, d in (members_of(content) | {"manifest.json": text}).items()])
    with pytest.raises(gw.ArtifactError):
        load_bytes(file.getvalue(), tmp_path)


def tensor_file(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "longer than the file"),
        ((2**63).to_bytes(8, "little"), "longer than the file"),
        (tensor_file([1], b""), "no JSON object"),
        (tensor_file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "more": 1}}, bytes(8)), "that are known"),
        (tensor_file({"a": {"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "that are known"),
        (tensor_file({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, bytes(8)), "sizes that are none"),
        (tensor_file({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, bytes(8)), "sizes that are none"),
        (tensor_file({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}}, bytes(8)), "bytes that its shape needs"),
        (tensor_file({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, bytes(8)), "bytes that its shape needs"),
        (tensor_file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)), "leaves a gap"),
        (tensor_file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(12)), "belong to no tensor"),
        (tensor_file({"__metadata__": {}}, b""), "that are known"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tensor_file_that_lies_is_refused_before_anything_is_allocated(payload, message, content, tmp_path):
    with pytest.raises(gw.ArtifactError, match=message):
        load_bytes(packed(members_of(content) | {"weights.safetensors": payload}), tmp_path)


def test_a_program_that_does_not_parse_gives_its_line(content, tmp_path):
    members = members_of(content)
    text = members["program.txt"].replace(b"aten.linear.default", b"aten.from_file.default", 1)
    with pytest.raises(gw.ArtifactError, match=r"line \d+, column \d+: unknown operation aten.from_file"):
        load_bytes(packed(members | {"program.txt": text}), tmp_path)


def test_weights_that_the_program_was_not_saved_with_are_refused(content, tmp_path):
    other = gw.compile(Net().eval(), example_inputs=(X,), backend="aten", cleanups=False)
    other.save(tmp_path / "other.gw")
    weights = members_of((tmp_path / "other.gw").read_bytes())["weights.safetensors"]
    with pytest.raises(gw.ArtifactError, match="other contents in the weight table than in the text"):
        load_bytes(packed(members_of(content) | {"weights.safetensors": weights}), tmp_path)


def test_a_digest_known_from_elsewhere_is_held_against_the_file(content, tmp_path):
    load_bytes(content, tmp_path, sha256=hashlib.sha256(content).hexdigest().upper())
    with pytest.raises(gw.ArtifactError, match="does not have the SHA-256 00"):
        load_bytes(content, tmp_path, sha256="0" * 64)


def test_what_is_no_file_is_an_artifact_error(tmp_path):
    for path in (tmp_path / "missing.gw", tmp_path):
        with pytest.raises(gw.ArtifactError, match="cannot be read"):
            gw.load(path)


# --- saving ----------------------------------------------------------------------------------------------------------------


class FailingFiles:
    """Fails the k-th file operation of a save."""

    NAMES = ("open", "fsync", "replace")

    def __init__(self, monkeypatch, k, error=errno.ENOSPC):
        self.left = k
        for name in self.NAMES:
            monkeypatch.setattr(atomic.os, name, self.wrapped(getattr(os, name), error))

    def wrapped(self, function, error):
        def call(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                raise OSError(error, os.strerror(error))
            return function(*args, **kwargs)

        return call


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_a_failed_save_leaves_the_old_file_and_no_debris(k, model, tmp_path, monkeypatch):
    path = tmp_path / "net.gw"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        FailingFiles(patch, k)
        with pytest.raises(gw.ArtifactError, match="cannot be written"):
            model.save(path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["net.gw"]


def test_an_interrupted_save_leaves_the_old_file_and_no_debris(model, tmp_path, monkeypatch):
    path = tmp_path / "net.gw"
    path.write_bytes(b"old")

    def interrupted(file, members):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(zip_subset, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.save(path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["net.gw"]


def test_a_save_removes_what_a_killed_one_left_but_not_what_a_living_one_writes(model, tmp_path):
    boot = atomic._boot()
    dead, earlier = tmp_path / f".net.gw.{boot}-999999999-ab.tmp", tmp_path / ".net.gw.other-1-ab.tmp"
    living, foreign = tmp_path / f".net.gw.{boot}-{os.getpid()}-ab.tmp", tmp_path / ".other.gw.other-1-ab.tmp"
    for path in (dead, earlier, living, foreign):
        path.write_bytes(b"")
    model.save(tmp_path / "net.gw")
    assert sorted(os.listdir(tmp_path)) == sorted(["net.gw", living.name, foreign.name])


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "link to a device"])
def test_what_is_no_file_is_not_replaced(kind, model, tmp_path):
    path = tmp_path / "net.gw"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a device":
        path.symlink_to("/dev/full")
    else:
        path = Path("/dev/full")
    before = os.lstat(path).st_ino
    with pytest.raises(gw.ArtifactError, match=r"cannot be written \((Is a directory|Not a regular file)\)"):
        model.save(path)
    assert os.lstat(path).st_ino == before and not any(name.startswith(".") for name in os.listdir(path.parent))


def test_a_link_stays_and_what_it_leads_to_is_replaced(model, tmp_path):
    target, link = tmp_path / "store" / "net-1.gw", tmp_path / "net.gw"
    target.parent.mkdir()
    target.write_bytes(b"old")
    link.symlink_to("store/net-1.gw")
    model.save(link)
    assert link.is_symlink() and gw.load(target, backend="aten").program == model.program and os.listdir(target.parent) == [target.name]


@pytest.mark.parametrize("permissions", [0o600, 0o664])
def test_a_file_keeps_its_permissions(permissions, model, tmp_path):
    path = tmp_path / "net.gw"
    path.write_bytes(b"old")
    path.chmod(permissions)
    model.save(path)
    assert path.stat().st_mode & 0o777 == permissions and path.read_bytes() != b"old"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write any file: run the tests as another user")
def test_a_read_only_file_is_not_replaced(model, tmp_path):
    path = tmp_path / "net.gw"
    path.write_bytes(b"old")
    path.chmod(0o444)
    with pytest.raises(gw.ArtifactError, match="cannot be written"):
        model.save(path)
    assert path.read_bytes() == b"old"


def test_saving_into_no_folder_says_so(model, tmp_path):
    with pytest.raises(gw.ArtifactError, match="cannot be written"):
        model.save(tmp_path / "none" / "net.gw")


def test_a_dtype_that_is_not_stored_is_named(tmp_path):
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("wave", torch.zeros(2, dtype=torch.complex128))

        def forward(self, x):
            return x + self.wave

    model = gw.compile(Complex(), example_inputs=(torch.zeros(2),), backend="aten", cleanups=False)
    with pytest.raises(gw.ArtifactError, match="weight wave is torch.complex128, which safetensors cannot hold"):
        model.save(tmp_path / "net.gw")
    assert os.listdir(tmp_path) == []
