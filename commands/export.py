"""export."""

import argparse

from ..compiler import compile as compile_model
from ..ir import Program
from .programs import parsed
from .result import Mistake, Result, progress
from .sources import load


def export(options: argparse.Namespace) -> Result:
    passes = parsed(options.passes)
    model = load(options.model, options.trusted)
    if isinstance(model.model, Program) and options.model.endswith(".txt"):
        raise Mistake(f"{options.model} has no weights: export takes a .gw, .onnx or .pt2 file, a zoo name or module:factory")
    args, kwargs = model.example or (None, None)
    with progress() as tell:
        compiled = compile_model(
            model.model, passes, example_inputs=args, example_kwargs=kwargs, backend="aten", cleanups=not options.no_cleanups,
            trusted=options.trusted, progress=tell,
        )  # fmt: skip
    written = compiled.export_onnx(
        options.output, dialect=options.dialect, regions=options.regions, opset=options.opset, external_data=options.external_data
    )
    verdict = None if written.verdict is None else {"kind": written.verdict.kind, "reason": written.verdict.reason}
    return Result(
        f"{written}\n", {"pipeline": compiled.program.pipeline, "files": [str(each) for each in written.files], "verdict": verdict}
    )
