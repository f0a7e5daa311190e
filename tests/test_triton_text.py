"""Emitted files are what `ruff format` would write and `ruff check` passes: nothing is defined that nothing reads. Those of attention, experts
and recurrences are modules of the package, which `make lint` holds to the same."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "bench")]

from triton_kernels import capture, kernel_of  # noqa: E402

from graphwright import ir, models  # noqa: E402
from graphwright.codegen.triton import Kernel, NotFusible, emit  # noqa: E402
from graphwright.codegen.triton.groups import find_groups  # noqa: E402
from graphwright.codegen.triton.line_breaks import with_breaks  # noqa: E402
from graphwright.codegen.triton.targets import TARGETS  # noqa: E402
from graphwright.codegen.triton.tune import Tuner  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def ruff(*arguments: str) -> str:
    """What ruff has to say, by the configuration of this repository."""
    command = [sys.executable, "-m", "ruff", *arguments, "--config", str(ROOT / "pyproject.toml"), "--no-cache", "--quiet"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout


def assert_clean(kernels: list[Kernel], folder: Path) -> None:
    for kernel in kernels:
        (folder / kernel.file_name).write_text(kernel.source)
    assert ruff("format", "--diff", str(folder)) == ""
    # Lines of the program, which the docstring has, may be long.
    assert ruff("check", "--extend-ignore", "E501", str(folder)) == ""
    code = [line for kernel in kernels for line in kernel.source.split('"""', 2)[2].splitlines()]
    assert [line for line in code if len(line) > 140] == []


def families() -> Iterator[Kernel]:
    """Those that `bench/gpu.py` times, for every target that has them."""
    import gpu

    for function, args in gpu.families(lambda *shape: torch.empty(shape, dtype=torch.bfloat16)).values():
        program = capture(function, args)
        for target in TARGETS.values():
            try:
                yield kernel_of(program, target)
            except NotFusible:  # some GPUs multiply no 8-bit floats
                assert not target.copies_blocks and any(x.dtype == torch.float8_e4m3fn for x in args)


def low_rank_layers() -> Iterator[Kernel]:
    import gpu_low_rank

    for layer in gpu_low_rank.LAYERS.values():
        args = gpu_low_rank.empty_inputs(layer)
        for target in TARGETS.values():
            yield from gpu_low_rank.kernels_of(layer, args, target)


def networks() -> Iterator[Kernel]:
    """Groups of the zoo's networks, by blocks that the hardware copies and by addresses."""
    for name in ("video_unet", "dit", "decoder", "vit"):
        module, args, kwargs = models.load(name, "tiny")
        half = [x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
        halves = {key: x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for key, x in kwargs.items()}
        for program in (ir.capture(module, args, kwargs), ir.capture(module.bfloat16(), tuple(half), halves)):
            for group in find_groups(program.main.graph):
                for target in (TARGETS["sm_90"], TARGETS["sm_80"]):
                    yield emit(group.plan, program.symbols, target=target)


def tiles() -> Iterator[Kernel]:
    """Every tile that a tuner tries: of rows in one block and in loops, of few columns, and of a product."""
    cases = [
        (lambda x, w: F.layer_norm(x, (16384,), w), [torch.empty(64, 16384), torch.empty(16384)]),
        (lambda x: (torch.softmax(x, -1), x.amax(-1)), [torch.empty(64, 1)]),
        (lambda x, w: F.relu(x @ w), [torch.empty(64, 96, dtype=torch.float16), torch.empty(96, 64, dtype=torch.float16)]),
    ]
    for function, args in cases:
        program = capture(function, args)
        plan = kernel_of(program).plan
        for tile in Tuner(torch.device("cpu"), TARGETS["sm_90"], None)._candidates(plan):
            yield emit(plan, program.symbols, tile=tile, target=TARGETS["sm_90"])


def odd_cases() -> Iterator[Kernel]:
    """Products of symbols, arguments that are text, results of several kinds, many inputs with long names."""
    rows, columns = torch.export.Dim("rows", min=2), torch.export.Dim("columns", min=2)
    scaled = capture(lambda x, y: (F.gelu(x * y, approximate="tanh"), x > y), [torch.randn(4, 63)] * 2, ({0: rows, 1: columns},) * 2)
    yield kernel_of(scaled)
    pieces = [torch.empty(3, 5 + n, 7).transpose(0, 2) for n in range(8)]
    yield kernel_of(capture(lambda *x: torch.cat(x, 1).relu() * 2, pieces))
    yield kernel_of(capture(lambda x, m: torch.where(m, x.transpose(1, 2).flip(-1), -x), [torch.empty(2, 7, 7), torch.empty(7, 7) > 0]))


@pytest.mark.parametrize("cases", [families, low_rank_layers, networks, tiles, odd_cases], ids=lambda cases: cases.__name__)
def test_files_are_formatted_and_define_what_they_read(cases, tmp_path):
    assert_clean([*cases()], tmp_path)


STATEMENTS = {
    "a call that fits one line below": f"y = call({', '.join(['argument'] * 13)})",
    "a call of many arguments": f"y = call({', '.join(f'argument_{n}={n}' for n in range(20))})",
    "a call behind an index": f"kernel[(triton.cdiv(n, BLOCK),)]({', '.join(['argument'] * 13)})",
    "a cast that follows": f"y = tl.load({' + '.join(['argument'] * 11)}).to(tl.float32)",
    "a cast that follows what is longer than a line": f"y = tl.load({' + '.join(['argument'] * 12)}, mask=m).to(tl.float32)",
    "a sum that is longer than a line": f"y = tl.load({' + '.join(['argument_of_it * 2'] * 9)} - 3, mask=m)",
    "a tuple": f"return ({', '.join(['argument'] * 20)})",
    "a parameter list": f"def run({', '.join(f'argument_{n}' for n in range(20))}):\n        pass",
    "a bracket in a text": f'y = call(")", {", ".join(["argument"] * 20)})',
}


@pytest.mark.parametrize("name", STATEMENTS)
def test_long_statements_are_broken_as_the_formatter_breaks_them(name, tmp_path):
    text = f"def function():\n    {STATEMENTS[name]}\n"
    assert any(len(line) > 140 for line in text.splitlines())
    (tmp_path / "broken.py").write_text(with_breaks(text))
    assert ruff("format", "--diff", str(tmp_path)) == ""


def test_what_needs_no_break_stays():
    text = f'"""{"word " * 40}"""\n# {"word " * 40}\ny = call(1)\n'
    assert with_breaks(text) == text
