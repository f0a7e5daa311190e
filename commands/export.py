"""export."""

import argparse

from .programs import compiled_from
from .result import Result


def export(options: argparse.Namespace) -> Result:
    compiled = compiled_from(options, "export", backend="aten")
    written = compiled.export_onnx(
        options.output, dialect=options.dialect, regions=options.regions, opset=options.opset, external_data=options.external_data
    )
    verdict = None if written.verdict is None else {"kind": written.verdict.kind, "reason": written.verdict.reason}
    return Result(
        f"{written}\n", {"pipeline": compiled.program.pipeline, "files": [str(each) for each in written.files], "verdict": verdict}
    )
