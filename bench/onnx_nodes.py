"""ONNX's own test of each operator: how many of those that onnxruntime passes are read onto ATen and give what the standard says.

`right` are programs of ATen alone, `fixed` such of models whose operands that shapes depend on (axes, sizes) were given as constants,
`opaque` hold an operator that onnxruntime runs, `refused` raise a typed error. None may be `wrong` or `crashed`.
"""

from collections import Counter

from harness import Bench

from graphwright.tests.onnx_cases import Verdict, cases, judge, passes_onnxruntime


def main() -> None:
    bench = Bench("onnx_nodes", peers={"onnxruntime": "onnxruntime"})
    counts: Counter[Verdict] = Counter()
    for case in cases()[:: 16 if bench.quick else 1]:
        if not passes_onnxruntime(case):
            continue
        verdict, why = judge(case)
        counts[verdict] += 1
        if verdict not in (Verdict.RIGHT, Verdict.FIXED):
            bench.note(f"{case.name}: {verdict}: {why}" if why else f"{case.name}: {verdict}")
    passed = counts.total()
    for verdict in Verdict:
        bench.row("node tests", verdict, "1", counts[verdict], {"onnxruntime": passed})
    bench.row("node tests", "on ATen", "1", counts[Verdict.RIGHT] + counts[Verdict.FIXED], {"onnxruntime": passed})
    bench.finish()


if __name__ == "__main__":
    main()
