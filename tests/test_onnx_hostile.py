"""Damaged ONNX files end in a program or one of our errors, soon and in limited memory. bench/fuzz_onnx.py reads 10,000 of them."""

import pytest
from onnx import TensorProto, helper

import graphwright as gw
from graphwright.tests import onnx_large
from graphwright.tests.onnx_cases import cases, model_of
from graphwright.tests.onnx_mutations import mutated, outcomes

ENDS = ("read", "ArtifactError", "CaptureError", "InputError")


def test_damaged_files_are_read_or_refused_with_our_errors(tmp_path):
    sources = [model_of(case).SerializeToString() for case in cases()[::40]]
    files = [tmp_path / f"{seed}.onnx" for seed in range(60)]
    for seed, file in enumerate(files):
        file.write_bytes(mutated(sources[seed % len(sources)], sources, seed))
    files[0].write_bytes(sources[0])
    ended = dict(enumerate(outcomes(files, timeout=30)))
    others = {seed: end for seed, end in ended.items() if end[0] not in ENDS}
    assert not others, f"by seed: {others}"
    assert ended[0][0] == "read"  # which was not damaged


def test_files_that_claim_gigabytes_do_not_get_them(tmp_path):
    claims = dict(onnx_large.files())
    files = [tmp_path / f"{place}.onnx" for place in range(len(claims))]
    for file, model in zip(files, claims.values(), strict=True):
        file.write_bytes(model.SerializeToString())
    ended = dict(zip(claims, outcomes(files, timeout=30), strict=True))
    assert not {name: said for name, (said, _, _) in ended.items() if said not in ENDS}
    assert max(taken for _, _, taken in ended.values()) < onnx_large.CLAIMED / 4


def test_a_name_that_is_no_text_is_an_error(tmp_path):
    node = helper.make_node("Relu", ["x"], ["y"], name="here")
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    model = helper.make_model(helper.make_graph([node], "g", infos[:1], infos[1:]), opset_imports=[helper.make_opsetid("", 18)])
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString().replace(b"here", b"he\xffe"))
    with pytest.raises(gw.ArtifactError, match="what stands there is not what the operator takes"):
        gw.from_onnx(tmp_path / "m.onnx")
