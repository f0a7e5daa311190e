"""Names and strings in files of each kind are data: what reads and runs the files executes, imports, starts and writes nothing.

`bench/hostile.py` damages thousands of files; the tests of each format have cases by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from onnx import TensorProto, helper

import graphwright as gw
from graphwright.commands.result import Mistake
from graphwright.commands.sources import load
from graphwright.tests.forged import members_of, packed
from graphwright.tests.payloads import PAYLOADS, WATCHED, write_payloads


def test_names_and_strings_that_are_code_are_never_run(tmp_path):
    files = write_payloads(tmp_path)
    done = subprocess.run([sys.executable, "-c", WATCHED, *map(str, files)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["events"] == [] and said["left"] == []
    assert len(PAYLOADS) >= 50 and said["run"] == len(files), "each is a name like any other"


def _pipe(path):
    os.mkfifo(path)


def _endless(path):
    path.symlink_to("/dev/zero")


def _link_to_itself(path):
    path.symlink_to(path.name)


def _enormous(path):
    with path.open("wb") as file:
        file.truncate(2**36)  # 64 GiB that take no room on the disk


READERS = {
    ".gw": lambda path: gw.load(path, backend="aten", cache=False),
    ".onnx": gw.from_onnx,
    ".txt": lambda path: load(str(path), trusted=False),
}


@pytest.mark.parametrize("suffix", READERS)
@pytest.mark.parametrize("made", [_pipe, _endless, _link_to_itself, _enormous, Path.mkdir])
def test_what_is_no_plain_file_or_a_huge_one_is_refused_at_once(tmp_path, made, suffix):
    path = tmp_path / f"model{suffix}"
    made(path)
    with pytest.raises((gw.ArtifactError, Mistake), match="model"):
        READERS[suffix](path)


@pytest.mark.parametrize("read", [gw.load, gw.from_onnx])
def test_a_name_that_no_file_can_have_is_an_error(read):
    with pytest.raises(gw.ArtifactError, match="No file has such a name"):
        read("model\0.onnx")


def test_a_header_of_weights_that_is_mostly_brackets_is_refused_before_it_is_read(tmp_path):
    gw.compile(torch.nn.Identity(), example_inputs=(torch.ones(2),), backend="aten", cache=False).save(tmp_path / "good.gw")
    members = members_of((tmp_path / "good.gw").read_bytes())
    header = b'{"a":[' + b"[]," * (33 * 2**20 // 3) + b"1]}"
    members["weights.safetensors"] = len(header).to_bytes(8, "little") + header
    (tmp_path / "model.gw").write_bytes(packed(members))
    with pytest.raises(gw.ArtifactError, match="its header is longer than the file, or than"):
        gw.load(tmp_path / "model.gw")


def test_one_name_of_two_among_many_is_found_in_one_walk():
    """60,000 names looked up in a list each are a minute."""
    weights = [helper.make_tensor(f"w{n}", TensorProto.FLOAT, [1], [1.0]) for n in (*range(60_000), 59_999)]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", infos[:1], infos[1:], weights)
    with pytest.raises(gw.ArtifactError, match="'w59999' names two inputs or two initializers"):
        gw.from_onnx(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]))


@pytest.mark.parametrize("name", ['Evil"\n\x1b[31m', "E" * 5000])
def test_names_of_operators_do_not_break_lengthen_or_colour_a_message(name):
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node(name, ["x"], ["y"], domain=name)], "g", infos[:1], infos[1:])
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(name, 1)]
    with pytest.raises(gw.GraphwrightError) as refused:
        gw.from_onnx(helper.make_model(graph, opset_imports=imports))
    assert str(refused.value).isprintable() and len(str(refused.value)) < 1000
