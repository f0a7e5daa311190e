"""Damaged ONNX files: each is read or refused with one of our errors, within 5 seconds and in limited memory (specs/trust.md, section 5).

`ours` are files that ended so; the first others are printed with the seed that makes them again.
"""

import tempfile
from collections import Counter
from pathlib import Path

from harness import Bench

from graphwright.tests.onnx_cases import cases, model_of
from graphwright.tests.onnx_mutations import mutated, outcomes

SECONDS = 5.0
ERRORS = {"read", "ArtifactError", "CaptureError", "InputError"}


def main() -> None:
    bench = Bench("fuzz_onnx", peers={})
    sources = [model_of(case).SerializeToString() for case in cases()[::9]]
    counts: Counter[str] = Counter()
    count = 200 if bench.quick else 10_000
    with tempfile.TemporaryDirectory() as name:
        for start in range(0, count, 100):
            files = []
            for seed in range(start, start + 100):
                files.append(Path(name) / f"{seed}.onnx")
                files[-1].write_bytes(mutated(sources[seed % len(sources)], sources, seed))
            for seed, (said, seconds) in enumerate(outcomes(files, SECONDS), start):
                good = said in ERRORS and seconds <= SECONDS
                counts[said if good else "bad"] += 1
                if not good and counts["bad"] <= 20:
                    bench.note(f"seed {seed}: {said} after {seconds:.1f} s")
            for file in files:
                file.unlink()
    for kind in sorted({*ERRORS, "bad"}):
        bench.row(f"{count} damaged files", kind, "1", counts[kind], {})
    bench.finish()


if __name__ == "__main__":
    main()
