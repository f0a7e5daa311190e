"""The document of a compile: what its schema says, lines that lead to one another, and what the other parts of the report say."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.explorer import VERSION
from graphwright.ir.liveness import profile

SCHEMA = Path(gw.__file__).parent / "explorer" / "schema.json"


class Gated(nn.Module):
    """Two layers, of which the second's gate is computed twice: something to share, and something to slice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 256), nn.Linear(256, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x)
        return x + self.down(hidden * torch.sigmoid(hidden) + torch.sigmoid(hidden))


@pytest.fixture(scope="module")
def sliced():
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    compiled = gw.compile(Gated().eval(), "slice-groups{memory_budget=30%}", example_inputs=(x,), backend="aten", cache=False)
    compiled.profile(x)
    return compiled


@pytest.fixture(scope="module")
def found(sliced):
    return json.loads(sliced.report().json())


def lines_of(found, program):
    return found["programs"][program]["lines"]


def test_documents_are_what_the_schema_says(found):
    jsonschema = pytest.importorskip("jsonschema", reason="the schema is checked by jsonschema: pip install 'graphwright[test]'")
    schema = json.loads(SCHEMA.read_text())
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    assert [error.message for error in validator.iter_errors(found)] == []
    assert list(validator.iter_errors(found | {"graphwright_report": 99})) != []
    assert found["graphwright_report"] == VERSION


def test_a_program_is_its_text(sliced, found):
    for stage, program in zip(found["stages"], sliced.history, strict=True):
        text = "\n".join(line["text"] for line in lines_of(found, stage["program"]))
        footer = "\n".join(f"pipeline {json.dumps(each.pipeline)}" for each in program.history)
        assert str(program) == text + ("\n\n" + footer if footer else "") + "\n"


def test_a_pass_that_changes_nothing_has_no_program_of_its_own(found):
    numbers = [stage["program"] for stage in found["stages"]]
    assert numbers[0] == 0 and numbers[-1] == len(found["programs"]) - 1
    for before, after in zip(found["stages"], found["stages"][1:], strict=False):
        assert (after["program"] == before["program"]) == (not after["records"])


def test_lines_name_the_lines_that_they_read(found):
    lines = lines_of(found, 0)
    down = next(line for line in lines if line.get("op") == "aten.linear.default" and "down" in line["text"])
    read = [lines[place]["text"].split()[:2] for place in down["reads"]]
    assert read[1:] == [["weight", "@down.weight"], ["weight", "@down.bias"]] and read[0][0].startswith("%")


def test_inputs_of_regions_read_what_they_are_slices_of(found):
    lines = lines_of(found, -1)
    inside = [line for line in lines if line["kind"] == "input" and "region" in line]
    assert inside
    for line in inside:
        [read] = line["reads"]
        assert read in lines[line["region"]]["reads"]


def test_lines_lead_to_the_users_source(found):
    line = next(line for line in lines_of(found, 0) if line.get("op") == "aten.sigmoid.default")
    where = found["wheres"][line["where"]]
    run = next(run for run in found["sources"][where["file"]] if 0 <= where["line"] - run["first"] < len(run["lines"]))
    assert "torch.sigmoid(hidden)" in run["lines"][where["line"] - run["first"]]


def test_a_program_that_names_a_path_opens_no_file(tmp_path):
    secret = tmp_path / "secret.py"
    secret.write_text("password = 1\n")
    text = f"graphwright 1\n\nfunction main {{\n  takes ((*), {{}})\n  gives *\n  input %x : f32[2]\n  %0 = aten.relu.default(%x) : f32[2]  # [0] {secret}:1 net\n  return %0\n}}\n"
    found = gw.compile(gw.parse(text), backend="aten").report().data()
    assert found["wheres"] and found["sources"] == {}


