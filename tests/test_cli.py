"""The command line promises: text or one JSON object on stdout, three exit codes, one line for a mistake, silence in a pipe."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.cli import main

MODELS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
    def forward(self, x):
        return self.linear(x).relu() + self.linear(x).relu()

def make():
    torch.manual_seed(0)
    print("a factory may print")
    return Net().eval(), (torch.ones(2, 4),)

def make_with_kwargs():
    return Net().eval(), (), {"x": torch.ones(2, 4)}

def wrong():
    return Net()

def failing():
    raise ValueError("no such checkpoint\\non this machine")

class Branches(Net):
    def forward(self, x):
        return x if x.sum() > 0 else -x

def of_another_dtype():
    return Net().eval(), (torch.ones(2, 4).double(),)

def with_a_number_for_kwargs():
    return Net().eval(), (torch.ones(2, 4),), 3

def uncapturable():
    return Branches(), (torch.ones(2, 4),)
"""

needs_diff = pytest.mark.skipif(importlib.util.find_spec("graphwright.ir.diff") is None, reason="needs graphwright/ir/diff.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a module of factories, an artifact, an exported program, and the dumps of a program before and after passes."""
    path = tmp_path_factory.mktemp("cli")
    (path / "cli_test_models.py").write_text(MODELS)
    here = Path.cwd()
    os.chdir(path)
    try:
        assert main(["compile", "cli_test_models:make", "--backend", "aten", "-o", "net.gw"]) == 0
        import torch
        from cli_test_models import make

        module, args = make()
        torch.export.save(torch.export.export(module, args), "net.pt2")
        import graphwright as gw

        program = gw.capture(module, args, {})
        (path / "before.txt").write_text(str(program))
        (path / "after.txt").write_text(str(gw.PassManager("share-subexpressions").run(program).program))
        (path / "folder.gw").mkdir()
        (path / "broken.txt").write_text("no program")
        (path / "latin.txt").write_bytes(b"\xff\xfe")
    finally:
        os.chdir(here)
    return path


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Runs one command in that folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(folder)

    def call(*arguments):
        code = main(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_compile_prints_the_report_and_writes_an_artifact(run, folder):
    code, out, _ = run("compile", "cli_test_models:make", "--passes", "slice-groups", "--backend", "aten", "-o", "new.gw")
    assert code == 0
    assert "contract: exact" in out and "wrote new.gw" in out
    assert (folder / "new.gw").exists()


def test_compile_makes_a_decoder_of_a_language_model(run, folder):
    passes = ["--passes", "layer-skip{n_min=1,horizon=4}"]
    code, out, err = run("compile", "decoder:tiny", "--decoder", *passes, "--backend", "aten", "-o", "d.gw")
    assert code == 0, err
    assert "kv-cache" in out and len(gw.load("d.gw", backend="aten").generate([[1, 2]], 3).tokens[0]) == 3
    code, _, err = run("compile", "d.gw", "--decoder")
    assert code == 2 and "d.gw is captured already: --decoder takes a zoo name or module:factory" in err


def test_compile_holds_passes_to_their_contract_on_demand(run):
    code, out, _ = run("compile", "cli_test_models:make", "--numeric", "--backend", "aten", "--json")
    shared = next(each for each in json.loads(out)["passes"] if each["pass"] == "share-subexpressions")
    assert code == 0 and shared["rewrites"] > 0 and shared["verdict"]["kind"] == "right"


@pytest.mark.parametrize("model", ["cli_test_models:make", "cli_test_models:make_with_kwargs", "net.gw", "before.txt"])
def test_dump_prints_a_program_that_parses_back(run, model):
    import graphwright as gw

    code, out, _ = run("dump", model)
    assert code == 0
    assert str(gw.parse(out)) == out.rstrip("\n") or str(gw.parse(out)) == out


def test_dump_reads_an_exported_program_that_is_trusted(run):
    code, out, err = run("dump", "net.pt2", "--trusted")
    assert (code, err) == (0, "") and "aten.linear" in out


def test_dump_with_passes_shows_what_they_made(run):
    code, out, _ = run("dump", "before.txt", "--passes", "share-subexpressions", "--no-cleanups", "--json")
    assert code == 0 and json.loads(out)["pipeline"] == "share-subexpressions"


def test_dump_lists_weights(run):
    code, out, _ = run("dump", "net.gw", "--weights")
    assert code == 0 and "linear.weight" in out and "2 weights, 80 bytes" in out


@needs_diff
def test_diff_finds_no_difference_between_a_program_and_itself(run):
    assert run("diff", "before.txt", "before.txt") == (0, "", "")


@needs_diff
def test_diff_finds_a_difference_and_says_so_by_its_exit_code(run):
    code, out, _ = run("diff", "before.txt", "after.txt")
    assert code == 1 and out.startswith("2 calls removed\n") and "\n@@ -" in out and "\x1b" not in out


@needs_diff
def test_diff_as_json(run):
    code, out, _ = run("diff", "before.txt", "after.txt", "--json")
    data = json.loads(out)
    assert code == 1 and data["equal"] is False and data["diff"].startswith("2 calls removed\n")
    assert data["summary"]["removed"] == 2 and not any(data["summary"][key] for key in ("moved", "added", "changed", "reordered"))


def test_verify_holds_each_pass_to_its_contract(run):
    code, out, _ = run("verify", "cli_test_models:make", "--numeric")
    assert code == 0
    assert "contract right" in out and out.splitlines()[-1] == "verified"


def test_verify_says_when_nothing_was_judged_numerically(run):
    code, out, _ = run("verify", "after.txt", "--numeric", "--no-cleanups")
    assert code == 0 and "nothing was judged numerically" in out.splitlines()[-1]
    assert "give --passes P, or a network as written" in out.splitlines()[-1]
    _, out, _ = run("verify", "net.gw", "--numeric", "--passes", "fold-batch-norm")
    assert out.splitlines()[-1] == "verified; nothing was judged numerically, as no pass changed the program"


def test_verify_without_passes_checks_the_program_alone(run):
    code, out, _ = run("verify", "before.txt", "--json")
    assert code == 0 and json.loads(out) == {"verdict": "right", "numeric": False, "passes": []}


def test_verify_fails_on_a_pass_that_breaks_its_contract(run, monkeypatch):
    from graphwright.passes import RemoveNoOps, Verdict

    monkeypatch.setattr("graphwright.passes.ShareSubexpressions.check", lambda self, reference, after: Verdict("wrong", "planted"))
    code, out, _ = run("verify", "cli_test_models:make", "--numeric")
    assert RemoveNoOps.name and code == 1 and "share-subexpressions breaks its contract" in out


def test_passes_lists_contracts_and_options_with_their_defaults(run):
    code, out, _ = run("passes")
    assert code == 0 and "slice-groups" in out and "memory_budget=25%" in out
    found = {each["name"]: each for each in json.loads(run("passes", "--json")[1])["passes"]}
    assert found["slice-groups"]["contract"] == "exact"
    assert {"max_slices", "axes"} <= {each["name"] for each in found["slice-groups"]["options"]}


def test_passes_says_all_of_one_pass(run):
    code, out, _ = run("passes", "kv-cache")
    assert code == 0 and out.startswith("kv-cache  (exact)") and "Raises:" in out
    _, out, _ = run("passes", "slice-groups", "--json")
    assert json.loads(out)["name"] == "slice-groups" and "memory_budget" in json.loads(out)["doc"]


@pytest.mark.parametrize("name", ["smooth", "quantize", "absorb-outliers"])
def test_passes_says_which_options_bound_a_calibration_and_that_it_is_given_in_python(run, name):
    out = run("passes", name)[1]
    assert "\n  max_calib_bytes=2GiB  (a size such as 2GiB)\n" in out and "max_calib_bytes: of " in out
    assert ("\n  max_rows=4096  (an integer of at least 8)\n" in out) == (name != "smooth")  # which keeps no rows
    assert "\n  calibration  (an iterable of example inputs; given in Python, not in a pipeline's text)\n" in out
    assert {each["name"] for each in json.loads(run("passes", name, "--json")[1])["objects"]} >= {"calibration"}


def test_demo_lowers_the_peak_and_saves_on_demand(run, tmp_path):
    code, out, _ = run("demo", "--quick", "--json", "--save", str(tmp_path / "saved"))
    found = json.loads(out)
    assert code == 0
    assert found["compiled"]["peak_bytes"] < found["eager"]["peak_bytes"]
    assert "budget 76.25 KiB not met" in found["predicted"]  # the floor of so small a network is above a quarter of its peak
    assert found["error"] < 1e-5  # float32 outputs of a network this deep: sums in another order, about 1e-6
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == ["demo.txt", "report.txt"]


MISTAKES = {
    "no command": ([], "required"),
    "an unknown command": (["optimise", "net.gw"], "invalid choice"),
    "an unknown flag": (["passes", "--fast"], "--fast"),
    "no model": (["dump"], "MODEL"),
    "a missing file": (["dump", "absent.gw"], "absent.gw does not exist"),
    "an unknown network": (["dump", "video_unt"], "did you mean video_unet"),
    "an unknown size": (["dump", "video_unet:huge"], "tiny, small, base"),
    "an unknown module": (["dump", "absent_module:make"], "absent_module"),
    "an unknown factory": (["dump", "cli_test_models:absent"], "absent"),
    "a factory that returns something else": (["dump", "cli_test_models:wrong"], "must return"),
    "a factory that fails": (["dump", "cli_test_models:failing"], "no such checkpoint on this machine"),
    "a model that cannot be captured": (["dump", "cli_test_models:uncapturable"], "graphwright: "),
    "an untrusted .pt2": (["dump", "net.pt2"], "--trusted"),
    "text that is no program": (["dump", "broken.txt"], "line 1"),
    "a file that is no text": (["dump", "latin.txt"], "UTF-8"),
    "a text file to compile": (["compile", "before.txt"], "no weights"),
    "an example of another dtype": (["dump", "cli_test_models:of_another_dtype"], "input x of torch.float64"),
    "kwargs that are none": (["dump", "cli_test_models:with_a_number_for_kwargs"], "kwargs a dict"),
    "an unknown pass to describe": (["passes", "slice-group"], "did you mean slice-groups"),
    "an unknown pass": (["compile", "net.gw", "--passes", "slice-group"], "did you mean slice-groups"),
    "a bad option": (["dump", "before.txt", "--passes", "slice-groups{max_slices=0}"], "max_slices"),
    "a wrong order": (["verify", "before.txt", "--no-cleanups", "--passes", "slice-groups,fold-constants"], "must stand before"),
    "an unknown backend": (["compile", "net.gw", "--backend", "fast"], "unknown backend"),
    "an output of another kind": (["compile", "net.gw", "-o", "net.onnx"], "something.gw"),
    "an output that is a folder": (["compile", "net.gw", "-o", "folder.gw"], "folder.gw: Is a directory"),
    "an output in no folder": (["compile", "net.gw", "-o", "absent/net.gw"], "absent does not exist"),
    "a numeric check without weights": (["verify", "before.txt", "--numeric"], "weight"),
    "a folder that is a file": (["demo", "--quick", "--save", "before.txt"], "before.txt"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(run, mistake):
    arguments, said = MISTAKES[mistake]
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("graphwright: ") and said in err
    assert "Traceback" not in err and len(err.replace("a factory may print\n", "").splitlines()) == 1


def test_a_mistake_as_json_is_one_object_too(run):
    code, out, err = run("dump", "absent.gw", "--json")
    assert code == 2 and "absent.gw" in json.loads(out)["error"]["message"] and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "documented"),
    [(["dump", "absent.gw"], "GraphwrightError"), (["compile", "net.gw", "--passes", "slice-groups{"], "PassError")],
)
def test_a_mistake_as_json_has_a_documented_class(run, arguments, documented):
    assert json.loads(run(*arguments, "--json")[1])["error"]["type"] == documented


def test_help_documents_the_exit_codes(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compile", "--help"])
    assert stop.value.code == 0
    assert "exit codes" in capsys.readouterr().out


def test_a_pipe_gets_nothing_on_stderr_and_may_close_early(folder):
    command = f"{sys.executable} -m graphwright dump before.txt | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, len(done.stdout), done.stderr) == (0, 1, "")


def test_zoo_lists_every_network_and_size_that_model_takes(run):
    import graphwright as gw

    code, out, _ = run("zoo", "--json")
    found = {(each["name"], each["size"]): each for each in json.loads(out)["networks"]}
    assert code == 0
    assert set(found) == {(name, size) for name in gw.models.names() for size in gw.models.sizes(name)}
    module, (image,), _ = gw.models.load("vit", "tiny")
    assert found["vit", "tiny"]["parameters"] == sum(p.numel() for p in module.parameters())
    assert found["vit", "tiny"]["inputs"] == [list(image.shape)]
    assert "vit:tiny" in run("zoo")[1]


def test_the_version_is_that_of_the_package(capsys):
    from importlib.metadata import version

    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"graphwright {version('graphwright')}\n"


PASSES = """
from dataclasses import dataclass
import graphwright as gw
from graphwright.passes import Outcome

@dataclass(frozen=True)
class Nothing(gw.Pass):
    name, contract = "nothing", gw.Contract.EXACT

    def run(self, rewriter):
        return Outcome(lines=("looked at it",))

something = 3
"""


def test_a_pass_of_the_users_own_is_named_by_its_module(run, folder):
    (folder / "cli_test_passes.py").write_text(PASSES)
    code, out, err = run("compile", "cli_test_models:make", "--passes", "cli_test_passes:Nothing,share-subexpressions")
    assert code == 0 and "looked at it" in out, err
    for spec, message in [
        ("cli_test_passes:something", "is not a subclass of graphwright's Pass"),
        ("cli_test_passes:Missing", "AttributeError"),
        ("cli_test_nowhere:Nothing", "No module named 'cli_test_nowhere'"),
    ]:
        code, _, err = run("compile", "cli_test_models:make", "--passes", spec)
        assert code == 2 and message in err


def test_a_pipeline_that_the_shell_split_is_told_to_be_quoted(run):
    code, _, err = run("compile", "cli_test_models:make", "--passes", "slice-groupsmemory_budget=25%", "slice-groupsmax_slices=8")
    assert code == 2 and "put it in quotes" in err


def test_a_misspelled_network_with_a_size_is_told_the_nearest(run):
    code, _, err = run("dump", "vidio_unet:tiny")
    assert code == 2 and "did you mean video_unet:tiny?" in err


def test_export_writes_an_onnx_model_and_says_how_it_was_checked(tmp_path, capsys):
    output = tmp_path / "vit.onnx"
    assert main(["export", "vit:tiny", "-o", str(output), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["files"] == [str(output)] and said["verdict"] == {"kind": "right", "reason": ""} and output.stat().st_size > 0
    assert main(["export", "vit:tiny", "-o", str(tmp_path / "vit.bin")]) == 2
    assert "ONNX models are called something.onnx" in capsys.readouterr().err


def test_diff_shows_what_differs_between_two_onnx_models(tmp_path, capsys):
    pytest.importorskip("onnx", reason="needs the package onnx: pip install 'graphwright[onnx]'")
    paths = [str(tmp_path / name) for name in ("plain.onnx", "active.onnx")]
    for path, layers in zip(paths, ([nn.Linear(4, 3)], [nn.Linear(4, 3), nn.ReLU()]), strict=True):
        gw.compile(nn.Sequential(*layers), example_inputs=(torch.randn(2, 4),), backend="aten", cache=False).export_onnx(path)
    assert main(["diff", *paths, "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert [said["summary"][f"calls_{which}"] for which in ("before", "after")] == [1, 2]
    assert any(line.startswith("+") and "aten.relu.default" in line for line in said["diff"].splitlines())


def test_dump_counts_operators_those_of_onnx_apart(tmp_path, capsys):
    onnx = pytest.importorskip("onnx", reason="needs the package onnx: pip install 'graphwright[onnx]'")
    node = onnx.helper.make_node("NonMaxSuppression", ["boxes", "scores"], ["y"])
    infos = [onnx.helper.make_tensor_value_info(name, 1, shape) for name, shape in (("boxes", [1, 6, 4]), ("scores", [1, 1, 6]))]
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT64, ["n", 3])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["boxes"], ["r"]), node], "g", infos, [result])
    graph.node[1].input[0] = "r"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), tmp_path / "m.onnx")
    assert main(["dump", str(tmp_path / "m.onnx"), "--ops", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["operators"]["aten.relu.default"] == 1 and said["opaque"] == {"ai.onnx.NonMaxSuppression": 1}
    assert main(["diff", str(tmp_path / "m.onnx"), str(tmp_path / "m.onnx")]) == 0