def test_memory_is_what_the_analysis_says(sliced, found):
    for number, program in ((0, sliced.history[0]), (-1, sliced.program)):
        memory, told = profile(program.main), found["programs"][number]["functions"][0]["memory"]
        assert told["live"] == [int(n) for n in memory.live] and told["peak_bytes"] == memory.peak_bytes
        held = [s for s in told["storages"] if s["born"] <= told["peak_at"] <= s["dies"]]
        assert sum(s["bytes"] for s in held) + told["scratch"][told["peak_at"]] == told["peak_bytes"]
        assert all(lines_of(found, number)[s["line"]]["kind"] == "call" for s in held)


def test_differences_cover_both_programs(found):
    for difference in found["differences"]:
        sides = {-2: set(), -1: set()}
        for _, before, after, count, _ in difference["rows"]:
            sides[-2] |= set(range(before, before + count)) if before >= 0 else set()
            sides[-1] |= set(range(after, after + count)) if after >= 0 else set()
        assert sides[-2] == set(range(len(lines_of(found, difference["before"]))))
        assert sides[-1] == set(range(len(lines_of(found, difference["after"]))))
    assert {(d["before"], d["after"]) for d in found["differences"]} >= {(0, 1), (0, len(found["programs"]) - 1)}


def test_rewrites_lead_to_the_lines_that_went_and_came(found):
    number, stage = next((n, each) for n, each in enumerate(found["stages"]) if each["name"] == "share-subexpressions")
    record = stage["records"][0]
    gone = lines_of(found, found["stages"][number - 1]["program"])[record["before"][0]["line"]]
    assert gone["op"] == "aten.sigmoid.default" and record["file"].startswith("graphwright/passes/")


def test_kernels_are_timed_and_lead_to_their_lines(found):
    runs = {kernel["kind"] for kernel in found["kernels"]}
    assert runs == {"library", "region"} and all(kernel["seconds"] > 0 and kernel["bytes"] > 0 for kernel in found["kernels"])
    for kernel in found["kernels"]:
        [line] = kernel["lines"]
        assert lines_of(found, -1)[line]["op"] == kernel["name"].partition(",")[0]
        assert ("aten.sigmoid.default" in kernel["source"]) == (kernel["kind"] == "region")


def test_compiled_pieces_tell_the_operations_that_they_compute():
    pytest.importorskip("torch._inductor")
    x = torch.randn(4, 16)
    compiled = gw.compile(Gated().eval(), example_inputs=(x,), backend="inductor", cache=False)
    kernels = compiled.report().data()["kernels"]
    assert {kernel["kind"] for kernel in kernels} == {"compiled"} and "aten.sigmoid.default" in kernels[0]["source"]
    assert kernels[0]["seconds"] is None


@pytest.mark.parametrize("passes, kind", [("", "compiled"), ("slice-groups{memory_budget=30%}", "region")])
def test_compiled_pieces_show_the_kernels_that_were_made_of_them(tmp_path, passes, kind):
    """Those of this process, and those that an earlier one left in the cache."""
    pytest.importorskip("torch._inductor")
    x, emitted = torch.randn(64, 16), []
    for _ in range(2):
        torch.manual_seed(0)
        compiled = gw.compile(Gated().eval(), passes, example_inputs=(x,), backend="inductor", cache=tmp_path)
        compiled.profile(x)
        kernels = [kernel for kernel in compiled.report().data()["kernels"] if kernel["kind"] == kind]
        emitted.append([kernel["emitted"] for kernel in kernels])
    first, again = emitted
    assert first == again and first and all(text.startswith("// cpp_fused") and "void  kernel(" in text for text in first)


def test_kernels_of_libraries_have_nothing_emitted_for_them(found):
    assert {kernel["emitted"] for kernel in found["kernels"]} == {""}


def test_layers_are_held_against_float64(found):
    by_module = {error["module"]: error for error in found["errors"]}
    assert by_module.keys() == {"up", "down", ""} and found["errors_missing"] == ""
    for error in by_module.values():
        assert 0 < error["before"] < 1e-6  # float32: a few times 6e-8, over two layers
    assert by_module["up"]["after"] is None  # it runs slice by slice
    assert 0 < by_module[""]["after"] < 1e-6
    assert lines_of(found, 0)[by_module["down"]["line_before"]]["op"] == "aten.linear.default"


def test_a_layer_that_a_pass_changes_has_a_larger_error():
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    passes = "quantize{weight=int8-channel,min_numel=1}"
    compiled = gw.compile(Gated().eval(), passes, example_inputs=(x,), backend="aten", cache=False)
    compiled.profile(x)
    errors = {error["module"]: error for error in compiled.report().data()["errors"]}
    assert errors["up"]["before"] < 1e-6 < 1e-4 < errors["up"]["after"]  # eight bits: about 1e-3


class Normed(nn.Module):
    """A norm that is folded into a convolution, and a dropout that eval mode makes a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Linear(6, 5)
        self.norm.running_mean.add_(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(torch.relu(self.norm(self.conv(x)))))


def test_a_layer_that_another_was_folded_into_has_no_value_any_more_and_the_other_has():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    compiled = gw.compile(Normed().eval(), example_inputs=(x,), backend="aten", cache=False)
    errors = {error.module: error for error in compiled.profile(x).errors}
    assert errors["conv"].result is None and errors["conv"].after is None
    assert errors["norm"].result.target is torch.ops.aten.conv2d.default
    assert all(errors[name].after < 1e-6 for name in ("norm", "drop", "head"))


def test_a_layer_before_one_that_went_has_its_error_too():
    """A dropout goes from behind a linear layer that becomes another operation: one call came from both."""

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.drop = nn.Linear(16, 256), nn.Dropout()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum() + self.drop(self.up(x))

    torch.manual_seed(0)
    x = torch.randn(64, 16)
    compiled = gw.compile(Dropped().eval(), "quantize{weight=int4-g16,min_numel=0}", example_inputs=(x,), backend="aten", cache=False)
    errors = {error.module: error for error in compiled.profile(x).errors}
    assert errors["up"].after == errors["drop"].after > 1e-2 > 1e-6 > errors["up"].before


def test_what_was_left_alone_says_why_and_where():
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.cumsum(0) * 2).sin()

    compiled = gw.compile(Sum(), "slice-groups{memory_budget=10%}", example_inputs=(torch.randn(64, 64),), backend="aten", cache=False)
    found = compiled.report().data()
    left = found["stages"][-1]["left"]
    assert left and all(each["reason"] for each in left)
    assert any(lines_of(found, found["stages"][-2]["program"])[each["line"]]["op"] == each["what"] for each in left if each["line"] >= 0)


def test_schedules_are_matrices():
    module, args, kwargs = gw.models.load("moe_dlm", "tiny")
    passes = [gw.RegroupExperts(), gw.ExpertChoice(schedule=(1, 2, "linear"))]
    compiled = gw.compile(module, passes, example_inputs=args, example_kwargs=kwargs, backend="aten", cache=False)
    [schedule] = compiled.report().data()["schedules"]
    assert len(schedule["values"]) == len(schedule["rows"]) and {len(row) for row in schedule["values"]} == {len(schedule["columns"])}
    first = schedule["values"][0]
    assert first == sorted(first) and first[-1] == 2 * first[0]  # twice the experts a token, twice the tokens an expert


def test_layers_by_step_are_a_matrix():
    module, _, _ = gw.models.load("decoder", "tiny")
    compiled = gw.compile_decoder(module, "layer-skip{n_max=2,n_min=1,horizon=4}", backend="aten", cache=False)
    [schedule] = compiled.report().data()["schedules"]
    assert schedule["columns"] == ["0", "1", "2", "3"]
    assert [sum(column) for column in zip(*schedule["values"], strict=True)] == [2, 2, 1, 1]


def test_a_loaded_model_tells_what_it_knows(sliced, tmp_path):
    sliced.save(tmp_path / "gated.gw")
    loaded = gw.load(tmp_path / "gated.gw", backend="aten")
    loaded.profile(torch.randn(64, 16))
    found = loaded.report().data()
    assert len(found["programs"]) == 1 and found["stages"][-1]["name"] == "slice-groups"
    assert found["errors"] == [] and "does not know" in found["errors_missing"]
    assert found["kernels"][0]["seconds"] > 0


def test_profiling_leaves_states_as_they_were():
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += 1
            return x + self.count

    compiled = gw.compile(Counter(), example_inputs=(torch.zeros(1),), backend="aten", cache=False)
    compiled(torch.zeros(1))
    compiled.profile(torch.zeros(1))
    assert compiled(torch.zeros(1)).item() == 2


def test_what_is_measured_of_a_program_that_no_pass_changed_leads_to_its_lines():
    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin()

    compiled = gw.compile(Plain(), example_inputs=(torch.ones(4),), backend="aten", cache=False)
    compiled.profile(torch.ones(4))
    found = compiled.report().data()
    assert len(found["programs"]) == 1 < len(found["stages"])
    lines = {found["kernels"][0]["lines"][0], found["errors"][0]["line"], found["errors"][0]["line_before"]}
    assert [lines_of(found, 0)[line]["op"] for line in lines] == ["aten.sin.default"]


@pytest.mark.parametrize("cached", [False, True])
def test_a_file_that_no_pass_runs_over_is_profiled_as_often_as_one_likes(sliced, tmp_path, cached):
    sliced.save(tmp_path / "gated.gw")
    x = torch.randn(64, 16)
    for _ in range(2):
        compiled = gw.compile(
            tmp_path / "gated.gw", cleanups=False, backend="aten", cache=tmp_path / "cache" if cached else False, trainable=not cached
        )
        compiled.profile(x)
        found = compiled.report().data()
        assert found["errors"] and all(error["line"] >= 0 and error["line_before"] >= 0 for error in found["errors"])
        assert found["kernels"] and all(kernel["lines"] for kernel in found["kernels"])


def test_passes_over_a_loaded_model_follow_those_that_made_it(sliced, tmp_path):
    sliced.save(tmp_path / "gated.gw")
    again = gw.compile(tmp_path / "gated.gw", "share-subexpressions", backend="aten", cleanups=False, cache=False)
    stages = again.report().data()["stages"]
    assert [stage["name"] for stage in stages][:2] == ["loaded", "remove-proven-assertions"]
    assert [stage["name"] for stage in stages][-2:] == ["slice-groups", "share-subexpressions"] and {
        stage["program"] for stage in stages
    } == {0}


def test_sizes_that_a_call_decides_stand_at_their_hints():
    batch = torch.export.Dim("batch", min=2, max=512)
    x = torch.randn(64, 16)
    compiled = gw.compile(
        Gated().eval(),
        "slice-groups{memory_budget=30%}",
        example_inputs=(x,),
        dynamic_shapes={"x": {0: batch}},
        backend="aten",
        cache=False,
    )
    compiled.profile(torch.randn(32, 16))
    found = compiled.report().data()
    assert any(line["kind"] == "symbol" for line in lines_of(found, 0))
    assert found["programs"][0]["functions"][0]["memory"]["peak_bytes"] > 64 * 256 * 4
    assert {error["module"] for error in found["errors"]} == {"up", "down", ""}


def test_a_trainable_model_has_a_report_too():
    x = torch.randn(4, 16)
    compiled = gw.compile(Gated().eval(), example_inputs=(x,), backend="aten", trainable=True, cache=False)
    compiled.profile(x)
    found = compiled.report().data()
    assert all(kernel["lines"] for kernel in found["kernels"]) and all(error["line"] >= 0 for error in found["errors"])


def test_programs_that_the_cache_has_are_made_again_for_the_report(tmp_path):
    x = torch.randn(64, 16)
    make = lambda: gw.compile(Gated().eval(), "slice-groups", example_inputs=(x,), backend="aten", cache=tmp_path)  # noqa: E731
    torch.manual_seed(0)
    first = make().report().data()
    torch.manual_seed(0)
    again = make()
    assert again.report().passes[-1].kept
    again = again.report().data()
    assert again["programs"] == first["programs"] and again["differences"] == first["differences"]


def test_a_report_that_nobody_looks_at_makes_no_document(sliced, monkeypatch):
    monkeypatch.setattr("graphwright.runtime.compiled.Story", lambda **given: pytest.fail("a story was told"))
    assert "slice-groups" in str(sliced.report())
